"""The rules of KV cache groups, each against its own words or against vLLM: what a hit needs, what is worth keeping."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forms import FORMS, STATES
from rig import HAS_TRANSFER_RESULTS, HAS_WORKER_METADATA
from rig_cache import known
from vllm.v1 import kv_cache_interface as interface
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, UniformTypeKVCacheSpecs

from kvortex import BlockIndex, ConfigError
from kvortex.integrations.vllm.connector import groups_to_keep
from kvortex.integrations.vllm.groups import CHUNK, RUN, STATE, WINDOW, Group, align_tokens, groups_of, longest_hit
from kvortex.integrations.vllm.keys import as_bytes, as_keys, digest_of_name
from kvortex.integrations.vllm.layouts import union_of
from kvortex.integrations.vllm.options import ConnectorOptions, PoolShape, bytes_of_block

HIT_CASES, MASK_CASES = 400, 300

# ---- how long a hit is -----------------------------------------------------------------------------------------------


class Case:
    """Groups, a request, and which of its blocks are there."""

    def __init__(self, draw):
        self.hash_tokens = draw.choice([8, 16])
        kinds = draw.choices([RUN, WINDOW, CHUNK, STATE], weights=[4, 4, 2, 2], k=draw.randrange(1, 5))
        kinds.sort(key=lambda kind: kind == RUN)
        self.groups = tuple(self.group(draw, index, kind) for index, kind in enumerate(kinds))
        self.align = align_tokens(self.groups)
        self.num_tokens = draw.choice([draw.randrange(1, 400), self.align * draw.randrange(1, 7)])
        self.request = SimpleNamespace(
            block_hashes=[draw.randbytes(32) for _ in range(self.num_tokens // self.hash_tokens)],
            num_tokens=self.num_tokens,
            lora_request=None,
        )
        self.limit = self.num_tokens - (set(kinds) != {RUN} or draw.random() < 0.5)
        self.first = draw.randrange(self.limit // self.align + 1) * self.align if draw.random() < 0.3 else 0
        lacking = draw.choice([0, 0.02, 0.1, 0.4])
        self.whole = {
            (group.index, block)
            for group in self.groups
            for block in range(self.num_tokens // group.block_tokens)
        }  # fmt: skip
        self.there = {name for name in sorted(self.whole) if draw.random() >= lacking}

    def group(self, draw, index, kind):
        tokens = self.hash_tokens * draw.choice([1, 1, 2, 3])
        reach = {WINDOW: draw.randrange(2, 150), CHUNK: tokens * draw.randrange(1, 8)}.get(kind, 0)
        return Group(
            index=index, kind=kind, block_tokens=tokens, hashes_per_block=tokens // self.hash_tokens,
            reach_tokens=reach, peek_blocks=int(kind != STATE and draw.random() < 0.25),
        )  # fmt: skip

    def keys(self, names):
        """A block is known by the hash that ends where it does, and by its group."""
        keys = []
        for index, block in sorted(names):
            group = next(group for group in self.groups if group.index == index)
            last = (block + 1) * group.block_tokens // self.hash_tokens - 1
            keys.append(as_keys([self.request.block_hashes[last]], digest_of_name(index, None)))
        return np.concatenate(keys) if keys else as_keys([])

    def needs(self, group, length):
        """Blocks that a request needs of a group to go on behind so many tokens, told token by token."""
        tokens = group.block_tokens
        if group.kind == STATE:
            return {length // tokens - 1} if length else set()
        read = {
            RUN: lambda token: True,
            WINDOW: lambda token: token > length - group.reach_tokens,
            CHUNK: lambda token: token // group.reach_tokens == length // group.reach_tokens,
        }[group.kind]
        of_device = range(self.first // tokens)
        seen = {token // tokens for token in range(length) if read(token)} - set(of_device)
        return seen | {-(-length // tokens) + more for more in range(group.peek_blocks)}

    def longest(self, there):
        """By trying all lengths; vLLM finds nothing behind the limit, and may compute the last token of a block."""
        kinds = {group.kind for group in self.groups}
        may_end_inside = (
            self.limit < self.num_tokens and self.num_tokens % self.align == 0 and STATE not in kinds and kinds != {RUN}
        )
        end = self.num_tokens if may_end_inside else self.limit
        lengths = [
            *range(self.first + self.align, self.limit + 1, self.align),
            *([self.limit] if may_end_inside else []),
        ]
        for length in sorted(set(lengths), reverse=True):
            if length > self.first and all(
                (group.index, block) in there and (block + 1) * group.block_tokens <= end
                for group in self.groups
                for block in self.needs(group, length)
            ):
                return length
        return self.first

    def found(self, there, writing=()):
        index = BlockIndex(2048)
        index.add_slots(0, 2048)
        slots, _ = index.reserve(self.keys(there), 4096)
        index.commit(slots)
        return longest_hit(index, self.groups, self.request, self.first, self.limit, set(writing))


def cases(seed, count):
    for number in range(count):
        yield Case(random.Random(f"{seed} {number}"))


def test_a_hit_is_as_long_as_every_group_can_serve(seed):
    hits = 0
    for case in cases(seed, HIT_CASES):
        wanted = case.longest(case.there)
        assert case.found(case.there).length == wanted, vars(case)
        hits += case.first < wanted < case.longest(case.whole)
    assert hits > HIT_CASES // 20  # among them many that are neither all nor nothing


def test_a_hit_grows_only_if_what_it_lacks_is_being_saved(seed):
    for case in cases(seed, HIT_CASES):
        assert not case.found(case.there).is_growing
        lacking = case.whole - case.there
        hit = case.found(case.there, as_bytes(case.keys(lacking)))
        if case.longest(case.whole) > case.longest(case.there):
            assert hit.is_growing, vars(case)
        elif not hit.is_growing:
            assert hit.length == case.longest(case.there)


# ---- what is worth keeping -------------------------------------------------------------------------------------------


def kept(group, *args):
    """The blocks of `Group.worth_keeping`, one by one."""
    return [block for first, end in group.worth_keeping(*args) for block in range(first, end)]


@pytest.mark.skipif(not hasattr(SlidingWindowManager, "reachable_block_mask"), reason="0.15 keeps all blocks")
def test_of_windows_we_keep_what_vllm_keeps(seed):
    """But for block 0, where a drafter reads along: vLLM knows that no hit ends before it."""
    sparse = 0
    for number in range(MASK_CASES):
        draw = random.Random(f"{seed} {number}")
        tokens, window = draw.choice([16, 32]), draw.randrange(2, 200)
        align = tokens * draw.choice([1, 2, 4])
        interval = draw.choice([0, 0, align * draw.randrange(1, 8)])
        drafts = draw.random() < 0.3
        first = draw.randrange(10)
        end = first + draw.randrange(40)
        boundaries = [draw.randrange(700) // align * align for _ in range(3)]
        spec = interface.SlidingWindowSpec(
            block_size=tokens, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=window
        )
        mask = SlidingWindowManager.reachable_block_mask(
            first, end, align, spec, drafts, **known(
                SlidingWindowManager.reachable_block_mask,
                retention_interval=interval, reachable_boundaries=boundaries,
            )
        )  # fmt: skip
        group = Group(index=0, kind=WINDOW, block_tokens=tokens, reach_tokens=window, peek_blocks=int(drafts))
        ours = set(kept(group, first, end, boundaries, interval))
        theirs = set(range(first, end)) if mask is None else {first + at for at, keep in enumerate(mask) if keep}
        assert theirs <= ours and ours - theirs <= ({0} if drafts else set()), (first, end, boundaries, interval, spec)
        sparse += 0 < len(ours) < end - first
    assert sparse > MASK_CASES // 10


@pytest.mark.parametrize("kind", [RUN, CHUNK])
def test_of_runs_and_chunks_every_block_is_kept(kind):
    group = Group(index=0, kind=kind, block_tokens=16, reach_tokens=64)
    assert kept(group, 3, 9, (), 0) == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("interval", [0, 96])
def test_an_interval_says_what_is_kept_of_a_window(interval):
    group = Group(index=0, kind=WINDOW, block_tokens=16, reach_tokens=33)
    assert kept(group, 0, 20, (), None) == list(range(20))
    assert kept(group, 0, 20, (160,), interval) == sorted({8, 9} | ({4, 5, 10, 11, 16, 17} if interval else set()))


# ---- which groups there are ------------------------------------------------------------------------------------------


def spec_of(name, **more):
    kind = getattr(interface, name)
    return kind(**known(kind, block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32), **more)


def config_of(*groups):
    return SimpleNamespace(kv_cache_groups=list(groups))


def group_of(spec, **more):
    group = KVCacheGroupSpec(["layer"], spec)
    for name, value in more.items():  # those that this version does not have are as a later one would set them
        setattr(group, name, value)
    return group


UNKNOWN = {
    "EncoderOnlyAttentionSpec": {},
    "CrossAttentionSpec": {},
    "RSWASpec": {"rswa_window": 64},
    "HiddenStateCacheSpec": {},
}


@pytest.mark.parametrize("name", [name for name in UNKNOWN if hasattr(interface, name)])
@pytest.mark.parametrize("inner", [False, True])
def test_an_unknown_kind_of_group_is_refused_by_its_name(name, inner):
    spec = spec_of(name, **UNKNOWN[name])
    if inner:
        spec = SimpleNamespace(kv_cache_specs={"a": spec_of("FullAttentionSpec"), "b": spec}, block_size=16)
    with pytest.raises(ConfigError, match=f"KV cache of {name}, .*without --kv-transfer-config"):
        groups_of(config_of(group_of(spec_of("FullAttentionSpec")), group_of(spec)))


def test_a_kind_derived_from_a_known_one_is_refused_too():
    class LaterSpec(interface.FullAttentionSpec):
        pass

    with pytest.raises(ConfigError, match="LaterSpec"):
        groups_of(config_of(group_of(LaterSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32))))


def test_blocks_that_are_no_multiple_of_the_hash_are_refused():
    groups = config_of(group_of(spec_of("FullAttentionSpec")))
    with pytest.raises(ConfigError, match="KV cache group 0 has blocks of 16 tokens, and vLLM hashes 12 at a time"):
        groups_of(groups, hash_tokens=12)
    assert groups_of(groups, hash_tokens=8)[0].hashes_per_block == 2


def test_groups_that_vllm_does_not_look_for_are_left_alone_and_the_others_keep_their_index():
    left = SimpleNamespace(prefix_cacheable=False)  # whatever its kind
    config = config_of(
        group_of(left),
        group_of(left),
        group_of(spec_of("FullAttentionSpec")),
        group_of(spec_of("SlidingWindowSpec", sliding_window=64)),
    )
    assert [(group.index, group.kind) for group in groups_of(config)] == [(3, WINDOW), (2, RUN)]


@pytest.mark.parametrize("left", [8, 16, 24, 48])
def test_hits_end_where_blocks_of_groups_that_are_left_alone_end_too(left):
    """vLLM's scheduler aligns what is computed to the blocks of all groups."""
    config = config_of(
        group_of(SimpleNamespace(prefix_cacheable=False, block_size=left)), group_of(spec_of("FullAttentionSpec"))
    )
    groups = groups_of(config, hash_tokens=16)
    request = SimpleNamespace(block_hashes=[bytes([at] * 32) for at in range(7)], num_tokens=115, lora_request=None)
    index = BlockIndex(8)
    index.add_slots(0, 8)
    index.commit(index.reserve(as_keys(request.block_hashes, digest_of_name(1, None)), 4096)[0])
    assert align_tokens(groups) == np.lcm(16, left)
    assert longest_hit(index, groups, request, 0, 114, set()).length == 112 // np.lcm(16, left) * np.lcm(16, left)


