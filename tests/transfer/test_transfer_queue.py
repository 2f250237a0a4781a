"""TransferQueue without an engine: FIFO, ordered after the caller's stream, full and unfit answered before any copy."""

import gc
import os
import threading
import time

import numpy as np
import pytest
from kvcache import SHAPES, DeviceCache, content

import kvortex
from kvortex import DriverError, EngineClosed, KVLayout, PinnedPool, PoolExhausted, TransferQueue
from kvortex.slots import stride_bytes
from kvortex.transfer import JobSignals, Submitter, probe_layout

TIMEOUT_MS = 20_000
OUT_OF_MEMORY = 2
NUM_BLOCKS = 8


class Moved:
    """A cache, a pool with as many slots as the cache has blocks, and what each of them holds."""

    def __init__(self, device, stream, shape="one_allocation"):
        self.stream = stream
        self.cache = DeviceCache(device, shape, num_blocks=NUM_BLOCKS)
        self.pool = PinnedPool(NUM_BLOCKS * stride_bytes(self.cache.block_bytes), self.cache.block_bytes, device)
        self.pool.wait_ready(TIMEOUT_MS)

    def submit(self, queue, blocks, slots, stream=None):
        return queue.submit(
            self.cache.layout, blocks, self.pool, slots, stream=self.stream if stream is None else stream
        )

    def record(self, key_id):
        return content(key_id, 0, self.cache.block_bytes)

    def fill_slots(self):
        for slot in range(NUM_BLOCKS):
            self.pool.view(slot)[:] = self.record(slot)

    def close(self):
        self.pool.close()
        self.cache.close()


@pytest.fixture
def moved(device, stream):
    made = Moved(device, stream)
    yield made
    made.close()


@pytest.fixture
def d2h(device, moved):
    with TransferQueue(device, "D2H") as queue:
        yield queue


@pytest.fixture
def h2d(device, moved):
    with TransferQueue(device, "H2D") as queue:
        yield queue


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_go_into_their_slots_and_come_back(device, stream, seed, shape, probed):
    moved = Moved(device, stream, shape)
    rng = np.random.default_rng(seed)
    blocks, slots, targets = (rng.permutation(NUM_BLOCKS) for _ in range(3))
    for block in range(NUM_BLOCKS):
        moved.cache.write(block, moved.record(block))
    with TransferQueue(device, "D2H") as saves, TransferQueue(device, "H2D") as loads:
        if probed:
            probe_layout(moved.cache.layout, saves)
            probe_layout(moved.cache.layout, loads)
        job = moved.submit(saves, blocks, slots)
        job.wait(TIMEOUT_MS)
        assert job.num_blocks == NUM_BLOCKS and job.statuses is None
        assert [bytes(moved.pool.view(slot)) for slot in slots] == [moved.record(block) for block in blocks]
        moved.cache.fill(0xEE)
        moved.submit(loads, targets, slots).wait(TIMEOUT_MS)
        assert [moved.cache.read(target) for target in targets] == [moved.record(block) for block in blocks]
    moved.close()


GATHERED_BLOCKS = 47


@pytest.fixture
def gathered(device, stream):
    """Blocks of 1 MiB, eight of which fill half of the staging of a kernel that moves them; queues that use it."""
    cache = DeviceCache(device, "separate_allocations", GATHERED_BLOCKS, num_layers=4, piece_bytes=128 << 10)
    pool = PinnedPool(GATHERED_BLOCKS << 20, 1 << 20, device)
    pool.wait_ready(TIMEOUT_MS)
    with TransferQueue(device, "D2H") as saves, TransferQueue(device, "H2D") as loads:
        for queue in (saves, loads):
            queue.use_gather(cache.layout, 4)
        yield cache, pool, saves, loads
    pool.close()
    cache.close()


