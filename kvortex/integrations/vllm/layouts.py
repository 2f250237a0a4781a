"""Make a `KVLayout` of the tensors that vLLM registers: opaque bytes by strides, checked, never guessed."""

from kvortex import ConfigError, KVLayout


def layout_of(tensors, num_blocks, block_dims, overlap=False):
    """The layout of per-layer tensors, or of one tensor for all layers.

    Parameters
    ----------
    tensors : iterable of torch.Tensor
        In the order of the layers. A tensor that several layers share counts once.
    num_blocks : int
        Blocks that vLLM's scheduler counts. If a kernel's blocks are smaller, several of the tensor's blocks, side by
        side, make one.
    block_dims : int or sequence of int
        Which dimension counts blocks, of all tensors or of each, see `block_dimension`.
    overlap : bool, default False
        Whether layers share memory, as those of several KV cache groups do: the owner of a block owns all of its bytes.

    Raises
    ------
    ConfigError
        The tensors do not have `num_blocks` blocks, or a block is not contiguous.
    """
    tensors = list(tensors)
    if isinstance(block_dims, int):
        block_dims = [block_dims] * len(tensors)
    distinct = {
        (tensor.data_ptr(), tensor.shape, tensor.stride()): (tensor, dim)
        for tensor, dim in zip(tensors, block_dims, strict=True)
    }
    runs = []
    for tensor, dim in distinct.values():
        runs += runs_of(tensor, num_blocks, dim)
    runs.sort(key=lambda part_and_run: part_and_run[0])  # runs that are neighbours become one piece
    runs = [run for _, run in runs]
    if overlap:
        runs = union_of(runs)
    try:
        return KVLayout(runs, num_blocks, owners=[tensor for tensor, _ in distinct.values()])
    except ValueError as error:
        raise ConfigError(f"KVortex cannot move this KV cache: {error}") from error


def union_of(runs):
    """Runs of the same bytes that name no byte twice, each at the place of its first run.

    A block's bytes have this order in its slot and on disk. The order of addresses differs between processes.
    """
    merged = []
    for place, (base, stride, piece) in sorted(enumerate(runs), key=lambda numbered: numbered[1]):
        if merged:
            first, last, last_stride, last_piece = merged[-1]
            if stride == last_stride and base <= last + last_piece and base + piece - last <= stride:
                merged[-1] = (min(first, place), last, stride, max(last_piece, base + piece - last))
                continue
        merged.append((place, base, stride, piece))
    return [tuple(run) for _, *run in sorted(merged)]


def text_of(layout, tensors, block_dims, names):
    """A text that says what a block's bytes mean: it differs if a block of one server is no block of the other.

    Parameters
    ----------
    layout : KVLayout
    tensors, block_dims
        As for `layout_of`.
    names : iterable of str
        Of attention backends and of vLLM's layout: what tensors do not show.
    """
    lines = [layout.fingerprint.hex(), *sorted(names), *map(str, layout.planes)]
    for tensor, dim in zip(tensors, block_dims, strict=True):
        sizes = ["blocks" if at == dim else size for at, size in enumerate(tensor.shape)]
        order = sorted(range(tensor.dim()), key=lambda at: -tensor.stride(at))
        lines.append(f"{tensor.dtype} {sizes} {order}")
    return "\n".join(lines)


def runs_of(tensor, num_blocks, block_dim):
    """The runs of one tensor in the scheduler's blocks, each with the number of the kernel's block within its block."""
    try:
        layout = KVLayout.from_tensors([tensor], block_dim)
    except ValueError as error:
        raise ConfigError(f"KVortex cannot move this KV cache: {error}") from error
    parts, rest = divmod(layout.num_blocks, num_blocks)
    if rest or not parts:
        raise ConfigError(
            f"vLLM counts {num_blocks} blocks, but the KV cache has {layout.num_blocks} in dimension {block_dim} of "
            f"shape {tuple(tensor.shape)}"
        )
    for base, stride, piece in layout.runs:
        if piece == stride:
            yield 0, (base, stride * parts, piece * parts)
        else:
            for part in range(parts):
                yield part, (base + part * stride, stride * parts, piece)


def block_dimension(backend, spec, tensor, num_blocks):
    """Which dimension of a layer's tensor counts blocks.

    Up to vLLM 0.31 the attention backend says how it shapes a cache: it is asked with a number of blocks that no other
    size of a model equals. From 0.32 on all have one logical shape, blocks first, whatever the order in memory. If
    there is no backend, only one dimension may fit the number of blocks.
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
