"""Which bytes of a block are vectors of K and V: the planes of a layout, from the roles of tensors and runs."""

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

from kvortex.codec.planes import UNIT_BYTES, planes_of, uncovered

ROLES = ("k", "v", "kv", "interleaved", "latent", "exact")
ROPE_BYTES = 128  # at the end of a latent (MLA): 64 numbers that a codec leaves as they are


def is_bfloat16(dtype, itemsize):
    """Whether numbers of this type can be packed. Integers of 16 bits count as the bits of bfloat16."""
    name = str(dtype).rpartition(".")[2]  # "torch.bfloat16"
    return itemsize == 2 and name in ("bfloat16", "uint16", "int16")


def roles_of_tensors(roles, num_tensors):
    """Return one role for each tensor; ValueError for an unknown role or a wrong number of them."""
    roles = ["exact" if roles is None else roles] * num_tensors if roles is None or isinstance(roles, str) else [*roles]
    if len(roles) != num_tensors:
        raise ValueError(f"roles must be one for all tensors or one each: got {len(roles)} for {num_tensors} tensors")
    for role in roles:
        if role not in ROLES:
            raise ValueError(f"a role must be one of {', '.join(ROLES)}, got {role!r}")
    return roles


def layers_of_roles(roles):
    """The layer of each tensor. If K and V are separate tensors, the first of each is layer 0, and so on."""
    counts, layers = {"k": 0, "v": 0}, []
    for role in roles:
        parts = [role] if role in counts else ["k", "v"]
        layers.append(max(counts[part] for part in parts))
        counts.update(dict.fromkeys(parts, layers[-1] + 1))
    return layers


def heads_of(shape, strides, block_dim, num_rows, num_heads=None):
    """How rows of vectors belong together: the number of heads, and whether the heads are outside, the tokens inside.

    Tokens and then heads are the last dimensions before the vectors', but the other way round if only that goes with
    `num_heads`. Where shape and rows do not go together, the rows are taken for those of one head.
    """
    dims = [dim for dim in range(len(shape) - 1) if dim != block_dim % len(shape)][-2:]
    if len(dims) < 2 or shape[dims[0]] * shape[dims[1]] != num_rows:
        return 1, False
    tokens, heads = dims if num_heads in (None, shape[dims[1]]) else dims[::-1]
    return shape[heads], strides[heads] > strides[tokens]


def planes_of_tensor(role, shape, strides, itemsize, dtype, first_byte, nbytes, layer, block_dim=0, block_size=0):
    """The planes of a block of one tensor, `nbytes` from `first_byte` on; `block_size` tokens, or 0 if that is unknown.

    Raises
    ------
    ValueError
        The tensor's shape does not fit the role.
    """
    if role == "exact" or not is_bfloat16(dtype, itemsize):
        return []
    row_bytes = shape[-1] * itemsize
    num_rows, rest = divmod(nbytes, row_bytes)
    if strides[-1] != itemsize or rest or row_bytes // (2 if role == "interleaved" else 1) % UNIT_BYTES:
        return []  # its rows are not the heads' vectors, or too short for any codec
    if role == "latent":
        coded = row_bytes - ROPE_BYTES
        return planes_of("k", first_byte, num_rows, coded, row_bytes, layer) if coded > 0 else []
    if role == "kv":
        if num_rows % 2:
            raise ValueError(f"the role 'kv' needs as many rows of V as of K, got {num_rows} rows a block in {shape}")
        num_rows //= 2
    heads = heads_of(shape, strides, block_dim, num_rows, num_rows // block_size if block_size else None)
    if role in ("k", "v"):
        return planes_of(role, first_byte, num_rows, row_bytes, row_bytes, layer, *heads)
    if role == "kv":
        half = num_rows * row_bytes
        return [
            *planes_of("k", first_byte, num_rows, row_bytes, row_bytes, layer, *heads),
            *planes_of("v", first_byte + half, num_rows, row_bytes, row_bytes, layer, *heads),
        ]
    if shape[-1] % 2:
        raise ValueError(f"the role 'interleaved' needs rows of K beside V, got a last dimension of {shape[-1]}")
    return [
        *planes_of("k", first_byte, num_rows, row_bytes // 2, row_bytes, layer, *heads),
        *planes_of("v", first_byte + row_bytes // 2, num_rows, row_bytes // 2, row_bytes, layer, *heads),
    ]


def planes_of_runs(planes, pieces, kept):
    """Move planes from offsets over the runs as they were listed to offsets over the runs that are kept.

    Parameters
    ----------
    planes : iterable of Plane
    pieces : list of int
        Bytes of each run that was named.
    kept : list of int or None
        The numbers of the runs that count; None: all.

    Raises
    ------
    ValueError
        A plane does not lie in one run.
    """
    planes = tuple(planes)
    if not planes:
        return ()
    named = list(accumulate(pieces, initial=0))
    kept = range(len(pieces)) if kept is None else kept
    moved = dict(zip(kept, accumulate((pieces[number] for number in kept), initial=0), strict=False))
    found = []
    for plane in planes:
        run = bisect_right(named, plane.first_byte) - 1
        if not 0 <= run < len(pieces) or plane.end_byte > named[run + 1]:
            raise ValueError(f"{plane} does not lie in one of the layout's runs, which are the pieces of a block")
        if run in moved:
            found.append(replace(plane, first_byte=plane.first_byte - named[run] + moved[run]))
    return tuple(found)


def addresses_of(offsets, runs):
    """Yield, for each offset in a block, its address in block 0 and the bytes from block to block there."""
    starts = list(accumulate((piece for _, _, piece in runs), initial=0))
    for offset in offsets:
        run = bisect_right(starts, offset) - 1
        base, stride, _ = runs[run]
        yield base + offset - starts[run], stride


def planes_of_part(planes, spans):
    """Return the planes that lie whole in one of the spans (offset, length) of a part, at their offsets in it."""
    found, start = [], 0
    for offset, length in spans:
        for plane in planes:
            if offset <= plane.first_byte and plane.end_byte <= offset + length:
                found.append(replace(plane, first_byte=plane.first_byte - offset + start))
        start += length
    return tuple(found)


def covering(planes, pieces):
    """Return the planes and, for all other bytes, exact planes, none of which crosses from one piece to the next."""
    ends = list(accumulate(pieces))
    inside = [[] for _ in pieces]
    for plane in planes:
        inside[bisect_right(ends, plane.first_byte)].append(plane)
    found = [*planes]
    for piece, end, known in zip(pieces, ends, inside, strict=True):
        first = end - piece
        moved = [replace(plane, first_byte=plane.first_byte - first) for plane in known]
        found += [replace(gap, first_byte=gap.first_byte + first) for gap in uncovered(moved, piece)]
    return found
