"""Random lives of an engine: shared prefixes, aborts, resets, late copies, refused ones, too little memory.

The rig's oracle looks at every token that is read, and at the end nothing may be left over.
"""

import os
import random

import pytest
from rig import HAS_WORKER_METADATA, in_flight
from vllm.v1.request import RequestStatus

SOAK = os.environ.get("KVORTEX_SOAK") == "1"
SCHEDULES, STEPS = (400, 600) if SOAK else (6, 200)
OUT_OF_MEMORY = 2


def refuse_some(host, rig, draw, directions):
    """Let the driver refuse one transfer in fifteen."""
    for part in rig.halves:

        def submit(queue, transfer, stream, submit=part.submit):
            if queue.direction in directions and draw.random() < 1 / 15:
                host.fail_call(1, OUT_OF_MEMORY, field="memcpy_batch_async")
            try:
                return in_flight(submit(queue, transfer, stream))
            finally:
                host.fail_call(0, 0)  # where no job was free, nothing has been copied

        part.submit = submit


def live(rig, draw, *, resets, steps=STEPS, others=False, others_fail=False):
    """Add, abort and forget at random, then serve what is left; of some another connector has a part, or all, or says
    so and fails.
    """
    trunks = [[draw.randrange(3, 1000) for _ in range(300)] for _ in range(6)]
    added = 0
    for _ in range(steps):
        for _ in range(draw.randrange(3)):
            if len(rig.scheduler.requests) < 8:
                tokens = draw.choice(trunks)[: draw.randrange(1, 300)]
                tokens += [draw.randrange(3, 1000) for _ in range(draw.randrange(40))]
                if others and draw.random() < 0.5:
                    rig.offered[f"r{added}"] = draw.choice([len(tokens), draw.randrange(len(tokens) + 1)])
                if others_fail and draw.random() < 0.1:
                    rig.unreachable.add(f"r{added}")
                rig.add(f"r{added}", tokens, draw.randrange(1, 40))
                added += 1
        event = draw.random()
        if event < 0.06 and rig.scheduler.requests:
            rig.abort(draw.choice(list(rig.scheduler.requests)))
        elif event < 0.08 and resets:
            rig.reset()
        elif event < 0.14:
            rig.scheduler.reset_prefix_cache()
        rig.step()
    rig.run()
    rig.require_clean()
    for name, request in rig.requests.items():
        if request.status == RequestStatus.FINISHED_LENGTH_CAPPED:
            assert len(rig.outputs(name)) == request.max_tokens


@pytest.mark.timeout(7200 if SCHEDULES > 6 else 120)
@pytest.mark.parametrize("pipelined", [False, True], ids=["in_turn", "pipelined"])
def test_no_schedule_reads_a_wrong_token(make_rig, host, seed, load_async, pipelined):
    num_matched = num_preempted = 0
    for number in range(SCHEDULES):
        draw = random.Random(f"{seed} {number} {load_async} {pipelined}")
        rig = make_rig(
            load_async=load_async,
            pipelined=pipelined,
            num_blocks=draw.choice([29, 41, 67]),
            num_slots=draw.choice([24, 64, 200]),
            num_ranks=draw.choice([1, 1, 2]),
            extra={"max_jobs": draw.choice([2, 64])},
        )
        host.set_delay_us(0, draw.choice([100, 3000]), seed)
        # vLLM 0.15 loses count of tokens in flight at a reset.
        resets = draw.random() < 0.5 and (HAS_WORKER_METADATA or not pipelined)
        if draw.random() < 0.5:
            # Where a load inside a step fails, vLLM itself may serve the garbage: a request preempted before it has
            # computed those blocks again finds them in the device's prefix cache.
            refuse_some(host, rig, draw, ["D2H", "H2D"] if load_async else ["D2H"])
        try:
            live(rig, draw, resets=resets)
        except BaseException as error:
            error.add_note(f"schedule {number} of KVORTEX_SEED={seed}, {load_async=}, {pipelined=}")
            raise
        rig.close()  # the events of hundreds of them are more than the host driver has
        num_matched += rig.half.blocks_matched
        num_preempted += sum(request.num_preemptions for request in rig.requests.values())
    # Otherwise these schedules show little.
    assert num_matched > 2 * SCHEDULES and num_preempted > SCHEDULES


def trouble(rig, draw, faulty_disk):
    """Before each step, perhaps, something happens to the disk."""
    step = rig.step

    def step_in_trouble():
        if draw.random() < 0.1:
            faulty_disk.mend()
            if draw.random() < 0.6:
                call, how = draw.choice(["read", "write", "any"]), draw.choice(["EIO", "short", "lie", "hang"])
                faulty_disk.plan(call, how, nth=draw.randrange(1, 20), count=draw.choice([1, 5, 1 << 40]))
        step()

    rig.step = step_in_trouble


@pytest.mark.timeout(7200 if SCHEDULES > 6 else 120)
@pytest.mark.parametrize("pipelined", [False, True], ids=["in_turn", "pipelined"])
def test_no_schedule_over_a_disk_reads_a_wrong_token(
    make_rig, host, faulty_disk, tmp_path, seed, load_async, pipelined
):
    """Engine after engine over one disk, which fails, lies and hangs."""
    num_promoted = num_written = 0
    for number in range(SCHEDULES):
        draw = random.Random(f"{seed} {number} {load_async} {pipelined} disk")
        groups = draw.choice([("full",), ("full",), ("full", "window:64")]) if HAS_WORKER_METADATA else ("full",)
        rig = make_rig(
            load_async=load_async,
            pipelined=pipelined,
            # To 41 blocks vLLM never admits 340 tokens of two groups.
            num_blocks=draw.choice([41, 67]) if len(groups) == 1 else 67,
            num_slots=draw.choice([24, 48]),
            num_ranks=draw.choice([1, 1, 2]),
            groups=groups if len(groups) > 1 else None,
            extra={
                "max_jobs": draw.choice([2, 64]),
                "disk_path": str(tmp_path),
                "namespace": "the rig",
                "disk_bytes": draw.choice(["2MiB", "8MiB"]),
                "promote_timeout_ms": draw.choice([0, 5, 200]),
                "flush_timeout_ms": 500,
                "prefill_tokens_per_s": 0,
            },
        )
        host.set_delay_us(0, draw.choice([100, 3000]), seed)
        rig.half.tier.breaker.allows = lambda now_s: True  # a tier that rests shows nothing
        if draw.random() < 0.3:
            refuse_some(host, rig, draw, ["D2H"])
        trouble(rig, draw, faulty_disk)
        try:
            live(rig, draw, resets=draw.random() < 0.5 and (HAS_WORKER_METADATA or not pipelined))
        except BaseException as error:
            error.add_note(f"schedule {number} of KVORTEX_SEED={seed}, {load_async=}, {pipelined=}")
            raise
        faulty_disk.mend()
        num_promoted += rig.half.tier.promoter.num_promoted
        num_written += rig.half.tier.num_put_behind + rig.half.tier.cleaner.num_written
        rig.close()
    assert num_promoted and num_written > SCHEDULES  # how much depends on the machine
