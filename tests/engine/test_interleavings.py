"""Several threads call the engine at once, and every order of their steps is run.

A step of a thread goes from one of its driver calls to the next: it records the caller's stream, draws its turn, waits
for its turn and for the jobs that it met, issues, seals. The threads stand still before each such call, and a schedule
says which of them goes on. All schedules are run, depth first; of four threads a drawn part. What could go wrong: calls
that wait for each other for ever, and jobs on one block that run against the order in which they named themselves.
"""

import os
import random
import threading
import time

import pytest
from kvcache import content, keys_of

SOAK = os.environ.get("KVORTEX_SOAK") == "1"
STEPS = ("event_record", "stream_wait_event", "memcpy_2d_async")
SETTLED_S = 0.01  # that nobody moves for, before a thread that is neither ended nor at a step nor waiting is given up

pytestmark = pytest.mark.host


class Schedule:
    """Choices, the first of which are given; the rest takes the first thread each time."""

    def __init__(self, given=(), rng=None):
        self.given, self.rng, self.taken = list(given), rng, []

    def choose(self, candidates):
        choice = self.rng.randrange(len(candidates)) if self.rng else 0
        if len(self.taken) < len(self.given):  # a busy machine may take a thread for a waiting one, and so offer fewer
            choice = min(self.given[len(self.taken)], len(candidates) - 1)
        self.taken.append((choice, len(candidates)))
        return candidates[choice]

    def following(self):
        """The choices of the next schedule, depth first; None after the last."""
        taken = list(self.taken)
        while taken:
            choice, count = taken.pop()
            if choice + 1 < count:
                return [choice for choice, _ in taken] + [choice + 1]
        return None


def run_threads(host, queues, calls, schedule):
    """Run each call in a thread, a step at a time; return what they returned, in the order of `calls`."""
    answers, threads, ids = [None] * len(calls), [], {}

    def run(number):
        ids[number] = threading.get_native_id()
        answers[number] = calls[number]()

    host.stop_calls(*STEPS)
    try:
        for number in range(len(calls)):  # one after the other, so that a thread's number is the same in each run
            threads.append(threading.Thread(target=run, args=(number,)))
            threads[-1].start()
            while number not in ids or (ids[number] not in host.stopped() and threads[-1].is_alive()):
                time.sleep(0)
        alone = {ids[number]: number for number in ids}
        deadline = time.monotonic() + 20
        while any(thread.is_alive() for thread in threads):
            standing = settle(host, queues, threads, alone)
            assert time.monotonic() < deadline, "the calls wait for each other"
            if standing:
                deadline = time.monotonic() + 20
                host.step(schedule.choose(standing))
    finally:
        host.stop_calls()
        for thread in threads:
            thread.join(20)
    return answers


def settle(host, queues, threads, alone):
    """The native ids of the threads of ours that stand, by number, once all others wait for a turn or a seal."""
    seen, since = None, time.monotonic()
    while True:
        standing = sorted((thread for thread in host.stopped() if thread in alone), key=alone.get)
        alive = sum(thread.is_alive() for thread in threads)
        if len(standing) + sum(queue.num_waiting for queue in queues) == alive:
            return standing
        if (standing, alive) != seen:
            seen, since = (standing, alive), time.monotonic()
        elif time.monotonic() - since > SETTLED_S:
            return standing
        time.sleep(0)


def check_blocks(bench, jobs, loaded, saved):
    """Every block is wholly the one or the other: what a save found is what was there, or what a load brought."""
    for job in jobs:
        job.wait(20_000)
    for block, key in loaded.items():
        assert bench.holds(block, key), f"block {block} is not what was loaded into it"
    for at, (key, may_be) in enumerate(saved.items()):
        bench.load([key], [20 + at]).wait(20_000)
        assert any(bench.holds(20 + at, other) for other in may_be), f"key {key} is a mixture"


def prepare(bench):
    bench.engine.clear()
    for block in range(4):
        bench.cache.write(block, content(200 + block, 0, bench.cache.block_bytes))
    bench.saved([1, 2, 3])
    for block in range(4):
        bench.cache.write(block, content(200 + block, 0, bench.cache.block_bytes))


def circle(bench):
    """Two saves on one queue and a load that shares a block with each: by claims alone they wait for each other."""
    engine, stream = bench.engine, bench.stream
    calls = [
        lambda: engine.save_blocks(keys_of([10]), [0], stream=stream),
        lambda: engine.save_blocks(keys_of([11]), [1], stream=stream),
        lambda: engine.load_blocks(keys_of([1, 2]), [0, 1], stream=stream),
    ]
    return calls, {0: 1, 1: 2}, {10: (200, 1), 11: (201, 2)}


def two_of_one_block(bench):
    """Two saves of one block and a load into it: the load must not overwrite what either of them still reads."""
    engine, stream = bench.engine, bench.stream
    calls = [
        lambda: engine.save_blocks(keys_of([10]), [0], stream=stream),
        lambda: engine.save_blocks(keys_of([11]), [0], stream=stream),
        lambda: engine.load_blocks(keys_of([1]), [0], stream=stream),
    ]
    return calls, {0: 1}, {10: (200, 1), 11: (200, 1)}


def four(bench):
    engine, stream = bench.engine, bench.stream
    calls = [
        lambda: engine.save_blocks(keys_of([10, 12]), [0, 2], stream=stream),
        lambda: engine.save_blocks(keys_of([11]), [1], stream=stream),
        lambda: engine.load_blocks(keys_of([1, 2]), [0, 1], stream=stream),
        lambda: engine.load_blocks(keys_of([3]), [2], stream=stream),
    ]
    return calls, {0: 1, 1: 2, 2: 3}, {10: (200, 1), 11: (201, 2), 12: (202, 3)}


@pytest.fixture
def bench(make_bench, host):
    yield make_bench(12, num_transfer_streams=2)
    host.stop_calls()


@pytest.mark.parametrize("scenario", [circle, two_of_one_block])
def test_every_order_of_the_steps_of_three_threads_is_sound(bench, host, scenario):
    choices, num_runs = [], 0
    host.set_delay_us(0, 30)
    while choices is not None:
        prepare(bench)
        calls, loaded, saved = scenario(bench)
        schedule = Schedule(choices)
        check_blocks(bench, run_threads(host, bench.engine.queues, calls, schedule), loaded, saved)
        num_runs += 1
        choices = schedule.following()
    assert num_runs > 20


def test_drawn_orders_of_the_steps_of_four_threads_are_sound(bench, host, seed):
    host.set_delay_us(0, 30)
    for number in range(1000 if SOAK else 40):
        prepare(bench)
        calls, loaded, saved = four(bench)
        check_blocks(
            bench,
            run_threads(host, bench.engine.queues, calls, Schedule(rng=random.Random(seed + number))),
            loaded,
            saved,
        )
