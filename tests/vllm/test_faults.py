"""Copies that the driver refuses, and more copies than there are jobs: a miss, never a wrong token, never a leak."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from rig import in_flight
from vllm.v1.request import RequestStatus

from kvortex import DriverError
from kvortex.integrations.vllm import worker
from kvortex.integrations.vllm.connector import keeps_blocks_of_aborted_loads
from kvortex.integrations.vllm.messages import LOAD, StepMetadata, Transfer
from kvortex.integrations.vllm.worker import Running

OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700
COPY = "memcpy_batch_async"  # what moves the blocks of the rig


@contextmanager
def refused(host, rig, direction, rank=0):
    """Let the driver refuse every save or every load of one rank; yields the list of those."""
    parts, seen = [half.worker for half in rig.workers], []

    def wrapped(part):
        submit = part.submit

        def submit_refused(queue, transfer, stream):
            if part is parts[rank] and queue.direction == direction:
                seen.append(transfer)
                host.fail_call(1, OUT_OF_MEMORY, field=COPY)
            try:
                return in_flight(submit(queue, transfer, stream))
            finally:
                host.fail_call(0, 0)  # where no job was free, nothing has been copied

        return submit_refused

    for part in parts:
        part.submit = wrapped(part)
    yield seen
    for part in parts:
        del part.submit


@contextmanager
def loads_stand_still(host):
    """Let no copy of a load get onto its stream; this thread's calls go on."""
    own_thread, is_over = threading.get_native_id(), threading.Event()

    def step():
        while not is_over.is_set():
            if own_thread in host.stopped():
                host.step(own_thread)
            time.sleep(0.0001)

    helper = threading.Thread(target=step)
    helper.start()
    host.stop_calls(COPY)
    try:
        yield
    finally:
        host.stop_calls()
        is_over.set()
        helper.join()


def wait_for_a_load_to_stand_still(host):
    while not host.stopped():
        time.sleep(0.0001)


def summed(rig, name):
    """A counter over all that vLLM was told."""
    return sum((stats if isinstance(stats, dict) else stats.data).get(name, 0) for stats in rig.stats)


# ---- loads -----------------------------------------------------------------------------------------------------------


# Not pipelined with synchronous loads: there vLLM keeps the token that the next step sampled from the garbage.
@pytest.mark.parametrize(
    "load_async, pipelined", [(True, False), (True, True), (False, False)], ids=["async", "async-pipelined", "sync"]
)
def test_a_load_that_fails_is_computed_instead(make_rig, prompt, host, load_async, pipelined):
    rig = make_rig(load_async=load_async, pipelined=pipelined)
    rig.serve("first", prompt("p", 100), 10)
    rig.forget_device()
    with refused(host, rig, "H2D") as loads:
        rig.serve("second", prompt("p", 100), 10)
    assert len(loads) == 1 and summed(rig, "transfers_failed") == 1
    assert rig.outputs("second") == rig.outputs("first")
    rig.forget_device()
    assert rig.serve("third", prompt("p", 100)) == 96  # what was computed again has been kept again
    rig.require_clean()


def test_only_the_host_part_of_a_prefix_is_computed_again(make_rig, prompt, host, load_async):
    rig = make_rig(load_async=load_async)
    rig.serve("whole", prompt("p", 161))
    rig.forget_device()
    rig.serve("head", prompt("p", 65))
    with refused(host, rig, "H2D") as loads:
        rig.serve("again", prompt("p", 161), 10)
    assert [len(load.slots) for load in loads] == [6]
    assert len(rig.outputs("again")) == 10
    rig.require_clean()


def test_a_preempted_request_whose_load_fails_is_right(make_rig, prompt, host, load_async):
    rig = make_rig(load_async=load_async)
    rig.add("first", prompt("p", 100), 40)
    while rig.index.num_ready < 7:
        rig.step()
        rig.workers[0].worker.drain()
    rig.scheduler.reset_prefix_cache(reset_running_requests=True)  # of the device alone
    with refused(host, rig, "H2D") as loads:
        rig.run()
    assert len(rig.outputs("first")) == 40
    assert loads or not rig.half.reload_preempted
    rig.forget_device()
    rig.serve("second", prompt("p", 100), 40)
    rig.require_clean()


