"""The half in each vLLM worker: a pool, a stream to save on, one to load on, and the order between them and vLLM's.

It does what the scheduler's half decided and reports what ended. What it must never get wrong is order; the four waits
are marked, and `verify` is their judge.
"""

import contextlib
import logging
import time
from dataclasses import dataclass, field

from kvortex import Device, DriverError, Event, PinnedPool, Stream, TransferQueue
from kvortex.integrations.vllm.messages import Load, Transfer, WorkerReport
from kvortex.transfer import gather_pays, probe_layout

logger = logging.getLogger("vllm.kvortex")

SLICE_COPIES = 2048  # of a load, submitted at once: about 2 ms of the host's time
SUBMITTING_SHARE = 0.5  # of a step's time at the most, while the GPU is busy with the step's forward


class HostCompute:
    """Where vLLM computes on the CPU: its work is over when a call of ours begins, and it waits for nobody."""

    stream = marked = 0

    def mark(self):
        pass

    def wait_for(self, job):
        job.wait()

    def close(self):
        pass


class CudaCompute:
    """vLLM's stream on a GPU: torch's current one, in the thread that runs the model."""

    def __init__(self, device, torch_device):
        import torch

        self.current_stream, self.torch_device = torch.cuda.current_stream, torch_device
        self.marked, self.event = Stream.create(device), Event.create(device)

    @property
    def stream(self):
        return self.current_stream(self.torch_device).cuda_stream

    def mark(self):
        """Let `marked`, a stream without work, stand where vLLM's stream stands now."""
        self.event.record(self.stream)
        self.marked.wait_event(self.event)

    def wait_for(self, job):
        job.wait_on(self.stream)

    def close(self):
        self.marked.close()
        self.event.close()


@dataclass
class Running:
    """A transfer that was asked for and is not over."""

    transfer: Transfer
    load: Load | None = None  # None: a save
    jobs: list = field(default_factory=list)
    submitted: int = 0  # blocks, from the first on; a load goes in slices
    began: float = field(default_factory=time.perf_counter)
    is_captured: bool = False  # by `verify`, or there was no room for it
    check: object = None

    @property
    def is_submitted(self):
        return self.submitted == len(self.transfer.slots)


