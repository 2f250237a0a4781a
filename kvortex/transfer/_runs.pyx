"""Runs of layouts: read from tensors, joined where they touch, grouped where they are evenly spaced."""

from kvortex.driver._memory cimport BorrowedMemory

import math
from bisect import bisect_right
from itertools import accumulate

from kvortex.transfer.fingerprint import piece_of_axes
from kvortex.transfer.overlaps import find_overlap

MAX_RUNS = 1 << 20  # a million pieces a block; more is a mistake, and would fill memory before an error shows
MAX_PERIOD = 4      # K and V, and a scale for each; what repeats with a longer period moves piece by piece


def distinct_runs(runs, num_blocks):
    """The numbers of the runs, each run once; refuses runs that share bytes and are not the same."""
    distinct = {}  # what makes two runs the same -> number of the first
    for number, run in enumerate(runs):
        base, stride, piece = run
        distinct.setdefault((base, stride if num_blocks > 1 else 0, piece), number)
    numbers = list(distinct.values())
    runs = [runs[number] for number in numbers]
    found = find_overlap(runs, num_blocks)
    if found is not None:
        refuse_overlap(numbers, runs, found)
    return numbers


def refuse_overlap(numbers, runs, found):
    (one, block), (other, other_block) = sorted(found)
    raise ValueError(f"run {numbers[one]}, block {block} and run {numbers[other]}, block {other_block} share bytes: as "
                     f"(base, block_stride, piece_bytes) these runs are {runs[one]} and {runs[other]}. A byte must "
                     f"belong to one block; the stride of interleaved runs is that of all their pieces together")


def runs_of_tensor(BorrowedMemory memory, block_dim, what):
    """The runs of one tensor in the order of its outer dimensions, its number of blocks, its piece of a fingerprint."""
    address, shape, strides, itemsize = memory.address, memory.shape, memory.strides, memory.itemsize
    if shape is None:
        which = "an address" if memory.owner is None else type(memory.owner).__name__
        raise TypeError(f"{what}: {which} describes no strides; pass an array or a tensor")
    if not -len(shape) <= block_dim < len(shape):
        raise ValueError(f"{what}: block_dim {block_dim} is outside its {len(shape)} dimensions")
    block_dim %= len(shape)
    num_blocks, block_stride = shape[block_dim], strides[block_dim]
    if 0 in shape or any(stride < 0 for stride in strides):
        raise ValueError(f"{what}: shape {shape} with strides {strides} has no elements or runs backwards")
    inner, outer, axis = [], [], 0
    for dim, (count, stride) in enumerate(zip(shape, strides)):
        if dim == block_dim or count == 1:
            continue
        (outer if num_blocks > 1 and stride > block_stride else inner).append((stride, count, axis))
        axis += 1
    inner.sort()
    axes = [(axis, count) for _, count, axis in (*outer, *reversed(inner))]
    piece = itemsize
    for stride, count, _ in inner:
        if stride != piece:
            raise ValueError(f"{what} is not block-contiguous: shape {shape}, strides {strides} bytes, block dimension "
                             f"{block_dim}; register it in a layout whose blocks are dense")
        piece *= count
    if num_blocks > 1 and piece > block_stride:
        raise ValueError(f"{what}: blocks of {piece} bytes overlap at a stride of {block_stride}")
    if math.prod([count for _, count, _ in outer]) > MAX_RUNS:
        raise ValueError(f"{what} has more than {MAX_RUNS} pieces a block: shape {shape}, block_dim {block_dim}")
    starts = [address]
    for stride, count, _ in outer:
        if stride < block_stride * (num_blocks - 1) + piece:
            raise ValueError(f"{what} is not block-contiguous: blocks interleave (shape {shape}, strides {strides} "
                             f"bytes)")
        starts = [start + stride * index for start in starts for index in range(count)]
    kind = str(getattr(memory.owner, "dtype", "")).rpartition(".")[2] or itemsize  # "torch.bfloat16", "float16"
    return [(start, block_stride, piece) for start in starts], num_blocks, piece_of_axes(kind, axes)


def merge_touching(runs, num_blocks):
    """Join runs whose pieces touch in every block: with two blocks or more they interleave, so it is one allocation."""
    merged = [runs[0]]
    for base, stride, piece in runs[1:]:
        last_base, last_stride, last_piece = merged[-1]
        if (num_blocks > 1 and base == last_base + last_piece and stride == last_stride
                and last_piece + piece <= stride):
            merged[-1] = (last_base, stride, last_piece + piece)
        else:
            merged.append((base, stride, piece))
    return merged


def group_evenly_spaced(runs):
    """Groups of runs that are evenly spaced on both sides, as tuples in the order of `kv_group`.

    Runs of K and V alternate (period 2), so every period up to MAX_PERIOD is tried and the one with the fewest groups
    taken; within a period, even stretches are taken greedily.
    """
    offsets = list(accumulate((piece for _, _, piece in runs), initial=0))
    best = None
    for period in range(1, MAX_PERIOD + 1):
        groups = []
        for phase in range(min(period, len(runs))):
            members = range(phase, len(runs), period)
            groups += even_stretches([(*runs[index], offsets[index]) for index in members])
        if best is None or len(groups) < len(best):
            best = groups
        if len(best) <= period:  # a longer period has as many phases, and each at least one group
            break
    return sorted(best, key=lambda group: group[2])


def even_stretches(rows):
    """Cut (base, block_stride, piece, offset) rows into stretches of equal pieces at equal, ascending distances."""
    stretches, start = [], 0
    while start < len(rows):
        base, stride, piece, offset = rows[start]
        end, pitch, slot_pitch = start + 1, piece, piece
        if end < len(rows):
            pitch, slot_pitch = rows[end][0] - base, rows[end][3] - offset
        if pitch < piece:
            pitch = slot_pitch = piece
        else:
            while (end < len(rows) and rows[end][1:3] == (stride, piece)
                   and rows[end][0] - rows[end - 1][0] == pitch and rows[end][3] - rows[end - 1][3] == slot_pitch):
                end += 1
        if end == start + 1:
            pitch = slot_pitch = piece
        stretches.append((base, stride, offset, piece, pitch, slot_pitch, end - start))
        start = end
    return stretches


def spans_of_part(runs, whole, num_blocks):
    """Where the bytes of some runs lie in a block of the runs `whole`, as (offset, length) of each stretch."""
    offsets = accumulate((piece for _, _, piece in whole), initial=0)
    places = sorted([(stride if num_blocks > 1 else 0, base, piece, offset)
                     for (base, stride, piece), offset in zip(whole, offsets)])
    spans = []
    for run in runs:
        base, stride, piece = run
        stride = stride if num_blocks > 1 else 0  # the stride of a single block may be anything
        while piece:
            found = places[max(bisect_right(places, (stride, base, math.inf)) - 1, 0)]
            ahead = base - found[1]
            if found[0] != stride or not 0 <= ahead < found[2]:
                raise ValueError(f"the run (base, block_stride, piece_bytes) {run} does not lie in the layout's runs, "
                                 f"at {base:#x}; a part consists of `runs` of its layout, or of stretches of them at "
                                 f"their strides")
            length = min(piece, found[2] - ahead)
            spans.append((found[3] + ahead, length))
            base, piece = base + length, piece - length
    return spans
