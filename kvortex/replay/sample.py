"""Makes the bundled sample trace: ``python -m kvortex.replay.sample FILE.jsonl.gz``.

Seeded multi-turn conversations over a few shared system prompts. Each turn's prompt is the whole conversation so far,
so its blocks repeat those of the turn before up to the block that was only partly filled. Nothing in it comes from
real users.
"""

import gzip
import heapq
import itertools
import json
import random
import sys

from kvortex.replay.trace import TOKENS_PER_ID

SEED = 20250711
NUM_CONVERSATIONS = 480
MEAN_ARRIVAL_MS = 1_500
MEAN_TURN_GAP_MS = 60_000
CONTINUE_PROBABILITY = 0.72


def sample_lines(seed=SEED):
    """Return the lines of the trace, without line ends, in order of time."""
    rng = random.Random(seed)
    new_id = itertools.count().__next__
    prompts = [[new_id() for _ in range(rng.randrange(2, 14))] for _ in range(6)]

    turns = []  # heap of (time, conversation, full blocks so far, tokens so far)
    time_ms = 0.0
    for conversation in range(NUM_CONVERSATIONS):
        time_ms += rng.expovariate(1 / MEAN_ARRIVAL_MS)
        prompt = prompts[min(int(rng.expovariate(0.6)), len(prompts) - 1)]  # the first prompts are the popular ones
        document_tokens = rng.randrange(500, 24_000) if rng.random() < 0.5 else 0
        turns.append((time_ms, conversation, list(prompt), len(prompt) * TOKENS_PER_ID + document_tokens))
    heapq.heapify(turns)

    lines = []
    while turns:
        time_ms, conversation, blocks, tokens = heapq.heappop(turns)
        input_length = tokens + rng.randrange(20, 900)
        output_length = rng.randrange(10, 1_200)
        while len(blocks) < input_length // TOKENS_PER_ID:
            blocks.append(new_id())
        partial = [new_id()] if input_length % TOKENS_PER_ID else []
        lines.append(
            json.dumps(
                {
                    "timestamp": int(time_ms),
                    "input_length": input_length,
                    "output_length": output_length,
                    "hash_ids": blocks + partial,
                }
            )
        )
        if rng.random() < CONTINUE_PROBABILITY:
            gap_ms = 3_000 + rng.expovariate(1 / MEAN_TURN_GAP_MS)
            heapq.heappush(turns, (time_ms + gap_ms, conversation, blocks, input_length + output_length))
    return lines


def main(path):
    """Write the trace to `path`, the same bytes every time (for one version of zlib)."""
    with open(path, "wb") as file, gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=file, mtime=0) as out:
        out.write("".join(line + "\n" for line in sample_lines()).encode())


if __name__ == "__main__":
    main(sys.argv[1])
