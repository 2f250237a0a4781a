"""`KVortexConnector`: what vLLM calls, handed on to the half that runs in this process."""

import hashlib
import importlib.util
import inspect
import logging
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace

from vllm import __version__ as VLLM_VERSION
from vllm.config import get_current_vllm_config_or_none, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.logger import init_logger
from vllm.platforms import current_platform

from kvortex import ConfigError
from kvortex.codec import FORMAT_VERSION
from kvortex.integrations.vllm.events import BlockEvents
from kvortex.integrations.vllm.groups import RUN, STATE, groups_of, way_out_of_groups
from kvortex.integrations.vllm.identity import namespace_of, require_stable_hashes
from kvortex.integrations.vllm.layouts import block_dimension, layout_of, text_of
from kvortex.integrations.vllm.messages import StepMetadata, WorkerReport
from kvortex.integrations.vllm.metrics import KVortexPromMetrics, KVortexStats
from kvortex.integrations.vllm.options import (
    ON_EVICT,
    ConnectorOptions,
    PoolShape,
    bytes_of_block,
    num_ranks_of,
    require_host_memory,
)
from kvortex.integrations.vllm.per_request import Wishes
from kvortex.integrations.vllm.planes import with_planes
from kvortex.integrations.vllm.plugin import register
from kvortex.integrations.vllm.scheduler import SchedulerHalf
from kvortex.integrations.vllm.start import tell_limits, tell_sizes
from kvortex.integrations.vllm.worker import BLOCKS, NOTHING, REQUESTS, WorkerHalf
from kvortex.log import Guarded
from kvortex.memory.limits import has_pools
from kvortex.transfer import packed_bytes, slot_block

logger = Guarded(init_logger("vllm.kvortex"))  # vLLM shows the log of this name
logging.getLogger("kvortex").parent = logging.getLogger("vllm")  # and so the library's log

# vLLM 0.15 has no message from workers to the scheduler but the statistics.
HAS_WORKER_METADATA = hasattr(base.KVConnectorBase_V1, "build_connector_worker_meta")
# A vLLM without it may start a request on states that are not there, as soon as it has any connector.
SERVES_STATES = hasattr(base.KVConnectorBase_V1, "supports_divergent_local_hybrid_hits")
# Before 0.32, a load that failed is reported to vLLM as blocks of one group; since then, as a request.
HAS_TRANSFER_RESULTS = hasattr(base.KVConnectorBase_V1, "get_transfer_results")
# From 0.32 on layouts have names, and all attention backends share one logical shape.
HAS_LAYOUT_NAMES = importlib.util.find_spec("vllm.v1.kv_cache_layout") is not None


def keeps_blocks_of_aborted_loads():
    """Whether vLLM keeps the device blocks of an aborted load until it hears that the load is over. 0.15 does not."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return "delay_free_blocks" in inspect.signature(Scheduler._free_request).parameters


def saves_after_drafting():
    """Whether vLLM calls `wait_for_save` when the drafter has written its KV of the step, too. 0.15 does not."""
    from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

    return "defer_finalize" in inspect.signature(KVConnectorModelRunnerMixin.maybe_get_kv_connector_output).parameters


def steps_at_once(vllm_config):
    """How many steps may have begun whose results the scheduler has not got, the one that just began included."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return max(2 if is_async else 1, vllm_config.parallel_config.pipeline_parallel_size)


def layout_name(vllm_config, kv_cache_config):
    """What vLLM calls the order of the dimensions of its KV cache."""
    if HAS_LAYOUT_NAMES:
        return str(getattr(kv_cache_config, "kv_cache_layout", None))
    from vllm.v1.attention.backends.utils import get_kv_cache_layout

    with set_current_vllm_config(vllm_config):
        return str(get_kv_cache_layout())


def is_one_of_several():
    """Whether a `MultiConnector` makes this call. It does not say so to its connectors, hence the look at the stack."""
    codes = MultiConnector.__init__.__code__, MultiConnector.get_required_kvcache_layout.__func__.__code__
    return any(frame.f_code in codes for frame, _ in traceback.walk_stack(None))


