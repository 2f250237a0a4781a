"""Engines that share a folder: what one saved, another finds."""

import pytest
from tiered_rig import EngineRig, keys_of, wait_until

from kvortex import ObjectTier


@pytest.fixture
def open_engine(tmp_path):
    """Return a function that opens an engine over one folder."""
    opened = []

    def make(weights=None, **settings):
        tier = ObjectTier(f"file://{tmp_path}/shared", **{"lookup_timeout_ms": 30_000, **settings})
        opened.append(EngineRig(tmp_path, tier=tier, weights=weights))
        return opened[-1]

    yield make
    for rig in opened:
        rig.close()


def test_what_one_engine_saved_another_finds(open_engine):
    a, b = open_engine(), open_engine()
    a.save(range(12))
    assert a.engine.flush() == 0
    assert b.load(range(12)) == 0, "b has not been told to ask"
    assert b.load(range(12), promote_timeout_ms=30_000) == 12
