"""What a codec costs two small models: perplexity, KL of the next token, agreement, and errors of K and V.

    make bench-codec                                       both models, in an environment of its own
    python -m bench.codec --quick                          one model, few tokens: that it works
    python -m bench.codec --json codec.json --plot codec.png
    python -m bench.codec --from-json codec.json           prints the tables of an earlier run

Of each document a prefix is computed, its K and V are rounded to bfloat16 and put into a paged cache; an engine on the
host device saves its blocks, the cache is overwritten, and the engine loads them into other blocks. From there the
model goes on, in float32, and each next token is compared with what it predicts from the K and V that nobody moved.
Models and texts are those that packages of the index ship: bench/codec/documents.py names them. About 10 minutes of
two idle cores.
"""

import argparse
import datetime
import json
import platform
import re
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path

from bench.codec import table

CODECS = ("exact", "q8", "k8v5", "k6v4", "q4")


def study(name, *, documents, prefix, scored):
    """The rows of one model."""
    import torch
    from transformers import DynamicCache

    from bench.codec.documents import KINDS, documents_of, load
    from bench.codec.ways import all_ways

    def say(text):
        print(f"{name}: {text}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

    def go_on(kv, ids):
        """Logarithms of the probabilities that the model gives to the token after each of `ids`."""
        cache = DynamicCache()
        for layer, (k, v) in enumerate(kv.transpose(0, 1).float()):
            cache.update(k[None], v[None], layer)
        positions = torch.arange(prefix, prefix + scored)[None]
        return model(ids[None], past_key_values=cache, position_ids=positions).logits[0].log_softmax(-1)

    begun = time.monotonic()
    tokenizer, model = load(name)
    texts = documents_of(name, tokenizer, count=documents, prefix=prefix, scored=scored)
    config = model.config
    shape = 2, config.num_hidden_layers, config.num_key_value_heads, prefix, config.head_dim
    ways = all_ways(CODECS, shape, prefix)
    scores = {way.name: {kind: [] for kind in KINDS} for way in ways}
    errors = {way.name: [] for way in ways}
    losses = {kind: [] for kind in KINDS}
    say(f"{len(texts)} documents")
    for number, text in enumerate(texts):
        before, after, targets = text.ids[:prefix], text.ids[prefix:-1], text.ids[prefix + 1 :]
        cache = DynamicCache()
        model(before[None], past_key_values=cache, logits_to_keep=1)
        kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers], 1).bfloat16()
        reference = go_on(kv, after)
        probabilities = reference.exp()
        losses[text.kind].append(-reference[range(scored), targets].mean().item())
        for way in ways:
            restored = way(kv, before)
            if way.name == "exact" and not torch.equal(restored, kv):
                sys.exit("a block came back with other bytes than were saved")
            found = table.score(reference, probabilities, go_on(restored, after), targets)
            scores[way.name][text.kind].append(found)
            changes, whole = [(part.double() ** 2).sum((1, 2, 3, 4)).tolist() for part in (restored.double() - kv, kv)]
            errors[way.name].append([changes[0], whole[0], changes[1], whole[1]])
        say(f"document {number + 1} of {len(texts)}, {text.kind}")
    mean = {kind: sum(found) / len(found) for kind, found in losses.items()}
    return {
        "model": name,
        "num_layers": shape[1],
        "num_heads": shape[2],
        "head_dim": shape[4],
        "prefix_tokens": prefix,
        "perplexity": {kind: float(torch.tensor(loss).exp()) for kind, loss in mean.items()},
        "rows": [table.row_of(way.name, way.bits, scores[way.name], errors[way.name]) for way in ways],
    }


def run(options):
    """Yield the result whenever another model is done."""
    import torch

    from bench.codec.documents import MODELS

    torch.set_num_threads(options.threads)
    few = {"documents": 1, "prefix": 256, "scored": 16}
    usual = {"documents": options.documents, "prefix": 1024, "scored": options.tokens}
    versions = [f"{package} {metadata.version(package)}" for package in ("torch", "transformers", "gguf")]
    result = {
        "machine": f"{processor()}, {options.threads} threads",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "bench.codec", *sys.argv[1:]]),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "models": [],
    }
    for name in MODELS[: 1 if options.quick else None]:
        with torch.inference_mode():
            result["models"].append(study(name, **(few if options.quick else usual)))
        yield result


def processor():
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    return names[0] if names else platform.machine()


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.codec", description=__doc__, formatter_class=formatter)
    parser.add_argument("--documents", type=int, choices=range(1, 5), default=4, help="of each kind (%(default)s)")
    parser.add_argument("--tokens", type=int, default=160, help="scored in each document (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one model, few tokens: only to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, each kind of document apart")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw KL against bits: .png, .svg, .pdf")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="print an earlier result; measures nothing")
    options = parser.parse_args()
    try:
        for result in [earlier(options.from_json)] if options.from_json else run(options):
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            if options.plot:
                table.draw(result, options.plot)
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: `make bench-codec` makes an environment that has what this needs")
    table.show(result)


def earlier(path):
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