def test_a_model_with_no_group_to_keep_is_refused():
    with pytest.raises(ConfigError, match="none of this model's KV cache groups"):
        groups_of(config_of(group_of(SimpleNamespace(prefix_cacheable=False))))


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("enable_kv_transfer = False", {"enable_kv_transfer": False}),
        ("host_resident = True", {"host_resident": True}),
        ("role = OTHER", {"role": SimpleNamespace(name="OTHER", __str__=None)}),
    ],
)
def test_a_group_that_vllm_serves_in_a_way_of_its_own_is_refused(what, options):
    with pytest.raises(ConfigError, match="which has " + what.split(" = ")[0]):
        groups_of(config_of(group_of(spec_of("FullAttentionSpec"), **options)))


def test_a_window_that_vllm_replays_is_refused():
    spec = spec_of("SlidingWindowSpec", sliding_window=64)
    with pytest.raises(ConfigError, match="prefix_replay_tokens"):
        groups_of(SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=Replayed(spec))]))


class Replayed:
    """A spec of which vLLM computes the last tokens of a hit again."""

    prefix_replay_tokens = 64

    def __init__(self, spec):
        self.spec = spec


def test_layers_kept_apart_are_of_the_kind_of_each():
    specs = {"a": spec_of("SlidingWindowSpec", sliding_window=64)}
    specs["b"] = interface.SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=64
    )
    (group,) = groups_of(config_of(group_of(UniformTypeKVCacheSpecs.from_specs(specs))))
    assert (group.kind, group.reach_tokens, group.block_tokens) == (WINDOW, 64, 16)


