"""What a user may write into ``kv_connector_extra_config``, and the shape of the pool that follows from it."""

from dataclasses import dataclass, fields, replace

from kvortex import ConfigError, DiskTier, KVortexConfig, ObjectTier, PoolExhausted
from kvortex.arguments import shown
from kvortex.config import nearest, parse_bytes
from kvortex.integrations.vllm.groups import STATE, align_tokens
from kvortex.integrations.vllm.planes import packed_bytes_of
from kvortex.integrations.vllm.sights import MOST_COUNTED
from kvortex.memory.limits import lacking_memory
from kvortex.slots import PAGE_BYTES, Slots, stride_bytes
from kvortex.tiers.remote import tier_at

ENGINE_OPTIONS = (
    "cpu_pool_size_bytes",
    "max_jobs",
    "shutdown_timeout_ms",
    "pool_first_chunk_bytes",
    "pool_chunk_bytes",
    "pool_driver_allocated",
    "pool_huge_pages",
    "gather_ctas",
    "codec",
    "exact_layers",
    "enable_numa",
)
TIER_SIZES = ("disk_bytes", "write_bytes_per_s")
CODED = {"disk_codec": "codec", "disk_level": "level", "disk_slot_ratio": "slot_ratio"}  # as `DiskTier` calls them
REMOTE = ("remote_url", "remote_options")
BLOCKS_PER_OBJECT, MOST_JOINED, OBJECT_BYTES = "blocks_per_object", 256, 4 << 20
AT_ONCE, ON_EVICT = "at_once", "on_evict"  # when blocks are saved
MOST = 1 << 40
# Options of vLLM's own connectors -> the same thing here.
NAMES_OF_OTHERS = {
    "cpu_bytes_to_use": "cpu_pool_size_bytes",
    "cpu_bytes_to_use_per_rank": "cpu_pool_size_bytes, for all ranks together",
    "num_cpu_blocks": "cpu_pool_size_bytes, in bytes",
    "disk_capacity_bytes": "disk_bytes",
    "lazy_offload": 'save, with "on_evict"',
    "store_threshold": "save_after_hits, one less",
}
NUMBERS = {
    "window_interval_tokens": "tokens",
    "save_after_hits": "requests",
    "promote_timeout_ms": "milliseconds",
    "flush_timeout_ms": "milliseconds",
    "prefill_tokens_per_s": "tokens a second",
}


