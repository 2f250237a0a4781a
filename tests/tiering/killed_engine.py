"""A process whose children each use an engine at random until they are killed; told of by its standard output.

A line of input is a folder, the slots of its tier, "coded" or "exact", the weights at the start ("-": unnamed) and a
seed. A child writes:

    pid N           it is there
    kept A,B,...    the tier has these blocks of the current weights, durably as far as a killed process goes
    gone A,B,...    these were forgotten, durably; nobody saves them again
    cleared NAME    from now on the weights are these; "unnamed": no other process has any use for their blocks
"""

import os
import sys
import traceback

import numpy as np
from tier_rig import keys_of
from tiered_rig import EngineRig

NUM_KEYS = 60
NAMES = ("step 1", "step 2")


def tell(what, *numbers):
    os.write(1, f"{what} {','.join(map(str, numbers))}\n".encode())


def use(path, tier_slots, coded, weights, rng):
    rig = EngineRig(path, tier_slots=tier_slots, coded=coded, weights=weights)
    alive, unnamed, gone = list(range(NUM_KEYS)), 0, []
    tell("pid", os.getpid())
    if rng.integers(2):
        rig.adopted()
    while True:
        verb = rng.choice(["save"] * 4 + ["load"] * 4 + ["prefetch", "flush", "flush", "discard", "clear", "restart"])
        ids = [int(i) for i in rng.permutation(alive)[: rng.integers(1, 9)]]
        if verb == "save":
            rig.save(ids)
        elif verb == "load":
            for key_id in ids:
                rig.load([key_id], promote_timeout_ms=int(rng.choice([0, 1, 1000])))
        elif verb == "prefetch":
            rig.engine.prefetch(keys_of(ids))  # dropped while it runs
        elif verb == "flush":
            if rig.engine.flush(10_000) == 0 and not rig.tier.is_adopting:  # else more may have to make room
                tell("kept", *rig.known(alive))
                tell("gone", *gone)
        elif verb == "discard" and not unnamed and len(alive) > NUM_KEYS // 2:
            tell("kept")  # not these any more, wherever in the discard it dies
            rig.engine.discard_blocks(keys_of(ids))
            alive = [i for i in alive if i not in ids]
            gone += ids
        elif verb == "restart" and not rig.weights.startswith("unnamed"):
            tell("kept")  # while the next one adopts, what it writes takes the place of what it knows
            rig.close()  # killed here, it may leave a part of a manifest
            weights = rig.weights if rig.weights in NAMES else None
            rig = EngineRig(path, tier_slots=tier_slots, coded=coded, weights=weights)
        elif verb == "clear" and rng.integers(3) == 0:
            name = str(rng.choice(NAMES)) if rng.integers(2) else None
            unnamed += 1  # an earlier copy of what is forgotten from here on may lie where nobody knows of it
            tell("kept")
            rig.engine.clear(weights=name)
            rig.weights = name or f"unnamed {os.getpid()} {unnamed}"
            gone, alive = [], list(range(NUM_KEYS))
            tell("cleared", name or "unnamed")


def main():
    for line in sys.stdin:  # a process for each, without the price of an interpreter; nothing is open yet
        path, tier_slots, coding, weights, seed = line.rstrip("\n").split("\t")
        weights, rng = None if weights == "-" else weights, np.random.default_rng(int(seed))
        child = os.fork()
        if child == 0:
            try:
                use(path, int(tier_slots), coding == "coded", weights, rng)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        status = os.waitpid(child, 0)[1]
        tell("dead", status)


if __name__ == "__main__":
    main()
