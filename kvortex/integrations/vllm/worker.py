"""The half in each vLLM worker: a pool, a stream to save on, one to load on, and the order between them and vLLM's.

It does what the scheduler's half decided and reports what ended. What it must never get wrong is order; the five waits
are marked, and `verify` is their judge.
"""

import logging
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

from kvortex import Device, DriverError, Event, KVLayout, PinnedPool, Stream, TransferQueue
from kvortex.integrations.vllm.messages import CHUNK, LOAD, SAVE, Transfer, WorkerReport
from kvortex.log import Guarded
from kvortex.transfer import gather_pays, probe_layout

logger = Guarded(logging.getLogger("vllm.kvortex"))

FREE_JOB_SECONDS = 0.001  # after which a load that found no job looks for one again, and whether it is still wanted
IDLE_SECONDS = 0.0002  # that a step which computes nothing leaves to other threads


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
    submission: Future = field(default_factory=Future)  # of its job; None, or cancelled: it was given up
    is_unwanted: bool = False  # somebody else writes what it would load
    began: float = field(default_factory=time.perf_counter)
    is_captured: bool = False  # by `verify`, or there was no room for it
    check: object = None

    @property
    def is_load(self):
        return self.transfer.kind == LOAD

    def job(self):
        """Its job, None if nothing is copied; waits until that is known."""
        if self.submission.cancelled() or self.submission.exception():
            return None
        return self.submission.result()

    def give_up(self):
        """Submit it no more; True if that is certain, False if its thread is at it or it is submitted."""
        self.is_unwanted = True
        return self.submission.cancel()


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
    Called by the thread that runs the model. Nothing blocks the host but a synchronous load, a fence on a load that is
    just being submitted, fences on the CPU, copies of blocks that another connector fills, `drain` and `close`, and a
    nap in steps that compute nothing. The driver takes a microsecond for each piece, 65 ms for a prompt of 32k tokens:
    a thread of their own submits loads, which no step waits for. A save is submitted between two steps, because it is
    of what the last wrote.
    """

    def __init__(self, shape, options, *, reports_aborted_loads):
        self.shape, self.options, self.reports_aborted_loads = shape, options, reports_aborted_loads
        self.device = self.pool = self.saver = self.loader = self.compute = self.layout = self.verifier = None
        self.wanted, self.submitter = SimpleQueue(), None  # loads, in the order in which they are submitted
        self.running = {}  # by number, ascending
        # The KV cache: whether vLLM still has it is only seen if nothing of ours holds it, but while copies use it. It
        # stands behind the queues, which wait for their copies when they are dropped.
        self.tensors, self.tensors_in_use = [], ()
        self.aborted = set()
        self.received, self.load_errors = set(), set()
        self.report = WorkerReport()
        self.next_chunk, self.has_failed, self.is_incomplete = 1, False, False
        self.counters = {}

    def register(self, layout):
        """Take the KV cache: pin the first chunk of the pool, make the streams, find out how the pieces move best."""
        tensor = layout.owners[0]
        on_gpu = tensor.device.type == "cuda"
        engine = self.options.engine
        self.device = Device.open(f"cuda:{tensor.device.index or 0}" if on_gpu else "host")
        self.compute = CudaCompute(self.device, tensor.device) if on_gpu else HostCompute()
        self.pool = PinnedPool(
            self.shape.slots.pool_bytes,
            self.shape.block_bytes,
            self.device,
            header_bytes=engine.header_bytes,
            first_chunk_bytes=engine.pool_first_chunk_bytes,
            chunk_bytes=engine.pool_chunk_bytes,
            huge_pages=engine.pool_huge_pages,
            numa=engine.enable_numa,
            driver_allocated=engine.pool_driver_allocated,
        )
        self.tensors = [weakref.ref(tensor) for tensor in layout.owners]
        self.layout = KVLayout(layout.runs, layout.num_blocks)
        self.saver = TransferQueue(self.device, "D2H", max_jobs=engine.max_jobs)
        self.loader = TransferQueue(self.device, "H2D", max_jobs=engine.max_jobs)
        for queue in (self.saver, self.loader):
            probe_layout(self.layout, queue)
            if engine.gather_ctas and gather_pays(self.layout, queue.direction):
                queue.use_gather(self.layout, engine.gather_ctas)
        self.submitter = threading.Thread(target=self.submit_loads, name="kvortex-loads", daemon=True)
        self.submitter.start()
        if self.options.verify:
            from kvortex.integrations.vllm.verify import Verifier

            self.verifier = Verifier(layout, self.pool, tensor.device)

    def live_addresses(self):
        """Where the KV cache is that was registered, or what is left of it once no copy of ours uses it."""
        self.drain()
        self.tensors_in_use = ()
        return {live.data_ptr() for tensor in self.tensors if (live := tensor()) is not None}

    # ---- a step, in this order ---------------------------------------------------------------------------------------

    def begin(self, step):
        """Before the forward: it may overwrite blocks that are being copied."""
        for number in step.fences:
            running = self.running.get(number)
            if running is None or (running.is_load and running.give_up()):  # aborted: vLLM 0.15 gives its blocks away
                continue
            self.order(running)  # the wait after a save
            self.capture(running)  # of an aborted load: whoever has its blocks now may write them from here on
        for number in step.waits:
            if number in self.running:
                self.finish(self.running[number])  # the wait before another connector writes
        if step.of(LOAD):
            self.compute.mark()

    def start_loads(self, step):
        for load in step.of(LOAD):
            running = self.begin_transfer(load)
            self.wanted.put(running)
            if not self.options.load_async:
                self.order(running)  # the wait after a load
                self.capture(running)
        if step.is_idle and self.running:
            # Nothing to do but to step again, and a thread that lets go of the GIL for moments only keeps others from
            # it, for seconds at times: the loads' thread and the judges of `verify`.
            time.sleep(IDLE_SECONDS)

    def start_save(self, step):
        """After the forward was launched: what it writes is copied when it is over."""
        for save in step.of(SAVE):
            running = self.begin_transfer(save)
            try:
                job = self.submit(self.saver, save, self.compute.stream)  # the wait before a save
            except DriverError as error:
                self.fail(running, error)
                continue
            if job is None:
                self.count(saves_dropped=len(save.slots))
                self.end(running, bad=save.slots)
                continue
            running.submission.set_result(job)
            self.capture(running)

    def begin_transfer(self, transfer):
        if not self.tensors_in_use:
            self.tensors_in_use = [tensor() for tensor in self.tensors]
        running = self.running[transfer.number] = Running(transfer)
        return running

    def collect(self, finished_request_ids):
        """Note which copies are over."""
        if not self.reports_aborted_loads and self.options.load_async:
            loads = {running.transfer.request_id for running in self.running.values() if running.is_load}
            self.aborted |= loads & set(finished_request_ids)
        self.retire()

    def submit_loads(self):
        """What the loads' thread does."""
        while (running := self.wanted.get()) is not None:
            if not running.submission.set_running_or_notify_cancel():
                continue
            job = None
            try:
                while job is None and not running.is_unwanted:
                    job = self.submit(self.loader, running.transfer, self.compute.marked)  # the wait before a load
                    if job is None:  # all are in flight
                        self.loader.poll()
                        time.sleep(FREE_JOB_SECONDS)
                running.submission.set_result(job)
            except Exception as error:  # raised in `retire`
                running.submission.set_exception(error)

    def order(self, running):
        """Let vLLM's next work come after this transfer; a copy that failed is over, and `retire` says so."""
        self.wait_surely(running.job(), self.compute.wait_for)

    @staticmethod
    def wait_surely(job, wait_for):
        """Wait for a job as told; where that raises, until the job itself says that it is over."""
        if job is None:
            return
        try:
            wait_for(job)
        except DriverError:
            while not job.done():
                time.sleep(FREE_JOB_SECONDS)

    def finish(self, running):
        """Wait until this transfer is over, and judged as far as the device has a part in it."""
        job = running.job()
        if job is not None:
            self.wait_surely(job, lambda job: job.wait())
            self.capture(running)
            if running.check is not None:
                self.verifier.wait(running.check)

    def submit(self, queue, transfer, stream):
        return queue.submit(self.layout, transfer.block_ids, self.pool, transfer.slots, stream=stream)

    def retire(self):
        for running in list(self.running.values()):
            if not running.submission.done():
                continue
            try:
                job = None if running.submission.cancelled() else running.submission.result()  # or what its thread met
                num_blocks = 0
                if job is not None:
                    if not job.done():
                        continue
                    num_blocks = job.num_blocks  # raises what the copies met: nothing to verify then
                    if not self.verified(running):
                        continue
            except DriverError as error:
                self.fail(running, error)
                continue
            what = running.transfer.kind
            amounts = {"blocks": num_blocks, "bytes": num_blocks * self.layout.block_bytes}
            amounts["seconds"] = time.perf_counter() - running.began
            self.count(**{f"{what}_{unit}": amount for unit, amount in amounts.items()})
            self.end(running)

    def fail(self, running, error):
        """A transfer did not happen: blocks loaded are vLLM's to compute, blocks saved are not kept."""
        if not self.has_failed:  # once: when a device dies, every transfer fails
            logger.error("KVortex: a transfer failed, its blocks will be computed: %s", error)
        self.has_failed = True
        self.count(transfers_failed=1)
        if running.check is not None:
            self.verifier.release(running.check)
        kind, _, slots, block_ids, request_id = running.transfer
        if kind == LOAD and request_id not in self.aborted:  # else they are another's by now
            self.load_errors.update(block_ids.tolist())
        self.end(running, bad=slots)

    def end(self, running, bad=()):
        """Report a transfer, with the slots whose blocks did not move, and its request as loaded."""
        kind, number, _, _, request_id = running.transfer
        del self.running[number]
        if not self.running:
            self.tensors_in_use = ()
        self.report.add(kind, number, bad)
        if kind != LOAD or not self.options.load_async:
            return
        if request_id in self.aborted:
            self.aborted.remove(request_id)
        else:
            self.received.add(request_id)

    def capture(self, running):
        """For `verify`: what the device holds of these blocks at this point of vLLM's stream."""
        if self.verifier is not None and not running.is_captured and running.job() is not None:
            running.is_captured = True
            running.check = self.verifier.capture(running.transfer.block_ids, running.transfer.slots)

    def verified(self, running):
        """Whether a finished copy has been compared with what the device held, or need not be."""
        if self.verifier is None:
            return True
        if running.is_load and self.options.load_async:
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
        if self.pool is not None and self.pool.slots_usable < self.pool.num_slots and not self.is_incomplete:
            self.is_incomplete = True
            logger.warning(
                "KVortex: host memory could not be registered, so %d of %d blocks serve; PinnedPool.wait_ready says "
                "what may be in the way", self.pool.slots_usable, self.pool.num_slots,
            )  # fmt: skip
        while self.pool is not None:
            first, count = self.shape.slots.chunk(self.next_chunk)
            if not count or self.pool.slots_ready < first + count:
                break
            self.report.add(CHUNK, self.next_chunk)
            self.next_chunk += 1
        if not self.report.ended:
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
            self.finish(running)

    def close(self):
        """Wait for copies in flight, `shutdown_timeout_ms` at the most; memory that one may still use is left alone."""
        deadline = time.monotonic() + self.options.engine.shutdown_timeout_ms / 1000
        for running in self.running.values():
            running.give_up()
        if self.submitter is not None:
            self.wanted.put(None)
            self.submitter.join(max(0, deadline - time.monotonic()))
        queues = [queue for queue in (self.saver, self.loader) if queue is not None]
        for queue in queues:
            queue.close(max(0, int(1000 * (deadline - time.monotonic()))))
        parts = [self.verifier, self.compute, self.pool, self.device]
        if any(queue.jobs_in_flight for queue in queues):
            parts = [self.verifier]
        for part in parts:
            if part is not None:
                part.close()