def move_gathered(gathered, stream, seed, late=lambda high_us: None, counts=(1, 2, 3, 8, 23)):
    cache, pool, saves, loads = gathered
    rng = np.random.default_rng(seed)
    for count in counts:
        blocks, slots, targets = (rng.permutation(GATHERED_BLOCKS)[:count] for _ in range(3))
        records = [rng.bytes(1 << 20) for _ in range(count)]
        for block, record in zip(blocks, records, strict=True):
            cache.write(block, record)
        late(3000)
        saves.submit(cache.layout, blocks, pool, slots, stream=stream).wait(TIMEOUT_MS)
        late(0)
        assert [bytes(pool.view(slot)) == record for slot, record in zip(slots, records, strict=True)] == [True] * count
        cache.fill(0xEE)
        late(3000)
        loads.submit(cache.layout, targets, pool, slots, stream=stream).wait(TIMEOUT_MS)
        late(0)
        assert [cache.read(target) == record for target, record in zip(targets, records, strict=True)] == [True] * count
        untouched = set(range(GATHERED_BLOCKS)) - set(targets.tolist())
        assert all(cache.read(block) == b"\xee" * (1 << 20) for block in untouched)


def test_gathered_blocks_go_through_the_staging_and_come_back(gathered, stream, seed):
    move_gathered(gathered, stream, seed)


@pytest.mark.host
@pytest.mark.parametrize("round_", range(4))
def test_gathered_blocks_survive_kernels_and_copies_that_run_late(gathered, stream, seed, host, round_):
    move_gathered(
        gathered, stream, seed + round_, lambda high_us: host.set_delay_us(0, high_us, seed + round_), [GATHERED_BLOCKS]
    )


@pytest.mark.host
def test_a_gathered_load_is_over_when_its_last_kernel_is(gathered, stream, host):
    """The kernel begins late, and what comes behind it on the queue's own stream does not."""
    cache, pool, _, loads = gathered
    record = os.urandom(1 << 20)
    pool.view(3)[:] = record
    jobs = []
    host.stop_calls("launch_kernel")
    thread = threading.Thread(
        target=lambda: jobs.append(loads.submit(cache.layout, [5], pool, [3], stream=stream)), daemon=True
    )
    thread.start()
    while not host.stopped():
        time.sleep(0)
    time.sleep(0.05)  # what is on the streams by now is over
    host.set_delay_us(300_000, 300_000)
    host.stop_calls("launch_kernel", "event_record")
    host.step(*host.stopped())
    while list(host.stopped().values()) != ["event_record"]:
        time.sleep(0)
    time.sleep(0.05)  # the kernel's stream sleeps by now
    host.set_delay_us(0, 0)
    host.stop_calls()
    thread.join(20)
    jobs[0].wait(TIMEOUT_MS)
    assert cache.read(5) == record, "the job was over before its kernel"


@pytest.mark.host
def test_a_queue_that_submits_copies_cannot_be_made_to_gather(device, moved, host):
    layout = moved.cache.layout
    signals = JobSignals()
    with TransferQueue(device, "D2H", signals=signals) as queue, Submitter(device, signals, [queue]):
        before = host.live_objects()
        host.stop_calls("memcpy_batch_async")
        job = queue.submit(layout, [0], moved.pool, [0], stream=moved.stream, deferred=True)
        while not host.stopped():
            time.sleep(0)
        with pytest.raises(ValueError, match="copies of a job are being submitted"):
            queue.use_gather(layout, 4)
        assert queue.gather is None and host.live_objects() == before
        host.stop_calls()
        job.wait(TIMEOUT_MS)
        queue.use_gather(layout, 4)
        queue.submit(layout, [0, 1], moved.pool, [0, 1], stream=moved.stream, deferred=True).wait(TIMEOUT_MS)
        assert [bytes(moved.pool.view(slot)) for slot in (0, 1)] == [moved.cache.read(block) for block in (0, 1)]


def test_unfit_gathers_are_refused(device, moved, d2h):
    for num_ctas in (0, 1025):
        with pytest.raises(ValueError, match=f"num_ctas must be 1 to 1024, got {num_ctas}"):
            d2h.use_gather(moved.cache.layout, num_ctas)
    with pytest.raises(ValueError, match="not made of multiples of 16 bytes"):
        d2h.use_gather(KVLayout([(1 << 20, 24, 24)], 2), 4)
    d2h.use_gather(moved.cache.layout, 4)
    with pytest.raises(ValueError, match="gathers already"):
        d2h.use_gather(moved.cache.layout, 4)