@pytest.mark.parametrize(
    "marks, peeks", [((False, False), (1, 1)), ((True, False), (1, 0)), ((False, True), (0, 1))], ids=str
)
def test_a_drafter_finds_a_block_less_in_the_groups_that_are_marked_or_in_all(marks, peeks):
    specs = [spec_of("FullAttentionSpec"), spec_of("SlidingWindowSpec", sliding_window=64)]
    config = config_of(*(group_of(spec, is_eagle_group=mark) for spec, mark in zip(specs, marks, strict=True)))
    for drafts in (True, False):
        found = {group.index: group.peek_blocks for group in groups_of(config, drafts=drafts)}
        assert tuple(found[index] for index in (0, 1)) == (peeks if drafts else (0, 0))


def test_a_drafter_reads_no_states():
    config = config_of(
        group_of(spec_of("MambaSpec", shapes=((2,),), dtypes=(torch.float32,))), group_of(spec_of("FullAttentionSpec"))
    )
    assert [group.peek_blocks for group in groups_of(config, drafts=True)] == [0, 1]


def test_tokens_that_a_window_retains_count_as_its_own():
    if hasattr(interface.SlidingWindowSpec, "extra_retained_tokens"):
        spec = spec_of("SlidingWindowSpec", sliding_window=64, extra_retained_tokens=3)
        assert groups_of(config_of(group_of(spec)))[0].reach_tokens == 67
    assert groups_of(config_of(group_of(spec_of("SlidingWindowSpec", sliding_window=64))))[0].reach_tokens == 64


