"""Four faults of order, one for each wait that `WorkerHalf` must make; `verify` has to notice every one on a GPU.

On a CPU vLLM's work is over before a copy is asked for, so what a fault lets run too early is in time all the same,
but for `after-load`: there the copies of the host driver run late.
"""

from kvortex import Stream
from kvortex.integrations.vllm.worker import WorkerHalf


def plant(name):
    """Break every `WorkerHalf` of this process; `name` is one of `FAULTS`."""
    FAULTS[name]()


def copies_wait_for_nobody(is_faulty):
    """Transfers of some queues are ordered after a stream on which nothing ever runs, instead of after vLLM's."""
    original = WorkerHalf.submit
    idle = {}

    def submit(self, queue, transfer):
        if not is_faulty(self, queue):
            return original(self, queue, transfer)
        if self not in idle:
            idle[self] = Stream.create(self.device)
        return queue.submit(self.layout, transfer.block_ids, self.pool, transfer.slots, stream=idle[self])

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
        step.fences = []
        original(self, step)

    WorkerHalf.begin = begin


class LooksLanded:
    """A load that says at once that it is over."""

    def __init__(self, job, num_blocks):
        self.job, self.num_blocks = job, num_blocks

    def done(self):
        return True

    def wait(self):
        pass

    def wait_on(self, stream):
        pass


def after_load():
    """A forward reads a block that is still being loaded."""
    original = WorkerHalf.start_load
    in_flight = []  # whoever drops a job may wait for it

    def start_load(self, load):
        started = original(self, load)
        running = self.running.get(load.transfer.number)
        if running is not None:
            in_flight.append(running.job)
            running.job = LooksLanded(running.job, len(load.transfer.slots))
            while in_flight[0].done():
                in_flight.pop(0)
                if not in_flight:
                    break
        return started

    WorkerHalf.start_load = start_load


FAULTS = {"before-save": before_save, "after-save": after_save, "before-load": before_load, "after-load": after_load}