def transfers_of_vllm(vllm_config):
    """The `KVTransferConfig` that vLLM itself uses. A `MultiConnector` gives its connectors others, which it made."""
    frames = [frame for frame, _ in traceback.walk_stack(None) if frame.f_code is MultiConnector.__init__.__code__]
    return (frames[-1].f_locals["vllm_config"] if frames else vllm_config).kv_transfer_config


@contextmanager
def naming(vllm_config):
    """Add the name of the model and the version of vLLM to the message of a `ConfigError`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error} ({vllm_config.model_config.model}, vLLM {VLLM_VERSION})") from None


def hears_of_blocks_of_others():
    """Whether `MultiConnector` tells a connector which blocks another one fills. That of 0.15 passes no blocks."""
    return "new_empty" not in MultiConnector.update_state_after_alloc.__code__.co_names


def groups_to_keep(vllm_config, kv_cache_config):
    """The groups of this model, the same in both halves.

    Raises
    ------
    ConfigError
        A group of a kind that is not known, or that this vLLM would not serve right.
    """
    speculative, parallel, hash_tokens = vllm_config.speculative_config, vllm_config.parallel_config, None
    shares = [getattr(parallel, f"{name}_context_parallel_size", 1) for name in ("decode", "prefill")]
    drops = getattr(speculative, "use_eagle_block_drop", getattr(speculative, "use_eagle", lambda: False))
    if len(kv_cache_config.kv_cache_groups) > 1:
        try:
            from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
        except ImportError:  # 0.15
            hash_tokens = vllm_config.cache_config.block_size
        else:
            _, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    # vLLM from 0.26 on spreads a block's tokens over the ranks that decode together, 0.15 over those of prefill too.
    shared_by = shares[0] * (1 if HAS_WORKER_METADATA else shares[1])
    groups = groups_of(kv_cache_config, hash_tokens=hash_tokens, parallel_tokens=shared_by, drafts=drops())
    if max(shares) > 1 and (len(kv_cache_config.kv_cache_groups) > 1 or groups[0].kind != RUN):
        raise ConfigError(
            f"KVortexConnector supports context parallelism (here {shares[0]} for decode, {shares[1]} for prefill) "
            f"with one KV cache group of full attention, and this model has others; leave both sizes at 1"
            f"{way_out_of_groups(groups, len(kv_cache_config.kv_cache_groups))}"
        )
    if any(group.kind == STATE for group in groups) and not SERVES_STATES:
        raise ConfigError(
            "this model keeps states (Mamba, linear attention or short convolutions), for which this vLLM may start "
            "requests on states that are not there as soon as it has any KV connector; use vLLM 0.32 or later, or "
            "serve it without --kv-transfer-config"
        )
    return groups


def retention_interval(kv_cache_config):
    """The interval at which vLLM's own cache keeps blocks, see `Group.worth_keeping`; before 0.32 it keeps all."""
    if hasattr(kv_cache_config, "prefix_cache_retention_interval"):
        return kv_cache_config.prefix_cache_retention_interval
    from vllm import envs

    return getattr(envs, "VLLM_PREFIX_CACHE_RETENTION_INTERVAL", None)


def require_evictions(vllm_config, writes_early):
    """Refuse the option ``save: on_evict`` where a save on eviction would come too late, or never.

    Raises
    ------
    ConfigError
        This vLLM shows a connector no evictions, has no prefix cache, or writes blocks (`writes_early`) before a
        connector can copy what they held.
    """
    why = None
    if not HAS_WORKER_METADATA:
        why = "this vLLM does not show a connector which blocks it evicts; use vLLM 0.26 or later"
    elif not vllm_config.cache_config.enable_prefix_caching:
        why = "vLLM's prefix caching is off, and so it evicts nothing; switch it on"
    elif writes_early:
        why = "for this model vLLM copies states, or zeroes blocks, before a connector can copy what was there"
    if why is not None:
        raise ConfigError(f"save is 'on_evict', but {why}, or leave out the option save")


ANOTHER_ENGINE = (
    "another engine of this process uses KVortexConnector, or has used it with another KV cache, and vLLM keeps one "
    "connector for all engines of a process: shut that engine down before you make the next "
    "(llm.llm_engine.engine_core.shutdown()), or give each a process (VLLM_ENABLE_V1_MULTIPROCESSING=1)"
)


