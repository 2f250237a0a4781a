"""The half in each vLLM worker: a pool, a stream to save on, one to load on, and the order between them and vLLM's.

It does what the scheduler's half decided and reports what ended. What it must never get wrong is order; the four waits
are marked, and `verify` is their judge.
"""

import contextlib
import time
from dataclasses import dataclass

from kvortex import Device, DriverError, PinnedPool, TransferQueue
from kvortex.integrations.vllm.messages import Load, Transfer, WorkerReport
from kvortex.transfer import gather_pays, probe_layout


class HostCompute:
    """Where vLLM computes on the CPU: its work is over when a call of ours begins, and it waits for nobody."""

    stream = 0

    def wait_for(self, job):
        job.wait()


class CudaCompute:
    """vLLM's stream on a GPU: torch's current one, in the thread that runs the model."""

    def __init__(self, torch_device):
        import torch

        self.current_stream, self.torch_device = torch.cuda.current_stream, torch_device

    @property
    def stream(self):
        return self.current_stream(self.torch_device).cuda_stream

    def wait_for(self, job):
        job.wait_on(self.stream)


@dataclass
class Running:
    """A transfer whose copies are on a stream."""

    job: object
    transfer: Transfer
    load: Load | None  # None: a save
    began: float
    check: object = None


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
    jobs are taken) and fences on the CPU.
    """

    def __init__(self, shape, options, *, reports_aborted_loads):
        self.shape, self.options, self.reports_aborted_loads = shape, options, reports_aborted_loads
        self.device = self.pool = self.saver = self.loader = self.layout = self.verifier = None
        self.running = {}  # by number, in the order of their start
        self.waiting = []  # loads that found no free job
        self.aborted = set()
        self.received, self.load_errors = set(), set()
        self.report = WorkerReport()
        self.next_chunk = 1
        self.counters = {}

    def register(self, layout, tensor):
        """Take the KV cache: pin the first chunk of the pool, make the streams, find out how the pieces move best."""
        on_gpu = tensor.device.type == "cuda"
        self.compute = CudaCompute(tensor.device) if on_gpu else HostCompute()
        engine = self.options.engine
        self.device = Device.open(f"cuda:{tensor.device.index or 0}" if on_gpu else "host")
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
        if self.options.verify:
            from kvortex.integrations.vllm.verify import Verifier

            self.verifier = Verifier(layout, self.pool, tensor.device)

    # ---- a step, in this order ---------------------------------------------------------------------------------------

    def begin(self, step):
        """Before the forward: it may overwrite blocks that are being copied."""
        for number in step.fences:
            if number in self.running:
                self.order(self.running[number])  # the wait after a save
        for load in [load for load in self.waiting if load.transfer.number in step.fences]:
            self.waiting.remove(load)  # aborted, its blocks are another's: vLLM 0.15 does not wait for us
            self.aborted.discard(load.request_id)
            self.report.done[load.transfer.number] = 1

    def start_loads(self, step):
        for load in step.loads:
            if step.load_async:
                self.waiting.append(load)
            else:
                while not self.start_load(load):
                    self.order(next(running for running in self.running.values() if running.load))
                    self.collect()
                running = self.running.get(load.transfer.number)
                if running is not None:
                    self.order(running)  # the wait after a load
                    self.capture(running)
        self.start_waiting()

    def start_waiting(self):
        while self.waiting and self.start_load(self.waiting[0]):
            self.waiting.pop(0)

    def start_load(self, load):
        """False when every job is in flight."""
        number = load.transfer.number
        if load.missing:
            self.load_errors.update(load.missing)
        try:  # the wait before a load is in `submit`: its copies come after what is on the stream now
            job = self.submit(self.loader, load.transfer)
        except DriverError as error:
            self.fail(load.transfer, load, error)
            return True
        if job is not None:
            self.running[number] = Running(job, load.transfer, load, time.perf_counter())
        return job is not None

    def start_save(self, step):
        """After the forward was launched: what it writes is copied when it is over."""
        if step.save is None:
            return
        try:  # the wait before a save is in `submit`
            job = self.submit(self.saver, step.save)
        except DriverError as error:
            self.fail(step.save, None, error)
            return
        if job is None:
            self.count(saves_dropped=len(step.save.slots))
            self.report.failed[step.save.number] = 1
            return
        running = self.running[step.save.number] = Running(job, step.save, None, time.perf_counter())
        self.capture(running)

    def order(self, running):
        """Let vLLM's next work come after this transfer; one that failed is over, and `collect` says so."""
        with contextlib.suppress(DriverError):
            self.compute.wait_for(running.job)

    def submit(self, queue, transfer):
        return queue.submit(self.layout, transfer.block_ids, self.pool, transfer.slots, stream=self.compute.stream)

    def collect(self, finished_request_ids=()):
        """Note which copies are over."""
        if not self.reports_aborted_loads and self.options.load_async:
            loading = {load.request_id for load in self.waiting}
            loading.update(running.load.request_id for running in self.running.values() if running.load)
            self.aborted |= loading & set(finished_request_ids)
        self.start_waiting()
        for number, running in list(self.running.items()):
            if not running.job.done() or not self.verified(running):
                continue
            del self.running[number]
            try:
                num_blocks = running.job.num_blocks
            except DriverError as error:
                self.fail(running.transfer, running.load, error)
                continue
            self.report.done[number] = 1
            what = "save" if running.load is None else "load"
            self.count(
                **{
                    f"{what}_blocks": num_blocks,
                    f"{what}_bytes": num_blocks * self.layout.block_bytes,
                    f"{what}_seconds": time.perf_counter() - running.began,
                }
            )
            if running.load is not None:
                self.landed(running.load)

    def capture(self, running):
        """For `verify`: what the device holds of these blocks at this point of vLLM's stream."""
        if self.verifier is not None and running.check is None:
            running.check = self.verifier.capture(running.transfer.block_ids, running.transfer.slots)

    def verified(self, running):
        """Whether a finished copy has been compared with what the device held, or need not be."""
        if self.verifier is None:
            return True
        self.capture(running)  # a load between steps has ended: from here on a forward may read it
        verdict = self.verifier.verdict(running.check)
        if verdict is not None:
            self.count(**verdict)
        return verdict is not None

    def fail(self, transfer, load, error):
        """A transfer did not happen: blocks loaded are vLLM's to compute, blocks saved are not kept."""
        self.report.failed[transfer.number] = 1
        self.count(transfers_failed=1)
        if load is not None:
            if load.request_id not in self.aborted:  # otherwise they are another's by now
                self.load_errors.update(transfer.block_ids.tolist())
            self.landed(load)

    def landed(self, load):
        if not self.options.load_async:
            return
        if load.request_id in self.aborted:
            self.aborted.remove(load.request_id)
        else:
            self.received.add(load.request_id)

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
            with contextlib.suppress(DriverError):
                running.job.wait()

    def close(self):
        for part in (self.saver, self.loader, self.pool, self.device):
            if part is not None:
                part.close()