@pytest.mark.host
@pytest.mark.parametrize("pooled", [False, True])
def test_a_refused_gather_leaves_nothing_and_the_queue_as_it_was(device, moved, host, pooled):
    pool = kvortex.DevicePool(32 << 20, device) if pooled else None
    num_refused = 0
    for n in range(1, 40):
        with TransferQueue(device, "D2H") as queue:
            before = host.live_objects()
            host.fail_call(n, OUT_OF_MEMORY)
            try:
                queue.use_gather(moved.cache.layout, 4, pool)
            except (DriverError, PoolExhausted):
                assert pool is None or pool.usage().used_bytes == 0, f"call {n}"
                assert host.live_objects() == before and queue.gather is None, f"call {n}"
                num_refused += 1
            host.fail_call(0, 0)
    assert num_refused > 12
    if pooled:
        pool.close()


def test_the_probe_tells_what_moves_each_group_and_measures_it(device, moved, d2h, h2d):
    layout = moved.cache.layout
    assert layout.planner == ()
    saves = probe_layout(layout, d2h, measure=True)
    loads = probe_layout(layout, h2d, measure=True)
    assert layout.planner == (*saves, *loads)
    for direction, rows in (("D2H", saves), ("H2D", loads)):
        [row] = rows
        assert (row.direction, row.piece_bytes, row.rows, row.num_groups) == (direction, 256, 4, 2)
        assert row.pitch_bytes == 256 * NUM_BLOCKS
        assert row.strided_gbps > 0 and row.batch_gbps > 0
        assert row.backend == ("strided" if row.strided_gbps * 1.15 >= row.batch_gbps else "batch") or row == loads[0]


@pytest.mark.host
def test_the_probe_neither_compares_nor_measures_a_shape_that_is_known(device, moved, d2h, h2d, host):
    known = {}
    rows = [probe_layout(moved.cache.layout, queue, measure=True, known=known) for queue in (d2h, h2d)]
    other = DeviceCache(device, num_blocks=NUM_BLOCKS)
    host.count_calls()
    assert [probe_layout(other.layout, queue, measure=True, known=known) for queue in (d2h, h2d)] == rows
    assert host.num_calls("memcpy_2d_async") == host.num_calls("mem_host_alloc") == 0
    probe_layout(other.layout, d2h, measure=True)
    assert host.num_calls("memcpy_2d_async") > 0
    other.close()


@pytest.mark.host
def test_strided_copies_that_are_slow_are_not_used(device, moved, host):
    """A delay before each operation makes a strided copy (4 rows) dearer than a batch (256 pieces)."""
    with TransferQueue(device, "D2H") as saves, TransferQueue(device, "H2D") as loads:
        for queue in (saves, loads):
            [row] = probe_layout(moved.cache.layout, queue)
            assert (row.backend, row.strided_gbps) == ("strided", None), "the host driver is not measured unless asked"
        cache = DeviceCache(device, "one_allocation", num_blocks=4, num_layers=4, piece_bytes=64 << 10)
        host.set_delay_us(300, 300)
        for queue in (saves, loads):
            [row] = probe_layout(cache.layout, queue, measure=True)
            assert row.backend == "batch" and row.strided_gbps * 1.15 < row.batch_gbps
        host.set_delay_us(0, 0)
        with PinnedPool(4 << 20, cache.block_bytes, device) as pool:
            for block in range(4):
                cache.write(block, content(block, 0, cache.block_bytes))
            host.count_calls()
            for queue, blocks in ((saves, [0, 1]), (loads, [2, 3])):
                queue.submit(cache.layout, blocks, pool, [0, 1], stream=moved.stream).wait(TIMEOUT_MS)
            assert host.num_calls("memcpy_2d_async") == 0
            assert [cache.read(2), cache.read(3)] == [cache.read(0), cache.read(1)]
        cache.close()