def test_several_loads_that_fail_at_once_are_all_computed(make_rig, prompt, host, load_async):
    rig = make_rig(load_async=load_async)
    for name in "abc":
        rig.serve(name, prompt(name, 50))
    rig.forget_device()
    with refused(host, rig, "H2D") as loads:
        for name in "abc":
            rig.add(name + " again", prompt(name, 50))
        rig.run()
    assert len(loads) == 3 and all(len(rig.outputs(name + " again")) == 2 for name in "abc")
    rig.require_clean()


def test_nothing_computed_on_top_of_a_failed_load_is_kept(make_rig, prompt, host):
    rig = make_rig(load_async=False)
    rig.serve("first", prompt("p", 40))
    rig.forget_device()
    with refused(host, rig, "H2D") as loads:
        rig.serve("second", prompt("p", 110), 40)  # the step of the load computes four more blocks from its garbage
    assert len(loads) == 1
    rig.forget_device()
    rig.serve("third", prompt("p", 110), 40)
    rig.require_clean()


def test_a_request_that_shares_a_failed_load_is_right_too(make_rig, prompt, host):
    rig = make_rig(load_async=False, max_tokens=512)
    rig.serve("first", prompt("p", 40))
    rig.forget_device()
    with refused(host, rig, "H2D"):
        rig.add("second", prompt("p", 100), 20)
        rig.add("third", prompt("p", 40) + prompt("q", 100), 20)
        rig.run()
    rig.forget_device()
    assert rig.serve("fourth", prompt("p", 40) + prompt("q", 100)) in (0, 32, 128)
    rig.require_clean()


def test_a_failed_load_may_fail_its_request_where_vllm_is_told_so(make_rig, prompt, host, load_async):
    rig = make_rig(load_async=load_async, failure_policy="fail")
    rig.serve("first", prompt("p", 40))
    rig.forget_device()
    with refused(host, rig, "H2D"):
        rig.add("second", prompt("p", 110))
        rig.run()
    assert rig.requests["second"].status == RequestStatus.FINISHED_ERROR
    rig.forget_device()
    assert rig.serve("third", prompt("p", 110)) == 0
    rig.require_clean()


def test_an_aborted_load_that_fails_leaves_nothing(make_rig, prompt, host):
    rig = make_rig(extra={"max_jobs": 1})
    for name in "ab":
        rig.serve(name, prompt(name, 100))
    rig.forget_device()
    host.hold()
    rig.add("a again", prompt("a", 100))
    rig.add("b again", prompt("b", 100))
    rig.step()
    rig.abort("b again")  # its load waits for a job, and the driver will refuse it
    rig.step()
    with refused(host, rig, "H2D") as loads:
        host.release()
        rig.run()
    assert loads and len(rig.outputs("a again")) == 2
    rig.require_clean()


# ---- saves -----------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_is_a_miss(make_rig, prompt, host, load_async):
    rig = make_rig(load_async=load_async)
    with refused(host, rig, "D2H") as saves:
        rig.serve("first", prompt("p", 100))
    assert len(saves) == summed(rig, "transfers_failed") == 1
    assert rig.index.num_free == 64
    rig.forget_device()
    assert rig.serve("second", prompt("p", 100)) == 0
    rig.forget_device()
    assert rig.serve("third", prompt("p", 100)) == 96
    rig.require_clean()


def test_a_device_that_dies_with_copies_in_flight_serves_without_them(make_rig, prompt, host, load_async):
    rig = make_rig(num_blocks=13, load_async=load_async)
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    rig.workers[0].worker.retire = lambda: None  # nobody asks before a fence does
    rig.add("second", prompt("q", 40))
    while rig.scheduler.requests:
        rig.step()
    host.kill(0, ILLEGAL_ADDRESS)
    del rig.workers[0].worker.retire
    rig.serve("third", prompt("r", 180))  # needs the blocks that are being saved
    rig.serve("fourth", prompt("p", 100), 10)
    assert len(rig.outputs("fourth")) == 10
    rig.require_clean()


