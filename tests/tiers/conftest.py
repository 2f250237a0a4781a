"""Stores to test, and system calls that fail."""

import pytest
from faulty_calls import faulty, faulty_library  # noqa: F401
from tier_rig import NUM_SLOTS, RIGS, SECONDS, SEGMENT_BYTES, SPACE, TAG, FolderRig, make_pool, quota_of

from kvortex.tiers.disk.tier import DiskTier


@pytest.fixture(params=RIGS)
def rig(request, tmp_path):
    """Every store in turn."""
    made = RIGS[request.param](tmp_path)
    yield made
    made.close()


@pytest.fixture
def remote(tmp_path):
    """A store on a server."""
    made = FolderRig(tmp_path)
    yield made
    made.close()


@pytest.fixture
def pool():
    with make_pool() as made:
        yield made


@pytest.fixture
def open_tier(tmp_path, pool):
    """Return a function that opens a tier in one folder; by default without a manifest, and waits for the adoption."""

    def make(tag=TAG, wait=True, manifest=False, **settings):
        for left in [] if manifest else tmp_path.rglob("manifest.sqlite"):
            left.unlink()
        settings = {"disk_bytes": quota_of(NUM_SLOTS), "segment_bytes": SEGMENT_BYTES, **settings}
        tier = DiskTier(tmp_path, **settings).open(pool, namespace=SPACE, tag=tag)
        assert not wait or tier.adoption.wait(SECONDS)
        return tier

    return make