class WorkerHalf:
    """Move blocks.

    Parameters
    ----------
    shape : PoolShape
    options : ConnectorOptions
    reports_aborted_loads : bool
        Whether vLLM wants to hear of loads whose request was aborted meanwhile (it keeps their blocks until then), or
        must not.

    Notes
    -----
    Called by the thread that runs the model. Nothing blocks the host but a synchronous load (on the CPU, and when all
    jobs are taken), fences on the CPU, `drain` and `close`. The driver takes a microsecond for each piece, 65 ms for a
    prompt of 32k tokens: loads are submitted while the GPU computes, and in slices, so that the next step need not wait
    for that.
    """

    def __init__(self, shape, options, *, reports_aborted_loads):
        self.shape, self.options, self.reports_aborted_loads = shape, options, reports_aborted_loads
        self.device = self.pool = self.saver = self.loader = self.compute = self.layout = self.verifier = None
        self.running = {}  # by number, ascending
        self.aborted = set()
        self.step_began, self.step_seconds = time.perf_counter(), 0.0
        self.received, self.load_errors = set(), set()
        self.report = WorkerReport()
        self.next_chunk, self.has_failed = 1, False
        self.counters = {}

    def register(self, layout, tensor):
        """Take the KV cache: pin the first chunk of the pool, make the streams, find out how the pieces move best."""
        on_gpu = tensor.device.type == "cuda"
        engine = self.options.engine
        self.device = Device.open(f"cuda:{tensor.device.index or 0}" if on_gpu else "host")
        self.compute = CudaCompute(self.device, tensor.device) if on_gpu else HostCompute()
        self.pool = PinnedPool(
            self.shape.num_slots * self.shape.slot_bytes,
            self.shape.block_bytes,
            self.device,
            first_chunk_bytes=engine.pool_first_chunk_bytes,
            chunk_bytes=engine.pool_chunk_bytes,
            huge_pages=engine.pool_huge_pages,
            numa=engine.enable_numa,
            driver_allocated=engine.pool_driver_allocated,
        )
        self.layout = layout
        self.saver = TransferQueue(self.device, "D2H", max_jobs=engine.max_jobs)
        self.loader = TransferQueue(self.device, "H2D", max_jobs=engine.max_jobs)
        for queue in (self.saver, self.loader):
            probe_layout(layout, queue)
            if engine.gather_ctas and gather_pays(layout, queue.direction):
                queue.use_gather(layout, engine.gather_ctas)
        loads = [row for row in layout.planner if row.direction == "H2D"]
        copies = sum(row.num_groups * (row.rows if row.backend == "batch" else 1) for row in loads)
        self.slice_blocks = max(1, SLICE_COPIES // copies)
        if self.options.verify:
            from kvortex.integrations.vllm.verify import Verifier

            self.verifier = Verifier(layout, self.pool, tensor.device)

    # ---- a step, in this order ---------------------------------------------------------------------------------------

    def begin(self, step):
        """Before the forward: it may overwrite blocks that are being copied."""
        now = time.perf_counter()
        self.step_seconds, self.step_began = now - self.step_began, now
        for number in step.fences:
            running = self.running.get(number)
            if running is not None:
                self.order(running)  # the wait after a save
                if not running.is_submitted:  # aborted, its blocks are another's: vLLM 0.15 does not wait for us
                    running.transfer = cut(running.transfer, 0, running.submitted)
                self.capture(running)  # of an aborted load: whoever has its blocks now may write them from here on
        if step.loads:
            self.compute.mark()

    def start_loads(self, step):
        for load in step.loads:
            running = self.running[load.transfer.number] = Running(load.transfer, load)
            if not self.options.load_async:
                while not self.submit_slice(running, len(load.transfer.slots)):
                    self.await_jobs(next(other for other in self.running.values() if other.load and other.jobs))
                    self.retire()
                self.order(running)  # the wait after a load
                if running.jobs:  # else it failed
                    self.capture(running)

    def start_save(self, step):
        """After the forward was launched: what it writes is copied when it is over."""
        if step.save is None:
            return
        running = self.running[step.save.number] = Running(step.save)
        try:
            job = self.submit(self.saver, step.save, self.compute.stream)  # the wait before a save
        except DriverError as error:
            self.fail(running, error)
            return
        if job is None:
            self.count(saves_dropped=len(step.save.slots))
            self.end(running, self.report.failed)
            return
        running.jobs.append(job)
        running.submitted = len(step.save.slots)
        self.capture(running)

    def collect(self, finished_request_ids, has_forward):
        """After the forward was launched: submit loads while it runs, and note which copies are over."""
        loads = [running for running in self.running.values() if running.load]
        if not self.reports_aborted_loads and self.options.load_async:
            self.aborted |= {running.load.request_id for running in loads} & set(finished_request_ids)
        deadline = time.perf_counter() + SUBMITTING_SHARE * self.step_seconds
        for running in loads:
            free = True
            while free and not running.is_submitted:
                free = self.submit_slice(running, self.slice_blocks if has_forward else len(running.transfer.slots))
                if has_forward and time.perf_counter() > deadline:
                    free = False
            if not free:
                break
        self.retire()

    def submit_slice(self, running, most):
        """Submit up to `most` further blocks of a load; False when every job is in flight."""
        part = cut(running.transfer, running.submitted, running.submitted + most)
        try:
            job = self.submit(self.loader, part, self.compute.marked)  # the wait before a load
        except DriverError as error:  # raised when no copy of this stream is in flight any more
            self.fail(running, error)
            return True
        if job is None:
            return False
        running.jobs.append(job)
        running.submitted += len(part.slots)
        return True

    def order(self, running):
        """Let vLLM's next work come after this transfer; a copy that failed is over, and `retire` says so."""
        for job in running.jobs:
            with contextlib.suppress(DriverError):
                self.compute.wait_for(job)

    def await_jobs(self, running):
        for job in running.jobs:
            with contextlib.suppress(DriverError):
                job.wait()

    def submit(self, queue, transfer, stream):
        return queue.submit(self.layout, transfer.block_ids, self.pool, transfer.slots, stream=stream)

    def retire(self):
        for running in list(self.running.values()):
            if not running.is_submitted or not all(job.done() for job in running.jobs) or not self.verified(running):
                continue
            try:
                num_blocks = sum(job.num_blocks for job in running.jobs)
            except DriverError as error:
                self.fail(running, error)
                continue
            what = "save" if running.load is None else "load"
            amounts = {"blocks": num_blocks, "bytes": num_blocks * self.layout.block_bytes}
            amounts["seconds"] = time.perf_counter() - running.began
            self.count(**{f"{what}_{unit}": amount for unit, amount in amounts.items()})
            self.end(running, self.report.done)

    def fail(self, running, error):
        """A transfer did not happen: blocks loaded are vLLM's to compute, blocks saved are not kept."""
        if not self.has_failed:  # once: when a device dies, every transfer fails
            logger.error("KVortex: a transfer failed, its blocks will be computed: %s", error)
        self.has_failed = True
        running.submitted = len(running.transfer.slots)
        self.count(transfers_failed=1)
        if running.load is not None and running.load.request_id not in self.aborted:  # else they are another's by now
            self.load_errors.update(running.load.transfer.block_ids.tolist())
        self.end(running, self.report.failed)

    def end(self, running, where):
        """Report a transfer as done or failed, and its request as loaded."""
        number = running.transfer.number
        del self.running[number]
        where[number] = 1
        if running.load is None or not self.options.load_async:
            return
        if running.load.request_id in self.aborted:
            self.aborted.remove(running.load.request_id)
        else:
            self.received.add(running.load.request_id)

    def capture(self, running):
        """For `verify`: what the device holds of these blocks at this point of vLLM's stream."""
        if self.verifier is not None and not running.is_captured:
            running.is_captured = True
            running.check = self.verifier.capture(running.transfer.block_ids, running.transfer.slots)

    def verified(self, running):
        """Whether a finished copy has been compared with what the device held, or need not be."""
        if self.verifier is None:
            return True
        if running.load is not None and self.options.load_async:
            self.capture(running)  # it has ended: from here on a forward may read it
        verdict = self.verifier.verdict(running.check)
        if verdict is not None:
            self.count(**verdict)
        return verdict is not None

    def count(self, **amounts):
        for name, amount in amounts.items():
            self.counters[name] = self.counters.get(name, 0) + amount

    # ---- what is told ------------------------------------------------------------------------------------------------

    def take_received(self):
        received, self.received = self.received, set()
        return received or None

    def take_load_errors(self):
        errors, self.load_errors = self.load_errors, set()
        return errors

    def take_report(self):
        """A `WorkerReport`, or None when there is nothing to tell."""
        while self.pool is not None:
            first, count = self.shape.chunk(self.next_chunk)
            if not count or self.pool.slots_ready < first + count:
                break
            self.report.done[-self.next_chunk] = 1
            self.next_chunk += 1
        if not (self.report.done or self.report.failed):
            return None
        report, self.report = self.report, WorkerReport()
        return report

    def take_counters(self):
        counters, self.counters = self.counters, {}
        return counters

    # ---- end ---------------------------------------------------------------------------------------------------------

    def drain(self):
        """Wait for every copy in flight: the memory they use is about to go."""
        for running in self.running.values():
            self.await_jobs(running)

    def close(self):
        """Wait for copies in flight, `shutdown_timeout_ms` at the most; memory that one may still use is left alone."""
        queues = [queue for queue in (self.saver, self.loader) if queue is not None]
        for queue in queues:
            queue.close(self.options.engine.shutdown_timeout_ms)
        parts = [self.verifier, self.compute, self.pool, self.device]
        if any(queue.jobs_in_flight for queue in queues):
            parts = [self.verifier]
        for part in parts:
            if part is not None:
                part.close()


def cut(transfer, first, last):
    """The blocks `first` to `last` of a transfer."""
    return transfer._replace(slots=transfer.slots[first:last], block_ids=transfer.block_ids[first:last])
