"""What the log says at start: the pool's size beside vLLM's own cache, and what is not done, with the way out."""

import logging

from kvortex.config import bytes_text
from kvortex.integrations.vllm.groups import STATE, WINDOW
from kvortex.integrations.vllm.options import ON_EVICT
from kvortex.log import Guarded
from kvortex.slots import stride_bytes

logger = Guarded(logging.getLogger("vllm.kvortex"))


def tell_sizes(shape, options, *, device_block_bytes, longest, step_tokens, interval):
    """Log what the pool holds beside vLLM's own KV cache and the longest prompt. If it holds less, warn.

    Parameters
    ----------
    shape : PoolShape
    options : ConnectorOptions
    device_block_bytes : int
        Of a block of one rank as vLLM holds it; with a codec a slot is smaller.
    longest : int
        Tokens of the longest prompt, vLLM's ``max_model_len``.
    step_tokens : int
        Tokens that a request computes before vLLM frees the blocks that left a window.
    interval : int or None
        See `Group.worth_keeping`.
    """
    num_slots, ends = shape.slots.num_slots, [-(-longest // group.block_tokens) for group in shape.groups]
    on_device = sum(group.most_blocks(longest - 1, step_tokens) for group in shape.groups)
    in_pool = sum(
        last - first
        for group, end in zip(shape.groups, ends, strict=True)
        for first, last in group.worth_keeping(0, end, (longest,), interval)
    )
    in_pool = max(1, in_pool)  # a prompt shorter than a block is not kept
    pool, device = num_slots * longest // in_pool, shape.num_device_blocks * longest // on_device
    logger.info(
        "KVortexConnector: the pool holds %d tokens: %sx of the GPU's KV cache (%d tokens), %sx of the longest prompt "
        "(max_model_len, %d tokens); that is %d blocks of %d bytes%s%s",
        pool, times(pool, device), device, times(pool, longest), longest, num_slots, shape.slots.stride_bytes,
        f" in each of {shape.num_ranks} ranks" if shape.num_ranks > 1 else "",
        ", as the first stage of the pipeline counts" if shape.num_stages > 1 else "",
    )  # fmt: skip
    if options.engine.codec != "exact":
        exact_bytes = stride_bytes(device_block_bytes, shape.slots.header_bytes)
        exact_slots = options.engine.cpu_pool_size_bytes // shape.num_ranks // exact_bytes
        logger.info(
            "KVortexConnector: the codec %s is lossy: what comes back from the pool is close to what was saved, not "
            "equal to it, so answers may change; it holds %sx of what it would hold without a codec (%d tokens, "
            "%d blocks of %d bytes)",
            options.engine.codec, times(num_slots, max(1, exact_slots)), exact_slots * longest // in_pool,
            exact_slots, exact_bytes,
        )  # fmt: skip
    least = {"the longest prompt": (longest, "it keeps only the beginning of such a prompt")}
    if options.save != ON_EVICT:  # else the two caches hold different blocks, and add up
        least["the GPU's KV cache"] = device, "most blocks that leave that cache have left the pool before"
    for what, (tokens, so) in least.items():
        if pool < tokens:
            needed = -(-tokens * in_pool // longest) * shape.slots.stride_bytes * shape.num_ranks
            logger.warning(
                "KVortexConnector: the pool is below 1x of %s (%sx): %s; set cpu_pool_size_bytes to at least %s",
                what, times(pool, tokens), so, bytes_text(needed),
            )  # fmt: skip


def times(tokens, others):
    """The ratio as a text, rounded down: below 1 it does not read 1.00."""
    return f"{100 * tokens // others / 100:.2f}"


def tell_limits(shape, options, role, *, fails_requests, fails_engine, num_groups, interval, way_out):
    """Log what the roles, vLLM's policy and the model leave undone, and what to do about it.

    Parameters
    ----------
    shape : PoolShape
    options : ConnectorOptions
    role : Wishes
        What vLLM's ``kv_role`` allows.
    fails_requests : bool
        Whether a failed load makes vLLM end the request with an error.
    fails_engine : bool
        Whether a failed load ends vLLM, because it cannot be told of it.
    num_groups : int
        Number of vLLM's KV cache groups, those that are left alone included.
    interval : int or None
        See `Group.worth_keeping`.
    way_out : str
        See `way_out_of_groups`.
    """
    if not role.load or not role.save:
        never = "loads" if not role.load else "saves"
        level = logging.INFO if options.tier else logging.WARNING
        of_no_use = "" if options.tier else ", and without a disk_path the pool is of no use: set kv_role to kv_both"
        logger.log(level, "KVortexConnector: with this kv_role the server %s no blocks%s", never, of_no_use)
    if role.load and fails_requests and options.load_async and not fails_engine:  # inside steps 'fail' is right
        logger.warning(
            "KVortexConnector: kv_load_failure_policy is 'fail', so a request ends with an error where its blocks "
            'could not be loaded; set "kv_load_failure_policy": "recompute" in --kv-transfer-config, and vLLM computes '
            "them"
        )
    if role.load and fails_engine:
        logger.warning(
            "KVortexConnector: this vLLM cannot hear of a load that failed for a model with several KV cache groups, "
            "windows or states, and ends with an error; use vLLM 0.32 or later with load_async%s", way_out,
        )  # fmt: skip
    alone = sorted({*range(num_groups)} - {group.index for group in shape.groups})
    if alone:
        logger.info(
            "KVortexConnector: KV cache groups %s are left alone, as vLLM's own prefix cache leaves them",
            ", ".join(map(str, alone)),
        )  # fmt: skip
    in_part = [group.index for group in shape.groups if group.kind in (WINDOW, STATE)]
    if role.save and in_part and interval is not None:
        logger.info(
            "KVortexConnector: of the layers with windows or states (KV cache groups %s) it keeps what a prompt needs "
            "that goes on where another one ends, or %s; window_interval_tokens sets how much%s",
            ", ".join(map(str, sorted(in_part))),
            f"at a multiple of {interval} tokens" if interval else "where vLLM sees that they part", way_out,
        )  # fmt: skip
