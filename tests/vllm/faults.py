"""Faults of order, one for each wait that `WorkerHalf` must make; `verify` has to notice every one.

On a CPU vLLM's work is over before a copy is asked for, so that a wait left out before a copy does no harm. The waits
after a copy are missed there too, when the copies of the host driver run late. On a GPU each one shows with

    python tests/vllm/engine_run.py stress --verify --graphs --seconds 30 --mutant ... and, for

    before-save               --size small --device-gib 0.5 --host-gib 4: saves begin at once, while the forward writes
    after-save, before-load   --size heavy --short 0.9 --device-gib 1.1 --host-gib 8 --busy-link: saves are late
    after-load                --size heavy --short 0.9 --device-gib 2 --host-gib 12

    after-eviction            --size small --device-gib 0.5 --host-gib 4 --extra '{"save": "on_evict"}'
    not-held                  --size gemma --device-gib 0.6 --host-gib 4 --busy-link, and in the environment
                              VLLM_PREFIX_CACHE_RETENTION_INTERVAL=0

but for before-other, whose other connector (--other first) lives on the CPU.
"""

from kvortex import Job, Stream
from kvortex.integrations.vllm.holds import Holds
from kvortex.integrations.vllm.worker import WorkerHalf


def plant(name):
    """Break every `WorkerHalf` of this process; `name` is one of `FAULTS`."""
    FAULTS[name]()


def copies_wait_for_nobody(is_faulty):
    """Transfers of some queues are ordered after a stream on which nothing ever runs, instead of after vLLM's."""
    original = WorkerHalf.submit
    idle = {}

    def submit(self, queue, transfer, stream):
        if is_faulty(self, queue):
            if self not in idle:
                idle[self] = Stream.create(self.device)
            stream = idle[self]
        return original(self, queue, transfer, stream)

    WorkerHalf.submit = submit


def before_save():
    """A block is saved before the forward has written it."""
    copies_wait_for_nobody(lambda worker, queue: queue is worker.saver)


def before_load():
    """A block is loaded while the forward of its last owner still writes it, or a save still reads it."""
    copies_wait_for_nobody(lambda worker, queue: queue is worker.loader)


def after_save():
    """A forward writes a block that is still being saved."""
    original = WorkerHalf.begin

    def begin(self, step):
        step.fences = [number for number in step.fences if number in self.running and self.running[number].is_load]
        original(self, step)

    WorkerHalf.begin = begin


def after_eviction():
    """A step writes a block that vLLM has given away, and that is still being saved."""
    original = WorkerHalf.begin

    def begin(self, step):
        for save in step.evictions:
            self.save(save)
        step.evictions = []
        original(self, step)

    WorkerHalf.begin = begin


class LooksLanded(Job):
    """A load that says at once that it is over, as every job does that moves nothing."""

    num_blocks = 0

    def __init__(self, job, num_blocks):
        self.job, self.num_blocks = job, num_blocks


def after_load():
    """A forward reads a block that is still being loaded."""
    original = WorkerHalf.submit
    in_flight = []  # whoever drops a job may wait for it

    def submit(self, queue, transfer, stream):
        job = original(self, queue, transfer, stream)
        if queue is self.saver or job is None:
            return job
        in_flight[:] = [*(earlier for earlier in in_flight if not earlier.done()), job]
        return LooksLanded(job, len(transfer.slots))

    WorkerHalf.submit = submit


def before_other():
    """Another connector fills a block that is still being saved."""
    original = WorkerHalf.begin

    def begin(self, step):
        step.waits = []
        original(self, step)

    WorkerHalf.begin = begin


def not_held():
    """A block that left a window is given to somebody else while it is still being saved, and nobody is fenced."""
    Holds.take = lambda self, block_ids, group_indexes: block_ids[:0]
    after_save()


FAULTS = {
    "before-save": before_save,
    "after-save": after_save,
    "after-eviction": after_eviction,
    "before-load": before_load,
    "after-load": after_load,
    "before-other": before_other,
    "not-held": not_held,
}
