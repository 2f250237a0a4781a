"""The half in each vLLM worker: a pool, a stream to save on, one to load on, and the order between them and vLLM's.

It does what the scheduler's half decided, and reports what ended. What it must never get wrong is order: comments mark
the six waits that keep the order, and `verify` checks the result.
"""

import contextlib
import logging
import time
import weakref
from dataclasses import dataclass, field

from kvortex import Device, DriverError, KVLayout, PinnedPool
from kvortex.integrations.vllm.messages import CHUNK, LOAD, SAVE, Transfer, WorkerReport
from kvortex.integrations.vllm.worker_tier import WorkerTier
from kvortex.log import Guarded
from kvortex.transfer import Carrier, Job, Submitter

logger = Guarded(logging.getLogger("vllm.kvortex"))

BLOCKS, REQUESTS, NOTHING = "blocks", "requests", "nothing"  # what vLLM is told when a load failed
MOST_REFUSALS = 100  # of one load by the driver, one a step, before it counts as failed
IDLE_WAIT_MS = 1  # how long a step that computes nothing waits for a load


class HostCompute:
    """vLLM on the CPU: when it calls us its work is over, and it has no stream that could wait for our copies."""

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
    """A transfer that was asked for and is not over."""

    transfer: Transfer
    job: Job | None = None  # None: no job record was free, or it could not be submitted
    error: Exception | None = None  # why it could not be submitted
    refusals: int = 0  # by the driver
    is_given_up: bool = False  # nothing is copied: its target blocks belong to another request
    began: float = field(default_factory=time.perf_counter)
    is_captured: bool = False  # `verify` has its blocks, or had no room for them
    check: object = None

    @property
    def is_load(self):
        return self.transfer.kind == LOAD

    @property
    def is_waiting(self):
        """Whether it is offered again in the next step."""
        return self.job is None and self.error is None and not self.is_given_up

    def num_blocks(self):
        """Blocks that were moved, None while it is not over. If a copy failed, raise its error."""
        if self.is_given_up:
            return 0
        if self.error is not None:
            raise self.error
        return self.job.num_blocks if self.job is not None and self.job.done() else None


