"""Where rows of one meaning lie in a block, and where a codec puts them in the packed block (as in pack.h)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from kvortex.arguments import shown, whole_number

CODECS = {"exact": (16, 16), "q8": (8, 8), "k8v5": (8, 5), "k6v4": (6, 4), "q4": (4, 4)}  # bits of K, bits of V
UNIT_BYTES, FLAG_BYTES, EXACT = 16, 4, 16
DIMS = (32, 64, 128, 256)
LARGEST_PIECE, SMALLEST_PIECE = 128, 32
ROLES = ("k", "v", "exact")


@dataclass(frozen=True, slots=True)
class Plane:
    """Rows of one meaning, in the bytes of a block: `num_rows` of `row_bytes` each, `step_bytes` from one to the next.

    A row of role "k" or "v" is one vector of 32, 64, 128 or 256 bfloat16 numbers; `planes_of` splits longer ones. A
    plane of role "exact" is kept as it is. All bytes are multiples of 16; anything else is a ValueError.

    The rows are `num_heads` vectors for each token: the heads of token 0, then those of token 1 and so on, or, with
    `heads_first`, the tokens of head 0, then those of head 1.
    """

    role: str
    first_byte: int
    num_rows: int
    row_bytes: int
    step_bytes: int
    layer: int = 0
    num_heads: int = 1
    heads_first: bool = False

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {shown(self.role)}")
        for name in ("first_byte", "num_rows", "row_bytes", "step_bytes", "layer", "num_heads"):
            number = whole_number(getattr(self, name), name)
            least = 1 if name in ("num_rows", "row_bytes", "num_heads") else 0
            if not least <= number < 1 << (63 if name == "first_byte" else 32):
                raise ValueError(f"{name} must be from {least} to 2^32 - 1, got {shown(number)}")
            if name.endswith("_byte") or name.endswith("_bytes"):
                require_units(name, number)
        if self.num_rows > 1 and self.step_bytes < self.row_bytes:
            raise ValueError(f"step_bytes must be at least row_bytes ({self.row_bytes}), got {self.step_bytes}")
        if self.num_rows % self.num_heads:
            raise ValueError(f"num_rows must be a multiple of num_heads ({self.num_heads}), got {self.num_rows}")
        if self.role != "exact" and self.row_bytes // 2 not in DIMS:
            raise ValueError(
                f"a vector must have 32, 64, 128 or 256 numbers of 2 bytes, got {self.row_bytes} bytes; pass planes_of"
            )

    @property
    def end_byte(self):
        """The byte behind the last row."""
        return self.first_byte + (self.num_rows - 1) * self.step_bytes + self.row_bytes


def planes_of(
    role: str,
    first_byte: int,
    num_rows: int,
    row_bytes: int,
    step_bytes: int,
    layer: int = 0,
    num_heads: int = 1,
    heads_first: bool = False,
) -> tuple[Plane, ...]:
    """Return the planes of rows whose vectors have any length.

    A vector of D numbers is coded in pieces of the largest power of two that divides D, 128 at most, each a plane of
    its own; one of 256 stays whole. If that power is below 32, there is one plane, of role "exact".
    """
    require_units("row_bytes", whole_number(row_bytes, "row_bytes"))
    dim = row_bytes // 2
    piece = dim if dim == 2 * LARGEST_PIECE else min(dim & -dim, LARGEST_PIECE)
    if role == "exact" or piece < SMALLEST_PIECE:
        return (Plane("exact", first_byte, num_rows, row_bytes, step_bytes, layer),)
    return tuple(
        Plane(role, first_byte + at, num_rows, 2 * piece, step_bytes, layer, num_heads, heads_first)
        for at in range(0, row_bytes, 2 * piece)
    )


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """How a codec packs one block; made by `of`. The same for every block of a layout, so a packed block has one size.

    `planes` cover each byte of the block once. Plane i has `bits[i]` bits a number (16: exact) and lies at `offsets[i]`
    of the packed block; its flag, a 32-bit word, at ``flags_offset + 4 * i``.
    """

    codec: str
    block_bytes: int
    planes: tuple[Plane, ...]
    bits: tuple[int, ...]
    offsets: tuple[int, ...]
    flags_offset: int
    packed_bytes: int

    @classmethod
    def of(cls, planes: Iterable[Plane], block_bytes: int, codec: str, exact_layers: Iterable[int] = ()) -> Self:
        """Lay out the packed block.

        Parameters
        ----------
        planes : iterable of Plane
            Bytes that none of them covers become exact planes behind them.
        block_bytes : int
            Of the block as it is on the device, a multiple of 16.
        codec : str
            A key of `CODECS`.
        exact_layers : iterable of int
            Layers whose planes are kept as they are; -1 is the last layer that any plane has.

        Raises
        ------
        ValueError
            Planes share bytes or leave the block, or a number, a codec or a layer does not exist.
        """
        if codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {shown(codec)}")
        if whole_number(block_bytes, "block_bytes") <= 0:
            raise ValueError(f"block_bytes must be positive, got {shown(block_bytes)}")
        require_units("block_bytes", block_bytes)
        planes = tuple(planes)
        exact = exact_numbers(exact_layers, 1 + max((plane.layer for plane in planes), default=-1))
        planes += tuple(uncovered(planes, block_bytes))
        bits = tuple(EXACT if plane.layer in exact else bits_of(plane, codec) for plane in planes)
        offsets, end = [], 0
        for plane, width in zip(planes, bits, strict=True):
            offsets.append(end)
            end += packed_plane_bytes(plane, width)
        packed_bytes = end + aligned(FLAG_BYTES * len(planes))
        return cls(codec, block_bytes, planes, bits, tuple(offsets), end, packed_bytes)


def bits_of(plane, codec):
    """Return the bits that a number of the plane has."""
    return EXACT if plane.role == "exact" else CODECS[codec][ROLES.index(plane.role)]


def packed_plane_bytes(plane, bits):
    """Return the bytes of a packed plane: exact rows, or nibbles or bytes, what 5 and 6 bits have above, and scales."""
    if bits == EXACT:
        return plane.num_rows * plane.row_bytes
    elements = plane.num_rows * plane.row_bytes // 2
    low, high = (8, 0) if bits == 8 else (4, bits - 4)
    return aligned(elements * low // 8) + aligned(elements * high // 8) + aligned(2 * plane.num_rows)


def exact_numbers(exact_layers, num_layers):
    """Return the set of layers that are meant, each from 0."""
    found = set()
    for layer in exact_layers:
        number = whole_number(layer, "a layer of exact_layers")
        if not -num_layers <= number < num_layers:
            raise ValueError(f"exact_layers must be from {-num_layers} to {num_layers - 1}, got {shown(number)}")
        found.add(number % num_layers)
    return found


def uncovered(planes, block_bytes):
    """Yield exact planes for the bytes that no plane covers; refuse planes that share bytes or leave the block."""
    for plane in planes:
        if plane.end_byte > block_bytes:
            raise ValueError(f"{plane} ends at byte {plane.end_byte} of a block of {block_bytes}")
    rows = sorted(
        (plane.first_byte + row * plane.step_bytes, plane.row_bytes, number)
        for number, plane in enumerate(planes)
        for row in range(plane.num_rows)
    )
    gaps, end, before = [], 0, None
    for first, length, number in [*rows, (block_bytes, 0, None)]:
        if first < end:
            raise ValueError(f"{planes[before]} and {planes[number]} share byte {first}")
        if first > end:
            gaps.append((end, first - end))
        end, before = first + length, number
    while gaps:  # those of one length at one distance are rows of one plane
        first, length = gaps[0]
        step = gaps[1][0] - first if len(gaps) > 1 else 0
        num_rows = 1
        while num_rows < len(gaps) and gaps[num_rows] == (first + num_rows * step, length):
            num_rows += 1
        yield Plane("exact", first, num_rows, length, step if num_rows > 1 else length)
        del gaps[:num_rows]


def aligned(nbytes):
    """Return `nbytes` rounded up to a multiple of 16."""
    return -(-nbytes // UNIT_BYTES) * UNIT_BYTES


def require_units(name, number):
    """Refuse bytes that are no multiple of 16."""
    if number % UNIT_BYTES:
        raise ValueError(f"{name} must be a multiple of {UNIT_BYTES}, got {shown(number)}")
