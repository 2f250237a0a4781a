"""A tier that has no room just now, and one that has little."""

import pytest
from tier_rig import SECONDS
from tiered_rig import POOL_SLOTS, EngineRig, wait_until

IDS, NEW = range(20), range(100, 120)


def test_what_is_saved_before_the_folder_is_known_is_written_when_it_is(tmp_path, faulty_disk):
    """A tier that knows of no slot yet is not one that has no room."""
    with EngineRig(tmp_path) as rig:
        rig.save(IDS)
    next(tmp_path.rglob("manifest.sqlite")).unlink()
    faulty_disk.plan("read", "hang", nth=4)  # behind the pages of the segments
    with EngineRig(tmp_path) as rig:
        faulty_disk.wait_hanging()
        assert rig.save(NEW[:4]) == 4
        assert rig.engine.flush(100) >= 4
        rig.save(NEW[4:8])
        faulty_disk.mend()
        wait_until(lambda: rig.known(NEW[:8]) == [*NEW[:8]])
        assert rig.engine.flush(SECONDS) == 0


@pytest.mark.parametrize("tier_slots", [1, 2, POOL_SLOTS // 2])
def test_a_tier_smaller_than_ram_has_what_was_flushed_last(tmp_path, tier_slots):
    with EngineRig(tmp_path, tier_slots=tier_slots) as rig:
        rig.save(IDS)
        rig.engine.flush(SECONDS)
        rig.require_quiet()
        rig.forget_ram()
        assert len(rig.found(IDS)) == tier_slots
