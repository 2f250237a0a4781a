#!/usr/bin/env python3
"""One kind of model in real engines on the CPU: is restored KV the KV that was computed, in every group?

    python tests/vllm/engine_kinds.py --kind gemma3 --mode none native custom

The modes run one after the other in one process. It prints one line of JSON, the last of stdout. An engine without
connector comes first in any case: what it yields is the truth. The controls, which spoil what is restored, and the
stress are run in the last of the modes.
"""

import argparse
import functools
import gc
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import engine_run  # noqa: E402
import engine_scenarios  # noqa: E402
from kinds import KINDS, patch_vllm, write_config  # noqa: E402

NUM_TOKENS = 16
MAX_MODEL_LEN = 704
DEVICE_TOKENS = 8192  # of each group: nothing is evicted
FEW_TOKENS = {"SlidingWindowSpec": 384, "ChunkedLocalAttentionSpec": 384, "MambaSpec": 128}  # 896 of others: much is
HOST_SHARE = 0.6  # of those device blocks, in the host's pool: it evicts too
CHUNK_TOKENS = 192  # a step: longer than every unit, shorter than prompts


class KindEngine(engine_run.Engine):
    """An engine that counts what connectors bring, knows the bytes of every block, and can spoil what arrives."""

    def __init__(self, kind, mode, model, *, num_blocks, host_gib=0.25, late_us=0, mutant="", disk=None):
        self.kind, self.mode = kind, mode
        options = {"load_format": "dummy", **kind.options}
        command = ["stress", "--mode", mode, "--model", str(model), "--batched", str(CHUNK_TOKENS), "--verify"]
        command += ["--device-blocks", str(num_blocks), "--host-gib", str(host_gib), "--options", json.dumps(options)]
        command += [
            "--concurrency",
            "12",
            "--requests",
            "32",
            "--prefixes",
            "4",
            "--scale",
            "0.2",
            "--distinct",
            "10",
            "--tokens",
        ]
        command += ["--mutant", mutant] if mutant else []
        if disk is not None:
            extra = {"disk_path": str(disk), "disk_bytes": "1GiB", "write_bytes_per_s": 0, "prefill_tokens_per_s": 0}
            command += ["--extra", json.dumps({**extra, "promote_timeout_ms": 60_000})]
        self.args = engine_run.arguments(command)
        super().__init__(self.args, max_model_len=MAX_MODEL_LEN, max_num_seqs=12)
        runner = self.core.model_executor.driver_worker.worker.model_runner
        self.config, self.manager = runner.kv_cache_config, self.core.scheduler.kv_cache_manager
        self.memory = bytes_of(runner.kv_caches)
        assert self.memory.numel() == self.config.kv_cache_tensors[0].size
        self.external, self.spoil = 0, None
        if self.offloads:
            self.count_external()
            self.spoil_arrivals()
        if late_us:
            from kvortex.driver import _host

            _host.set_delay_us(late_us // 2, late_us, 0)

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()
        self.folder.cleanup()
        for name in ("llm", "core", "manager", "memory", "scheduler_half", "worker_half"):
            setattr(self, name, None)
        gc.collect()

    def groups(self):
        return [type(group.kv_cache_spec).__name__ for group in self.config.kv_cache_groups]

    def block_bytes(self):
        return self.config.kv_cache_tensors[0].size // self.config.num_blocks

    def count_external(self):
        connector = self.core.scheduler.connector
        original = connector.update_state_after_alloc

        def count(request, blocks, num_external_tokens, *args, **kwargs):
            self.external += num_external_tokens
            return original(request, blocks, num_external_tokens, *args, **kwargs)

        connector.update_state_after_alloc = count

    def spoil_arrivals(self):
        """Call `spoil`, where it is set, between the arrival of a request's blocks and the step that reads them, with
        the blocks of each group.
        """
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector = get_kv_transfer_group()
        original = connector.get_finished

        def get_finished(*args, **kwargs):
            saved, loaded = original(*args, **kwargs)
            for request in loaded or () if self.spoil is not None else ():
                for group, ids in enumerate(self.manager.get_block_ids(request)):
                    self.spoil(group, [block for block in ids if block])  # 0 is vLLM's null block
            return saved, loaded

        connector.get_finished = get_finished

    def zero(self, group, ids):
        for block in ids:
            for page in self.pages(group, block):
                page.zero_()

    def swap(self, group, ids):
        """The first two change places."""
        for one, other in zip(*(self.pages(group, block) for block in ids[:2]), strict=True) if len(ids) > 1 else ():
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    def pages(self, group, block):
        """The bytes of one block in each layer of a group, without padding."""
        group = self.config.kv_cache_groups[group]
        for tensor in self.config.kv_cache_tensors:
            for index, layer in enumerate(tensor.layers):
                if layer in group.layer_names:
                    spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(layer, group.kv_cache_spec)
                    first = tensor.offset + index * tensor.layer_stride + block * tensor.block_stride
                    yield self.memory[first : first + used_bytes(spec)]

    def cached_blocks(self):
        """Bytes of every block in vLLM's prefix cache, by its hash and group."""
        from vllm.v1.core.kv_cache_utils import get_group_id

        found = {}
        for key, block in self.manager.block_pool.cached_block_hash_to_block._cache.items():
            block = next(iter(block.values())) if isinstance(block, dict) else block
            group = get_group_id(key)
            found[key] = group, [page.clone() for page in self.pages(group, block.block_id)]
        return found

    def one_by_one(self, prompts, *, forget=False):
        """Each alone; tokens, those that vLLM did not compute, and those that the connector brought."""
        result = {"tokens": [], "cached": [], "external": []}
        for prompt in prompts:
            if forget:
                self.forget()
            before = self.external
            for name, value in self.generate([prompt], NUM_TOKENS).items():
                result[name] += value
            result["external"].append(self.external - before)
        return result


def bytes_of(kv_caches):
    """All of the KV cache as bytes: every tensor is a view of one allocation."""
    import torch

    first = kv_caches[0]
    while isinstance(first, list | tuple):
        first = first[0]
    return torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage())


