import numpy as np

from kvortex import PinnedPool
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.disk._disk_store import DiskStore
from kvortex.tiers.disk.segments import Segments


def test_thin(tmp_path, seed):
    rng = np.random.default_rng(seed)
    pool = PinnedPool(64 << 20, 1 << 20, "host", header_bytes=4096)
    pool.wait_ready(10000)
    seg = Segments(
        [tmp_path], namespace=b"n" * 32, stride_bytes=pool.stride_bytes, disk_bytes=100 << 20, segment_bytes=32 << 20
    )
    print(seg.num_slots, seg.slots_per_segment)
    with DiskStore(pool, seg, namespace=b"n" * 32) as store:
        n = 20
        keys = np.frombuffer(rng.bytes(32 * n), np.uint8).reshape(n, 32)
        data = [rng.bytes(1 << 20) for _ in range(n)]
        for i in range(n):
            pool.view(i)[:] = data[i]
        b = store.put(np.arange(n) * 3, np.arange(n), keys, 1 << 20, tag=b"t" * 32, timeout_ms=10000)
        assert (b.wait() == 0).all(), b.statuses
        assert b.done()
        b = store.get(np.arange(n) * 3, np.arange(n) + 30, keys, 1 << 20, tag=b"t" * 32, timeout_ms=10000)
        assert (b.wait() == 0).all(), b.statuses
        for i in range(n):
            assert bytes(pool.view(30 + i)) == data[i]
        b = store.get(np.arange(n) * 3, np.arange(n) + 30, keys, 1 << 20, tag=b"u" * 32, timeout_ms=10000)
        assert (b.wait() == BlockStatus.TAG_DIFFERS).all()
        b = store.scan(np.arange(store.num_slots), tag=b"t" * 32, timeout_ms=10000)
        s = b.wait()
        assert (s[np.arange(n) * 3] == 0).all() and (s == 0).sum() == n
        assert (b.keys[np.arange(n) * 3] == keys).all()
        assert store.flush(5000) == 0
        print(store.stats())
