"""Whether two blocks of a layout share a byte: decided by arithmetic on strides, without a loop over blocks."""

from bisect import bisect_left
from itertools import combinations, product

# If runs interleave at different strides, every pair is compared, 5 us each: this bounds the time to a second.
MAX_PAIRS = 1 << 18


def find_overlap(runs, num_blocks):
    """Find two blocks that share a byte.

    Parameters
    ----------
    runs : list of (int, int, int)
        Base, bytes from block to block, bytes of a piece (at least 1 and, if there are two blocks, at most the stride).
        All runs differ.
    num_blocks : int
        At least 1.

    Returns
    -------
    tuple of two (int, int), or None
        Number of the run and of the block, of both; None if no byte belongs to two blocks. Exact.

    Raises
    ------
    ValueError
        More than `MAX_PAIRS` pairs of runs with different strides interleave.
    """
    for stretch in overlapping_extents(runs, num_blocks):
        if num_blocks == 1:
            return (stretch[0], 0), (stretch[1], 0)
        by_stride = {}
        for number in stretch:
            by_stride.setdefault(runs[number][1], []).append(number)
        for stride, members in by_stride.items():
            if found := overlap_at_one_stride(runs, members, stride, num_blocks):
                return found
        num_pairs = sum(len(first) * len(second) for first, second in combinations(by_stride.values(), 2))
        if num_pairs > MAX_PAIRS:
            raise ValueError(
                f"{len(stretch)} runs with {len(by_stride)} different strides interleave: to tell whether their blocks "
                f"share bytes, {num_pairs} pairs would have to be compared, and {MAX_PAIRS} are the limit; let runs "
                f"that interleave have one stride"
            )
        for first, second in combinations(by_stride.values(), 2):
            for one, other in product(first, second):
                if blocks := overlap_of_two(runs[one], runs[other], num_blocks):
                    return (one, blocks[0]), (other, blocks[1])
    return None


def find_shared(runs, num_blocks, other_runs, other_blocks):
    """Find a block of one layout and a block of another that share a byte.

    Parameters
    ----------
    runs, other_runs : list of (int, int, int)
        As for `find_overlap`; those of one layout share no bytes with each other.
    num_blocks, other_blocks : int
        At least 1.

    Returns
    -------
    tuple of two (int, int), or None
        Number of the run and of the block, of both. Exact.

    Raises
    ------
    ValueError
        More than `MAX_PAIRS` pairs of runs interleave.
    """
    sides = (runs, num_blocks), (other_runs, other_blocks)
    extents = []  # first byte, last, side, number
    for side, (members, count) in enumerate(sides):
        extents += [
            (base, base + (count - 1) * stride + piece - 1, side, number)
            for number, (base, stride, piece) in enumerate(members)
        ]
    reached = [], []  # of each side, the runs that may reach the one looked at
    num_pairs = 0
    for start, last, side, number in sorted(extents):
        facing = reached[1 - side]
        facing[:] = [(end, candidate) for end, candidate in facing if end >= start]
        num_pairs += len(facing)
        if num_pairs > MAX_PAIRS:
            raise ValueError(
                f"{len(runs)} and {len(other_runs)} runs interleave: to tell whether their blocks share bytes, more "
                f"than {MAX_PAIRS} pairs would have to be compared; let two layouts lie apart"
            )
        for _, candidate in facing:
            one, other = (number, candidate) if side == 0 else (candidate, number)
            if blocks := overlap_of_two(runs[one], other_runs[other], num_blocks, other_blocks):
                return (one, blocks[0]), (other, blocks[1])
        reached[side].append((last, number))
    return None


def overlapping_extents(runs, num_blocks):
    """Yield the numbers of runs, two or more and by base, whose extents from first to last byte form one stretch."""
    stretch, end = [], 0
    past_first = num_blocks - 1
    extents = [(base, base + past_first * stride + piece) for base, stride, piece in runs]
    for number in sorted(range(len(runs)), key=extents.__getitem__):
        base, stop = extents[number]
        if base >= end:
            if len(stretch) > 1:
                yield stretch
            stretch = []
        stretch.append(number)
        if stop > end:
            end = stop
    if len(stretch) > 1:
        yield stretch


def overlap_at_one_stride(runs, members, stride, num_blocks):
    """As `find_overlap`, for runs of one stride.

    Lay memory out in rows of `stride` bytes: a run is a rectangle, its piece wide and `num_blocks` rows high, or two if
    its piece crosses the end of a row. A sweep down the rows keeps the columns of the rectangles that it crosses.
    """
    rectangles = []  # first row, column, its end, run, block in the first row
    for number in members:
        row, column = divmod(runs[number][0], stride)
        end = column + runs[number][2]
        rectangles.append((row, column, min(end, stride), number))
        if end > stride:
            rectangles.append((row + 1, 0, end - stride, number))
    rectangles.sort()
    columns, passed = [], 0  # of the rectangles that the sweep crosses, by column; how many it has left, in their order
    for row, column, end, number in rectangles:
        while rectangles[passed][0] + num_blocks <= row:
            del columns[bisect_left(columns, rectangles[passed][1:])]
            passed += 1
        place = bisect_left(columns, (column, end, number))
        for start, stop, other in columns[max(place - 1, 0) : place + 1]:
            if start < end and column < stop:
                shared = row * stride + max(start, column)
                return tuple((run, (shared - runs[run][0]) // stride) for run in (other, number))
        columns.insert(place, (column, end, number))
    return None


def overlap_of_two(run, other, num_blocks, other_blocks=None):
    """Find a block of one run and a block of another, of any strides, that share a byte; None if none do.

    By default the other run has as many blocks as the first.

    Blocks b and c share one if ``low <= b * stride - c * other_stride <= high``. How many such pairs a range of b has
    is a sum of quotients.
    """
    (base, stride, piece), (other_base, other_stride, other_piece) = run, other
    other_blocks = num_blocks if other_blocks is None else other_blocks
    stride = stride if num_blocks > 1 else piece  # the stride of a single block may be anything
    other_stride = other_stride if other_blocks > 1 else other_piece
    low, high = other_base - base - piece + 1, other_base - base + other_piece - 1
    # For a given b the c form an interval. If it reaches beyond the blocks there are, it holds one of these two:
    for c in (0, other_blocks - 1):
        b = max(0, -(-(low + c * other_stride) // stride))
        if b < num_blocks and b * stride <= high + c * other_stride:
            return b, c
    first = max(0, (high - other_stride) // stride + 1)  # for b from here on no c of the interval is negative,
    end = min(num_blocks, -(-(low + other_blocks * other_stride) // stride))  # and below here none is too large

    def num_pairs(last):
        """Pairs with b in first..last-1."""
        count, start = last - first, first * stride
        return sum_of_quotients(count, other_stride, stride, start - low) - sum_of_quotients(
            count, other_stride, stride, start - high - 1
        )

    if end <= first or not num_pairs(end):
        return None
    b = bisect_left(range(first, end), 1, key=lambda b: num_pairs(b + 1)) + first
    return b, (b * stride - low) // other_stride


def sum_of_quotients(count, divisor, step, start):
    """The sum of ``(start + step * i) // divisor`` for i below `count`, in as many steps as Euclid's algorithm."""
    total = 0
    while count > 0:
        total += count * (count - 1) // 2 * (step // divisor) + count * (start // divisor)
        step, start = step % divisor, start % divisor
        count, start = divmod(start + step * count, divisor)
        divisor, step = step, divisor
    return total