def used_bytes(spec):
    import dataclasses

    padded = getattr(spec, "page_size_padded", None) is not None
    return (dataclasses.replace(spec, page_size_padded=None) if padded else spec).page_size_bytes


# ---- prompts ---------------------------------------------------------------------------------------------------------


def tokens(name, count):
    draw = random.Random(name)
    return [draw.randrange(3, 1024) for _ in range(count)]


def whole_prompts(kind):
    """One token behind a boundary, which is no boundary of a chunk: whatever is computed anew after a hit depends on
    what was restored of every group.
    """
    return [
        tokens(name, -(-least // kind.unit) * kind.unit + 1) for name, least in (("a", 400), ("b", 300), ("c", 450))
    ]


def partial_prompts(kind):
    """Prompts that begin as those of `whole_prompts` do: longer ones, shorter ones, and some that go another way."""
    first, second, third = whole_prompts(kind)
    return [
        first + tokens("d", 70),
        first[:-1],
        first[: len(first) - 40],
        second[:200] + tokens("e", 90),
        second + third[:20],
        third[: 2 * kind.unit + 5],
        third[: len(third) // 2] + tokens("f", 200),
    ]


def branches(kind):
    """Prompts that part at one place: vLLM notices it at the second, and keeps what a window or a state has there."""
    stem = tokens("stem", 2 * kind.unit + 150)
    return [stem + tokens(name, 90) for name in ("h", "i", "j")]


# ---- what is run -----------------------------------------------------------------------------------------------------


def without_connector(engine):
    whole = whole_prompts(engine.kind)
    result = {"cold": engine.one_by_one(whole), "warm": engine.one_by_one(whole)}
    engine.memory.zero_()
    result["zeroed"] = engine.one_by_one(whole)
    engine.forget()
    result |= parts(engine)
    result["stress"] = engine_scenarios.stress(engine, argparse.Namespace(**{**vars(engine.args), "abort_rate": 0.0}))
    return result


def with_connector(engine):
    whole = whole_prompts(engine.kind)
    result = {"cold": engine.one_by_one(whole)}
    computed = engine.cached_blocks()
    engine.forget()
    result["back"] = engine.one_by_one(whole)
    result["bytes"] = compare(engine, computed, engine.cached_blocks())
    return result | parts(engine)


def over_a_disk(make_engine):
    """Prompts of one engine, and the same of the next one over the same disk, whose pool is empty."""
    result = {}
    for name in ("cold", "back"):
        engine = make_engine()
        assert engine.worker_half.tier.adoption.wait(60_000)
        result[name] = engine.one_by_one(whole_prompts(engine.kind))
        engine.settle()
        result[name + "_blocks"] = engine.counters()
        engine.close()
    return result


def parts(engine):
    """Hits on a part of a prompt, each of them after the device has forgotten all."""
    result = {"partial": engine.one_by_one(partial_prompts(engine.kind), forget=True)}
    engine.forget()
    *before, last = branches(engine.kind)
    result["before_branch"] = engine.one_by_one(before)
    return result | {"branch": engine.one_by_one([last], forget=True)}


def controls(engine):
    """What comes of zeros in place of what was restored, in all groups and in one after the other; and what the
    comparison of bytes says of blocks that changed places.
    """
    whole, result = whole_prompts(engine.kind), {}

    def spoiled(spoil):
        engine.forget(host=True)  # what a spoiled request saved is wrong
        engine.one_by_one(whole)
        computed = engine.cached_blocks()
        engine.forget()
        engine.spoil = spoil
        run = engine.one_by_one(whole)
        engine.spoil = None
        return run, compare(engine, computed, engine.cached_blocks())

    result["all"], _ = spoiled(engine.zero)
    for index in range(len(engine.config.kv_cache_groups)):
        result[index], _ = spoiled(lambda group, ids, index=index: engine.zero(group, ids if group == index else []))
    _, swapped = spoiled(engine.swap)
    return {"zeroed": result, "swapped": swapped}


def compare(engine, computed, restored):
    """Blocks that vLLM's prefix cache held both times, and those whose bytes differ, by group."""
    import torch

    same, different = ([0] * len(engine.config.kv_cache_groups) for _ in range(2))
    for key in computed.keys() & restored.keys():
        (group, one), (_, other) = computed[key], restored[key]
        (same if all(map(torch.equal, one, other)) else different)[group] += 1
    return {"same": same, "different": different}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", required=True, choices=KINDS)
    parser.add_argument("--mode", nargs="+", default=["none"], choices=["none", "native", "disk", "custom"])
    parser.add_argument("--mutant", default="", help="a fault to plant for the stress, see faults.py")
    args = parser.parse_args()
    modes = ["none", *(mode for mode in args.mode if mode != "none")]
    for name, value in engine_run.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    kind = KINDS[args.kind]
    patch_vllm(kind)
    if "native" in args.mode:
        import native_on_cpu  # noqa: F401
    report = {"kind": args.kind, "seconds": {}}
    with tempfile.TemporaryDirectory(prefix="kvortex-kind-") as model:
        write_config(model, kind)
        for mode in modes:
            began = time.monotonic()
            many = 8 + len(kind.groups) * DEVICE_TOKENS // kind.unit
            if mode == "disk":
                with tempfile.TemporaryDirectory(prefix="kvortex-disk-") as disk:
                    make = functools.partial(KindEngine, kind, "custom", model, num_blocks=many, disk=disk)
                    report[mode] = over_a_disk(make)
                continue
            engine = KindEngine(kind, mode, model, num_blocks=many)
            if mode == "none":
                block_bytes, groups = engine.block_bytes(), engine.config.kv_cache_groups
                report |= {"groups": engine.groups(), "block_bytes": block_bytes}
                report["block_tokens"] = [group.kv_cache_spec.block_size for group in groups]
                report[mode] = without_connector(engine)
            else:
                report[mode] = with_connector(engine)
                if mode == modes[-1]:
                    report[mode] |= controls(engine)
                report[mode] |= engine.counters()
            engine.close()
            if mode == modes[-1] != "none" and kind.survives_full_pool:
                num_blocks = 8 + sum(FEW_TOKENS.get(group, 896) // kind.unit + 1 for group in report["groups"])
                host_gib = HOST_SHARE * num_blocks * block_bytes / engine_run.GIB
                options = {"num_blocks": num_blocks, "host_gib": host_gib, "late_us": 20000, "mutant": args.mutant}
                engine = KindEngine(kind, mode, model, **options)
                report[mode]["stress"] = engine_scenarios.stress(engine, engine.args) | engine.counters()
                engine.close()
            report["seconds"][mode] = round(time.monotonic() - began, 1)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
