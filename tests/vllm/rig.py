"""A real vLLM scheduler, real connector halves, and a model that is nothing but its KV.

The KV of a token is a number made of all tokens up to it and of the weights, which `Rig.reset` exchanges. Before a
forward, the rig reads the KV of every token that the scheduler counts as computed, as attention would, and counts what
differs: a block loaded into the wrong place, too late, from a stale slot, or overwritten too early. A forward that read
something wrong writes something wrong, in every rank, so that an error spreads as it would. Only reading a block whose
load was reported as failed is no fault, because vLLM computes that request again.
"""

import copy
import inspect
import itertools
import os
import pickle
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from other_connector import OtherConnector
from rig_cache import (
    BLOCK_TOKENS,
    Truth,
    configure_cache,
    known,
    make_groups,
    make_tensors,
    planes,
    resolve_block_sizes,
)
from rig_model import Model
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVEventsConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvortex.integrations.vllm import KVortexConnector
from kvortex.integrations.vllm.messages import LOAD, StepMetadata

TINY = Path(__file__).parent / "tiny"
SLOT_BYTES = 4096  # a block has 256 bytes unless there are more heads, and a slot whole pages; a header one more
HAS_WORKER_METADATA = hasattr(KVConnectorBase_V1, "build_connector_worker_meta")
HAS_TRANSFER_RESULTS = hasattr(KVConnectorBase_V1, "get_transfer_results")  # 0.32: empty steps too wait for saves


