"""Driver calls that fail: every one of a save and a load in turn, once for a moment and once for good."""

import pytest
from kvcache import DeviceCache, content, keys_of, make_engine

import kvortex

OUT_OF_MEMORY = 2
ILLEGAL_ADDRESS = 700

pytestmark = pytest.mark.host


def one_round(bench):
    """Save two blocks and load them back, with everything that orders them."""
    job = bench.engine.save_blocks(keys_of([1, 2]), [0, 1], stream=bench.stream)
    job.wait_on(bench.stream)
    job.wait(20_000)
    job = bench.engine.load_blocks(keys_of([1, 2]), [8, 9], stream=bench.stream)
    job.wait_on(bench.stream)
    job.wait(20_000)
    return job.num_blocks


@pytest.fixture(params=["one_allocation", "gathered"])
def filled(request, make_bench):
    bench = make_bench(4, request.param, max_jobs=4, num_transfer_streams=2)
    for block, key_id in enumerate([1, 2]):
        bench.cache.write(block, content(key_id, 0, bench.cache.block_bytes))
    bench.stream.synchronize()
    return bench


def test_every_call_may_fail_once_and_the_engine_goes_on(filled, host):
    bench = filled
    for n in range(1, 200):
        bench.engine.clear()
        bench.cache.fill(0x44)
        for block, key_id in enumerate([1, 2]):
            bench.cache.write(block, content(key_id, 0, bench.cache.block_bytes))
        host.fail_call(n, OUT_OF_MEMORY)
        loaded = None
        try:
            loaded = one_round(bench)
        except kvortex.DriverError as error:
            assert error.code == OUT_OF_MEMORY
        struck = not host.fail_pending()
        host.fail_call(0, 0)
        if loaded == 2:
            assert bench.holds(8, 1) and bench.holds(9, 2)
        # The same again without a fault: nothing may have been lost, leaked or left half-done.
        assert not bench.engine.failed
        bench.engine.clear()
        assert one_round(bench) == 2
        assert bench.holds(8, 1) and bench.holds(9, 2)
        stats = bench.engine.get_stats()
        assert stats.pool_blocks_used == 2, f"call {n} leaked a slot"
        assert stats.jobs_in_flight == 0, f"call {n} leaked a job record"
        if not struck:
            break
    assert n > 15, "the round makes more calls than this"


@pytest.mark.parametrize("n", range(1, 30))
def test_after_a_sticky_error_nothing_is_served_and_shutdown_ends(device, stream, host, n):
    cache = DeviceCache(device)
    engine = make_engine(cache, 4, max_jobs=4, num_transfer_streams=2, shutdown_timeout_ms=1000)
    cache.write(0, content(1, 0, cache.block_bytes))
    host.fail_call(n, ILLEGAL_ADDRESS, sticky=True)
    with pytest.raises(kvortex.KVortexError):
        for _ in range(30):
            engine.save_blocks(keys_of([1]), [0], stream=stream).wait(20_000)
            engine.load_blocks(keys_of([1]), [8], stream=stream).wait(20_000)
            engine.clear()
    host.fail_call(0, 0)
    with pytest.raises(kvortex.DriverError):
        engine.save_blocks(keys_of([2]), [0], stream=0)
    assert engine.check_blocks(keys_of([1])).leading == 0 or not engine.failed
    engine.shutdown()


def test_jobs_in_flight_fail_when_the_context_dies(bench, host):
    bench.saved([1])
    host.hold()
    load = bench.load([1], [8])
    save = bench.engine.save_blocks(keys_of([2]), [0], stream=bench.stream)
    host.kill(0, ILLEGAL_ADDRESS)
    host.release()
    for job in (load, save):
        with pytest.raises(kvortex.DriverError) as raised:
            job.wait(20_000)
        assert raised.value.code == ILLEGAL_ADDRESS
        with pytest.raises(kvortex.DriverError):
            job.num_blocks  # noqa: B018
        with pytest.raises(kvortex.DriverError):
            job.wait_on(bench.stream)
    assert bench.engine.failed
    assert bench.leading([1]) == 0
    stats = bench.engine.get_stats()
    assert stats.failed and stats.jobs_failed == 2
    assert stats.pool_blocks_used == 2, "a slot was reused although a copy may still run into it"


def test_shutdown_fails_jobs_that_do_not_end_and_leaks_their_memory(make_bench, host):
    bench = make_bench(4, shutdown_timeout_ms=50)
    bench.saved([1])
    host.hold()
    job = bench.load([1], [8])
    bench.engine.shutdown()
    with pytest.raises(kvortex.KVortexError):
        job.wait(20_000)
    host.release()
    bench.stream.synchronize()


@pytest.mark.parametrize("shape", ["one_allocation", "gathered"])
def test_failed_creation_gives_everything_back(device, host, shape):
    cache = DeviceCache(device, shape)
    before = host.live_objects()
    for n in range(1, 400):
        host.fail_call(n, OUT_OF_MEMORY)
        try:
            engine = make_engine(cache, 4, max_jobs=3, num_transfer_streams=2)
        except (kvortex.DriverError, kvortex.PoolExhausted):
            pass
        else:
            host.fail_call(0, 0)
            engine.shutdown()
            if n > 20:
                break
        host.fail_call(0, 0)
        assert host.live_objects() == before, f"call {n} of the creation leaked"
    assert 20 < n < 399


def test_strided_refused_at_the_first_load_falls_back_within_the_call(bench, host):
    assert bench.engine.get_stats().strided
    bench.saved([1])
    host.fail_call(1, 1, field="memcpy_2d_async")
    job = bench.load([1], [8])
    job.wait(20_000)
    assert bench.holds(8, 1)
    assert not bench.engine.get_stats().strided
    bench.load([1], [9]).wait(20_000)
    assert bench.holds(9, 1)


def test_driver_without_batches_is_served_copy_by_copy(make_bench, host):
    bench = make_bench(4, "separate_allocations")
    host.fail_call(1, 801, field="memcpy_batch_async")
    bench.saved([1])
    bench.load([1], [8]).wait(20_000)
    assert bench.holds(8, 1)
