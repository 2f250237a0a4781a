"""The race oracle: threads save, load, evict and forget blocks of known content; every load is compared at its target.

Sources are overwritten on the caller's stream right after `save_blocks` + `wait_on`; targets are poisoned on it right
before `load_blocks`, and read on it right after `wait_on`. A missing order on either side of either direction shows as
a wrong block. The number to report is `wrong_blocks`: zero.
"""

import asyncio
import random
import threading
from dataclasses import dataclass, field

import numpy as np
from kvcache import keys_of

import kvortex

POISON = 0xDB
CHAIN_BLOCKS = 6


@dataclass
class Report:
    operations: int = 0
    saved_blocks: int = 0
    loaded_blocks: int = 0
    wrong_blocks: int = 0
    cancelled: int = 0
    errors: list = field(default_factory=list)

    def add(self, other):
        for name in ("operations", "saved_blocks", "loaded_blocks", "wrong_blocks", "cancelled"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors += other.errors


class _Worker:
    """One thread: its own stream, its own device blocks, keys shared with all the others."""

    def __init__(self, engine, cache, first_block, num_chains, seed, on_stream):
        self.engine, self.cache = engine, cache
        self.blocks = np.arange(first_block, first_block + CHAIN_BLOCKS)
        self.num_chains = num_chains
        self.random = random.Random(seed)
        self.stream = kvortex.Stream.create(cache.device)
        self.on_stream = on_stream
        self.report = Report()

    def run(self, operations):
        verbs = [self.save] * 40 + [self.load] * 45 + [self.touch] * 6 + [self.check] * 5 + [self.discard] * 3
        verbs += [self.cancel]
        try:
            for _ in range(operations):
                self.random.choice(verbs)()
                self.report.operations += 1
                if self.random.random() < 0.0005:
                    self.engine.clear()
        except BaseException as error:  # handed to the main thread, which raises it
            self.report.errors.append(error)
        finally:
            self.stream.synchronize()
            self.stream.close()

    def chain(self):
        """Key ids of a random prefix."""
        first = self.random.randrange(self.num_chains) * CHAIN_BLOCKS
        return list(range(first, first + self.random.randint(1, CHAIN_BLOCKS)))

    def save(self):
        key_ids = self.chain()
        blocks = self.blocks[: len(key_ids)]
        for key_id, block in zip(key_ids, blocks, strict=True):
            data, done = self.cache.content(key_id), 0
            for buffer, start, stride, size in self.cache.places:
                self.cache.buffers[buffer].copy_from(data[done : done + size], start + int(block) * stride, self.stream)
                done += size
        self.on_stream(self.stream)
        job = self.engine.save_blocks(keys_of(key_ids), blocks, stream=self.stream)
        job.wait_on(self.stream)
        for block in blocks:
            self.cache.scribble(int(block), 0x5C, self.stream)
        if self.random.random() < 0.3:
            job.wait(60_000)
        self.report.saved_blocks += job.num_blocks

    def load(self):
        key_ids = self.chain()
        blocks = self.random.sample(list(self.blocks), len(key_ids))
        for block in blocks:
            self.cache.scribble(int(block), POISON, self.stream)
        self.on_stream(self.stream)
        job = self.engine.load_blocks(keys_of(key_ids), blocks, stream=self.stream)
        job.wait_on(self.stream)
        for position, (key_id, block) in enumerate(zip(key_ids, blocks, strict=True)):
            data = self.cache.read(int(block), self.stream)
            if position < job.num_blocks:
                right = data == self.cache.loaded(key_id)
                self.report.loaded_blocks += 1
            else:
                right = data == bytes([POISON]) * len(data)
            self.report.wrong_blocks += not right

    def touch(self):
        self.engine.touch_blocks(keys_of(self.chain()))

    def check(self):
        key_ids = self.chain()
        hits = self.engine.check_blocks(keys_of(key_ids))
        assert 0 <= hits.leading <= len(key_ids)

    def discard(self):
        self.engine.discard_blocks(keys_of(self.chain()))

    def cancel(self):
        """Await a load and give up at once: the copies go on, the pins are dropped by whoever retires the job."""
        key_ids = self.chain()
        blocks = self.blocks[: len(key_ids)]

        async def give_up():
            job = self.engine.load_blocks(keys_of(key_ids), blocks, stream=self.stream)
            job.wait_on(self.stream)
            with_timeout = asyncio.wait_for(job, timeout=0)
            try:
                await with_timeout
            except TimeoutError:
                self.report.cancelled += 1

        asyncio.run(give_up())


def run_stress(engines_and_caches, *, num_threads=8, operations=10_000, num_chains=40, seed=0, on_stream=None):
    """Run `operations` in all, split over threads, which take the (engine, cache) pairs in turn; returns a `Report`.

    Each cache needs CHAIN_BLOCKS blocks a thread. `on_stream` puts extra work in front of every save and load.
    """
    on_stream = on_stream or (lambda stream: None)
    workers = []
    for number in range(num_threads):
        engine, cache = engines_and_caches[number % len(engines_and_caches)]
        workers.append(_Worker(engine, cache, number * CHAIN_BLOCKS, num_chains, seed * 1000 + number, on_stream))
    threads = [threading.Thread(target=worker.run, args=(operations // num_threads,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = Report()
    for worker in workers:
        total.add(worker.report)
    if total.errors:
        raise total.errors[0]
    return total