class Rig(Model):
    """One engine core without a model.

    Parameters
    ----------
    num_blocks : int
        Device blocks; the first is vLLM's null block. No other size of the cache may be a multiple of it.
    num_slots : int
    load_async : bool
    num_ranks : int, default 1
        Worker halves, each with a cache of its own.
    pipelined : bool, default False
        Asynchronous scheduling: a step is scheduled and runs before the scheduler has heard of the one before.
    failure_policy : str, default "recompute"
        Of vLLM, for loads that failed.
    kv_role : str, default "kv_both"
        Of vLLM: what connectors are to do.
    extra : dict, optional
        More options of the connector.
    events : bool, default False
        Whether vLLM publishes KV events; then they are in `events`.
    num_groups : int, default 1
        With two, it is short for groups of ("full", "window:2048").
    hash_function : callable, default sha256
        Makes vLLM's block hashes.
    policy : str, default "fcfs"
        Whom vLLM schedules first.
    heads : tuple of int, default (1, 1)
        KV heads of each layer; where they differ, so do the pages of the layers.
    other : dict, optional
        Options of an `OtherConnector` beside KVortex's, in a `MultiConnector`.
    other_first : bool, default False
        Whether it is asked first.
    groups : tuple of str, optional
        The form of each KV cache group, see `Group`; the tensors are then as this version's model runner makes them.
    block_tokens, layers : int or tuple of int
        Of each group. A group with fewer layers than another is padded, one with none is empty.
    mixed_pages, pad_bytes, layout
        See `configure_cache`.
    stages : tuple of int, optional
        Layers that each group has in each stage of a pipeline; each rank is a stage. For `groups`.
    runner : str, default "v1"
        Whose order of a step: "v1" or, from 0.26 on, "v2".
    hash_tokens : int, optional
        Tokens in a hash block, fewer than the groups have in common; from 0.32 on, with states.
    retention : int or None, optional
        vLLM's interval between windows and states that its own prefix cache keeps, None for all; from 0.32 on.
    connector : bool, default True
        Whether there is one; if not, this shows that the rig itself sees what it should.
    """

    def __init__(self, *, num_blocks=67, num_slots=64, load_async=True, num_ranks=1, max_tokens=128, max_seqs=8,
                 pipelined=False, failure_policy="recompute", kv_role="kv_both", extra=None, events=False, num_groups=1,
                 hash_function=sha256, policy="fcfs", heads=(1, 1), other=None, other_first=False,
                 groups=None, block_tokens=BLOCK_TOKENS, layers=2, mixed_pages=False, pad_bytes=0, layout="LBHNC",
                 runner="v1", hash_tokens=None, retention=0, connector=True, stages=()):  # fmt: skip
        num_ranks, layers = len(stages) or num_ranks, sum(stages) or layers
        model = ModelConfig(model=str(TINY), skip_tokenizer_init=True, dtype="float32", seed=0)
        scheduling = SchedulerConfig(
            **known(
                SchedulerConfig, max_num_seqs=max_seqs, max_num_batched_tokens=max_tokens, max_model_len=2048,
                enable_chunked_prefill=True, is_encoder_decoder=False, policy=policy,
            )
        )  # fmt: skip
        caching = CacheConfig(
            **known(
                CacheConfig, block_size=BLOCK_TOKENS, gpu_memory_utilization=0.9, cache_dtype="auto",
                enable_prefix_caching=True,
            )
        )  # fmt: skip
        slot_bytes = SLOT_BYTES * (1 + bool({"disk_path", "remote_url"} & {*(extra or {})}))
        options = {"cpu_pool_size_bytes": num_slots * num_ranks * slot_bytes, "load_async": load_async, **(extra or {})}
        named = {
            "kv_connector": "KVortexConnector", "kv_connector_module_path": "kvortex.integrations.vllm",
            "kv_connector_extra_config": options,
        }  # fmt: skip
        # Of the other connector: tokens that it has of a request, requests that it fails to pull, or does not send.
        self.offered, self.unreachable, self.aborted = {}, set(), set()
        if other is not None:
            OtherConnector.rig = self
            both = [named, {
                "kv_connector": "OtherConnector", "kv_connector_module_path": "other_connector",
                "kv_connector_extra_config": other,
            }]  # fmt: skip
            both = [{**one, "kv_role": "kv_both"} for one in both]
            connectors = {"connectors": both[::-1] if other_first else both}
            named = {"kv_connector": "MultiConnector", "kv_connector_extra_config": connectors}
        transfer = connector and KVTransferConfig(
            **named, kv_role=kv_role, **known(KVTransferConfig, kv_load_failure_policy=failure_policy)
        )
        config = VllmConfig(
            model_config=model, scheduler_config=scheduling, cache_config=caching, kv_transfer_config=transfer or None,
            device_config=DeviceConfig("cpu"),
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null") if events else None,
        )  # fmt: skip
        config.scheduler_config.async_scheduling = pipelined
        config.cache_config.num_gpu_blocks = num_blocks
        if groups is None and num_groups == 2:
            groups = ("full", "window:2048")
        self.groups = make_groups(groups or ("full",), num_blocks, block_tokens, layers if groups else len(heads))
        config.scheduler_config.disable_hybrid_kv_cache_manager = len(self.groups) == 1
        for name, value in (("prefix_match_unit", hash_tokens), ("prefix_cache_retention_interval", retention)):
            if hasattr(config.cache_config, name):
                setattr(config.cache_config, name, value)
        of_stages = [
            make_groups(groups, num_blocks, block_tokens, count, sum(stages[:at])) for at, count in enumerate(stages)
        ]
        cache_configs = [
            configure_cache(
                config, num_blocks, its_groups, heads=heads, mixed_pages=mixed_pages, pad_bytes=pad_bytes, layout=layout
            )
            for its_groups in of_stages or [self.groups]
        ] * (1 if stages else num_ranks)
        self.cache_config = cache_configs[0]
        for_scheduler = generate_scheduler_kv_cache_config(cache_configs)
        self.block_size, hash_block_size = resolve_block_sizes(config, for_scheduler, cache_configs)
        init_none_hash(hash_function)
        self.hash_blocks = get_request_block_hasher(hash_block_size, hash_function)
        # Of the connector; nobody starts other processes.
        config.parallel_config.tensor_parallel_size = 1 if stages else num_ranks
        config.parallel_config.pipeline_parallel_size = len(stages) or 1
        self.config, self.heads, self.runner = config, heads, runner
        scheduler = AsyncScheduler if pipelined else Scheduler
        with runner_of_vllm(runner):
            self.scheduler = scheduler(
                vllm_config=config, kv_cache_config=for_scheduler, log_stats=True,
                structured_output_manager=StructuredOutputManager(config),
                **known(Scheduler.__init__, block_size=self.block_size, hash_block_size=hash_block_size),
            )  # fmt: skip
            self.connector = self.scheduler.connector
            self.workers, self.caches = [], []
            for rank, cache_config in enumerate(cache_configs):
                config.parallel_config.rank = rank
                self.caches.append(make_tensors(cache_config, layout) if groups else self.make_cache())
                if connector:
                    worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, cache_config)
                    worker.register_kv_caches(self.caches[-1])
                    self.workers.append(worker)
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        for group, manager in zip(self.groups, managers, strict=True):
            group.is_zeroed = getattr(manager, "records_new_block_ids", False)
        self.aggregator = KVOutputAggregator(num_ranks)
        self.pipelined, self.pending = pipelined, []  # steps that ran and of which the scheduler has not heard
        self.requests, self.tables, self.known, self.truths = {}, {}, {}, {}
        self.epoch, self.failed_blocks = 0, [set() for _ in self.caches]
        self.wrong_tokens = self.read_tokens = self.num_steps = self.num_pulled = 0
        self.computed_at_first = {}  # tokens that a request found computed when it ran for the first time
        self.events, self.stats = [], []
        if events:
            self.scheduler.kv_event_publisher.publish = lambda batch: self.events.extend(batch.events)

    def make_cache(self):
        """The tensors of one rank's KV cache, by layer."""
        return {
            f"layer{number}": torch.zeros(2, self.cache_config.num_blocks, BLOCK_TOKENS, heads, 1)
            for number, heads in enumerate(self.heads)
        }

    @property
    def half(self):
        """The connector's half in the scheduler; None where it keeps nothing."""
        return self.connector and ours(self.connector).scheduler

    @property
    def halves(self):
        """The connector's halves in the workers."""
        return [ours(worker).worker for worker in self.workers]

    @property
    def index(self):
        return self.half.index

    # ---- requests ----------------------------------------------------------------------------------------------------

    def add(self, request_id, tokens, max_tokens=2, **more):
        """A new request; `more` goes to vLLM's `Request`."""
        request = self.make_request(request_id, tokens, max_tokens, **more)
        self.requests[request_id], self.truths[request_id] = request, Truth(tokens)
        self.scheduler.add_request(request)
        return request

    def make_request(self, request_id, tokens, max_tokens, **more):
        parameters = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **more.pop("sampling", {}))
        try:
            parameters.update_from_generation_config({}, 2)
        except TypeError:
            parameters.update_from_generation_config({})
        return Request(
            **known(
                Request.__init__, request_id=request_id, prompt_token_ids=list(tokens), sampling_params=parameters,
                pooling_params=None, eos_token_id=2, block_hasher=self.hash_blocks,
            ),
            **more,
        )  # fmt: skip

    def add_to_session(self, request_id, kept, tokens, max_tokens):
        """More tokens of a streaming session, behind those of its tokens that it keeps."""
        more = self.make_request(request_id, tokens, max_tokens, resumable=True)
        self.truths[request_id] = Truth([*kept, *tokens])
        self.scheduler.add_request(more)

    def abort(self, request_id):
        self.aborted.add(request_id)
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def outputs(self, request_id):
        """The tokens that vLLM has for this request beyond its prompt."""
        return list(self.requests[request_id].output_token_ids)

    def run(self, most_s=40):
        """Step until nothing is left to do, and the last copies have been reported."""
        end = time.monotonic() + most_s
        while time.monotonic() < end:
            if not self.scheduler.requests:
                while self.pending:
                    self.update()
                if not (self.half and (self.half.in_flight or (self.half.tier and self.half.tier.is_busy))):
                    return
            self.step()
        raise AssertionError(f"not done after {most_s} s: {list(self.scheduler.requests)}")

    def serve(self, request_id, tokens, max_tokens=2, **more):
        """One request from its arrival to its last copy; the tokens that it found computed."""
        self.add(request_id, tokens, max_tokens, **more)
        self.run()
        return self.computed_at_first[request_id]

    def forget_device(self):
        """Empty the device's prefix cache, so that only the connector can hit."""
        self.run()
        assert self.scheduler.reset_prefix_cache()

    def reset(self):
        """New weights: all that was computed is to be forgotten. False if vLLM cannot, because a request is loading."""
        while self.pending:
            self.update()
        try:
            done = self.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        except RuntimeError:
            return False
        self.epoch += done
        return done

    def step_until_served(self):
        """Step until no request is left; copies may go on."""
        while self.scheduler.requests:
            self.step()

    def open_gate_when_waited_for(self, host):
        """Let whoever waits for a copy open the gate that `host.hold` closed; returns the list of those waits."""
        waits = []
        for half in self.halves:

            def wait_for(job):
                waits.append(job)
                host.release()
                job.wait()

            half.compute.wait_for = wait_for
        return waits

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(self):
        """What engine core and model runner do, in this version's order."""
        self.pending.append(self.launch())
        if not self.pending[-1][0].num_scheduled_tokens:
            time.sleep(0.0002)  # an engine would not be this fast to ask again
        if not self.pipelined or len(self.pending) > 1 or not self.pending[0][0].num_scheduled_tokens:
            self.update()

    def launch(self):
        """Schedule, run the forward, and let the workers' halves do their part."""
        output = self.scheduler.schedule()
        self.num_steps += 1
        self.take_tables(output)
        runs = self.runs(output)
        steps = [pickle.loads(pickle.dumps(output.kv_connector_metadata)) for _ in self.workers]
        if self.runner == "v1":
            self.tell_of_preemptions(output, steps)
        self.prepare_blocks(output, runs)
        if self.runner == "v2":
            self.tell_of_preemptions(output, steps)
        late = not getattr(output, "has_sync_kv_loads", True)  # loads may start after the forward
        for worker, step in zip(self.workers, steps, strict=True):
            worker.bind_connector_metadata(step)
            if not late:
                worker.start_load_kv(None)
        steps = getattr(output.kv_connector_metadata, "metadata", [output.kv_connector_metadata])
        for load in itertools.chain.from_iterable(step.of(LOAD) for step in steps if isinstance(step, StepMetadata)):
            for failed in self.failed_blocks:
                failed.difference_update(load.block_ids.tolist())
        wrong = self.forward(runs)
        results = []
        for worker in self.workers:
            if late:
                worker.start_load_kv(None)
            if output.num_scheduled_tokens or HAS_TRANSFER_RESULTS:
                worker.wait_for_save()
            result = KVConnectorOutput()
            if HAS_TRANSFER_RESULTS:
                landed = worker.get_transfer_results(output.finished_req_ids)
                result.failed_recving = landed.failed_recving
                result.finished_sending, result.finished_recving = landed.finished_sending, landed.finished_recving
            else:
                result.finished_sending, result.finished_recving = worker.get_finished(output.finished_req_ids)
            result.invalid_block_ids = worker.get_block_ids_with_load_errors()
            result.kv_connector_stats = worker.get_kv_connector_stats()
            if HAS_WORKER_METADATA:
                result.kv_connector_worker_meta = worker.build_connector_worker_meta()
            worker.clear_connector_metadata()
            results.append(pickle.loads(pickle.dumps(result)))
        self.settle(runs, wrong, set().union(*(result.invalid_block_ids for result in results)))
        return output, self.sample(runs), results or [None]

    def tell_of_preemptions(self, output, steps):
        for worker, step in zip(self.workers, steps, strict=True):
            if "kv_connector_metadata" in inspect.signature(worker.handle_preemptions).parameters:
                worker.handle_preemptions(step)
            elif output.preempted_req_ids:
                worker.handle_preemptions(output.preempted_req_ids)

    def update(self):
        """Let the scheduler hear of the oldest step it has not heard of."""
        output, sampled, results = self.pending.pop(0)
        ids = list(output.num_scheduled_tokens)
        runner_outputs = [
            ModelRunnerOutput(
                **known(
                    ModelRunnerOutput, req_ids=ids, req_id_to_index={name: at for at, name in enumerate(ids)},
                    sampled_token_ids=[sampled[name] for name in ids], logprobs=None, prompt_logprobs_dict={},
                    pooler_output=None, kv_connector_output=result,
                )
            )
            for result in results
        ]  # fmt: skip
        whole = self.aggregator.aggregate(runner_outputs) if len(results) > 1 else runner_outputs[0]
        if whole.kv_connector_output and whole.kv_connector_output.is_empty() and not ids:
            whole = copy.copy(whole)
            whole.kv_connector_output = None
        outputs = self.scheduler.update_from_output(output, whole)
        self.stats += [
            one.scheduler_stats.kv_connector_stats
            for one in outputs.values()
            if one.scheduler_stats and one.scheduler_stats.kv_connector_stats
        ]

    def take_tables(self, output):
        """Block tables and token counts, as a model runner keeps them."""
        cached = output.scheduled_cached_reqs
        anew = [(new.req_id, new.block_ids) for new in output.scheduled_new_reqs]
        for name, ids, num_outputs in zip(
            cached.req_ids, cached.new_block_ids, cached.num_output_tokens, strict=True
        ):  # fmt: skip
            # Fewer than the runner knows: the scheduler has dropped what was sampled on top of a failed load.
            self.known[name] = min(self.known[name], self.requests[name].num_prompt_tokens + num_outputs)
            if name in cached.resumed_req_ids:
                anew.append((name, ids))
            elif ids is not None:
                for table, more in zip(self.tables[name], ids, strict=True):
                    table += more
        for name, ids in anew:
            self.tables[name], self.known[name] = [list(more) for more in ids], self.requests[name].num_tokens
        for new in output.scheduled_new_reqs:
            self.computed_at_first.setdefault(new.req_id, new.num_computed_tokens)

    def runs(self, output):
        """Per request scheduled: its name, the tokens computed before and after this step."""
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        runs = [(name, computed[name], computed[name] + count) for name, count in output.num_scheduled_tokens.items()]
        for name, _, after in runs:
            assert after <= self.known[name]
            for group, table in zip(self.groups, self.tables[name], strict=True):
                assert len(table) * group.block_tokens >= after
            truth = self.truths[name].tokens
            assert list(self.requests[name].all_token_ids) == truth[: self.requests[name].num_tokens]
        return runs

    def sample(self, runs):
        """A token wherever the last one known was computed."""
        sampled = {}
        for name, _, after in runs:
            sampled[name] = []
            if after == self.known[name]:
                sampled[name].append(self.truths[name].token_after(after))
                self.known[name] += 1
        return sampled

    # ---- what the other connector does -------------------------------------------------------------------------

    def pull(self, other, pull):
        """It writes what it has, or garbage where it fails, and says so."""
        rank = [other.caches is cache for cache in self.caches].index(True)
        blocks = pull.block_ids[pull.first // BLOCK_TOKENS : -(-pull.last // BLOCK_TOKENS)]
        fails = pull.name in self.unreachable
        run, poisoned = (pull.name, pull.first, pull.last), {pull.name} if fails else ()
        self.write(self.caches[rank], [run], poisoned, [pull.block_ids])
        self.num_pulled += not fails
        if fails:
            other.invalid |= set(blocks)
        else:
            self.failed_blocks[rank].difference_update(blocks)

    def send(self, other, name, num_tokens, block_ids):
        """It reads blocks of a request that is over."""
        self.read_tokens += num_tokens
        for number, (_, plane) in planes(other.caches, self.groups):
            if not np.array_equal(plane[block_ids].reshape(-1)[:num_tokens], self.kv(name, 0, num_tokens, number)):
                self.wrong_tokens += num_tokens

    # ---- end ---------------------------------------------------------------------------------------------------------

    def require_clean(self):
        """Nothing was read wrong, and nothing is left pinned, being written, or in flight."""
        half = self.half
        assert self.wrong_tokens == 0, f"{self.wrong_tokens} of {self.read_tokens} tokens were read wrong"
        if half is None:
            return
        assert not half.in_flight and not half.requests and not half.writing and not half.loads
        assert not half.landed and not half.loading and not half.waits_for
        assert not half.room.num_taken and not half.room.holders.any()
        assert self.index.num_pinned == 0 and self.index.num_writing == 0
        if half.tier is not None:
            assert not half.tier.asked and not half.tier.behind and not half.tier.promoter.is_busy
            assert half.tier.catalogue.num_pinned == 0 and half.tier.catalogue.num_writing == 0
        for part in self.halves:
            assert not part.running and not part.aborted and not part.received
            assert not part.load_errors

    def close(self):
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


@contextmanager
def runner_of_vllm(name):
    """What `VllmConfig.use_v2_model_runner` says, which the CPU has no say in."""
    if name == "v1":
        yield
        return
    with mock.patch.dict(os.environ, VLLM_USE_V2_MODEL_RUNNER="1"):
        yield


def ours(connector):
    """KVortex's own, where it is one of several."""
    connectors = getattr(connector, "_connectors", [connector])
    return next(one for one in connectors if isinstance(one, KVortexConnector))


def in_flight(job):
    """A job, or None, once all its copies are on their stream, or were refused."""
    while job is not None and not job.submitted:
        time.sleep(0.0001)
    return job
