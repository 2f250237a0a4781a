"""An engine that is killed at any moment: what the next one finds in its folder is right, or not there."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed_engine import NAMES, NUM_KEYS
from tiered_rig import EngineRig

HERE = Path(__file__).parent
SOAK = os.environ.get("KVORTEX_SOAK") == "1"
ROUNDS = 1000 if SOAK else 54
TIERS = [(NUM_KEYS + 20, False), (36, False), (NUM_KEYS + 20, True)]  # with room for all, and one that evicts; coded


class Killed:
    """What a killed engine had said of its blocks."""

    def __init__(self, weights):
        self.weights, self.kept, self.gone = weights, set(), set()

    def hear(self, what, text):
        if what == "cleared":
            self.weights, self.kept, self.gone = text, set(), set()
        else:
            setattr(self, what, {int(number) for number in text.split(",") if number})


@pytest.fixture
def kill_one():
    """Return a function that lets an engine work in a folder for a moment and kills it; it answers a `Killed`."""
    path = os.pathsep.join([str(HERE), str(HERE.parent / "tiers"), str(HERE.parent), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-W", "ignore", HERE / "killed_engine.py"]
    engines = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env={**os.environ, "PYTHONPATH": path})

    def kill(folder, tier_slots, coded, weights, rng):
        killed = Killed(weights)
        fields = folder, tier_slots, "coded" if coded else "exact", weights, rng.randrange(1 << 30)
        print(*fields, sep="\t", file=engines.stdin, flush=True)
        pid = int(engines.stdout.readline().removeprefix("pid "))
        time.sleep(rng.uniform(0, 0.15))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while True:
            what, _, text = engines.stdout.readline().rstrip("\n").partition(" ")
            if what == "dead":
                assert int(text) == signal.SIGKILL, "the engine failed before it was killed; see its output"
                return killed
            killed.hear(what, text)

    yield kill
    engines.stdin.close()
    engines.wait()


def look(folder, tier_slots, coded, weights):
    """The blocks of these weights that a new engine finds, compared with what they were."""
    weights = None if weights == "-" else weights
    with EngineRig(folder, tier_slots=tier_slots, coded=coded, weights=weights) as rig:
        return set(rig.adopted().found(range(NUM_KEYS)))


@pytest.mark.timeout(7200 if SOAK else 300)
def test_a_killed_engine_leaves_no_wrong_block(tmp_path, kill_one, seed):
    """Its blocks are those of the weights that the next one names; blocks of unnamed ones died with it."""
    rng, num_found, num_kept, num_gone = random.Random(seed), 0, 0, 0
    for round_ in range(ROUNDS):
        tier_slots, coded = TIERS[round_ % len(TIERS)]
        folder, weights = tmp_path / f"{tier_slots} {coded}", rng.choice(["-", *NAMES])
        killed = kill_one(folder, tier_slots, coded, weights, rng)
        if tier_slots > NUM_KEYS and killed.weights != "unnamed":
            found = look(folder, tier_slots, coded, killed.weights)
            assert killed.kept <= found, "a flushed block was lost"
            assert not killed.gone & found, "a block that was forgotten came back"
            num_kept, num_gone = num_kept + len(killed.kept), num_gone + len(killed.gone)
        num_found += len(look(folder, tier_slots, coded, rng.choice(["-", *NAMES])))
    print(f"{ROUNDS} engines killed; {num_found} blocks found right, {num_kept} flushed ones all, {num_gone} gone")
    assert num_found and num_kept and (num_gone or not SOAK)  # on a slow machine few get so far