def test_a_fence_that_could_not_be_put_is_waited_for(make_rig, host):
    part = make_rig().workers[0].worker
    transfer = Transfer(LOAD, 1, np.zeros(1, np.uint32), np.zeros(1, np.int64), "r")
    host.hold()
    running = Running(transfer, in_flight(part.submit(part.loader, transfer, part.compute.stream)))
    opener = threading.Timer(0.1, host.release)
    opener.start()
    part.compute.wait_for = lambda job: job.wait_on(part.compute.stream)  # as on a GPU
    host.fail_call(1, OUT_OF_MEMORY, field="stream_wait_event")
    part.order(running)
    assert running.num_blocks() == 1
    opener.join()


def test_what_a_failed_save_held_for_verify_is_let_go(make_rig, prompt, host):
    rig = make_rig(extra={"verify": True})
    part = rig.workers[0].worker
    host.hold()
    rig.add("first", prompt("p", 100))
    rig.step()
    assert part.verifier.bytes_held
    host.kill(0, ILLEGAL_ADDRESS)
    rig.run()
    assert not part.verifier.bytes_held and not part.verifier.blocks_compared
    rig.require_clean()


# ---- more copies than jobs -------------------------------------------------------------------------------------------


def test_saves_that_find_no_job_are_dropped_and_counted(make_rig, prompt, host):
    rig = make_rig(extra={"max_jobs": 1})
    host.hold()
    for name in "abc":
        rig.add(name, prompt(name, 40))
        rig.step()
    for _ in range(5):
        rig.step()
    assert rig.index.num_writing == 2  # the first one's; the others' are free again
    host.release()
    rig.run()
    assert summed(rig, "saves_dropped") == 4 and rig.index.num_ready == 2
    rig.require_clean()


def test_loads_that_find_no_job_wait(make_rig, prompt, host, load_async):
    rig = make_rig(load_async=load_async, extra={"max_jobs": 1})
    for name in "abc":
        rig.serve(name, prompt(name, 40))
    rig.forget_device()
    host.set_delay_us(1000, 2000)
    for name in "abc":
        rig.add(name + " again", prompt(name, 40))
    rig.run()
    assert [rig.computed_at_first[name + " again"] for name in "abc"] == [32, 32, 32]
    rig.require_clean()


def test_no_step_waits_for_the_submission_of_a_load(make_rig, prompt, host):
    rig = make_rig()
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    with loads_stand_still(host):
        rig.add("second", prompt("p", 100))
        rig.step()
        wait_for_a_load_to_stand_still(host)
        rig.add("other", prompt("q", 40))
        while rig.outputs("other") != rig.truths["other"].tokens[40:42]:
            rig.step()
        assert not rig.outputs("second")
    rig.run()
    assert rig.computed_at_first["second"] == 96
    rig.require_clean()


def test_no_load_waits_for_the_forward_of_its_step(make_rig, prompt, load_async):
    """vLLM from 0.32 on calls `start_load_kv` after the forward: a load ordered there would come after it."""
    rig = make_rig(load_async=load_async)
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    part, forward, seen = rig.workers[0].worker, rig.forward, []

    def forward_with_a_look(runs):
        seen.extend(running.job is not None for running in part.running.values() if running.is_load)
        return forward(runs)

    rig.forward = forward_with_a_look
    rig.add("second", prompt("p", 100))
    rig.step()
    assert seen == [True]
    rig.run()
    rig.require_clean()


def test_only_a_step_that_computes_nothing_waits_for_a_load(make_rig, prompt, host, monkeypatch):
    """Or it would step again at once, and take the core from those who submit and copy."""
    monkeypatch.setattr(worker, "IDLE_WAIT_MS", 20_000)
    rig = make_rig()
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    host.hold()
    load = StepMetadata(transfers=[Transfer(LOAD, 1000, np.zeros(1, np.uint32), np.ones(1, np.int64), "r")])
    part = rig.workers[0].worker
    part.begin(load)
    part.start_loads(load)
    part.collect(())
    assert part.running
    part.begin(StepMetadata(is_idle=True))
    threading.Timer(0.1, host.release).start()
    part.collect(())
    assert not part.running


