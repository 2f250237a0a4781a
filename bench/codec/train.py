"""Makes kvortex/codec/ecsq_tables.bin: how often which integers occur in K and V of the two models, at every level.

    PYTHONPATH=tests python -m bench.codec.train FILE      in the environment of `make bench-codec`; ten minutes

Of each document four blocks of 16 tokens, spread over the prefix, are quantised as kvortex/codec/ECSQ.md says. Each
group of channels counts for its class. To what was counted comes what a Gaussian of the class's size has, or for heavy
tails a Laplacian: all there is to say about classes that these models do not have. The tables are symmetric.
"""

import math
import sys
from pathlib import Path

import ecsq_reference as ecsq
import numpy as np

CLASSES, SLOTS, LARGEST, ESCAPE_SLOTS = 48, 4096, 126, 2
PRIOR, ENOUGH, FEW_PRIOR = 4_000, 20_000, 20_000  # integers


def prefixes():
    """Yield K and V, uint16 ``[2, layers, heads, tokens, dim]``, of every document."""
    import torch
    from transformers import DynamicCache

    from bench.codec.documents import MODELS, documents_of, load

    for name in MODELS:
        tokenizer, model = load(name)
        for text in documents_of(name, tokenizer, count=2, prefix=1024, scored=320):
            cache = DynamicCache()
            with torch.inference_mode():
                model(text.ids[None, :1024], past_key_values=cache, logits_to_keep=1)
            kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers], 1).bfloat16()
            yield kv.view(torch.int16).numpy().view(np.uint16)


def count(kv, counts):
    """Add the integers of one prefix to ``counts[class, symbol]``."""
    for first in np.linspace(0, kv.shape[3] // 16 - 1, 4).astype(int) * 16:
        for role, layers in zip("kv", kv[..., first : first + 16, :], strict=True):
            for words in layers.swapaxes(1, 2):
                for level in ecsq.STEPS:
                    _, classes, integers = ecsq.encode_plane(role, words, False, level)
                    integers = np.array(integers)
                    symbols = np.where(np.abs(integers) > LARGEST, ecsq.ESCAPE, integers + LARGEST)
                    np.add.at(counts, (classes, symbols), 1)


def prior(number):
    """How probable each integer is, if nothing else is known of the class."""
    size, is_heavy = divmod(number, 2)
    rms, ends = 2 ** ((size - 7) / 3), np.arange(-LARGEST, LARGEST + 2) - 0.5
    if is_heavy:
        half = 0.5 * np.exp(-np.abs(ends) * math.sqrt(2) / rms)
        return np.diff(np.where(ends < 0, half, 1 - half))
    return np.diff([0.5 * (1 + math.erf(end / rms / math.sqrt(2))) for end in ends])


def frequencies(counts):
    """Share the slots out: one at least for each integer up to the rarest that is worth half a slot."""
    shares = counts[: 2 * LARGEST + 1] + counts[2 * LARGEST :: -1]
    shares = shares / shares.sum()
    reach = LARGEST - np.flatnonzero(shares * SLOTS > 0.5)[0]
    chosen = np.arange(LARGEST - reach, LARGEST + reach + 1)
    found = np.zeros(256)
    found[chosen] = np.maximum(np.rint(shares[chosen] * (SLOTS - ESCAPE_SLOTS)), 1)
    found[ecsq.ESCAPE] = ESCAPE_SLOTS
    while rest := int(SLOTS - found.sum()):  # to or from whichever gains most or loses least by it
        step = np.sign(rest)
        after = np.maximum(found[chosen] + step, 1e-9)
        found[chosen[np.argmax(shares[chosen] * np.log2(after / found[chosen]))]] += step
    return found.astype("<u2")


def main(target):
    counts = np.zeros((CLASSES, 256))
    for number, kv in enumerate(prefixes()):
        count(kv, counts)
        print(f"document {number + 1}", file=sys.stderr)
    rows = []
    for number, row in enumerate(counts):
        weight = PRIOR if row.sum() > ENOUGH else FEW_PRIOR
        row[: 2 * LARGEST + 1] += weight * prior(number)
        rows.append(frequencies(row))
    Path(target).write_bytes(np.stack(rows).tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