@pytest.mark.host
def test_probe_of_very_slow_copies_ends_with_single_blocks(device, host):
    cache = DeviceCache(device, "one_allocation", num_blocks=4, num_layers=4, piece_bytes=64 << 10)
    host.set_delay_us(10_000, 10_000)
    host.count_calls()
    with TransferQueue(device, "D2H") as saves:
        [row] = probe_layout(cache.layout, saves, measure=True)
    host.set_delay_us(0, 0)
    assert row.strided_gbps and row.batch_gbps
    assert host.num_calls("memcpy_2d_async") < 10, "trials of 32 blocks, which take 0.3 s each"
    cache.close()


def test_only_the_named_blocks_and_slots_are_written(moved, d2h, h2d):
    moved.fill_slots()
    moved.submit(h2d, [2], [5]).wait(TIMEOUT_MS)
    assert moved.cache.read(2) == moved.record(5)
    assert all(set(moved.cache.read(block)) == {0xEE} for block in range(NUM_BLOCKS) if block != 2)
    moved.submit(d2h, [0], [7]).wait(TIMEOUT_MS)
    assert set(bytes(moved.pool.view(7))) == {0xEE}
    assert all(bytes(moved.pool.view(slot)) == moved.record(slot) for slot in range(7))


def test_jobs_of_one_queue_run_in_their_order(moved, h2d):
    moved.fill_slots()
    jobs = [moved.submit(h2d, [3], [slot]) for slot in range(NUM_BLOCKS)]
    jobs[-1].wait(TIMEOUT_MS)
    assert all(job.done() for job in jobs)
    assert moved.cache.read(3) == moved.record(NUM_BLOCKS - 1)


@pytest.mark.host
def test_jobs_end_in_their_order_and_poll_counts_them(moved, d2h, host):
    host.hold()
    jobs = [moved.submit(d2h, [block], [block]) for block in range(3)]
    assert [job.done() for job in jobs] == [False] * 3
    assert d2h.poll() == 0
    assert d2h.jobs_in_flight == 3
    host.release()
    retired = 0
    while d2h.jobs_in_flight:
        retired += d2h.poll()
        done = [job.done() for job in jobs]
        assert done == sorted(done, reverse=True)
    assert all(done) and retired <= 3 and d2h.poll() == 0


def test_a_copy_waits_for_the_callers_stream(moved, d2h, host):
    host.set_delay_us(500, 2000, seed=1)
    for byte in range(1, 6):
        moved.cache.scribble(0, byte, moved.stream)
        job = moved.submit(d2h, [0], [0])
        job.wait_on(moved.stream)
        moved.cache.scribble(0, 0x99, moved.stream)
        job.wait(TIMEOUT_MS)
        assert set(bytes(moved.pool.view(0))) == {byte}


def test_a_reader_waits_on_the_job(moved, h2d, host):
    moved.fill_slots()
    host.set_delay_us(500, 2000, seed=1)
    for slot in range(NUM_BLOCKS):
        job = moved.submit(h2d, [1], [slot])
        assert job.submitted
        job.wait_on(moved.stream)
        assert moved.cache.read(1, moved.stream) == moved.record(slot)


@pytest.mark.host
def test_a_queue_with_all_jobs_taken_answers_none(device, moved, host):
    with TransferQueue(device, "D2H", max_jobs=2) as queue:
        host.hold()
        jobs = [moved.submit(queue, [block], [block]) for block in range(2)]
        assert moved.submit(queue, [2], [2]) is None
        assert moved.submit(queue, [], []).done(), "nothing to move needs no job"
        host.release()
        jobs[0].wait(TIMEOUT_MS)
        job = moved.submit(queue, [2], [2])
        job.wait(TIMEOUT_MS)
        assert job.num_blocks == 1


@pytest.mark.host
def test_wait_gives_up_after_its_timeout_and_the_job_goes_on(moved, d2h, host):
    host.hold()
    job = moved.submit(d2h, [0], [0])
    for timeout_ms in (0, 20):
        with pytest.raises(TimeoutError, match=f"not done after {timeout_ms} ms"):
            job.wait(timeout_ms)
    host.release()
    job.wait(TIMEOUT_MS)
    assert job.num_blocks == 1


