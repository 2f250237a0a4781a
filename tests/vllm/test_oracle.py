"""The rig's oracle can fail: each protection of the connector taken out, in a life where it matters.

Every life is right with the connector as it is, and reads wrong tokens without the protection.
"""

import pytest

from kvortex.integrations.vllm.messages import LOAD, SAVE
from kvortex.integrations.vllm.scheduler import SchedulerHalf
from kvortex.integrations.vllm.worker import WorkerHalf


def life_of_a_save_in_flight(rig, prompt, host):
    """The device blocks of the first are needed for the second while they are being saved."""
    rig.open_gate_when_waited_for(host)
    host.hold()
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    rig.add("second", prompt("q", 180))
    rig.step_until_served()
    host.release()
    rig.forget_device()
    rig.serve("third", prompt("p", 100))


def life_of_chunks(rig, prompt, host):
    """The first chunk ends one token before a block does, and is saved before the second runs."""
    rig.add("first", prompt("p", 100))
    while rig.scheduler.requests:
        rig.step()
        rig.workers[0].worker.drain()
    rig.forget_device()
    rig.serve("second", prompt("p", 100))


def life_of_a_late_load(rig, prompt, host):
    """What is loaded arrives some steps after it was asked for."""
    rig.serve("first", prompt("p", 100))
    rig.forget_device()
    host.hold()
    rig.add("second", prompt("p", 100))
    for _ in range(5):
        rig.step()
    host.release()
    rig.run()


def life_of_a_late_save(rig, prompt, host):
    """What is saved is copied only some steps after it was asked for."""
    part, late = rig.workers[0].worker, []
    part.start_save = late.append
    rig.add("first", prompt("p", 100))
    rig.step_until_served()
    del part.start_save
    assert rig.scheduler.reset_prefix_cache()
    rig.add("second", prompt("p", 100))
    for _ in range(5):
        rig.step()
        part.drain()
    for step in late:
        part.start_save(step)
    rig.run()


def without_fences(monkeypatch):
    monkeypatch.setattr(WorkerHalf, "begin", lambda self, step: None)


def with_saves_before_the_forward(monkeypatch):
    begin, start_save = WorkerHalf.begin, WorkerHalf.start_save

    def begin_and_save(self, step):
        begin(self, step)
        start_save(self, step)
        self.drain()

    monkeypatch.setattr(WorkerHalf, "begin", begin_and_save)
    monkeypatch.setattr(WorkerHalf, "start_save", lambda self, step: None)


def with_a_watermark_one_too_high(monkeypatch):
    build = SchedulerHalf.build

    def build_too_much(self, output):
        counts = output.num_scheduled_tokens
        output.num_scheduled_tokens = {name: count + 1 for name, count in counts.items()}
        step = build(self, output)
        output.num_scheduled_tokens = counts
        return step

    monkeypatch.setattr(SchedulerHalf, "build", build_too_much)


def with_loads_reported_at_once(monkeypatch):
    start_loads, end = WorkerHalf.start_loads, WorkerHalf.end

    def start_and_report(self, step):
        start_loads(self, step)
        self.received.update(load.request_id for load in step.of(LOAD))

    def end_in_silence(self, running, bad=()):
        received = set(self.received)
        end(self, running, bad)
        self.received = received

    monkeypatch.setattr(WorkerHalf, "start_loads", start_and_report)
    monkeypatch.setattr(WorkerHalf, "end", end_in_silence)


def with_blocks_ready_at_submission(monkeypatch):
    start, finish = SchedulerHalf.start, SchedulerHalf.finish

    def start_and_commit(self, kind, slots, *rest):
        if kind == SAVE:
            self.index.commit(slots)
            self.writing.clear()
        return start(self, kind, slots, *rest)

    monkeypatch.setattr(SchedulerHalf, "start", start_and_commit)
    monkeypatch.setattr(
        SchedulerHalf, "finish", lambda self, moving: moving.transfer.kind == LOAD and finish(self, moving)
    )


@pytest.mark.parametrize("faulty", [False, True], ids=["as_it_is", "faulty"])
@pytest.mark.parametrize(
    "fault, life",
    [
        (without_fences, life_of_a_save_in_flight),
        (with_saves_before_the_forward, life_of_chunks),
        (with_a_watermark_one_too_high, life_of_chunks),
        (with_loads_reported_at_once, life_of_a_late_load),
        (with_blocks_ready_at_submission, life_of_a_late_save),
    ],
    ids=lambda function: function.__name__,
)
def test_a_fault_is_seen_as_wrong_tokens(make_rig, prompt, host, monkeypatch, fault, life, faulty):
    if faulty:
        fault(monkeypatch)
    rig = make_rig(num_blocks=13, max_tokens=47)
    life(rig, prompt, host)
    assert (rig.wrong_tokens > 0) == faulty
    assert rig.half.blocks_matched > 0
