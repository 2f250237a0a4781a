"""Weights that change while blocks are on their way to the disk."""

import itertools
import shutil
import threading

import pytest
from tier_rig import SECONDS, keys_of
from tiered_rig import EngineRig

IDS, LATER = range(8), range(8, 14)


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


class Counted:
    """An index or a catalogue whose calls by the tiering thread are counted with others', and one is interrupted."""

    def __init__(self, index, count):
        self._index, self._count = index, count

    def __getattr__(self, name):
        attribute = getattr(self._index, name)
        if not callable(attribute):
            return attribute

        def call(*args, **settings):
            self._count()
            return attribute(*args, **settings)

        return call


def change_at(rig, nth):
    """Let weights change, and a save of the new ones be over, right before the nth call; return who counts them."""
    tiering, calls = rig.engine.tiering, []

    def count():
        if threading.current_thread() is not tiering._thread:
            return
        calls.append(None)
        if len(calls) == nth:
            rig.engine.clear(weights="step 2")
            rig.weights = "step 2"
            rig.begin_save(IDS, blocks=range(16, 24)).wait(SECONDS)

    for part in (tiering._cleaner, tiering._promoter):
        part.index = Counted(rig.engine.index, count)
    rig.tier.catalogue = Counted(rig.tier.catalogue, count)
    return calls


@pytest.mark.timeout(600)
def test_weights_may_change_before_any_step_of_tiering(tmp_path):
    """Before each call that its thread makes to index and catalogue: nobody is served a block of other weights."""
    nth, num_calls, both = 0, 1, ("step 1", "step 2")
    while nth < num_calls:
        nth, folder = nth + 1, tmp_path / str(nth)
        with EngineRig(folder, weights="step 1", num_blocks=24) as rig:
            rig.save(IDS)
            assert rig.engine.flush(SECONDS) == 0
            rig.forget_ram()
            job = rig.begin_save(LATER, "step 1", LATER)
            calls = change_at(rig, nth)
            prefetch = rig.engine.prefetch(keys_of(IDS))
            prefetch.wait(SECONDS)
            job.wait(SECONDS)
            prefetch.close()
            rig.engine.flush(SECONDS)
            num_calls = len(calls)
            shutil.copytree(folder, folder / "killed")
            for i in [*IDS, *LATER]:
                before = rig.weights
                rig.load([i], among=lambda rig=rig, before=before: [before, rig.weights], promote_timeout_ms=SECONDS)
        for path, weights in itertools.product((folder, folder / "killed"), both):
            with EngineRig(path, weights=weights) as rig:
                rig.adopted().found([*IDS, *LATER])
        shutil.rmtree(folder)
    print(num_calls, "calls")
    assert num_calls > 20