class KVortexConnector(base.KVConnectorBase_V1, base.SupportsHMA):
    """Keep vLLM's KV cache in pinned host memory, and bring it back on a prefix hit.

    Parameters
    ----------
    vllm_config, role, kv_cache_config
        As vLLM passes them. Options stand in ``kv_connector_extra_config``, see `ConnectorOptions`.

    Raises
    ------
    ConfigError
        An option is unknown or unfit; a `MultiConnector` of vLLM before 0.26; a model whose KV cache this version of
        vLLM, or this connector, cannot keep right; context parallelism with another than one group of full attention;
        saving on eviction where that would come too late.

    Notes
    -----
    After a weight update, the blocks that are kept are of the old weights. Forget them by
    ``LLM.reset_prefix_cache(reset_connector=True)``, or on a server, started with ``VLLM_SERVER_DEV_MODE=1``, by ``POST
    /reset_prefix_cache?reset_external=true``. If a name is wrong, the server ignores it, and answers that all is well.

    ``kv_role`` is heeded: a ``kv_producer`` loads nothing, and a ``kv_consumer`` saves nothing.

    Layers with a sliding window, with chunks or with states (Mamba, linear attention, short convolutions) forget. Of
    these the connector keeps the blocks that a request needs which continues a prompt.
    """

    def __init__(self, vllm_config, role, kv_cache_config=None):
        super().__init__(vllm_config, role, kv_cache_config)
        options = ConnectorOptions.parse(self._kv_transfer_config.kv_connector_extra_config)
        parallel = vllm_config.parallel_config
        num_groups = len(kv_cache_config.kv_cache_groups)
        self.scheduler = self.worker = self.refusal = self.begun = self._coder = None
        self.has_several_groups = num_groups > 1
        with naming(vllm_config):
            if is_one_of_several() and not hears_of_blocks_of_others():
                raise ConfigError(
                    "KVortexConnector does not work in the MultiConnector of this vLLM, which does not tell it the "
                    "blocks that another connector fills; use vLLM 0.26 or later, or KVortexConnector alone"
                )
            groups = groups_to_keep(vllm_config, kv_cache_config)
            way_out = way_out_of_groups(groups, num_groups)
            options = self._load_as_this_vllm_can(options, groups, way_out)
        failed_loads = BLOCKS
        if self.has_several_groups or groups[0].kind != RUN:
            failed_loads = REQUESTS if HAS_TRANSFER_RESULTS and options.load_async else NOTHING
        shape = PoolShape.of(
            options,
            kv_cache_config,
            groups,
            num_ranks=num_ranks_of(parallel),
            num_stages=parallel.pipeline_parallel_size,
            on_cpu=current_platform.is_cpu(),
        )
        interval = options.window_interval_tokens
        if interval and interval % shape.align_tokens:
            raise ConfigError(
                f"window_interval_tokens is {interval}, and hits of this model end on multiples of "
                f"{shape.align_tokens} tokens; set it to such a multiple"
            )
        if role == base.KVConnectorRole.SCHEDULER:
            if options.tier:
                require_stable_hashes(vllm_config)
            # If there are pools, an executor has asked before (`ask_early`).
            if not has_pools():
                require_host_memory(self._kv_transfer_config, parallel)
            events, scheduling = vllm_config.kv_events_config, vllm_config.scheduler_config
            tells = events is not None and events.enable_kv_cache_events
            holds_all = any(group.kind == STATE for group in groups) or getattr(
                kv_cache_config, "needs_kv_cache_zeroing", False
            )
            on_evict = options.save == ON_EVICT
            if on_evict:
                with naming(vllm_config):
                    require_evictions(vllm_config, holds_all)
            transfers = transfers_of_vllm(vllm_config)
            both = (self._kv_transfer_config, transfers)
            does = Wishes(load=all(one.is_kv_consumer for one in both), save=all(one.is_kv_producer for one in both))
            step_tokens = scheduling.max_num_batched_tokens * (2 if scheduling.async_scheduling else 1)
            num_rows = shape.slots.num_slots, shape.num_device_blocks if on_evict else 0
            self.scheduler = SchedulerHalf(
                shape,
                load_async=options.load_async,
                save_late=vllm_config.speculative_config is not None and not saves_after_drafting(),
                whole_prompts=not getattr(getattr(vllm_config, "aux_output_config", None), "enabled", False),
                reload_preempted=HAS_WORKER_METADATA,
                extends_hits=HAS_WORKER_METADATA or not self.has_several_groups,
                events=BlockEvents(groups, kv_cache_config, *num_rows) if tells else None,
                interval=retention_interval(kv_cache_config) if interval is None else interval,
                step_tokens=step_tokens,
                holds_all=holds_all,
                save_on_evict=on_evict,
                tier=options.tier
                and {
                    "bytes_per_s": options.tier.write_bytes_per_s,
                    "promote_timeout_ms": options.promote_timeout_ms,
                    "codec": options.tier.codec,
                    "prefill_tokens_per_s": options.prefill_tokens_per_s,
                    "steps_at_once": steps_at_once(vllm_config),
                    "remote": options.tier if options.tier.is_remote else None,
                    "blocks_per_object": options.joined_blocks(shape),
                },
                save_after_hits=options.save_after_hits,
                role=does,
            )
            self.counted = {}
            interval = self.scheduler.interval
            tell_sizes(
                shape,
                options,
                device_block_bytes=bytes_of_block(kv_cache_config),
                longest=vllm_config.model_config.max_model_len,
                step_tokens=step_tokens,
                interval=interval,
            )
            tell_limits(
                shape,
                options,
                does,
                fails_requests=getattr(transfers, "kv_load_failure_policy", None) == "fail",
                fails_engine=failed_loads == NOTHING,
                num_groups=num_groups,
                interval=interval,
                way_out=way_out,
            )
        else:
            self.worker = WorkerHalf(
                shape,
                options,
                reports_aborted_loads=keeps_blocks_of_aborted_loads(),
                failed_loads=failed_loads,
                open_store=options.tier and self._store_opener(vllm_config, options),
                put_lag=steps_at_once(vllm_config),
            )

    def _store_opener(self, vllm_config, options):
        """Return a function that opens this rank's store once the KV cache is registered. It holds nothing of vLLM."""
        began = time.perf_counter()
        self._layout_name = layout_name(vllm_config, self._kv_cache_config)
        parallel, namespace = vllm_config.parallel_config, namespace_of(vllm_config, name=options.namespace)
        logger.info("KVortexConnector: identifying the model and its weights took %.2f s", time.perf_counter() - began)
        whose = {
            "rank": parallel.rank,
            "num_ranks": num_ranks_of(parallel),
            "replica": parallel.data_parallel_index,
            "num_replicas": parallel.data_parallel_size,
        }

        def open_store(pool):
            of_layout = hashlib.sha256(namespace + self._layout_text.encode())
            if self._coder is not None:
                of_layout.update(self._coder.identity)
                whose["coder"] = self._coder
            store = options.tier.open_store(pool, namespace=of_layout.digest(), **whose)
            if options.tier.is_remote:
                logger.info("KVortexConnector: blocks are shared by %s", options.tier.url)
            else:
                folders = ", ".join(store.segments.folders)
                logger.info("KVortexConnector: %d blocks on disk at the most, in %s", store.num_slots, folders)
                if self._coder is not None:
                    logger.info(
                        "KVortexConnector: disk_codec %s, level %d, is lossy: what comes back from disk is close to "
                        "what was saved, not equal to it, so answers may change",
                        options.tier.codec, options.tier.level,
                    )  # fmt: skip
            return store

        return open_store

    def _load_as_this_vllm_can(self, options, groups, way_out):
        """The options, without `load_async` if this vLLM cannot wait for the loads of several groups between steps."""
        if self.has_several_groups and options.load_async and not HAS_WORKER_METADATA:
            logger.info(
                "KVortexConnector loads inside steps: this vLLM loads between steps for one KV cache group only; use "
                "vLLM 0.26 or later%s", way_out,
            )  # fmt: skip
            return replace(options, load_async=False)
        if any(group.kind == STATE for group in groups) and not options.load_async:
            raise ConfigError(
                "this model keeps states (Mamba, linear attention or short convolutions), which vLLM copies before a "
                "load inside a step could bring them; leave out load_async, or set it to true"
            )
        return options

    # ---- what vLLM asks about the connector --------------------------------------------------------------------------

    if hasattr(base, "CacheHitSource"):  # 0.32: what the statistics of vLLM count our hits as
        _cache_hit_source = base.CacheHitSource.HOST

    @property
    def prefer_cross_layer_blocks(self):
        """Whether vLLM's V1 runner (0.15 to 0.26) shall keep a block as one piece. A codec must see each layer."""
        return self.worker is None or not self.worker.options.is_lossy

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config):
        """The same from 0.32 on: blocks outermost, then layers. If a backend cannot take that, vLLM passes over it.

        None for MLA: its backends say that they take any layout, and on the CPU they do not. None on the CPU, where no
        backend takes it. None beside other connectors: vLLM refuses two that differ, and NIXL needs another one.
        """
        takes_it = HAS_LAYOUT_NAMES and current_platform.is_cuda() and not vllm_config.model_config.use_mla
        return "BLNHC" if takes_it and not is_one_of_several() else None

    @property
    def requires_kv_delivery(self):
        """A block that was not saved is a miss, no more."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data=None):
        return KVortexStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        return KVortexPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- the scheduler's half ----------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return self.scheduler.match(request, num_computed_tokens) if self.scheduler else (0, False)

    def bind_gpu_block_pool(self, gpu_block_pool):
        if self.scheduler:
            self.scheduler.holds.pool = gpu_block_pool
            self._let_go_before_resets(gpu_block_pool)
            if self.scheduler.evictions is not None:
                self.scheduler.evictions.watch(gpu_block_pool)
            if self.scheduler.events is not None:
                self.scheduler.events.watch(gpu_block_pool)

    def _let_go_before_resets(self, gpu_block_pool):
        """Give held blocks back before vLLM resets its prefix cache: with held blocks it cannot reset the cache."""
        reset = gpu_block_pool.reset_prefix_cache

        def let_go_and_reset():
            if self.scheduler:
                self.scheduler.let_go()
            return reset()

        gpu_block_pool.reset_prefix_cache = let_go_and_reset

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if self.scheduler:
            self.scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output):
        return self.scheduler.build(scheduler_output) if self.scheduler else StepMetadata()

    def update_connector_output(self, connector_output):
        if HAS_WORKER_METADATA:
            report = connector_output.kv_connector_worker_meta
        else:
            stats = connector_output.kv_connector_stats
            report = stats and stats.take_report()
        if self.scheduler:
            if connector_output.invalid_block_ids:
                self.scheduler.distrust_saves()
            if report and report.is_refusal:
                self.scheduler.let_go()
                self.scheduler = None
            elif report:
                self.scheduler.reported(report)

    def request_finished(self, request, block_ids):
        """Let vLLM free the blocks at once, copies in flight or not: the step that writes them next is fenced."""
        if self.scheduler:
            self.scheduler.finished(request)
        return False, None

    def request_finished_all_groups(self, request, block_ids):
        return self.request_finished(request, block_ids)

    def has_pending_push_work(self):
        """Whether steps must go on without requests: blocks are held until a report comes, or a lower tier works."""
        return self.has_pending_block_frees() or bool(
            self.scheduler and self.scheduler.tier and self.scheduler.tier.is_busy
        )

    def has_pending_block_frees(self):
        """Whether blocks are held: vLLM waits for them before it preempts."""
        return bool(self.scheduler and self.scheduler.holds.count)

    def reset_cache(self):
        if self.scheduler:
            self.scheduler.reset()
        return True

    def take_events(self):
        if not self.scheduler or self.scheduler.events is None:
            return ()
        return self.scheduler.events.take()

    # ---- the worker's half, in the order of a step -------------------------------------------------------------------

    def register_kv_caches(self, kv_caches):
        if self.worker:
            groups = [self._kv_cache_config.kv_cache_groups[group.index] for group in self.worker.shape.groups]
            kept = {name for group in groups for name in group.layer_names}
            kv_caches = {name: tensor for name, tensor in kv_caches.items() if name in kept}
            names = {id(tensor): name for name, tensor in reversed(kv_caches.items())}  # layers may share a tensor
            tensors = [tensor for name, tensor in kv_caches.items() if names[id(tensor)] == name]
            backends = {str(self._backend_of(name)) for name in kept}
            self._register(tensors, lambda tensor: self._block_dimension(names[id(tensor)], tensor), backends,
                           [names[id(tensor)] for tensor in tensors])  # fmt: skip

    def register_cross_layers_kv_cache(self, kv_cache, attn_backend):
        if self.worker:  # whatever vLLM calls the dimensions, blocks are outermost in memory
            self._register([kv_cache], lambda tensor: 0, {str(attn_backend)})

    def _block_dimension(self, layer_name, tensor):
        """Which dimension of a layer's tensor counts blocks."""
        spec = self._spec_of(layer_name)
        return block_dimension(self._backend_of(layer_name), spec, tensor, self.worker.shape.num_device_blocks)

    def _spec_of(self, layer_name):
        group = next(one for one in self._kv_cache_config.kv_cache_groups if layer_name in one.layer_names)
        return getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(layer_name, group.kv_cache_spec)

    def _backend_of(self, layer_name):
        """The attention backend of a layer, where there is one."""
        config = get_current_vllm_config_or_none() or self._vllm_config
        if config is not None and layer_name in config.compilation_config.static_forward_context:
            return config.compilation_config.static_forward_context[layer_name].get_attn_backend()
        return None

    def _register(self, tensors, block_dim_of, backends, names=()):
        again = self.worker.layout is not None
        if again and not self._starts_anew(tensors):
            return
        try:
            block_dims = [block_dim_of(tensor) for tensor in tensors]
            layout = layout_of(
                tensors, self.worker.shape.num_device_blocks, block_dims, overlap=self.has_several_groups
            )
            engine = self.worker.options.engine
            tier = self.worker.options.tier
            if self.worker.options.is_lossy:
                specs = [self._spec_of(name) for name in names]
                num_blocks, on_cpu = self.worker.shape.num_device_blocks, current_platform.is_cpu()
                layout = with_planes(layout, tensors, block_dims, specs, num_blocks, on_cpu=on_cpu)
            slot_bytes = packed_bytes(layout, engine.codec, engine.exact_layers)
            if tier is not None and tier.codec != "exact":
                self._coder = tier.coder(slot_block(layout, engine.codec, engine.exact_layers))
            if slot_bytes > self.worker.shape.block_bytes:
                raise ConfigError(
                    f"the KV cache takes {slot_bytes} bytes a block, and vLLM's configuration of it says "
                    f"{self.worker.shape.block_bytes}; please report this with your model and vLLM version"
                )
        except ConfigError as error:
            raise ConfigError(ANOTHER_ENGINE) if again else error from None
        began = time.perf_counter()
        if self.worker.open_store is not None:
            codec = f"codec {engine.codec} {sorted(engine.exact_layers)} {FORMAT_VERSION}"
            self._layout_text = text_of(layout, tensors, block_dims, backends | {self._layout_name, codec})
        self.worker.register(layout)
        self._vllm_config = None  # it holds the layers, and they the KV cache: a dropped engine could not free it
        logger.info(
            "KVortexConnector: %r, registered in %.2f s; %.1f GiB of host memory follow in the background",
            self.worker.layout, time.perf_counter() - began, self.worker.pool.nbytes / 2**30,
        )  # fmt: skip
        for row in self.worker.layout.planner:
            logger.debug("KVortexConnector: %s", row)

    def _starts_anew(self, tensors):
        """Whether a KV cache takes the place of one that is gone; False if it is the one that is registered.

        If an engine is dropped and not shut down, vLLM keeps its connector for the next engine.
        """
        old = self.worker
        if addresses := old.live_addresses():
            if addresses == {tensor.data_ptr() for tensor in tensors}:
                return False
            raise ConfigError(ANOTHER_ENGINE)
        if old.open_store is not None:  # the store is of the other engine's model
            raise ConfigError(ANOTHER_ENGINE)
        old.close()
        self.worker = WorkerHalf(
            old.shape,
            old.options,
            reports_aborted_loads=old.reports_aborted_loads,
            failed_loads=old.failed_loads,
        )
        return True

    def handle_preemptions(self, kv_connector_metadata):
        """From vLLM 0.26 on the first call of a step, before anything writes. 0.15 passes ids, in some steps."""
        if isinstance(kv_connector_metadata, StepMetadata):
            self._begin(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata):
        super().bind_connector_metadata(connector_metadata)
        self._begin(connector_metadata)
        if self.worker:
            self.worker.start_loads(connector_metadata)

    def _begin(self, connector_metadata):
        """Begin a step, whichever call of vLLM comes first. Later calls do nothing."""
        if self.begun is connector_metadata:
            return
        self.begun = connector_metadata
        shape = connector_metadata.shape
        if self.worker and shape is not None and not self.worker.shape.agrees_with(shape):
            logger.error(
                "KVortexConnector keeps nothing: the scheduler counts on %s, this worker has %s; please report this "
                "with your model and vLLM version", shape, self.worker.shape,
            )  # fmt: skip
            self.worker.close()
            self.worker, self.refusal = None, WorkerReport(is_refusal=True)
        if self.worker:
            self.worker.begin(connector_metadata)

    def start_load_kv(self, forward_context, **kwargs):
        """Nothing: loads have begun already. vLLM from 0.32 on calls this after the forward, which no load needs."""

    def wait_for_layer_load(self, layer_name):
        """Nothing: whole blocks are loaded before a forward begins."""

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        """Nothing: whole blocks are saved after a forward."""

    def wait_for_save(self):
        if self.worker:
            self.worker.start_save(self._get_connector_metadata())

    def get_finished(self, finished_req_ids):
        if not self.worker:
            return None, None
        self.worker.collect(finished_req_ids)
        return None, self.worker.take_received()

    if HAS_TRANSFER_RESULTS:

        def get_transfer_results(self, finished_req_ids):
            _, received = self.get_finished(finished_req_ids)
            failed = self.worker.take_failed_requests() if self.worker else set()
            return base.KVConnectorTransferResults(finished_recving=received or set(), failed_recving=failed)

    def get_block_ids_with_load_errors(self):
        return self.worker.take_load_errors() if self.worker else set()

    def build_connector_worker_meta(self):
        if self.worker:
            return self.worker.take_report()
        refusal, self.refusal = self.refusal, None
        return refusal

    def get_kv_connector_stats(self):
        """Called in both processes; None when there is nothing to tell."""
        stats = KVortexStats()
        if self.worker:
            stats.data = self.worker.take_counters()
        elif self.scheduler:
            stats.data = self._scheduler_counters()
        if not HAS_WORKER_METADATA:
            stats.report = self.build_connector_worker_meta()
        return stats if stats.data or stats.report else None

    def _scheduler_counters(self):
        index = self.scheduler.index.counters()
        now = {
            "blocks_matched": self.scheduler.blocks_matched,
            "blocks_evicted": index["evictions"],
            "saves_not_held": self.scheduler.holds.blocks_refused,
            "pins_refused": self.scheduler.pins.blocks_refused,
            **(self.scheduler.tier.counters() if self.scheduler.tier else {}),
        }
        counters = {name: value - self.counted.get(name, 0) for name, value in now.items()}
        levels = {"pool_blocks_used": index["num_ready"], "pool_blocks": index["slots_added"]}
        if self.scheduler.tier:
            levels |= self.scheduler.tier.levels()
        changed = any(counters.values()) or levels != self.counted.get("levels")
        self.counted = {**now, "levels": levels}
        return {**counters, **levels} if changed else {}

    # ---- sleep and end -----------------------------------------------------------------------------------------------

    def unregister_kv_caches(self):
        """Wait for copies before sleep unmaps the KV cache (vLLM 0.33)."""
        if self.worker:
            self.worker.drain()

    def restore_kv_caches(self):
        """Nothing: after sleep the KV cache has its old addresses again."""

    def shutdown(self):
        if self.worker:
            self.worker.close()
        if self.scheduler and self.scheduler.tier:
            self.scheduler.tier.close()


register()  # MultiConnector's statistics look the class up by name, even if vLLM got it by its module
