"""From the tensors that vLLM registers to a `KVLayout`: opaque bytes by strides, asserted, never guessed."""

from kvortex import ConfigError, KVLayout


def layout_of(tensors, num_blocks, block_dim):
    """The layout of per-layer tensors, or of one tensor for all layers.

    Parameters
    ----------
    tensors : iterable of torch.Tensor
        In the order of the layers. A tensor that several layers share counts once.
    num_blocks : int
        Blocks that vLLM's scheduler counts. A kernel's blocks may be smaller: then so many of the tensor's blocks,
        side by side, are one.
    block_dim : int
        Which dimension counts blocks, see `block_dimension`.

    Raises
    ------
    ConfigError
        Not so many blocks, or blocks that are not contiguous.
    """
    distinct = {(tensor.data_ptr(), tensor.shape, tensor.stride()): tensor for tensor in tensors}
    tensors = list(distinct.values())
    try:
        layout = KVLayout.from_tensors(tensors, block_dim)
    except ValueError as error:
        raise ConfigError(f"KVortex cannot move this KV cache: {error}") from error
    parts, rest = divmod(layout.num_blocks, num_blocks)
    if rest or not parts:
        raise ConfigError(
            f"vLLM counts {num_blocks} blocks, but the KV cache has {layout.num_blocks} in dimension {block_dim} of "
            f"shape {tuple(tensors[0].shape)}"
        )
    if parts == 1:
        return layout
    runs = []
    for base, stride, piece in layout.runs:
        if piece == stride:
            runs.append((base, stride * parts, piece * parts))
        else:
            runs += [(base + part * stride, stride * parts, piece) for part in range(parts)]
    return KVLayout(runs, num_blocks, owners=tensors)


def block_dimension(backend, spec, tensor, num_blocks):
    """Which dimension of a layer's tensor counts blocks.

    Up to vLLM 0.31 the attention backend says how it shapes a cache, and shows it by a number of blocks that no other
    size of a model equals. Later ones know one logical shape for all, blocks first, whatever lies where in memory.
    Without a backend it is the only dimension that can be.
    """
    if hasattr(backend, "get_kv_cache_shape"):
        marker = 1234567
        shape = backend.get_kv_cache_shape(marker, spec.block_size, spec.num_kv_heads, spec.head_size)
        if marker in shape and len(shape) == tensor.dim():
            return shape.index(marker)
    elif backend is not None:
        return 0
    fitting = [dim for dim, size in enumerate(tensor.shape) if size >= num_blocks and size % num_blocks == 0]
    if len(fitting) != 1:
        raise ConfigError(
            f"which dimension of the KV cache counts its {num_blocks} blocks? Shape {tuple(tensor.shape)}, attention "
            f"backend {getattr(backend, '__name__', backend)}; please report this with your model and vLLM version"
        )
    return fitting[0]