@dataclass(frozen=True, kw_only=True)
class ConnectorOptions:
    """Options of the connector. Those of the engine are in `engine`, by the names of `KVortexConfig`.

    Parameters
    ----------
    engine : KVortexConfig
        ``cpu_pool_size_bytes`` counts for all ranks together: each rank's pool is an equal part. Sizes may be texts
        such as ``"32GiB"``.
    load_async : bool, default True
        Load between the steps of vLLM, while it serves others. False: load inside the step that needs the blocks.
    window_interval_tokens : int, optional
        For layers with a sliding window or states: keep the blocks that a prompt needs which goes on at a multiple of
        so many tokens. 0: only those that the same prompt needs again, or where vLLM sees that prompts share a prefix.
        By default what vLLM's own cache does (``prefix_cache_retention_interval``).
    save : {"at_once", "on_evict"}, default "at_once"
        When a block is saved: as soon as its KV is written, or when vLLM gives its device block to another request.
    save_after_hits : int, default 0
        Save a block only if this many earlier requests had it, among the most recent ones. 0: save it the first time.
    disk_path : str or list of str, optional
        Folders, one for each disk. Blocks that the pool cannot hold go there, and outlive the server.
    disk_bytes : int or str
        Needed with `disk_path`: how much all ranks and replicas together may store there.
    disk_codec : {"exact", "ecsq"}, default "exact"
        "ecsq" takes a third to a quarter of the room, and is lossy: answers may differ. With `disk_level`, 1 to 4, and
        `disk_slot_ratio`: see `level` and `slot_ratio` of `kvortex.DiskTier`.
    write_bytes_per_s : int or str, default 256 MiB
        What each rank may write there a second, ten seconds of it at once; 0: no limit, the default of `remote_url`.
    remote_url : str, optional
        Instead of a disk, a server or folder that several vLLMs share: ``"redis://host"``, ``"s3://bucket/prefix"``,
        ``"file:///folder"``; see `kvortex.RedisTier` and `kvortex.ObjectTier`.
    remote_options : dict, optional
        Settings of that tier: ``{"ttl_s": 86400}``. And ``"blocks_per_object"``: how many consecutive blocks of full
        attention share a value there; 1 for Redis, and for objects as many as make 4 MiB, up to 32.
    namespace : str, optional
        Names the weights in a lower tier. Without a name, samples of their files identify them.
    promote_timeout_ms : int, default 2000
        How long a request may wait for blocks from a lower tier. After that it gets only what the pool has.
    flush_timeout_ms : int, default 10000
        How long the server may go on writing blocks to a lower tier when it ends.
    prefill_tokens_per_s : int, optional
        What the model computes. If reading blocks from a lower tier takes longer than computing them, they are not
        read. 0: they always are. By default measured in the server's own steps.
    verify : bool, default False
        Compare every saved and loaded block with what the GPU held, and count differences. For tests: costs device
        memory, and bandwidth of the link.
    """

    engine: KVortexConfig
    load_async: bool = True
    window_interval_tokens: int | None = None
    save: str = AT_ONCE
    save_after_hits: int = 0
    namespace: str | None = None
    promote_timeout_ms: int = 2000
    flush_timeout_ms: int = 10_000
    prefill_tokens_per_s: int | None = None
    verify: bool = False
    blocks_per_object: int | None = None  # of `remote_options`

    @property
    def tier(self):
        """The lower tier, or None."""
        return self.engine.tiers[0] if self.engine.tiers else None

    @classmethod
    def parse(cls, extra):
        """Options from ``kv_connector_extra_config``.

        Raises
        ------
        ConfigError
            An unknown name (with the nearest known one), a value of the wrong type or outside its limits, or no pool.
        """
        extra = dict(extra or {})
        own = {field.name for field in fields(cls)} - {"engine", BLOCKS_PER_OBJECT}
        known = sorted({*own, *ENGINE_OPTIONS, "disk_path", *TIER_SIZES, *CODED, *REMOTE})
        for name in extra:
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
                if name in NAMES_OF_OTHERS:
                    hint = f"another connector's name; here it is {NAMES_OF_OTHERS[name]}"
                raise ConfigError(f"kv_connector_extra_config has an unknown option {name!r}; {hint}")
        if "cpu_pool_size_bytes" not in extra:
            raise ConfigError(
                "kv_connector_extra_config needs cpu_pool_size_bytes: the host memory for KV blocks, of all ranks "
                'together, e.g. "32GiB"'
            )
        for name, what in NUMBERS.items():
            number = extra.get(name, 0)
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MOST:
                raise ConfigError(f"{name} must be a whole number of {what}, 0 to 2^40, got {shown(number)}")
        if extra.get("save_after_hits", 0) > MOST_COUNTED:
            raise ConfigError(f"save_after_hits must be at most {MOST_COUNTED}, got {extra['save_after_hits']}")
        if extra.get("save", AT_ONCE) not in (AT_ONCE, ON_EVICT):
            raise ConfigError(f"save must be {AT_ONCE!r} or {ON_EVICT!r}, got {extra['save']!r}")
        for name in own & extra.keys() - NUMBERS.keys() - {"save", "namespace"}:
            if not isinstance(extra[name], bool):
                raise ConfigError(f"{name} must be true or false, got {extra[name]!r}")
        for name in (*ENGINE_OPTIONS, *TIER_SIZES):
            if "_bytes" in name and isinstance(extra.get(name), str):
                try:
                    extra[name] = parse_bytes(extra[name])
                except ConfigError as error:
                    raise ConfigError(f"{name} of kv_connector_extra_config: {error}") from None
        count = None
        if isinstance(extra.get("remote_options"), dict):  # one of its settings is the connector's, not the tier's
            extra["remote_options"] = dict(extra["remote_options"])
            count = extra["remote_options"].pop(BLOCKS_PER_OBJECT, None)
        is_number = isinstance(count, int) and not isinstance(count, bool)
        if count is not None and not (is_number and 1 <= count <= MOST_JOINED):
            raise ConfigError(f"{BLOCKS_PER_OBJECT} must be a whole number, 1 to {MOST_JOINED}, got {shown(count)}")
        engine = KVortexConfig(**{name: extra[name] for name in ENGINE_OPTIONS if name in extra}, **tier_of(extra))
        return cls(engine=engine, blocks_per_object=count, **{name: extra[name] for name in own & extra.keys()})

    @property
    def is_lossy(self):
        """Whether the pool or the tier has a codec: then K and V must be told apart in every layer."""
        return self.engine.codec != "exact" or (self.tier is not None and self.tier.codec != "exact")

    def joined_blocks(self, shape):
        """How many blocks of full attention share a value on a server.

        By default 1 for models with states: a hit ends where vLLM kept a state, and that is seldom an object's end.

        Raises
        ------
        ConfigError
            A value would be longer than the server takes.
        """
        if self.tier is None or not self.tier.is_remote:
            return 1
        count, kinds = self.blocks_per_object, {group.kind for group in shape.groups}
        if count is None:
            is_joined = isinstance(self.tier, ObjectTier) and STATE not in kinds
            count = min(32, max(1, OBJECT_BYTES // shape.slots.payload_bytes)) if is_joined else 1
        value_bytes = count * (PAGE_BYTES + shape.slots.payload_bytes)
        most = getattr(self.tier, "max_value_bytes", value_bytes)
        if count > 1 and value_bytes > most:
            raise ConfigError(f"{count} blocks with their headers have {value_bytes} bytes, more than max_value_bytes="
                              f"{most}; set {BLOCKS_PER_OBJECT} to less")  # fmt: skip
        return count


def tier_of(extra):
    """The settings of `KVortexConfig` for the tier that these options ask for, {} if they ask for none."""
    if "remote_url" in extra:
        return remote_tier_of(extra)
    if "disk_path" not in extra:
        of_tiers = {"namespace", "promote_timeout_ms", "flush_timeout_ms", "prefill_tokens_per_s", "remote_options"}
        alone = sorted({*TIER_SIZES, *CODED, *of_tiers} & {*extra})
        if alone:
            raise ConfigError(f"{alone[0]} needs a lower tier; set disk_path or remote_url, or leave it out")
        return {}
    if "disk_bytes" not in extra:
        raise ConfigError('disk_path needs disk_bytes: what all ranks may take there together, e.g. "500GiB"')
    namespace = extra.get("namespace", "as loaded")
    sizes = {name: extra[name] for name in TIER_SIZES if name in extra}
    sizes |= {name: extra[option] for option, name in CODED.items() if option in extra}
    if sizes.get("codec", "exact") != "exact" and extra.get("verify") is True:
        raise ConfigError("verify compares blocks byte for byte, which a lossy disk_codec does not keep; drop one")
    try:
        return {"tiers": (DiskTier(extra["disk_path"], **sizes),), "namespace": namespace}
    except (ConfigError, TypeError) as error:
        if str(error).startswith(tuple(CODED.values())):
            raise ConfigError(f"disk_{error}") from None
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"kv_connector_extra_config: {error}; disk_path must be a folder or a list of them, and is "
            f"{shown(extra['disk_path'])}"
        ) from None


def remote_tier_of(extra):
    """The settings of `KVortexConfig` for a tier on a server."""
    others = sorted({"disk_path", "disk_bytes", *CODED} & {*extra})
    if others:
        raise ConfigError(f"remote_url and {others[0]} name two lower tiers, and one is possible; leave one out")
    options = extra.get("remote_options", {})
    if not isinstance(options, dict):
        raise ConfigError(f"remote_options must be a table of settings, got {shown(options)}")
    rate = extra.get("write_bytes_per_s", 0)
    tier = tier_at(extra["remote_url"], options, beside=(BLOCKS_PER_OBJECT,), write_bytes_per_s=rate)
    return {"tiers": (tier,), "namespace": extra.get("namespace", "as loaded")}


@dataclass(frozen=True, kw_only=True)
class PoolShape:
    """What both halves must agree on: the slots of one rank's pool, numbered alike in all ranks.

    Both halves compute it from vLLM's configuration; the scheduler's half sends its own to the workers, which compare.
    If there are several stages, it sees the first, and uses the slots that every rank reports.
    """

    num_device_blocks: int
    groups: tuple  # of `Group`, see `groups_of`
    num_ranks: int
    num_stages: int  # of a pipeline; each has its own layers, hence its own sizes
    slots: Slots  # of one rank; chunk 0 is registered from the start

    @property
    def block_bytes(self):
        """Bytes of a block in one rank."""
        return self.slots.payload_bytes

    def agrees_with(self, other):
        """Whether a rank of this shape and a scheduler's half of the other one number the same blocks alike."""
        return other == (replace(self, slots=other.slots) if self.num_stages > 1 else self)

    @property
    def align_tokens(self):
        """Every hit is a multiple of this many tokens."""
        return align_tokens(self.groups)

    @classmethod
    def of(cls, options, kv_cache_config, groups, *, num_ranks, num_stages=1, on_cpu=False):
        """The shape for vLLM's ``KVCacheConfig`` of one rank, of which these groups are kept.

        Raises
        ------
        ConfigError
            The pool does not hold one block a rank, or the codec cannot pack such blocks.
        """
        engine, block_bytes = options.engine, bytes_of_block(kv_cache_config)
        if engine.codec != "exact":
            how = (engine.codec, engine.exact_layers)
            block_bytes = packed_bytes_of(kv_cache_config, block_bytes, *how, on_cpu=on_cpu)
        elif options.is_lossy:  # whoever can be packed by q8 can be coded
            name = f"disk_codec {options.tier.codec!r}"
            packed_bytes_of(kv_cache_config, block_bytes, "q8", (), on_cpu=on_cpu, name=name)
        rank_bytes, stride = engine.cpu_pool_size_bytes // num_ranks, stride_bytes(block_bytes, engine.header_bytes)
        if rank_bytes < stride:
            raise ConfigError(
                f"cpu_pool_size_bytes is {engine.cpu_pool_size_bytes}, {rank_bytes} for each of {num_ranks} "
                f"ranks, and one block has {stride} bytes; set it to at least {stride * num_ranks}"
            )
        return cls(
            num_device_blocks=kv_cache_config.num_blocks,
            groups=groups,
            num_ranks=num_ranks,
            num_stages=num_stages,
            slots=Slots.of(
                rank_bytes,
                block_bytes,
                header_bytes=engine.header_bytes,
                first_chunk_bytes=engine.pool_first_chunk_bytes,
                chunk_bytes=engine.pool_chunk_bytes,
                one_chunk=engine.pool_driver_allocated,
            ),
        )


def bytes_of_block(kv_cache_config):
    """Bytes of one device block in all layers of a rank, padding included.

    The scheduler sees the spec of one layer alone, and layers may differ; so the specs do not tell. The sizes of the
    tensors are the same for both halves. From vLLM 0.32 on, each of them is that of the whole allocation.

    Raises
    ------
    ConfigError
        There are no tensors.
    """
    tensors = kv_cache_config.kv_cache_tensors
    if not tensors:
        raise ConfigError("vLLM's configuration of the KV cache names no tensors; please report this with your version")
    if hasattr(tensors[0], "layers"):
        return tensors[0].size // kv_cache_config.num_blocks
    packed = getattr(tensors[0], "block_stride", 0)  # 0.26, where blocks of all layers lie side by side
    return packed or sum(tensor.size for tensor in tensors) // kv_cache_config.num_blocks


def num_ranks_of(parallel):
    """Workers of one engine, each with a part of the KV cache."""
    prefill = getattr(parallel, "prefill_context_parallel_size", 1)
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size * prefill


def require_host_memory(transfer, parallel):
    """Refuse pools that this node cannot hold: the pools of all its ranks together, before any of them is allocated.

    Parameters
    ----------
    transfer : KVTransferConfig or None
        vLLM's. In a MultiConnector every KVortexConnector counts.
    parallel : ParallelConfig
        With Ray, which may put ranks on any node, nothing is checked here: each pool checks for itself.

    Raises
    ------
    PoolExhausted
        The message names the limit.
    ConfigError
        As from `ConnectorOptions.parse`.
    """
    found = [] if transfer is None else [(transfer.kv_connector, transfer.kv_connector_extra_config or {})]
    asked = 0
    for name, extra in found:  # the list grows meanwhile
        if name == "MultiConnector":
            found += [(one.get("kv_connector"), one.get("kv_connector_extra_config") or {})
                      for one in extra.get("connectors", ())]  # fmt: skip
        elif name == "KVortexConnector":
            asked += ConnectorOptions.parse(extra).engine.cpu_pool_size_bytes
    if getattr(parallel, "use_ray", False):
        return
    num_ranks = max(1, num_ranks_of(parallel) // getattr(parallel, "nnodes_within_dp", 1))
    needed = asked // num_ranks_of(parallel) * num_ranks
    lacking = lacking_memory(needed) if needed else None
    if lacking is not None:
        what, free = lacking
        raise PoolExhausted(
            f"cpu_pool_size_bytes is {asked / 2**30:.2f} GiB for all ranks, of which the pools of {num_ranks} on this "
            f"node take {needed / 2**30:.2f} GiB together, and {what} leaves {free / 2**30:.2f} GiB; lower "
            f"cpu_pool_size_bytes in kv_connector_extra_config, or raise the limit"
        )
