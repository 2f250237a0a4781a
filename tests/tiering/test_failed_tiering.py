"""What moves blocks to the tier and back fails as a whole: RAM serves on, and nobody waits."""

import pytest
from tier_rig import SECONDS, keys_of
from tiered_rig import EngineRig, wait_until

IDS = range(10)


class Broken:
    """A store that has no memory for a batch."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put(self, *args, **settings):
        raise MemoryError("no memory for a batch")


@pytest.fixture
def rig(tmp_path):
    """An engine whose tiering has failed, with blocks in RAM and others on the disk."""
    with EngineRig(tmp_path) as made:
        made.save(IDS)
        assert made.engine.flush(SECONDS) == 0
        made.forget_ram()
        made.tier.store = Broken(made.store)
        made.engine.discard_blocks(keys_of(IDS[:4]))
        made.save(IDS[:4])
        wait_until(lambda: not made.engine.tiering._thread.is_alive())
        yield made


def test_ram_is_loaded_by_those_who_would_wait_for_the_tier(rig):
    assert rig.load(IDS, promote_timeout_ms=SECONDS) == 4
    assert rig.load(IDS[5:], promote_timeout_ms=SECONDS) == 0


def test_a_prefetch_is_over_at_once_and_holds_nothing(rig):
    prefetch = rig.engine.prefetch(keys_of(IDS))
    prefetch.wait(SECONDS)
    assert rig.engine.index.num_pinned == 0
    assert rig.load(IDS, prefetched=prefetch) == 4
    assert rig.engine.index.num_pinned == 0


def test_a_flush_says_how_many_blocks_are_left(rig):
    assert rig.engine.flush() == 4


def test_all_else_goes_on(rig):
    assert rig.save(IDS[4:]) == 6 and rig.load(IDS) == 10
    assert rig.engine.check_blocks(keys_of(IDS)).leading == 10
    assert rig.engine.discard_blocks(keys_of(IDS[:1])) == 1
    rig.engine.clear()
    assert rig.load(IDS) == 0
    rig.engine.get_stats()