def test_a_job_without_blocks_is_done_at_once(moved, d2h):
    job = moved.submit(d2h, [], [])
    assert job.done() and job.num_blocks == 0
    job.wait(0)
    job.wait_on(moved.stream)


def test_a_dropped_job_is_carried_out(moved, h2d):
    moved.fill_slots()
    moved.submit(h2d, [4], [6])
    gc.collect()
    moved.submit(h2d, [5], [6]).wait(TIMEOUT_MS)
    assert moved.cache.read(4) == moved.record(6)
    assert h2d.jobs_in_flight == 0


def test_a_job_keeps_its_queue_and_pool(device, stream, host):
    moved = Moved(device, stream)
    moved.fill_slots()
    queue = TransferQueue(device, "H2D")
    host.hold()
    job = moved.submit(queue, [0], [6])
    del moved.pool, queue
    gc.collect()
    host.release()
    job.wait(TIMEOUT_MS)
    assert moved.cache.read(0) == moved.record(6)
    moved.cache.close()


def test_retired_jobs_are_told_to_listeners(device, moved):
    signals = JobSignals()
    file = os.eventfd(0, os.EFD_NONBLOCK)
    with TransferQueue(device, "D2H", signals=signals) as queue:
        signals.add_listener(file)
        for block in range(3):
            moved.submit(queue, [block], [block]).wait(TIMEOUT_MS)
        assert os.eventfd_read(file) == 3
        signals.remove_listener(file)
        moved.submit(queue, [0], [0]).wait(TIMEOUT_MS)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(file)
    os.close(file)


def test_threads_share_a_queue(device, moved, h2d):
    """Records are used again and again by all of them."""
    moved.fill_slots()
    wrong = []

    def work(block):
        for round_number in range(100):
            slot = (block + round_number) % NUM_BLOCKS
            moved.submit(h2d, [block], [slot]).wait(TIMEOUT_MS)
            if moved.cache.read(block) != moved.record(slot):
                wrong.append((block, slot))

    threads = [threading.Thread(target=work, args=(block,)) for block in range(NUM_BLOCKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "slots", "match"),
    [
        ([0, NUM_BLOCKS], [0, 1], r"block_ids\[1\] is 8, outside the layout's 0 to 7"),
        ([-1], [0], r"block_ids\[0\] is -1"),
        (np.array([2**64 - 1], dtype=np.uint64), [0], r"block_ids\[0\] is -1"),
        ([0.5], [0], "integers, got shape .* dtype float64"),
        ([True], [0], "integers, got shape .* dtype bool"),
        ([[0]], [0], r"one-dimensional array of integers, got shape \(1, 1\)"),
        ([0, 1], [0], "2 block ids but 1 slots; they must pair up"),
        ([0], [0, 1], "1 block ids but 2 slots"),
        ([0, 1], [0, NUM_BLOCKS], r"slot_ids\[1\] is 8"),
        ([0], np.array([-1]), r"slot_ids\[0\] is -1"),
        ([0], np.array([2**32 + 1]), r"slot_ids\[0\] is 4294967297"),
        ([0], [1.5], "slot_ids must be .* integers, got shape .* dtype float64"),
        ([0], [[1]], r"slot_ids must be a one-dimensional array of integers, got shape \(1, 1\)"),
    ],
)
def test_unfit_ids_are_refused_before_anything_is_copied(moved, d2h, blocks, slots, match):
    with pytest.raises(ValueError, match=match):
        moved.submit(d2h, blocks, slots)
    assert d2h.jobs_in_flight == 0
    assert not any(any(bytes(moved.pool.view(slot))) for slot in range(NUM_BLOCKS))


