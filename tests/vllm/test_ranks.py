"""Tensor parallelism: several workers with a pool each and the same slot numbers, none of them ever ahead alone."""

from contextlib import contextmanager

import pytest
from test_faults import refused
from test_reports import followed, held

from kvortex.integrations.vllm.keys import as_keys
from kvortex.integrations.vllm.messages import LOAD, SAVE


@contextmanager
def late(rig, rank):
    """Let a rank notice nothing of what its copies do, so that it reports later than the others."""
    part = rig.workers[rank].worker
    part.retire = lambda: None
    yield
    del part.retire


@contextmanager
def bad_blocks(rig, rank, kind, positions):
    """Let a rank say that it could not move these blocks of its transfers; vLLM hears of those that it was to load."""
    part = rig.workers[rank].worker
    end = part.end

    def end_badly(running, bad=()):
        slots, block_ids = running.transfer.slots[positions], running.transfer.block_ids[positions]
        if running.transfer.kind == LOAD == kind:
            part.load_errors.update(block_ids.tolist())
        end(running, slots if running.transfer.kind == kind else bad)

    part.end = end_badly
    yield
    del part.end


def found(rig, request_id):
    """Which blocks of a request are in the index."""
    return rig.index.lookup(as_keys(rig.requests[request_id].block_hashes))[0].tolist()


def leading(rig, request_id):
    return rig.index.lookup(as_keys(rig.requests[request_id].block_hashes))[1]


def test_two_ranks_serve_from_their_own_pools(make_rig, prompt, load_async):
    rig = make_rig(num_ranks=2, load_async=load_async)
    rig.serve("first", prompt("p", 100), 10)
    rig.forget_device()
    assert rig.serve("second", prompt("p", 100), 10) == 96
    assert rig.outputs("second") == rig.outputs("first")
    rig.require_clean()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_block_is_ready_when_the_last_rank_has_saved_it(make_rig, prompt, rank):
    rig = make_rig(num_ranks=2)
    with late(rig, rank):
        rig.add("first", prompt("p", 100), 20)
        while rig.scheduler.requests or rig.workers[1 - rank].worker.running:
            rig.step()
        assert leading(rig, "first") == 0 and rig.index.num_ready == 0
    rig.run()
    assert leading(rig, "first") == rig.index.num_ready == 7
    rig.require_clean()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_runs_when_the_last_rank_has_loaded_it(make_rig, prompt, rank):
    rig = make_rig(num_ranks=2)
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    with late(rig, rank):
        rig.add("second", prompt("p", 100))
        rig.add("other", prompt("q", 20), 5)
        for _ in range(10):
            rig.step()
        assert "second" not in rig.computed_at_first and len(rig.outputs("other")) == 5
        assert rig.index.num_pinned == 6
    rig.run()
    assert rig.computed_at_first["second"] == 96
    rig.require_clean()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_in_one_rank_is_a_miss(make_rig, prompt, host, rank):
    rig = make_rig(num_ranks=2)
    with refused(host, rig, "D2H", rank=rank):
        rig.serve("first", prompt("p", 100))
    assert rig.index.num_free == 64
    rig.forget_device()
    assert rig.serve("second", prompt("p", 100)) == 0
    rig.require_clean()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_that_fails_in_one_rank_is_computed_in_both(make_rig, prompt, host, load_async, rank):
    rig = make_rig(num_ranks=2, load_async=load_async)
    rig.serve("first", prompt("p", 100), 10)
    rig.forget_device()
    with refused(host, rig, "H2D", rank=rank):
        rig.serve("second", prompt("p", 130), 10)
    assert len(rig.outputs("second")) == 10
    rig.forget_device()
    assert rig.serve("third", prompt("p", 130), 10) == 128
    rig.require_clean()


def test_a_block_that_one_rank_could_not_save_is_a_miss_and_the_others_are_not(make_rig, prompt):
    rig = make_rig(num_ranks=2, events=True)
    with bad_blocks(rig, 0, SAVE, [2, 5]), bad_blocks(rig, 1, SAVE, [4]):
        rig.serve("first", prompt("p", 100), 1)
    assert found(rig, "first") == [True, True, False, True, False, False]
    assert rig.index.num_ready == 3 and rig.index.num_free == 61
    rig.forget_device()
    assert rig.serve("second", prompt("p", 100)) == 32
    rig.serve("third", prompt("q", 20))  # events are taken with a step's output
    assert found(rig, "first") == [True] * 6 and followed(rig.events) == held(rig)
    rig.require_clean()


def test_a_block_that_one_rank_could_not_load_is_computed_and_the_others_stay(make_rig, prompt, load_async):
    rig = make_rig(num_ranks=2, load_async=load_async, events=True)
    rig.serve("first", prompt("p", 100), 1)
    rig.forget_device()
    with late(rig, 1), bad_blocks(rig, 0, LOAD, [3]):
        rig.add("second", prompt("p", 100), 1)
        while found(rig, "first")[3]:  # until rank 0 has told
            rig.step()
        assert found(rig, "first") == [True, True, True, False, True, True]
    rig.run()
    assert found(rig, "first") == [True] * 6  # saved anew
    assert rig.outputs("second") == rig.outputs("first")
    rig.serve("third", prompt("q", 20))  # events are taken with a step's output
    assert followed(rig.events) == held(rig)
    rig.require_clean()


def test_what_failed_to_load_in_one_rank_is_gone_before_the_other_reports(make_rig, prompt, host):
    rig = make_rig(num_ranks=2)
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    with late(rig, 1), refused(host, rig, "H2D", rank=0):
        rig.add("second", prompt("p", 100))
        while leading(rig, "first"):  # until rank 0 has told
            rig.step()
        assert rig.index.num_pinned == 6
    rig.run()
    assert rig.index.num_pinned == 0 and leading(rig, "first") == 6  # saved anew
    rig.require_clean()


def test_slots_are_handed_out_when_every_rank_has_registered_them(make_rig, prompt):
    extra = {"pool_first_chunk_bytes": 8 * 4096, "pool_chunk_bytes": 8 * 4096}
    rig = make_rig(num_ranks=2, num_slots=32, extra=extra)
    for worker in rig.workers:
        worker.worker.pool.wait_ready(10_000)
    rig.workers[1].worker.next_chunk = 100  # it reports none for now
    rig.serve("first", prompt("p", 200))
    assert rig.index.slots_added == 8 and rig.index.num_ready <= 8
    rig.workers[1].worker.next_chunk = 1
    rig.step()
    assert rig.index.slots_added == 32
    rig.forget_device()
    rig.serve("second", prompt("q", 200))
    rig.forget_device()
    assert rig.serve("third", prompt("q", 200)) == 192
    rig.require_clean()
