"""Weights that change while blocks are on their way to the disk."""

from tier_rig import SECONDS
from tiered_rig import EngineRig

IDS = range(8)


class Interrupted:
    """An index with something that others do right before the cleaner takes blocks."""

    def __init__(self, index, act):
        self._index, self._act = index, act

    def __getattr__(self, name):
        return getattr(self._index, name)

    def coldest(self, n):
        act, self._act = self._act, lambda: None
        act()
        return self._index.coldest(n)


def test_blocks_of_new_weights_never_go_to_the_disk_under_the_old_name(tmp_path):
    """The cleaner has read which weights there are; then they change, and what is saved is the first that it takes."""
    with EngineRig(tmp_path, weights="step 1") as rig:

        def change():
            rig.engine.clear(weights="step 2")
            rig.weights = "step 2"
            assert rig.save(IDS) == len(IDS)

        rig.engine.tiering._cleaner.index = Interrupted(rig.engine.index, change)
        assert rig.engine.flush(SECONDS) == 0
    for weights in ("step 1", "step 2"):
        with EngineRig(tmp_path, weights=weights) as rig:
            there = rig.adopted().found(IDS)
            assert there == ([] if weights == "step 1" else [*IDS])