@pytest.mark.host
def test_a_slot_that_is_not_registered_is_refused(device, moved, d2h, host):
    host.fail_call(3, 2, field="mem_host_register")
    with PinnedPool(64 * 4096, 4096, device, first_chunk_bytes=4096, chunk_bytes=4096) as pool:
        with pytest.raises(PoolExhausted):
            pool.wait_ready(TIMEOUT_MS)
        d2h.submit(moved.cache.layout, [0], pool, [1], stream=moved.stream).wait(TIMEOUT_MS)
        with pytest.raises(ValueError, match=r"slot_ids\[0\] is 2, and 2 slots are registered"):
            d2h.submit(moved.cache.layout, [0], pool, [2], stream=moved.stream)


def test_a_closed_pool_is_refused(moved, d2h):
    moved.pool.close()
    with pytest.raises(EngineClosed, match="the pool is closed"):
        moved.submit(d2h, [0], [0])
    assert d2h.jobs_in_flight == 0


def test_a_block_larger_than_a_slot_is_refused(device, moved, d2h):
    too_small = moved.cache.block_bytes - 1
    with (
        PinnedPool(1 << 20, too_small, device) as pool,
        pytest.raises(
            ValueError, match=rf"blocks of {too_small + 1} bytes exceed the payload of a slot \({too_small}\)"
        ),
    ):
        d2h.submit(moved.cache.layout, [0], pool, [0], stream=moved.stream)


@pytest.mark.parametrize("stream", [None, "stream", -1])
def test_an_unfit_stream_is_refused(moved, d2h, stream):
    with pytest.raises((ValueError, TypeError), match="stream"):
        d2h.submit(moved.cache.layout, [0], moved.pool, [0], stream=stream)
    assert d2h.jobs_in_flight == 0


@pytest.mark.host
def test_a_capturing_stream_and_one_of_another_device_are_refused(moved, d2h, host):
    assert host.begin_capture(moved.stream.handle) == 0
    with pytest.raises(ValueError, match="capturing"):
        moved.submit(d2h, [0], [0])
    assert host.end_capture(moved.stream.handle) == (0, 0)
    with (
        kvortex.Device.open("host:1") as other,
        kvortex.Stream.create(other) as foreign,
        pytest.raises(ValueError, match="another device"),
    ):
        moved.submit(d2h, [0], [0], stream=foreign)
    assert d2h.jobs_in_flight == 0


def test_unfit_queues_are_refused(device):
    with pytest.raises(ValueError, match="direction must be 'D2H' or 'H2D', got 'save'"):
        TransferQueue(device, "save")
    for max_jobs in (0, (1 << 20) + 1):
        with pytest.raises(ValueError, match=f"max_jobs must be 1 to 1048576, got {max_jobs}"):
            TransferQueue(device, "D2H", max_jobs=max_jobs)
    with TransferQueue(device, "H2D") as queue:
        assert queue.direction == "H2D"
        with pytest.raises(RuntimeError, match="once"):
            queue.__init__(device, "H2D")


# ---- the end, and failures on the way -------------------------------------------------------------------------------


@pytest.mark.host
def test_close_waits_for_the_jobs_in_flight(device, moved, host):
    moved.cache.write(0, moved.record(3))
    queue = TransferQueue(device, "D2H")
    host.hold()
    job = moved.submit(queue, [0], [0])
    thread = threading.Thread(target=queue.close, args=(TIMEOUT_MS,))
    thread.start()
    host.release()
    thread.join(20)
    assert not thread.is_alive()
    assert job.done() and job.num_blocks == 1
    assert bytes(moved.pool.view(0)) == moved.record(3)


@pytest.mark.host
def test_close_fails_the_jobs_that_do_not_end_and_wakes_their_waiters(device, moved, host):
    queue = TransferQueue(device, "D2H")
    host.hold()
    jobs = [moved.submit(queue, [block], [block]) for block in range(2)]
    errors = []

    def wait():
        try:
            jobs[0].wait()
        except DriverError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    queue.close(timeout_ms=20)
    thread.join(20)
    assert len(errors) == 1
    for call in (jobs[1].wait, lambda: jobs[1].num_blocks, lambda: jobs[1].wait_on(moved.stream)):
        with pytest.raises(DriverError):
            call()
    assert jobs[1].done()
    host.release()


