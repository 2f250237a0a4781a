"""An engine that nobody shut down: the garbage collector ends its tiering, wherever it finds the engine."""

import gc
import threading

import pytest
from tier_rig import SECONDS, keys_of
from tiered_rig import EngineRig, wait_until

IDS = range(10)


@pytest.fixture
def dropped(tmp_path):
    """Return what makes garbage of an engine, which only the collector can find; it answers the engine's tiering."""
    gc.disable()

    def drop(rig):
        tiering = rig.engine.tiering
        rig.engine.itself = rig.engine
        vars(rig).clear()
        return tiering

    yield drop
    gc.enable()


def require_ended(tiering, path):
    """Its thread is gone, and what was written is there for the next engine."""
    tiering._thread.join(30)
    assert not tiering._thread.is_alive(), "the collector waits for what it has interrupted"
    wait_until(lambda: tiering._is_closed)
    with EngineRig(path) as rig:
        assert set(rig.adopted().found(IDS)) == set(IDS)


def collect_once(hook_of, name, ready=None):
    """Let the next call of a method run the garbage collector first, as any allocation may."""
    method = getattr(hook_of, name)

    def collecting(*args, **settings):
        setattr(hook_of, name, method)
        if ready is not None:
            ready.wait()
        gc.collect()
        return method(*args, **settings)

    setattr(hook_of, name, collecting)


def test_the_collector_may_find_it_in_the_thread_of_tiering(tmp_path, dropped):
    rig = EngineRig(tmp_path)
    rig.save(IDS)
    assert rig.engine.flush(SECONDS) == 0
    is_dropped = threading.Event()
    collect_once(rig.engine.tiering._cleaner, "step", is_dropped)
    rig.engine.tiering.wake()
    tiering = dropped(rig)
    is_dropped.set()
    require_ended(tiering, tmp_path)


def test_the_collector_may_find_it_while_a_prefetch_is_closed(tmp_path, dropped):
    rig = EngineRig(tmp_path)
    rig.save(IDS)
    assert rig.engine.flush(SECONDS) == 0
    prefetch = rig.engine.prefetch(keys_of(IDS))
    prefetch.wait(SECONDS)
    tiering = dropped(rig)
    collect_once(tiering, "wake")
    closing = threading.Thread(target=prefetch.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive(), "the collector waits for the lock that its own thread holds"
    require_ended(tiering, tmp_path)


def test_an_engine_that_is_dropped_in_the_open_is_ended_soon(tmp_path):
    rig = EngineRig(tmp_path)
    rig.save(IDS)
    assert rig.engine.flush(SECONDS) == 0
    tiering = rig.engine.tiering
    vars(rig).clear()
    require_ended(tiering, tmp_path)
