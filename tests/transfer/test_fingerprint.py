"""Which layouts may hold each other's blocks: equal fingerprints, and the parts of a layout."""

import json
from hashlib import sha256

import numpy as np
import pytest

import kvortex
from kvortex import KVLayout
from kvortex.transfer._layout import plan_copies

BASE = 1 << 32
KV, BLOCK, HEADS, DIM = 2, 16, 4, 8
SIZES = {"num_layers": 3, "num_blocks": 5, "block_size": BLOCK, "num_heads": HEADS, "head_dim": DIM, "itemsize": 2}


def contiguous(base=BASE, **changed):
    return KVLayout.contiguous(base, **{**SIZES, **changed})


def per_layer(*, planes_first, num_blocks=5, dtype=np.float16, num_layers=3, order=(0, 1, 2, 3), **settings):
    """One array a layer of logical shape (KV, BLOCK, HEADS, DIM) with a dimension of blocks before or after the planes;
    `order` is that of its axes in memory."""
    shape = (KV, BLOCK, HEADS, DIM)
    tensors = []
    for _ in range(num_layers):
        tensor = np.zeros((num_blocks, *(shape[axis] for axis in order)), dtype)
        tensor = tensor.transpose(0, *(1 + np.argsort(order)))
        if planes_first:
            tensor = np.ascontiguousarray(tensor.swapaxes(0, 1)) if order == (0, 1, 2, 3) else tensor.swapaxes(0, 1)
        tensors.append(tensor)
    return KVLayout.from_tensors(tensors, 1 if planes_first else 0, **settings)


def test_a_fingerprint_is_the_digest_of_a_documented_text():
    text = ["kvortex layout 1", "draft", 6144, [[3, [2, [0, 2], [1, 16], [2, 4], [3, 8]]]], None]
    assert contiguous(name="draft").fingerprint == sha256(json.dumps(text, separators=(",", ":")).encode()).digest()
    assert contiguous(name="draft").fingerprint.hex() == (
        "91a152f98fbb4d25b938813be7fff43a0bf048e4cea106ac0f0ec3ccf21e4f0d"
    )
    assert KVLayout([(BASE, 100, 60), (BASE + 60, 100, 40), (BASE + 4096, 200, 40)], 2).fingerprint == (
        sha256(b'["kvortex layout 1","",140,[[1,60],[2,40]],null]').digest()
    )


def test_it_does_not_depend_on_where_the_memory_lies_how_far_apart_blocks_are_or_how_many():
    assert contiguous().fingerprint == contiguous(BASE << 1, num_blocks=77).fingerprint
    runs = [(BASE, 4096, 64), (BASE + 64, 4096, 64)]
    apart = [(BASE << 1, 64, 64), (BASE << 2, 128, 64)]
    assert KVLayout(runs, 5).fingerprint == KVLayout(apart, 9).fingerprint
    assert len(KVLayout(runs, 5).runs) == 1 and len(KVLayout(apart, 9).runs) == 2  # merged or not
    assert per_layer(planes_first=True).fingerprint == per_layer(planes_first=False, num_blocks=2).fingerprint


def test_one_block_has_the_fingerprint_of_many():
    assert contiguous(num_blocks=1).fingerprint == contiguous().fingerprint
    for first in (True, False):
        assert per_layer(planes_first=first, num_blocks=1).fingerprint == per_layer(planes_first=True).fingerprint


