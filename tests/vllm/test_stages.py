"""Pipeline parallelism: each stage has layers of its own, hence blocks and slots of its own size."""

import random

import pytest
from rig import HAS_WORKER_METADATA
from test_per_request import asked
from test_schedules import live

SMALL_CHUNKS = {"pool_first_chunk_bytes": 8 * 4096, "pool_chunk_bytes": 8 * 4096}


@pytest.fixture(params=[(2, 40), (40, 2)], ids=["last_is_larger", "first_is_larger"])
def make_stages(request, make_rig):
    """Makes rigs of two stages; a slot of the one with more layers has twice the bytes."""

    def make(**options):
        options = {
            "groups": ("full", "window:64"), "num_blocks": 211, "num_slots": 128, "load_async": HAS_WORKER_METADATA,
            "stages": request.param, "extra": SMALL_CHUNKS, **options,
        }  # fmt: skip
        return make_rig(**options)

    return make


def wait_for_pools(rig):
    for half in rig.halves:
        half.pool.wait_ready(10_000)
    for _ in range(3):
        rig.step()


def test_stages_serve_from_pools_of_their_own_sizes(make_stages, prompt):
    rig = make_stages()
    wait_for_pools(rig)
    assert len({half.shape.block_bytes for half in rig.halves}) == 2
    rig.serve("first", prompt("p", 300), 10)
    rig.forget_device()
    assert rig.serve("second", prompt("p", 300), 10) == 288
    assert rig.outputs("second") == rig.outputs("first")
    rig.require_clean()


@pytest.mark.parametrize("extra", [SMALL_CHUNKS, {}], ids=["small_chunks", "one_chunk"])
def test_no_slot_is_used_that_a_stage_does_not_have(make_stages, prompt, extra):
    rig = make_stages(extra=extra)
    wait_for_pools(rig)
    assert sorted(half.pool.num_slots for half in rig.halves) == [64, 128]
    assert rig.index.slots_added == 64
    for name in "abcdef":
        rig.serve(name, prompt(name, 300))
        assert rig.index.num_ready <= 64
    rig.forget_device()
    assert rig.serve("again", prompt("f", 300)) == 288
    rig.require_clean()


def test_pins_take_a_quarter_of_the_slots_that_every_stage_has(make_stages, prompt):
    rig = make_stages()
    wait_for_pools(rig)
    rig.serve("first", prompt("p", 400), **asked(pin_s=1000))
    assert rig.half.pins.count == 64 // 4
    rig.half.pins.end(every=True)
    rig.require_clean()


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_is_kept_in_a_chunk_before_every_stage_has_it(make_stages, prompt, rank):
    rig = make_stages()
    late = rig.halves[rank]
    late.next_chunk = 100  # it reports none for now
    wait_for_pools(rig)
    rig.serve("first", prompt("p", 300))
    assert rig.index.slots_added == rig.index.num_ready == 0
    late.next_chunk = 0
    wait_for_pools(rig)
    assert rig.index.slots_added == 64
    rig.forget_device()
    assert rig.serve("second", prompt("p", 300)) == 0
    rig.forget_device()
    assert rig.serve("third", prompt("p", 300)) == 288
    rig.require_clean()


def test_no_schedule_of_stages_reads_a_wrong_token(make_stages, host, seed):
    draw = random.Random(seed)
    rig = make_stages(num_blocks=61)
    host.set_delay_us(0, 1000, seed)
    live(rig, draw, resets=HAS_WORKER_METADATA, steps=60)
    assert rig.index.slots_added == 64
