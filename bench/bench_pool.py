"""Pool: 256 MiB of pinned memory from nothing to registered and back, and the view of one slot."""

from kvortex import PinnedPool

POOL_BYTES = 256 << 20
PAYLOAD_BYTES = 2 << 20


def test_create_wait_ready_and_close(benchmark, device):
    def pin_and_unpin():
        with PinnedPool(POOL_BYTES, PAYLOAD_BYTES, device, first_chunk_bytes=64 << 20) as pool:
            pool.wait_ready(60_000)
            return pool.bytes_ready

    assert benchmark.pedantic(pin_and_unpin, rounds=3) == POOL_BYTES


def test_view(benchmark, device):
    with PinnedPool(16 << 20, PAYLOAD_BYTES, device) as pool:
        pool.wait_ready(60_000)
        view = benchmark.pedantic(pool.view, args=(5,), rounds=2000, warmup_rounds=10)
        assert view.nbytes == PAYLOAD_BYTES and not view.readonly
        view.release()