def test_it_tells_apart_what_means_something_else_though_the_blocks_are_equally_long():
    layouts = [
        contiguous(),
        contiguous(name="draft"),
        contiguous(kv=1, num_layers=6),
        contiguous(num_layers=1, block_size=3 * BLOCK),
        contiguous(num_heads=HEADS // 2, head_dim=2 * DIM),
        contiguous(itemsize=4, head_dim=DIM // 2),
        per_layer(planes_first=False),
        per_layer(planes_first=False, dtype=np.int16),
        per_layer(planes_first=False, order=(0, 2, 1, 3)),  # heads before tokens
        per_layer(planes_first=False, order=(1, 0, 2, 3)),  # K and V alternate, token by token
        KVLayout.cross_layer(BASE, num_blocks=5, block_bytes=6144),
        KVLayout.mla([BASE, BASE << 1, BASE << 2], num_blocks=5, block_size=BLOCK, latent_dim=64, itemsize=2),
        KVLayout([(BASE, 3072, 3072), (BASE << 1, 3072, 3072)], 5),
        KVLayout([(BASE, 2048, 2048), (BASE << 1, 4096, 4096)], 5),
        KVLayout([(BASE, 4096, 4096), (BASE << 1, 2048, 2048)], 5),
    ]
    assert {layout.block_bytes for layout in layouts} == {6144}
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert all(type(layout.fingerprint) is bytes and len(layout.fingerprint) == 32 for layout in layouts)


def test_layers_that_share_a_cache_count_once_and_where_they_stand_counts():
    one, other = (np.zeros((4, 64), np.float16) for _ in range(2))
    shared = [KVLayout.from_tensors(tensors).fingerprint for tensors in ([one, other, one], [other, one, other])]
    assert shared[0] == shared[1] != KVLayout.from_tensors([one, one, other]).fingerprint
    assert KVLayout([(BASE, 64, 64), (BASE << 1, 64, 64), (BASE, 64, 64)], 4).fingerprint == (
        KVLayout([(BASE, 64, 64), (BASE << 1, 64, 64)], 4).fingerprint
    )


@pytest.mark.parametrize("name", [None, b"draft", 3])
def test_a_name_is_a_str(name):
    with pytest.raises(TypeError, match="name must be a str"):
        contiguous(name=name)


# ---- parts ----------------------------------------------------------------------------------------------------------


def places(layout, pool, block=1, slot=0):
    """(device address, offset in the slot) of each byte of a block, as the planner copies it."""
    found = []
    for copy in plan_copies(layout, [block], [slot], pool, strided=False):
        offset = copy["host"] - pool.address(slot)
        found += [(copy["device"] + byte, offset + byte) for byte in range(copy["row_bytes"])]
    return found


@pytest.fixture(scope="module")
def pool():
    with kvortex.PinnedPool(4 * 8192, 8192, "host") as made:
        yield made


def test_a_block_of_a_part_has_the_bytes_of_its_runs_one_after_the_other(pool):
    whole = contiguous()
    part = whole.part([whole.runs[4], 1])
    assert (part.num_blocks, part.block_bytes, part.whole) == (5, 2048, whole)
    bases = [whole.runs[4][0] + 1024, whole.runs[1][0] + 1024]
    wanted = [(base + byte, number * 1024 + byte) for number, base in enumerate(bases) for byte in range(1024)]
    assert sorted(places(part, pool)) == sorted(wanted)


def test_a_part_may_be_a_stretch_of_a_run_and_a_part_of_a_part():
    whole = KVLayout.cross_layer(BASE, num_blocks=8, block_bytes=4096)
    part = whole.part([(BASE + 1024, 4096, 2048)])
    assert part.part([(BASE + 2048, 4096, 1024)]).whole is whole
    with pytest.raises(ValueError, match="does not lie in"):
        part.part([(BASE + 2048, 4096, 1025)])


def test_a_part_may_join_runs_that_touch_though_its_layout_has_them_apart(pool):
    keys, values = [(BASE + at, 4096, 512) for at in (0, 1024)], [(BASE + at, 4096, 512) for at in (512, 1536)]
    whole = KVLayout([*keys, *values], 8)
    part = whole.part([keys[0], values[0]])
    assert len(whole.runs) == 4 and len(part.runs) == 1
    assert places(part, pool) == [(BASE + 4096 + byte, byte) for byte in range(1024)]


@pytest.mark.parametrize(
    "run",
    [
        (BASE - 64, 4096, 64),
        (BASE, 4096, 4096 * 2),
        (BASE + 1, 4096, 2048),
        (BASE, 8192, 64),
        (BASE + 2048, 4096, 64),
        (BASE << 3, 4096, 64),
        7,
    ],
)
def test_what_is_no_part_is_refused(run):
    whole = KVLayout([(BASE, 4096, 2048), (BASE << 1, 4096, 2048)], 5)
    with pytest.raises(ValueError, match=r"does not lie in|must be"):
        whole.part([run])
    for empty in ([], ()):
        with pytest.raises(ValueError, match="at least one run"):
            whole.part(empty)


def test_parts_have_fingerprints_of_their_own_that_say_which_bytes_of_what_they_are():
    whole, moved = contiguous(), contiguous(BASE << 1, num_blocks=50)
    parts = [whole.part([number]) for number in range(len(whole.runs))]
    parts += [whole.part(range(6)), whole.part([1, 0]), whole.part([0, 1]), contiguous(name="draft").part([0])]
    prints = [part.fingerprint for part in parts]
    assert len({*prints, whole.fingerprint}) == len(parts) + 1
    assert moved.part([0, 1]).fingerprint == parts[8].fingerprint
    text = f'["kvortex part 1","{whole.fingerprint.hex()}",[[1024,1024]]]'
    assert parts[1].fingerprint == sha256(text.encode()).digest()


def test_runs_that_touch_or_not_make_the_same_part():
    merged = KVLayout([(BASE, 4096, 512), (BASE + 512, 4096, 512), (BASE + 1024, 4096, 512)], 4)
    apart = KVLayout([(BASE << at, 512, 512) for at in range(3)], 4)
    joined = merged.part([(BASE + 512, 4096, 1024)])
    assert joined.fingerprint == apart.part([1, 2]).fingerprint


def test_a_part_may_be_given_the_fingerprint_of_a_layout_that_holds_the_same():
    whole = contiguous()
    alone = contiguous(BASE << 1, num_layers=1)
    assert whole.part([0, 1], fingerprint=alone.fingerprint).fingerprint == alone.fingerprint
    with pytest.raises(ValueError, match="32 bytes"):
        whole.part([0], fingerprint=b"short")
    with pytest.raises(TypeError):
        whole.part([0], fingerprint="text")
