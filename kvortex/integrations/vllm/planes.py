"""Which bytes of vLLM's KV cache are vectors of K and V that a codec can pack."""

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from math import gcd, prod

from kvortex import ConfigError, KVLayout
from kvortex.codec import CODECS, PackedBlock, planes_of
from kvortex.transfer.planes import addresses_of, covering, planes_of_tensor

DIM_ON_CPUS = 32  # vLLM's kernels for CPUs keep K and V in tiles of their own, whose rows have so many numbers
TOKENS_OF_KERNELS = 16  # the smallest blocks that attention kernels have within those of the scheduler


def packed_bytes_of(kv_cache_config, block_bytes, codec, exact_layers, *, on_cpu=False, name=None):
    """What a packed block takes at the most, for vLLM's ``KVCacheConfig`` of one rank.

    Both halves ask, and the scheduler's sees no tensor: so it is what follows from the spec of a layer, whatever the
    order of K, V, heads and tokens, and however small the blocks of the attention kernel are. `on_cpu`: vLLM's kernels
    run on CPUs. `name`: what messages call the codec.

    Raises
    ------
    ConfigError
        The codec can pack nothing of such a cache, or its layers differ in a way that it cannot pack.
    """
    name = name or f"the codec {codec!r}"
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    shapes = [shape_of(spec) for spec in specs]
    pages = {spec.page_size_bytes for spec in specs}
    if None in shapes or len(pages) != 1 or len({shape[3:] if shape[3] == 2 else shape for shape in shapes}) != 1:
        raise ConfigError(
            f"{name} packs caches of attention in bfloat16 whose layers have pages of one size, and this "
            f"model's groups are {sorted({type(spec).__name__ for spec in specs})} of "
            f"{sorted({str(getattr(spec, 'dtype', None)) for spec in specs})} with pages of {sorted(pages)} bytes; "
            f"leave it out"
        )
    (page_bytes,), parts, dim_of_all = pages, shapes[0][3], common_dim(specs, on_cpu)
    head_dim, tokens = dim_of_all or shapes[0][2], max(shape[0] for shape in shapes)
    if dim_of_all and len(set(CODECS[codec])) > 1:
        why = "on CPUs vLLM keeps tiles of both" if on_cpu else "heads of several shapes share pages here"
        raise ConfigError(f"{name} packs K and V differently, and {why}; use q8 or q4")
    num_layers, rest = divmod(block_bytes, page_bytes)
    if rest or any(page_bytes != 2 * prod(shape) for shape in shapes):
        raise ConfigError(f"{name} cannot pack pages of {page_bytes} bytes with padding; leave it out")
    role, planes = "kv" if parts == 2 else "latent", []
    for layer in range(num_layers):
        planes += planes_of_tensor(role, (head_dim,), (2,), 2, "bfloat16", layer * page_bytes, page_bytes, layer)
    try:
        packed = PackedBlock.of(covering(planes, [page_bytes] * num_layers), block_bytes, codec, exact_layers)
    except ValueError as error:
        raise ConfigError(f"{name} cannot pack this KV cache: {error}") from None
    if all(bits == 16 for bits in packed.bits):
        raise ConfigError(f"{name} can pack nothing of heads of {head_dim} numbers; leave it out")
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


def common_dim(specs, on_cpu):
    """How long the vectors are in which every page can be packed, where what lies in it is not heads of one shape.

    That is so on CPUs, and where groups share pages but not the shape of heads: then K and V of each of them are such
    vectors, one after the other. None: all are heads of one shape.
    """
    shapes = {shape_of(spec) for spec in specs}
    if on_cpu and all(parts == 2 for _, _, _, parts in shapes):
        return DIM_ON_CPUS
    return gcd(*(head_dim for _, _, head_dim, _ in shapes)) if len(shapes) > 1 else None


def with_planes(layout, tensors, block_dims, specs, num_blocks, *, on_cpu=False):
    """The layout once more, with what is known of its bytes.

    Parameters
    ----------
    layout : KVLayout
        Of `layout_of`, over these tensors.
    tensors, block_dims
        As for `layout_of`, one a layer; `specs` has vLLM's ``KVCacheSpec`` of each.
    num_blocks : int
        Blocks that vLLM's scheduler counts.
    on_cpu : bool, default False
        Whether vLLM runs on CPUs.

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
    found, layers, dim_of_all = [], {}, common_dim(specs, on_cpu)
    for tensor, dim, spec in zip(tensors, block_dims, specs, strict=True):
        planes = planes_in_memory(tensor, dim, spec, num_blocks, dim_of_all)
        if layers.setdefault(tensor.data_ptr(), planes) != planes:  # groups share pages: one layer of each has it
            raise ConfigError("KV cache groups that share pages have K and V at different places; leave codec out")
    for layer, planes in enumerate(layers.values()):
        for address, plane in planes:
            base, end, start = by_address[bisect_right(bases, address) - 1]
            if not base <= address < end:
                raise ConfigError(
                    f"KVortex does not find the KV cache of layer {layer} in its layout; please report this"
                )
            found.append(replace(plane, first_byte=start + address - base, layer=layer))
    return KVLayout(layout.runs, layout.num_blocks, owners=layout.owners, planes=found)


def planes_in_memory(tensor, block_dim, spec, num_blocks, dim_of_all):
    """(Address in block 0, Plane) of each plane of a layer's cache; see `common_dim`."""
    one = KVLayout.from_tensors([tensor], block_dim, roles=role_of(tensor, block_dim, spec))
    parts = range(one.num_blocks // num_blocks)  # a kernel's blocks, side by side
    if dim_of_all is None:
        places = addresses_of([plane.first_byte for plane in one.planes], one.runs)
        return [
            (address + part * stride, plane)
            for plane, (address, stride) in zip(one.planes, places, strict=True)
            for part in parts
        ]
    ranges = []
    for first, piece in sorted((base + part * stride, piece) for base, stride, piece in one.runs for part in parts):
        if ranges and ranges[-1][1] == first:
            ranges[-1][1] += piece
        else:
            ranges.append([first, first + piece])
    row_bytes = 2 * dim_of_all
    return [
        (begin + plane.first_byte, plane)
        for begin, end in ranges
        for plane in planes_of("k", 0, (end - begin) // row_bytes, row_bytes, row_bytes)
    ]


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
        f"{tensor.stride()}, with heads of {head_dim} numbers; leave it out, and please report this"
    )