class WorkerHalf:
    """Move blocks.

    Parameters
    ----------
    shape : PoolShape
    options : ConnectorOptions
    reports_aborted_loads : bool
        Whether vLLM must be told of loads whose request was aborted meanwhile: it keeps their blocks until then. If
        False, it must not be told.
    failed_loads : {BLOCKS, REQUESTS, NOTHING}, default BLOCKS
        What vLLM can be told when a load failed. BLOCKS only with one group of full attention.
    open_store : callable, optional
        Opens the store of a lower tier for a pool.
    put_lag : int, default 1
        Steps that begin between a SAVE and the scheduler's verdict on it.

    Notes
    -----
    Called by the thread that runs the model. Nothing blocks the host but a synchronous load, a fence on a load that is
    just being submitted, fences on the CPU, copies of blocks that another connector fills, `drain` and `close`, and
    loads in steps that compute nothing. The driver takes a microsecond for each piece, 65 ms for a prompt of 32k
    tokens: a thread that never takes the GIL submits loads, which no step waits for. A save is submitted between two
    steps, because it copies what the last one wrote.
    """

    def __init__(self, shape, options, *, reports_aborted_loads, failed_loads=BLOCKS, open_store=None,
                 put_lag=1):  # fmt: skip
        self.shape, self.options, self.reports_aborted_loads = shape, options, reports_aborted_loads
        self.failed_loads, self.failed_requests = failed_loads, set()
        self.device = self.pool = self.compute = self.layout = self.verifier = None
        self.carrier = self.saver = self.loader = self.submitter = self.tier = None
        self.open_store, self.put_lag = open_store, put_lag
        self.running = {}  # by number, ascending
        self.is_idle = False  # this step computes nothing
        # Weak references to the KV cache, to see whether vLLM still has it. While copies use it, `tensors_in_use` holds
        # it. Set after the queues: a dropped worker then waits for its copies before it frees the memory.
        self.tensors, self.tensors_in_use = [], ()
        self.aborted = set()
        self.received, self.load_errors = set(), set()
        self.report = WorkerReport()
        self.has_failed, self.is_incomplete, self.has_refused = False, False, False
        # The slots as the scheduler's half counts them; None: not heard yet. With one stage it counts chunk 0 unasked.
        self.counted, self.next_chunk = None, int(shape.num_stages == 1)
        self.counters = {}

    def register(self, layout):
        """Take the KV cache: pin the first chunk of the pool, make the streams, find out how the pieces move best."""
        tensor = layout.owners[0]
        on_gpu = tensor.device.type == "cuda"
        engine = self.options.engine
        self.device = Device.open(f"cuda:{tensor.device.index or 0}" if on_gpu else "host")
        self.compute = CudaCompute(tensor.device) if on_gpu else HostCompute()
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
        self.layout = KVLayout(layout.runs, layout.num_blocks, planes=layout.planes)
        self.carrier = Carrier(
            self.device,
            self.pool,
            self.layout,
            max_jobs=engine.max_jobs,
            gather_ctas=engine.gather_ctas,
            codec=engine.codec,
            exact_layers=engine.exact_layers,
        )
        self.saver, self.loader = self.carrier.queues
        self.submitter = Submitter(self.device, self.carrier.signals, self.carrier.queues)
        if self.options.verify:
            from kvortex.integrations.vllm.verify import Verifier

            self.verifier = Verifier(layout, self.pool, tensor.device, engine.codec, engine.exact_layers)
        if self.open_store is not None:
            store = self.open_store(self.pool)
            coder = getattr(store, "coder", None)  # of blocks without the padding that groups may have
            block_bytes = self.shape.block_bytes if coder is None else coder.payload_bytes
            self.tier = WorkerTier(store, block_bytes, self.put_lag)

    def live_addresses(self):
        """Addresses of the tensors of the registered KV cache that still live when no copy of ours uses them."""
        self.drain()
        self.tensors_in_use = ()
        return {live.data_ptr() for tensor in self.tensors if (live := tensor()) is not None}

    # ---- a step, in this order ---------------------------------------------------------------------------------------

    def begin(self, step):
        """Before the forward: it may overwrite blocks that are being copied."""
        self.is_idle = step.is_idle
        if step.shape is not None:
            self.counted = step.shape.slots
        if self.tier is not None:
            self.tier.begin(step.tier)
        for save in step.evictions:
            self.order(self.save(save))  # the wait after a save of what the step overwrites
        for number in step.fences:
            running = self.running.get(number)
            if running is None or self.give_up(running):
                continue
            self.order(running)  # the wait after a save
            self.capture(running)  # of an aborted load: the new owner of its blocks may write from here on
        for number in step.waits:
            running = self.running.get(number)
            if running is not None and not self.give_up(running):
                self.finish(running)  # the wait before another connector writes

    def start_loads(self, step):
        """After `begin`: loads need not wait for the forward. A load without a job record is tried in the next step."""
        loads = [self.begin_transfer(load) for load in step.of(LOAD)]
        for running in [running for running in self.running.values() if running.is_waiting]:
            self.start_load(running)
            if running.is_waiting:
                break
        if not self.options.load_async:
            for running in loads:
                self.order(running)  # the wait after a load
                self.capture(running)

    def start_load(self, running):
        """Submit a load, or note why the driver refuses; `retire` tells vLLM."""
        try:
            running.job = self.submit(self.loader, running.transfer, self.compute.stream)  # the wait before a load
            if running.job is None and not self.options.load_async:  # the step needs it
                self.drain()
                running.job = self.submit(self.loader, running.transfer, self.compute.stream)
                if running.job is None:
                    raise MemoryError(f"no memory for a job of {len(running.transfer.slots)} blocks")
        except (DriverError, MemoryError) as error:
            running.error = error

    def start_save(self, step):
        """Called when the forward was launched: the copies of what it writes wait, on the device, for its end."""
        for save in step.of(SAVE):
            self.save(save)

    def save(self, save):
        """Copy device blocks into slots, after vLLM's work so far."""
        running = self.begin_transfer(save)
        try:
            running.job = self.submit(self.saver, save, self.compute.stream)  # the wait before a save
        except DriverError as error:
            self.fail(running, error)
            return running
        if running.job is None:
            self.count(saves_dropped=len(save.slots))
            self.end(running, bad=save.slots)
        self.capture(running)
        return running

    def begin_transfer(self, transfer):
        running = self.running[transfer.number] = Running(transfer)
        return running

    def collect(self, finished_request_ids):
        """Note which copies are over."""
        if not self.reports_aborted_loads and self.options.load_async:
            loads = {running.transfer.request_id for running in self.running.values() if running.is_load}
            self.aborted |= loads & set(finished_request_ids)
        if self.is_idle:
            self.wait_for_a_load()
        self.retire()
        if self.tier is not None:
            self.tier.collect()

    def wait_for_a_load(self):
        """Wait until the oldest load is over, or an operation of a lower tier, for `IDLE_WAIT_MS` at the most.

        The step computes nothing, and the next one would ask again at once. With few cores, that would take the core
        from the threads that submit and copy, and the GIL from others.
        """
        for running in self.running.values():
            if running.is_load and running.job is not None:
                with contextlib.suppress(TimeoutError, DriverError):
                    running.job.wait(IDLE_WAIT_MS)
                return
        if self.tier is not None:
            self.tier.wait_a_moment(IDLE_WAIT_MS)

    def give_up(self, running):
        """Withdraw a load; True if none of it is copied. A load is fenced when it was aborted (vLLM 0.15)."""
        if running.is_load and not running.is_given_up:
            running.is_given_up = running.job is None or self.loader.withdraw(running.job)
        return running.is_given_up

    def order(self, running):
        """Let vLLM's next work come after this transfer. If its copy failed it is over, and `retire` reports that."""
        if running.job is not None:
            with contextlib.suppress(DriverError):
                self.compute.wait_for(running.job)

    def finish(self, running):
        """Wait until this transfer is over, and the device has done its part of the `verify` check."""
        if running.job is None or running.is_given_up:
            return
        with contextlib.suppress(DriverError):  # as in `order`
            running.job.wait()
        self.capture(running)
        if running.check is not None:
            self.verifier.wait(running.check)

    def submit(self, queue, transfer, stream):
        if not self.tensors_in_use:
            self.tensors_in_use = [tensor() for tensor in self.tensors]
        queue.poll()  # frees the records of withdrawn jobs, which have no handle any more
        deferred = queue is self.loader and self.options.load_async  # a step that waits for a load submits it, too
        return queue.submit(
            self.layout, transfer.block_ids, self.pool, transfer.slots, stream=stream, deferred=deferred
        )

    def retire(self):
        for running in list(self.running.values()):
            try:
                num_blocks = running.num_blocks()
            except (DriverError, MemoryError) as error:
                if not self.is_tried_again(running):
                    self.fail(running, error)
                continue
            if num_blocks is None or (num_blocks and not self.verified(running)):
                continue
            what = running.transfer.kind
            amounts = {"blocks": num_blocks, "bytes": num_blocks * self.layout.block_bytes}
            amounts["seconds"] = time.perf_counter() - running.began
            self.count(**{f"{what}_{unit}": amount for unit, amount in amounts.items()})
            self.end(running, bad=self.not_packed(running))

    def not_packed(self, running):
        """Slots of a save whose block has numbers that the codec cannot pack."""
        if running.is_load or self.options.engine.codec == "exact":
            return ()
        refused = self.carrier.refused_slots(running.transfer.slots)
        if len(refused):
            self.count(blocks_not_packed=len(refused))
            if not self.has_refused:
                logger.warning("KVortex: blocks have numbers that no codec can pack (Inf, NaN, or 2^100 and more), and "
                               "are not kept")  # fmt: skip
            self.has_refused = True
        return refused

    def is_tried_again(self, running):
        """Whether a load that failed is offered once more, because vLLM could not be told of it."""
        again = running.is_load and self.failed_loads == NOTHING and self.options.load_async
        if again and running.refusals < MOST_REFUSALS:
            running.refusals += 1
            running.job = running.error = None
            return True
        return False

    def fail(self, running, error):
        """Note that a transfer failed: vLLM computes the blocks of a load, and those of a save are not kept."""
        if not self.has_failed:  # once: when a device dies, every transfer fails
            logger.error("KVortex: a transfer failed, its blocks are computed where they are needed: %s", error)
        self.has_failed = True
        self.count(transfers_failed=1)
        if running.check is not None:
            self.verifier.release(running.check)
        kind, _, slots, block_ids, request_id = running.transfer
        if kind == LOAD and request_id not in self.aborted:  # else another request has the blocks by now
            if self.failed_loads == NOTHING:
                raise RuntimeError(
                    "KVortex could not load blocks, and this vLLM has no way to hear of it for a model with several KV "
                    "cache groups, windows or states: it would go on with garbage. Use vLLM 0.32 or later with "
                    "load_async, which computes such blocks"
                ) from error
            if self.failed_loads == REQUESTS:
                self.failed_requests.add(request_id)
            else:
                self.load_errors.update(block_ids.tolist())
        self.end(running, bad=slots)

    def end(self, running, bad=()):
        """Report that a transfer is over, the slots whose blocks did not move, and the request of a load as loaded."""
        kind, number, _, _, request_id = running.transfer
        del self.running[number]
        if not self.running:
            self.tensors_in_use = ()
        self.report.add(kind, number, bad)
        if kind == SAVE and self.tier is not None:
            self.tier.saved(number, is_good=not len(bad))
        if kind != LOAD or not self.options.load_async:
            return
        if request_id in self.aborted:
            self.aborted.remove(request_id)
        else:
            self.received.add(request_id)

    def capture(self, running):
        """For `verify`: what the device holds of these blocks at this point of vLLM's stream."""
        if self.verifier is not None and not running.is_captured and running.job is not None:
            running.is_captured = True
            running.check = self.verifier.capture(running.transfer.block_ids, running.transfer.slots)

    def verified(self, running):
        """Whether a finished copy has been compared with what the device held, or need not be."""
        if self.verifier is None:
            return True
        if running.is_load and self.options.load_async:
            self.capture(running)  # the load has ended: from here on a forward may read its blocks
        # In a step that computes nothing this thread releases the GIL for moments only, and the threads that compare
        # would not get it, for a third of a second at times: so wait for them.
        verdict = self.verifier.verdict(running.check, wait=self.is_idle)
        if verdict is not None:
            self.count(**verdict)
        return verdict is not None

    def count(self, **amounts):
        for name, amount in amounts.items():
            self.counters[name] = self.counters.get(name, 0) + amount

    # ---- reports -----------------------------------------------------------------------------------------------------

    def take_received(self):
        received, self.received = self.received, set()
        return received or None

    def take_failed_requests(self):
        failed, self.failed_requests = self.failed_requests, set()
        return failed

    def take_load_errors(self):
        errors, self.load_errors = self.load_errors, set()
        return errors

    def take_report(self):
        """A `WorkerReport`, or None when there is nothing to tell."""
        if self.pool is not None and self.pool.slots_usable < self.pool.num_slots and not self.is_incomplete:
            self.is_incomplete = True
            logger.warning(
                "KVortex: only %d of %d blocks serve, because host memory could not be registered; "
                "PinnedPool.wait_ready names what to check", self.pool.slots_usable, self.pool.num_slots,
            )  # fmt: skip
        while self.pool is not None and self.counted is not None:
            first, count = self.counted.chunk(self.next_chunk)
            end = min(first + count, self.pool.num_slots)  # another stage may have more
            if end <= first or self.pool.slots_ready < end:
                break
            self.report.add(CHUNK, self.next_chunk, bad=range(end, first + count))
            self.next_chunk += 1
        if self.tier is not None:
            self.tier.tell(self.report)
        if self.report.is_empty():
            return None
        report, self.report = self.report, WorkerReport()
        return report

    def take_counters(self):
        counters, self.counters = self.counters, {}
        return counters

    # ---- end ---------------------------------------------------------------------------------------------------------

    def drain(self):
        """Wait for every copy in flight, because the memory that copies use may be unmapped next."""
        for running in self.running.values():
            self.finish(running)

    def close(self):
        """Wait for copies in flight, `shutdown_timeout_ms` at the most. Memory that a copy may still use is kept."""
        deadline = time.monotonic() + self.options.engine.shutdown_timeout_ms / 1000
        for running in self.running.values():
            self.give_up(running)
        for part in (self.submitter, self.carrier):
            if part is not None:
                part.close(max(0, int(1000 * (deadline - time.monotonic()))))
        if self.tier is not None:
            self.end_saves()
            self.tier.close(self.options.flush_timeout_ms)
        parts = [self.verifier, self.pool, self.device]
        if self.carrier is not None and any(queue.jobs_in_flight for queue in self.carrier.queues):
            parts = [self.verifier]
        for part in parts:
            if part is not None:
                part.close()

    def end_saves(self):
        """Start PUTs whose steps have begun and whose SAVE is over now; drop the others."""
        for number, running in self.running.items():
            if not running.is_load:
                with contextlib.suppress(DriverError, MemoryError):
                    self.tier.saved(number, is_good=bool(running.num_blocks()) and not len(self.not_packed(running)))