def test_a_closed_queue_refuses_work_and_close_is_idempotent(moved, d2h):
    job = moved.submit(d2h, [0], [0])
    d2h.close()
    d2h.close()
    assert job.done() and job.num_blocks == 1
    job.wait_on(moved.stream)
    for call in (d2h.poll, lambda: probe_layout(moved.cache.layout, d2h), lambda: moved.submit(d2h, [0], [0])):
        with pytest.raises(EngineClosed, match="closed"):
            call()


@pytest.mark.host
def test_everything_is_given_back(device, host):
    before = host.live_objects()
    TransferQueue(device, "D2H", max_jobs=5).close()
    assert host.live_objects() == before


@pytest.mark.host
@pytest.mark.parametrize(("field", "n"), [("stream_create", 1), ("event_create", 1), ("event_create", 6)])
def test_a_queue_that_cannot_be_made_leaves_nothing(device, host, field, n):
    before = host.live_objects()
    host.fail_call(n, 2, field=field)
    with pytest.raises(DriverError) as caught:
        TransferQueue(device, "D2H", max_jobs=4)
    assert caught.value.code == 2
    assert host.live_objects() == before


@pytest.mark.host
@pytest.mark.parametrize("field", ["event_record", "stream_wait_event", "memcpy_batch_async"])
def test_a_refused_submit_leaves_no_job_and_the_next_one_works(moved, d2h, host, field):
    moved.cache.write(0, moved.record(3))
    host.fail_call(1, 999, field=field)
    with pytest.raises(DriverError) as caught:
        moved.submit(d2h, [0, 1], [0, 1])
    assert caught.value.code == 999
    assert d2h.jobs_in_flight == 0
    moved.submit(d2h, [0], [4]).wait(TIMEOUT_MS)
    assert bytes(moved.pool.view(4)) == moved.record(3)


@pytest.mark.host
def test_a_dead_context_fails_every_job_and_the_queue_closes(device, moved, host):
    queue = TransferQueue(device, "D2H")
    host.hold()
    jobs = [moved.submit(queue, [block], [block]) for block in range(3)]
    host.kill(0, 700)
    host.release()
    for job in jobs:
        with pytest.raises(DriverError) as caught:
            job.wait(TIMEOUT_MS)
        assert caught.value.code == 700
    with pytest.raises(DriverError):
        moved.submit(queue, [0], [0])
    queue.close(timeout_ms=100)


@pytest.mark.host
def test_poll_where_the_context_cannot_be_entered_ends_what_is_polled_for(device, moved, host):
    """Whoever asks nothing but `poll` and the outcome must not ask for ever."""
    queue = TransferQueue(device, "D2H")
    host.hold()
    job = moved.submit(queue, [0], [0])
    host.fail_call(1, 700, field="ctx_push_current")
    with pytest.raises(DriverError) as caught:
        queue.poll()
    assert caught.value.code == 700
    assert job.done()
    with pytest.raises(DriverError):
        job.wait(TIMEOUT_MS)
    with pytest.raises(DriverError):
        moved.submit(queue, [0], [0])
    host.release()
    queue.close(timeout_ms=100)


# ---- withdrawn jobs --------------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize("is_closed", [False, True])
def test_of_a_job_that_is_over_nothing_can_be_withdrawn_nor_of_one_that_was_never_handed_over(device, moved, is_closed):
    signals = JobSignals()
    with TransferQueue(device, "H2D", signals=signals) as h2d, Submitter(device, signals, [h2d]):
        deferred = h2d.submit(moved.cache.layout, [0, 1], moved.pool, [0, 1], stream=moved.stream, deferred=True)
        deferred.wait(TIMEOUT_MS)
        jobs = [deferred, moved.submit(h2d, [2], [2]), moved.submit(h2d, [], [])]
        if is_closed:
            h2d.close(TIMEOUT_MS)
        assert [h2d.withdraw(job) for job in jobs] == [False] * 3
        assert [job.num_blocks for job in jobs] == [2, 1, 0]
