"""How many bytes a slot takes, how many slots a pool has, and which chunk each lies in: arithmetic, without a device.

Everybody who has to know asks here: the pool, whoever counts on one in another process, and tools. For code without the
GIL, `include/kvortex/slots.h` finds the address and the chunk of a slot, from the numbers of a `Slots`.
"""

from dataclasses import dataclass

from kvortex.arguments import whole_number
from kvortex.errors import ConfigError

PAGE_BYTES = 4096  # slots are aligned to it; a header is one page
FIRST_CHUNK_BYTES, CHUNK_BYTES = 128 << 20, 256 << 20


def stride_bytes(payload_bytes, header_bytes=0):
    """Bytes from slot to slot: header and payload, rounded up to whole pages."""
    return -(-(header_bytes + payload_bytes) // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True)
class Slots:
    """The slots of one pool, and the chunks in which they are registered.

    Attributes
    ----------
    payload_bytes, header_bytes : int
        Of one slot; the header comes first.
    num_slots : int
    first_chunk_slots, chunk_slots : int
        Slots of the first chunk, and of every later one but the last, which may be shorter.
    """

    payload_bytes: int
    header_bytes: int
    num_slots: int
    first_chunk_slots: int
    chunk_slots: int

    @classmethod
    def of(
        cls,
        pool_bytes,
        payload_bytes,
        *,
        header_bytes=0,
        first_chunk_bytes=FIRST_CHUNK_BYTES,
        chunk_bytes=CHUNK_BYTES,
        one_chunk=False,
    ):
        """The slots that fit into a pool: nothing is rounded up, and no slot straddles two chunks.

        Parameters
        ----------
        pool_bytes : int
        payload_bytes : int
            1 to 2^32 - 1.
        header_bytes : {0, 4096}, default 0
        first_chunk_bytes, chunk_bytes : int
            Rounded down to whole slots, at least one.
        one_chunk : bool, default False
            All slots are registered together.

        Raises
        ------
        ConfigError
            A size that gives no slot, or more than a slot number can name; another header.
        """
        pool_bytes = whole_number(pool_bytes, "pool_bytes")
        payload_bytes = whole_number(payload_bytes, "payload_bytes")
        header_bytes = whole_number(header_bytes, "header_bytes")
        first_chunk_bytes = whole_number(first_chunk_bytes, "first_chunk_bytes")
        chunk_bytes = whole_number(chunk_bytes, "chunk_bytes")
        if not 0 < payload_bytes < 1 << 32:
            raise ConfigError(f"payload_bytes must be 1 to 2^32 - 1, got {payload_bytes}")
        if header_bytes not in (0, PAGE_BYTES):
            raise ConfigError(f"header_bytes must be 0 or {PAGE_BYTES}, got {header_bytes}")
        stride = stride_bytes(payload_bytes, header_bytes)
        num_slots = pool_bytes // stride
        if num_slots <= 0:
            raise ConfigError(
                f"a pool of {pool_bytes} bytes holds no slot of {stride} bytes; set cpu_pool_size_bytes to at least "
                f"{stride}"
            )
        if num_slots >= 0xFFFFFFFF:
            raise ConfigError(
                f"a pool of {pool_bytes} bytes holds {num_slots} slots of {stride} bytes, and may hold 2^32 - 2; use "
                f"larger blocks or a smaller pool"
            )
        if first_chunk_bytes <= 0 or chunk_bytes <= 0:
            raise ConfigError(f"chunks must be larger than 0 bytes, got {first_chunk_bytes} and {chunk_bytes}")
        first, rest = (min(num_slots, max(1, nbytes // stride)) for nbytes in (first_chunk_bytes, chunk_bytes))
        return cls(payload_bytes, header_bytes, num_slots, num_slots if one_chunk else first, rest)

    @property
    def stride_bytes(self):
        """Bytes from slot to slot."""
        return stride_bytes(self.payload_bytes, self.header_bytes)

    @property
    def pool_bytes(self):
        """Bytes of all slots."""
        return self.num_slots * self.stride_bytes

    def chunk(self, number):
        """First slot and count of a chunk; behind the last chunk the count is 0."""
        if number == 0:
            return 0, self.first_chunk_slots
        first = self.first_chunk_slots + (number - 1) * self.chunk_slots
        return first, max(0, min(self.chunk_slots, self.num_slots - first))