# ---- context parallelism ---------------------------------------------------------------------------------------------


def test_ranks_that_share_the_tokens_of_a_block_make_hits_of_as_many_blocks(make_rig):
    rig = make_rig()
    rig.config.parallel_config.decode_context_parallel_size = 2
    groups = groups_to_keep(rig.config, rig.cache_config)
    options = ConnectorOptions.parse({"cpu_pool_size_bytes": 1 << 20})
    shape = PoolShape.of(options, rig.cache_config, groups, num_ranks=2)
    assert shape.align_tokens == groups[0].block_tokens == 2 * 16 and groups[0].hashes_per_block == 1
    request = SimpleNamespace(block_hashes=[bytes([at] * 32) for at in range(3)], num_tokens=100, lora_request=None)
    index = BlockIndex(8)
    index.add_slots(0, 8)
    index.commit(index.reserve(as_keys(request.block_hashes, digest_of_name(0, None)), 4096)[0])
    assert longest_hit(index, groups, request, 0, 99, set()).length == 96


@pytest.mark.parametrize("name", ["full_and_window", "window"])
@pytest.mark.parametrize("size", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused_with_windows(make_rig, name, size):
    rig = make_rig(**FORMS[name])
    setattr(rig.config.parallel_config, size, 2)
    with pytest.raises(ConfigError, match="context parallelism .* leave both sizes at 1"):
        groups_to_keep(rig.config, rig.cache_config)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_runs_over_each_other_become_one_that_names_no_byte_twice(seed):
    for number in range(200):
        draw = random.Random(f"{seed} {number}")
        stride, far = 256, 1 << 20
        runs = [
            (draw.choice([0, far]) + draw.randrange(0, 192, 16), stride, draw.randrange(16, 80, 16)) for _ in range(5)
        ]
        runs = [(base, stride, min(piece, stride - base % far)) for base, stride, piece in runs]
        named = [base + at for base, _, piece in runs for at in range(piece)]
        merged = [base + at for base, _, piece in union_of(runs) for at in range(piece)]
        assert sorted(merged) == sorted(set(named))
        there = [base + at for base, _, piece in runs for at in range(piece)]
        firsts = [
            min(there.index(base + at) for at in range(piece) if base + at in there)
            for base, _, piece in union_of(runs)
        ]
        assert firsts == sorted(firsts), "whatever the addresses, the layers' order is that of the bytes"


def test_runs_of_other_strides_stay_apart():
    assert union_of([(0, 256, 64), (1 << 20, 128, 64)]) == [(0, 256, 64), (1 << 20, 128, 64)]


@pytest.mark.parametrize("name", [name for name in FORMS if name not in STATES or HAS_TRANSFER_RESULTS])
def test_a_slot_has_room_for_all_bytes_of_a_block_in_every_form(make_rig, name):
    rig = make_rig(**FORMS[name])
    (half,) = rig.halves
    of_config = bytes_of_block(rig.cache_config)
    assert half.layout.block_bytes <= of_config == half.shape.block_bytes == rig.half.shape.block_bytes
    written = set()
    for group in rig.groups:
        for page in group.pages(rig.caches[0]):
            start = page.__array_interface__["data"][0]
            block = page[1]
            offsets = np.add.outer(0, np.zeros(1, dtype=np.int64))
            for size, step in zip(block.shape, block.strides, strict=True):
                offsets = np.add.outer(offsets, np.arange(size) * step)
            written.update((start + page.strides[0] + offsets).ravel().tolist())
    moved = {
        base + stride + at for base, stride, piece in half.layout.runs for at in range(0, piece, 4)
    }  # fmt: skip
    assert written <= moved
    if "pad_bytes" not in FORMS[name] and name not in STATES:
        assert len(moved) * 4 == half.layout.block_bytes


# ---- an interval between windows that are kept -----------------------------------------------------------------------


@pytest.mark.parametrize("interval", [-1, 1.5, True, "64", None])
def test_an_interval_that_is_no_number_of_tokens_is_refused(interval):
    with pytest.raises(ConfigError, match="window_interval_tokens must be a whole number of tokens, 0 to 2.40, got"):
        ConnectorOptions.parse({"cpu_pool_size_bytes": 1 << 20, "window_interval_tokens": interval})


def test_an_interval_between_two_blocks_is_refused_with_what_would_do(make_rig):
    with pytest.raises(ConfigError, match="window_interval_tokens is 48, .* multiples of 32 tokens"):
        make_rig(**FORMS["long_blocks_of_a_window"], extra={"window_interval_tokens": 48})
    assert make_rig(**FORMS["long_blocks_of_a_window"], extra={"window_interval_tokens": 64}).half.interval == 64


@pytest.mark.parametrize("interval, hit", [(0, 0), (64, 208), (128, 128)])
def test_with_an_interval_a_shorter_prefix_hits_where_it_ends(make_rig, prompt, interval, hit):
    form = {**FORMS["full_and_window"], "num_blocks": 211, "load_async": HAS_WORKER_METADATA}
    rig = make_rig(**form, num_slots=256, extra={"window_interval_tokens": interval})
    rig.serve("long", prompt("p", 400))
    rig.forget_device()
    assert rig.serve("short", prompt("p", 220)) == hit
    rig.require_clean()
