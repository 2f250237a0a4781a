"""Which bytes of vLLM's KV cache are vectors of K and V that a codec can pack."""

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

from kvortex import ConfigError, KVLayout
from kvortex.codec import PackedBlock
from kvortex.transfer.planes import addresses_of, covering, planes_of_tensor

TOKENS_OF_KERNELS = 16  # the smallest blocks that attention kernels have within those of the scheduler


def packed_bytes_of(kv_cache_config, block_bytes, codec, exact_layers):
    """What a packed block takes at the most, for vLLM's ``KVCacheConfig`` of one rank.

    Both halves ask, and the scheduler's sees no tensor: so it is what follows from the spec of a layer, whatever the
    order of K, V, heads and tokens, and however small the blocks of the attention kernel are.

    Raises
    ------
    ConfigError
        The codec can pack nothing of such a cache, or not all of its layers are alike.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    shapes = {(spec.page_size_bytes, *shape_of(spec)) for spec in specs if shape_of(spec) is not None}
    if len(shapes) != 1 or any(shape_of(spec) is None for spec in specs):
        raise ConfigError(
            f"the codec {codec!r} packs caches of attention in bfloat16 whose layers are all of one shape, and this "
            f"model's groups are {sorted({type(spec).__name__ for spec in specs})} of "
            f"{sorted({str(getattr(spec, 'dtype', None)) for spec in specs})}; leave codec out"
        )
    ((page_bytes, tokens, heads, head_dim, parts),) = shapes
    num_layers, rest = divmod(block_bytes, page_bytes)
    if rest or page_bytes != parts * tokens * heads * head_dim * 2:
        raise ConfigError(f"the codec {codec!r} cannot pack pages of {page_bytes} bytes with padding; leave codec out")
    role, planes = "kv" if parts == 2 else "latent", []
    for layer in range(num_layers):
        planes += planes_of_tensor(role, (head_dim,), (2,), 2, "bfloat16", layer * page_bytes, page_bytes, layer)
    try:
        packed = PackedBlock.of(covering(planes, [page_bytes] * num_layers), block_bytes, codec, exact_layers)
    except ValueError as error:
        raise ConfigError(f"the codec {codec!r} cannot pack this KV cache: {error}") from None
    if all(bits == 16 for bits in packed.bits):
        raise ConfigError(f"the codec {codec!r} can pack nothing of heads of {head_dim} numbers; leave codec out")
    more_flags = 4 * len(packed.planes) * (max(1, tokens // TOKENS_OF_KERNELS) - 1)
    return packed.packed_bytes + -(-more_flags // 16) * 16


def shape_of(spec):
    """Tokens, heads, numbers a head and parts (K and V, or a latent alone) of a layer's block; None: not packable."""
    if str(getattr(spec, "dtype", "")) != "torch.bfloat16" or not hasattr(spec, "head_size"):
        return None
    is_latent = "MLA" in type(spec).__name__
    if getattr(spec, "head_size_v", spec.head_size) not in (spec.head_size, None):
        return None
    return spec.block_size, spec.num_kv_heads, spec.head_size, 1 if is_latent else 2


def with_planes(layout, tensors, block_dims, specs, num_blocks):
    """The layout once more, with what is known of its bytes.

    Parameters
    ----------
    layout : KVLayout
        Of `layout_of`, over these tensors.
    tensors, block_dims
        As for `layout_of`, one a layer; `specs` has vLLM's ``KVCacheSpec`` of each.
    num_blocks : int
        Blocks that vLLM's scheduler counts.

    Raises
    ------
    ConfigError
        A tensor's shape is not one of those that are known.
    """
    starts = list(accumulate((piece for _, _, piece in layout.runs), initial=0))
    by_address = sorted(
        (base, base + piece, start) for (base, _, piece), start in zip(layout.runs, starts, strict=False)
    )
    bases = [base for base, _, _ in by_address]
    found, numbers = {}, {}
    for tensor, dim, spec in zip(tensors, block_dims, specs, strict=True):
        layer = numbers.setdefault(tensor.data_ptr(), len(numbers))  # groups share pages: one layer of each has it
        for address, plane in planes_in_memory(tensor, dim, spec, num_blocks, layer):
            base, end, start = by_address[bisect_right(bases, address) - 1]
            if not base <= address < end:
                raise ConfigError(
                    f"KVortex does not find the KV cache of layer {layer} in its layout; please report this"
                )
            found.setdefault(address, replace(plane, first_byte=start + address - base))
    return KVLayout(layout.runs, layout.num_blocks, owners=layout.owners, planes=found.values())


def planes_in_memory(tensor, block_dim, spec, num_blocks, layer):
    """Yield (address in block 0, Plane) of a layer's cache."""
    one = KVLayout.from_tensors([tensor], block_dim, roles=role_of(tensor, block_dim, spec))
    places = addresses_of([plane.first_byte for plane in one.planes], one.runs)
    for plane, (address, stride) in zip(one.planes, places, strict=True):
        for part in range(one.num_blocks // num_blocks):  # a kernel's blocks, side by side
            yield address + part * stride, replace(plane, layer=layer)


def role_of(tensor, block_dim, spec):
    """What a block of the tensor is, as `KVLayout.from_tensors` calls it; ConfigError where nobody knows."""
    sizes = [(tensor.stride(dim), tensor.shape[dim]) for dim in range(tensor.dim()) if dim != block_dim]
    _, _, head_dim, parts = shape_of(spec)
    if tensor.dim() >= 2 and tensor.stride(-1) == 1:
        if parts == 1 and tensor.shape[-1] == head_dim:
            return "latent"
        if parts == 2 and tensor.shape[-1] == head_dim and max(sizes)[1] == 2:  # the outermost
            return "kv"
        if parts == 2 and tensor.shape[-1] == 2 * head_dim:
            return "interleaved"
    raise ConfigError(
        f"the codec does not know where K and V lie in a KV cache of shape {tuple(tensor.shape)} and strides "
        f"{tensor.stride()}, with heads of {head_dim} numbers; leave codec out, and please report this"
    )