def test_only_a_step_that_computes_nothing_waits_for_a_judge(make_rig, prompt):
    """Or it would step again at once, and keep the GIL from the judge that it waits for."""
    rig = make_rig(extra={"verify": True})
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    part, go_on = rig.workers[0].worker, threading.Event()
    mismatches = part.verifier.mismatches
    part.verifier.mismatches = lambda capture: go_on.wait(20) and mismatches(capture)
    load = Transfer(LOAD, 1000, np.zeros(1, np.uint32), np.ones(1, np.int64), "r")
    part.begin(StepMetadata(transfers=[load]))
    part.start_loads(StepMetadata(transfers=[load]))
    part.running[1000].job.wait()
    part.retire()
    assert 1000 in part.running
    part.begin(StepMetadata(is_idle=True))
    threading.Timer(0.1, go_on.set).start()
    part.retire()
    assert not part.running


def test_a_load_that_finds_no_job_is_submitted_later_even_if_none_is_in_flight(make_rig, prompt):
    """A job's list of slots grows to the largest batch, for which there may be no memory at that moment."""
    rig = make_rig()
    rig.serve("first", prompt("p", 96))
    rig.forget_device()
    part = rig.workers[0].worker
    submit, refusals = part.submit, [None, None]
    part.submit = lambda queue, *more: refusals.pop() if queue is part.loader and refusals else submit(queue, *more)
    assert rig.serve("second", prompt("p", 96)) == 95
    assert not refusals
    rig.require_clean()


def test_a_step_that_cannot_submit_its_load_computes_instead(make_rig, prompt):
    """It cannot wait until there is memory for the job."""
    rig = make_rig(load_async=False)
    rig.serve("first", prompt("p", 100), 10)
    rig.forget_device()
    part = rig.workers[0].worker
    submit = part.submit
    part.submit = lambda queue, *more: None if queue is part.loader else submit(queue, *more)
    rig.serve("second", prompt("p", 100), 10)
    assert rig.outputs("second") == rig.outputs("first") and summed(rig, "transfers_failed") == 1
    rig.require_clean()


def test_loads_that_found_no_job_start_in_their_order(make_rig, prompt):
    rig = make_rig()
    for name in "abc":
        rig.serve(name, prompt(name, 40))
    rig.forget_device()
    part, order = rig.workers[0].worker, []
    submit, refusals = part.submit, [None, None]

    def submit_and_note(queue, transfer, stream):
        if queue is part.loader and refusals:
            return refusals.pop()
        if queue is part.loader:
            order.append(transfer.request_id)
        return submit(queue, transfer, stream)

    part.submit = submit_and_note
    for name in "abc":
        rig.add(name + " again", prompt(name, 40))
    rig.run()
    assert order == ["a again", "b again", "c again"]
    rig.require_clean()


def test_no_step_waits_for_the_loads_before_an_aborted_one(make_rig, prompt, host):
    """vLLM 0.15 gives its blocks to another at once, later versions when it is told that the load is over."""
    rig = make_rig(num_blocks=25)
    for name in "abc":
        rig.serve(name, prompt(name, 100))
    rig.forget_device()
    part = rig.workers[0].worker
    with loads_stand_still(host):
        for name in "abc":
            rig.add(name + " again", prompt(name, 100))
        rig.step()
        wait_for_a_load_to_stand_still(host)
        assert len(part.running) == 3
        rig.abort("c again")
        rig.add("other", prompt("q", 20 if keeps_blocks_of_aborted_loads() else 130), 10)
        while len(rig.outputs("other")) < 5:
            rig.step()
    rig.run()
    assert [rig.computed_at_first[name + " again"] for name in "ab"] == [96, 96]
    rig.require_clean()


