"""Threads use an engine over RAM and a faulty disk at random: no wrong block, and nothing is left behind."""

import contextlib
import gc
import os
import random
import threading

import pytest
from faulty_store import FAULTS, FaultyStore
from tier_rig import SECONDS, keys_of, open_now, require_no_more
from tiered_rig import EngineRig, wait_until

from kvortex import TierError

SOAK = os.environ.get("KVORTEX_SOAK") == "1"
BLOCK_OPERATIONS = 1_000_000 if SOAK else 50_000
CHAIN_BLOCKS, NUM_CHAINS, NUM_THREADS = 6, 20, 4
ALL = range(CHAIN_BLOCKS * NUM_CHAINS)
NAMES = ("step 1", "step 2", None)


class Weights:
    """Which weights the model has had. Nobody saves while they change; loads may go on."""

    def __init__(self, engine, first):
        self._engine, self.names = engine, [first]
        self._changed, self._num_savers = threading.Condition(), 0

    @property
    def age(self):
        return len(self.names) - 1

    @contextlib.contextmanager
    def stay(self):
        """They stay as they are; the current ones."""
        with self._changed:
            self._num_savers += 1
        yield self.names[-1]
        with self._changed:
            self._num_savers -= 1
            self._changed.notify_all()

    def change(self, name):
        with self._changed:
            self._changed.wait_for(lambda: not self._num_savers)
            self._engine.clear(weights=name)
            self.names.append(name or f"unnamed {len(self.names)}")


def flush(engine, timeout_ms):
    """The kernel tells a sync of direct writes that met the faulty store's buffered ones on the same pages."""
    with contextlib.suppress(TierError):
        engine.flush(timeout_ms)


class Worker(threading.Thread):
    """One caller with memory of its own; keys and weights are everybody's."""

    def __init__(self, rig, weights, number, seed):
        super().__init__()
        self.rig, self.engine, self.weights = rig, rig.engine, weights
        self.blocks = range(number * CHAIN_BLOCKS, (number + 1) * CHAIN_BLOCKS)
        self.random, self.held, self.job = random.Random(seed * 100 + number), [], None
        self.num_blocks = self.num_loaded = 0
        self.error = None

    def run(self):
        verbs = [self.save] * 40 + [self.load] * 40 + [self.prefetch] * 12 + [self.discard] * 2 + [self.look] * 5
        try:
            while self.num_blocks < BLOCK_OPERATIONS // NUM_THREADS:
                self.random.choice(verbs)()
                if self.random.random() < 0.002:
                    self.weights.change(self.random.choice(NAMES))
                if self.random.random() < 0.002:
                    flush(self.engine, 20)
        except BaseException as error:  # for the main thread
            self.error = error
        finally:
            self.held.clear()
            self.settle()

    def chain(self):
        first = self.random.randrange(NUM_CHAINS) * CHAIN_BLOCKS
        key_ids = range(first, first + self.random.randint(1, CHAIN_BLOCKS))
        self.num_blocks += len(key_ids)
        return key_ids, self.random.sample(self.blocks, len(key_ids))

    def settle(self):
        """Memory of the last job may be used again."""
        if self.job is not None:
            self.job.wait(SECONDS)
        self.job = None

    def save(self):
        key_ids, blocks = self.chain()
        self.settle()
        with self.weights.stay() as weights:
            deferred = self.random.random() < 0.3
            self.job = self.rig.begin_save(key_ids, weights, blocks, after=keys_of([]), deferred=deferred)
        if self.random.random() < 0.5:
            self.settle()

    def load(self):
        key_ids, blocks = self.chain()
        self.settle()
        how = {"promote_timeout_ms": self.random.choice([None, 0, 2, 200])}
        if self.held and self.random.random() < 0.5:
            key_ids, prefetch = self.held.pop(self.random.randrange(len(self.held)))
            blocks = self.blocks[: len(key_ids)]
            if self.random.random() < 0.7:
                prefetch.wait(SECONDS)
            how = {"prefetched": prefetch}
        age = self.weights.age
        among = lambda: self.weights.names[age:]  # noqa: E731
        self.num_loaded += self.rig.load(key_ids, among=among, blocks=blocks, **how)

    def prefetch(self):
        key_ids, _ = self.chain()
        hold_ms = self.random.choice([0, 1, 5000])
        prefetch = self.engine.prefetch(keys_of(key_ids), self.random.choice([0, 5, 500]), hold_ms)
        fate = self.random.choice(["held", "held", "closed", "dropped", "lost in a cycle"])
        if fate == "held":
            self.held = self.held[-3:] + [(key_ids, prefetch)]
        elif fate == "closed":
            prefetch.close()
        elif fate == "lost in a cycle":
            prefetch.itself = prefetch
            if self.random.random() < 0.05:
                gc.collect()

    def discard(self):
        self.engine.discard_blocks(keys_of(self.chain()[0]))

    def look(self):
        key_ids, _ = self.chain()
        hits = self.engine.check_blocks(keys_of(key_ids))
        assert 0 <= hits.leading <= hits.leading_anywhere <= len(key_ids)
        self.engine.touch_blocks(keys_of(key_ids))
        self.engine.get_stats()


@pytest.mark.timeout(7200 if SOAK else 300)
@pytest.mark.parametrize(
    "by_layout, io, coded",
    [(False, "threads", False), (True, "aio", False), (True, "threads", True)],
    ids=["addresses, threads", "layout, aio", "coded"],
)
def test_no_fault_of_the_disk_makes_an_engine_serve_a_wrong_block(tmp_path, seed, by_layout, io, coded):
    gc.collect()  # of earlier tests
    before = open_now()
    how = {"by_layout": by_layout, "coded": coded, "disk": {"io": io}}
    with EngineRig(tmp_path, num_blocks=NUM_THREADS * CHAIN_BLOCKS, **how) as rig:
        faulty = rig.tier.store = FaultyStore(rig, seed, rate=0.2, faults=FAULTS)
        rig.engine.tiering._breaker.allows = lambda now_s: True  # a tier that rests shows nothing
        weights = Weights(rig.engine, rig.weights)
        workers = [Worker(rig, weights, number, seed) for number in range(NUM_THREADS)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            workers[0].join(0.05)
            faulty.open_gate()
        errors = [worker.error for worker in workers if worker.error]
        if errors:
            raise errors[0]
        rig.tier.store = rig.store
        wait_until(lambda: faulty.open_gate() or not rig.engine.tiering._cleaner._out)
        del workers, worker
        gc.collect()
        rig.require_quiet()
        stats = rig.engine.get_stats().tiers[0]
        print(weights.age, "weights;", stats)
        assert stats.blocks_promoted > BLOCK_OPERATIONS // 500 and stats.blocks_expired_unread
        weights.change(None)  # of what was saved before, the disk may have lost something unseen
        rig.weights = weights.names[-1]
        rig.save(ALL[:20])
        flush(rig.engine, SECONDS)
        assert rig.engine.flush(SECONDS) == 0
        rig.forget_ram()
        assert rig.found(ALL[:20]) == [*ALL[:20]]
    gc.collect()
    require_no_more(before)
