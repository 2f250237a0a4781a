"""A real vLLM scheduler, real connector halves, and a model that is nothing but its KV.

The KV of a token is a number made of all tokens up to it. Before a forward, the rig reads the KV of every token that
the scheduler counts as computed, as attention would, and counts what differs: a block loaded into the wrong place, too
late, from a stale slot, or overwritten too early. What a forward writes, and the token it samples, comes from there as
well.
"""

import copy
import inspect
import pickle
from pathlib import Path

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

TINY = Path(__file__).parent / "tiny"
BLOCK_TOKENS, NUM_LAYERS = 16, 2
SLOT_BYTES = 4096  # a block has 512 bytes, and a slot a page
HAS_WORKER_METADATA = hasattr(KVConnectorBase_V1, "build_connector_worker_meta")


def known(function, **arguments):
    """Only the arguments that this version knows."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


class Rig:
    """One engine core without a model.

    Parameters
    ----------
    num_blocks : int
        Device blocks; the first is vLLM's null block. No other size of the cache may be a multiple of it.
    num_slots : int
    load_async : bool
    num_ranks : int, default 1
        Worker halves, each with a cache of its own.
    scheduler_class, policy : optional
    extra : dict, optional
        More options of the connector.
    """

    def __init__(self, *, num_blocks=67, num_slots=64, load_async=True, num_ranks=1, max_tokens=128, max_seqs=8,
                 failure_policy="recompute", scheduler_class=Scheduler, extra=None, events=None):  # fmt: skip
        model = ModelConfig(model=str(TINY), skip_tokenizer_init=True, dtype="float32", seed=0)
        scheduling = SchedulerConfig(
            **known(
                SchedulerConfig, max_num_seqs=max_seqs, max_num_batched_tokens=max_tokens, max_model_len=2048,
                enable_chunked_prefill=True, is_encoder_decoder=False,
            )
        )  # fmt: skip
        caching = CacheConfig(
            **known(
                CacheConfig, block_size=BLOCK_TOKENS, gpu_memory_utilization=0.9, cache_dtype="auto",
                enable_prefix_caching=True,
            )
        )  # fmt: skip
        options = {"cpu_pool_size_bytes": num_slots * num_ranks * SLOT_BYTES, "load_async": load_async, **(extra or {})}
        transfer = KVTransferConfig(
            kv_connector="KVortexConnector", kv_connector_module_path="kvortex.integrations.vllm", kv_role="kv_both",
            kv_connector_extra_config=options,
            **known(KVTransferConfig, kv_load_failure_policy=failure_policy),
        )  # fmt: skip
        config = VllmConfig(
            model_config=model, scheduler_config=scheduling, cache_config=caching, kv_transfer_config=transfer,
            device_config=DeviceConfig("cpu"), **({"kv_events_config": events} if events else {}),
        )  # fmt: skip
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(
            **known(FullAttentionSpec, block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
        )
        layers = [f"layer{number}" for number in range(NUM_LAYERS)]
        cache_config = KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(layers, spec)]
        )
        init_none_hash(sha256)
        config.parallel_config.tensor_parallel_size = num_ranks  # of the connector; nobody starts other processes
        self.scheduler = scheduler_class(
            vllm_config=config, kv_cache_config=cache_config, log_stats=True, block_size=BLOCK_TOKENS,
            structured_output_manager=StructuredOutputManager(config),
        )  # fmt: skip
        self.connector = self.scheduler.connector
        self.workers, self.caches = [], []
        for _ in range(num_ranks):
            worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, cache_config)
            cache = {name: torch.zeros(2, num_blocks, BLOCK_TOKENS, 1, 1) for name in layers}
            worker.register_kv_caches(cache)
            self.workers.append(worker)
            self.caches.append(cache)
        self.aggregator = KVOutputAggregator(num_ranks)
        self.tables, self.wrong_tokens, self.read_tokens = {}, 0, 0
        self.loaded_tokens, self.outputs, self.num_steps = {}, {}, 0

    @property
    def index(self):
        return self.connector.scheduler.index

    # ---- requests ----------------------------------------------------------------------------------------------------

    def add(self, request_id, tokens, max_tokens=2):
        parameters = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        try:
            parameters.update_from_generation_config({}, 2)
        except TypeError:
            parameters.update_from_generation_config({})
        request = Request(
            **known(
                Request.__init__, request_id=request_id, prompt_token_ids=list(tokens), sampling_params=parameters,
                pooling_params=None, eos_token_id=2, block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
            )
        )  # fmt: skip
        self.scheduler.add_request(request)
        return request

    def abort(self, request_id):
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def run(self, most=400):
        """Step until nothing is left to do, and the last copies have been reported."""
        for _ in range(most):
            if not self.scheduler.requests and not self.connector.scheduler.in_flight:
                return
            self.step()
        raise AssertionError(f"not done after {most} steps: {list(self.scheduler.requests)}")

    def reset_device(self):
        """Empty the device's prefix cache, so that only the connector can hit."""
        self.run()
        assert self.scheduler.reset_prefix_cache()

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(self):
        """What engine core and model runner do, in this version's order."""
        return self.update(self.launch())

    def launch(self):
        """Schedule, run the forward, and let the workers' halves do their part."""
        output = self.scheduler.schedule()
        self.num_steps += 1
        self.take_tables(output)
        sampled, results = {}, []
        for worker, cache in zip(self.workers, self.caches, strict=True):
            step = pickle.loads(pickle.dumps(output.kv_connector_metadata))
            if "kv_connector_metadata" in inspect.signature(worker.handle_preemptions).parameters:
                worker.handle_preemptions(step)
            elif output.preempted_req_ids:
                worker.handle_preemptions(output.preempted_req_ids)
            worker.bind_connector_metadata(step)
            late = not getattr(output, "has_sync_kv_loads", True)
            if not late:
                worker.start_load_kv(None)
            sampled = self.forward(output, cache)
            if late:
                worker.start_load_kv(None)
            if output.num_scheduled_tokens or late:
                worker.wait_for_save()
            result = KVConnectorOutput()
            result.finished_sending, result.finished_recving = worker.get_finished(output.finished_req_ids)
            result.invalid_block_ids = worker.get_block_ids_with_load_errors()
            result.kv_connector_stats = worker.get_kv_connector_stats()
            if HAS_WORKER_METADATA:
                result.kv_connector_worker_meta = worker.build_connector_worker_meta()
            worker.clear_connector_metadata()
            results.append(pickle.loads(pickle.dumps(result)))
        return output, sampled, results

    def update(self, launched):
        output, sampled, results = launched
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
        if whole.kv_connector_output.is_empty() and not ids:
            whole = copy.copy(whole)
            whole.kv_connector_output = None
        self.scheduler.update_from_output(output, whole)
        return output

    def take_tables(self, output):
        """The block tables, as a model runner keeps them."""
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
            self.loaded_tokens.setdefault(new.req_id, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for name, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self.tables[name] = list(ids[0])
            elif ids is not None:
                self.tables[name] += ids[0]

    def forward(self, output, cache):
        """Read what is computed, write what is scheduled, sample where the last token was."""
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled = {}
        for name, count in output.num_scheduled_tokens.items():
            request, table = self.scheduler.requests[name], self.tables[name]
            tokens = request.all_token_ids
            expected = kv_of(tokens)
            before, after = computed[name], computed[name] + count
            assert after <= len(tokens) and len(table) * BLOCK_TOKENS >= after
            for layer, tensor in enumerate(cache.values()):
                for part in range(2):
                    rows = tensor[part, table].reshape(-1)
                    wrong = (rows[:before] != torch.from_numpy(expected[:before] + layer * 2 + part)).sum()
                    self.wrong_tokens += int(wrong)
                    rows[before:after] = torch.from_numpy(expected[before:after] + layer * 2 + part)
                    first, last = before // BLOCK_TOKENS, -(-after // BLOCK_TOKENS)
                    tensor[part, table[first:last]] = rows.reshape(-1, BLOCK_TOKENS, 1, 1)[first:last]
            self.read_tokens += before
            sampled[name] = [int(expected[after - 1]) % 997 + 3] if after == len(tokens) else []
            self.outputs.setdefault(name, []).extend(sampled[name])
        return sampled

    # ---- end ---------------------------------------------------------------------------------------------------------

    def require_clean(self):
        """Nothing is left pinned, being written, or in flight."""
        half = self.connector.scheduler
        assert self.wrong_tokens == 0, f"{self.wrong_tokens} of {self.read_tokens} tokens were read wrong"
        assert not half.in_flight and not half.requests and not half.writing and not half.loads
        assert self.index.num_pinned == 0 and self.index.num_writing == 0
        for worker in self.workers:
            assert not worker.worker.running and not worker.worker.aborted

    def close(self):
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


def kv_of(tokens):
    """A number for each token, made of all tokens up to it; exact in float32."""
    state, found = 17, np.empty(len(tokens), dtype=np.float32)
    for at, token in enumerate(tokens):
        state = (state * 1000003 + token + 1) & 0x7FFFFF
        found[at] = state
    return found