def test_an_aborted_load_that_waits_for_a_job_never_starts_on_anothers_blocks(make_rig, prompt, host):
    rig = make_rig(num_blocks=17, extra={"max_jobs": 1})
    for name in "ab":
        rig.serve(name, prompt(name, 100))
    rig.forget_device()
    host.hold()
    for name in "ab":
        rig.add(name + " again", prompt(name, 100))
    rig.step()
    first, second = rig.workers[0].worker.running.values()
    assert first.job is not None and second.is_waiting
    rig.abort("b again")
    rig.step()
    rig.add("other", prompt("q", 130), 10)  # vLLM 0.15 gives it the blocks of the load that waits
    for _ in range(3):
        rig.step()
    host.release()
    rig.run()
    assert rig.computed_at_first["a again"] == 96 and len(rig.outputs("other")) == 10
    rig.require_clean()


# ---- fences on loads: vLLM 0.15 gives away the blocks of an aborted one ----------------------------------------------


@pytest.fixture
def loading(make_rig, prompt, host):
    """A rig that loads two prompts: of the first, some copies may be on the stream; of the second, none is."""
    rig = make_rig()
    for name in "ab":
        rig.serve(name, prompt(name, 100))
    rig.forget_device()
    with loads_stand_still(host):
        for name in "ab":
            rig.add(name + " again", prompt(name, 100))
        rig.step()
        wait_for_a_load_to_stand_still(host)
        yield rig


@pytest.mark.parametrize("kind", ["fences", "waits"])
def test_a_load_that_has_not_begun_is_withdrawn_where_others_write_its_blocks(loading, host, kind):
    part = loading.workers[0].worker
    _, second = part.running.values()
    part.begin(StepMetadata(**{kind: [second.transfer.number]}))  # does not wait
    part.retire()
    assert second.transfer.number not in part.running and not second.job.submitted
    loading.caches[0]["layer0"][:, second.transfer.block_ids] = 7.0
    host.stop_calls()
    second.job.wait(20_000)
    assert second.job.num_blocks == 0
    assert (loading.caches[0]["layer0"][:, second.transfer.block_ids] == 7.0).all()


@pytest.mark.parametrize("kind", ["fences", "waits"])
def test_a_load_that_waits_for_a_job_never_starts_where_others_write_its_blocks(make_rig, prompt, host, kind):
    rig = make_rig(extra={"max_jobs": 1})
    for name in "ab":
        rig.serve(name, prompt(name, 100))
    rig.forget_device()
    part = rig.workers[0].worker
    host.hold()
    for name in "ab":
        rig.add(name + " again", prompt(name, 100))
    rig.step()
    first, second = part.running.values()
    part.begin(StepMetadata(**{kind: [second.transfer.number]}))
    host.release()
    first.job.wait()
    part.start_loads(StepMetadata())  # there is a job for it
    part.retire()
    assert second.job is None and not part.running


@pytest.mark.parametrize("kind", ["fences", "waits"])
def test_a_load_that_has_begun_is_waited_for_where_others_write_its_blocks(loading, host, kind):
    part = loading.workers[0].worker
    first, _ = part.running.values()
    opener = threading.Timer(0.1, host.stop_calls)
    opener.start()
    part.begin(StepMetadata(**{kind: [first.transfer.number]}))
    assert first.job.done() and first.num_blocks() == 6
    opener.join()


def test_closing_copies_no_load_that_has_not_begun(loading, host):
    part = loading.workers[0].worker
    first, second = part.running.values()
    opener = threading.Timer(0.1, host.stop_calls)
    opener.start()
    part.close()
    assert first.num_blocks() == 6 and second.num_blocks() == second.job.num_blocks == 0
    part.close()
    opener.join()


def test_closing_leaves_memory_alone_that_a_copy_may_still_use(make_rig, prompt, host):
    rig = make_rig(extra={"shutdown_timeout_ms": 100})
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    host.hold()
    rig.add("second", prompt("p", 100))
    rig.step()
    part = rig.workers[0].worker
    (running,) = part.running.values()
    in_flight(running.job)
    part.close()
    with pytest.raises(DriverError):
        running.num_blocks()
    assert part.pool.view(0) is not None  # still there
    host.release()
    part.pool.close()
    part.device.close()
