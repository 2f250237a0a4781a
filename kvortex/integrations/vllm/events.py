"""KV events: which blocks came into host memory and which left it, for routers of requests."""

import numpy as np
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1 import kv_cache_interface
from vllm.v1.core import kv_cache_utils

from kvortex.integrations.vllm.keys import KEY_BYTES

HASH = f"V{KEY_BYTES}"


class BlockEvents:
    """Collect the events of blocks in host memory, which vLLM publishes with those of its own blocks.

    Parameters
    ----------
    groups : tuple of Group
    kv_cache_config : KVCacheConfig
        The scheduler's.
    num_slots : int
    num_device_blocks : int, default 0
        Needed only if blocks are saved when vLLM gives them to others: what they hold is noted before.

    Notes
    -----
    A router knows a block by its tokens and what is before them. When vLLM empties the cache of the device, the
    router forgets all blocks, those in host memory too, and they are announced again with their tokens. So the tokens
    of a slot are kept as long as its block is there: some hundred bytes beside a block's megabytes.
    """

    def __init__(self, groups, kv_cache_config, num_slots, num_device_blocks=0):
        all_groups = kv_cache_config.kv_cache_groups
        self.kinds = {group.index: kind_of(all_groups[group.index].kv_cache_spec) for group in groups}
        most_tokens = max(group.block_tokens for group in groups)
        self.num_slots = num_slots
        self.blocks = np.zeros(  # a row for each slot, set when it is reserved; then one for each device block
            num_slots + num_device_blocks,
            dtype=[
                ("hash", HASH),
                ("parent", HASH),  # the hash of the block before, zeros for the first one
                ("number", np.uint32),  # of the block in its request
                ("source", np.uint32),  # place in `sources`
                ("tokens", np.int32, most_tokens),
            ],
        )
        self.hash_bytes = KEY_BYTES  # vLLM's have 32, or 16 with xxhash
        self.sources = []  # (group, id of the LoRA, its name)
        self.places = {}  # source -> its place in `sources`
        self.extra_keys = {}  # slot -> what vLLM hashes beside tokens, where there is any
        self.is_told = np.zeros(num_slots, dtype=bool)
        self.events = []
        self.pool = self.device_cache = None

    def watch(self, pool):
        """Watch vLLM's BlockPool for a reset. Before 0.26 vLLM passes none: then nothing is announced again."""
        self.pool, self.device_cache = pool, pool.cached_block_hash_to_block

    def reserved(self, request, group, numbers, slots):
        """Note what these slots are reserved for: blocks of a request in a group, as arrays with ascending numbers."""
        if not len(numbers):
            return
        first, end, step, num_tokens = int(numbers[0]), int(numbers[-1]) + 1, group.hashes_per_block, group.block_tokens
        lora = request.lora_request
        source = (group, lora.adapter_id, lora.name) if lora else (group, None, None)
        place = self.places.setdefault(source, len(self.sources))
        if place == len(self.sources):
            self.sources.append(source)
        hashes = request.block_hashes[(first + 1) * step - 1 : end * step : step]
        parents = [request.block_hashes[first * step - 1] if first else b"", *hashes[:-1]]
        self.hash_bytes = len(hashes[0])
        tokens = np.array(request.all_token_ids[first * num_tokens : end * num_tokens], dtype=np.int32)
        rows = numbers - first
        blocks = self.blocks
        blocks["hash"][slots], blocks["parent"][slots] = as_hashes(hashes)[rows], as_hashes(parents)[rows]
        blocks["number"][slots], blocks["source"][slots] = numbers, place
        blocks["tokens"][slots, :num_tokens] = tokens.reshape(-1, num_tokens)[rows]
        at = 0
        for number, slot in zip(numbers.tolist(), slots.tolist(), strict=True):
            begin = number * num_tokens
            keys, at = kv_cache_utils.generate_block_hash_extra_keys(request, begin, begin + num_tokens, at)
            if keys:
                self.extra_keys[slot] = keys
            else:
                self.extra_keys.pop(slot, None)

    def row_of(self, block_ids):
        """The rows of `blocks` for these device blocks."""
        return self.num_slots + block_ids

    def move(self, rows, slots):
        """Copy the notes of these rows to these slots, into which their blocks are saved."""
        self.blocks[slots] = self.blocks[rows]
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            self.extra_keys.pop(slot, None)
            if row in self.extra_keys:
                self.extra_keys[slot] = self.extra_keys.pop(row)

    def store(self, slots):
        """Announce the blocks in these slots, which can be loaded from now on; those of a request in their order."""
        self.events += self.runs(slots)
        self.is_told[slots] = True

    def came_back(self, request, group, first, slots):
        """Announce those blocks in these slots that are not announced yet; the first one has the number `first`."""
        new = np.flatnonzero(~self.is_told[slots])
        if new.size:
            self.reserved(request, group, first + new, slots[new])
            self.store(slots[new])

    def remove(self, slots):
        """Announce that the blocks in these slots are gone, as far as they were ever announced."""
        slots, hashes = slots[self.is_told[slots]], {}
        for source, name in zip(self.blocks["source"][slots].tolist(), self.names("hash", slots), strict=True):
            hashes.setdefault(self.sources[source][0].index, []).append(name)
        for index, names in hashes.items():
            self.events.append(event(BlockRemoved, block_hashes=names, group_idx=index))
        self.is_told[slots] = False

    def take(self):
        """The events since the last call, in their order.

        vLLM takes its own events of the step first, and then these.
        """
        if self.pool is not None and self.device_cache is not self.pool.cached_block_hash_to_block:
            self.device_cache = self.pool.cached_block_hash_to_block  # it was emptied, and vLLM announced that
            told = np.flatnonzero(self.is_told)
            self.events = self.runs(told[np.argsort(self.blocks["number"][told], kind="stable")])
        events, self.events = self.events, []
        return events

    def runs(self, slots):
        """One event for each run of blocks, in which each block continues the one before it."""
        rows = self.blocks[slots]
        runs, ends = [], {}
        keys = zip(rows["source"].tolist(), rows["parent"].tolist(), rows["hash"].tolist(), strict=True)
        for at, (source, parent, name) in enumerate(keys):
            run = ends.pop((source, parent), None)
            if run is None:
                runs.append(run := [])
            run.append(at)
            ends[source, name] = run
        return [self.stored(slots[run]) for run in runs]

    def stored(self, slots):
        """The event of a run."""
        first = self.blocks[slots[0]]
        group, lora_id, lora_name = self.sources[first["source"]]
        return event(
            BlockStored,
            block_hashes=self.names("hash", slots),
            parent_block_hash=self.names("parent", slots[:1])[0] if first["number"] else None,
            token_ids=self.blocks["tokens"][slots, : group.block_tokens].ravel().tolist(),
            block_size=group.block_tokens,
            lora_id=lora_id,
            lora_name=lora_name,
            extra_keys=as_event_keys([self.extra_keys.get(slot) for slot in slots.tolist()]),
            group_idx=group.index,
            **self.kinds[group.index],
        )

    def names(self, field, slots):
        """Hashes in the form in which vLLM publishes them."""
        convert, size = kv_cache_utils.maybe_convert_block_hash, self.hash_bytes
        return [convert(name[:size]) for name in self.blocks[field][slots].tolist()]


def event(kind, **fields):
    """An event of vLLM about host memory, with those of the fields that this version of vLLM knows."""
    fields |= {"medium": "CPU", "locality": "LOCAL"}
    return kind(**{name: value for name, value in fields.items() if name in kind.__struct_fields__})


def as_hashes(names):
    return np.frombuffer(b"".join(name.ljust(KEY_BYTES, b"\0") for name in names), dtype=HASH)


def as_event_keys(extra_keys):
    """The extra keys as vLLM publishes them: from 0.32 on without the tags that it only hashes."""
    convert = getattr(kv_cache_utils, "to_event_extra_keys", list)
    return convert(extra_keys)


def kind_of(spec):
    """The fields of an event that describe its group, from vLLM 0.26 on."""
    if not hasattr(kv_cache_interface, "get_kv_cache_spec_kind"):
        return {}
    return {
        "kv_cache_spec_kind": kv_cache_interface.get_kv_cache_spec_kind(spec).value,
        "kv_cache_spec_sliding_window": kv_cache_interface.get_kv_cache_spec_sliding_window(spec),
    }
