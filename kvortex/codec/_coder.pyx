"""BlockCoder: what a lower tier makes of a slot's block before it writes it, and the reverse."""

import math

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc

cimport kvortex._c as _c
from kvortex.codec._codec cimport fill_planes

from kvortex.codec._ecsq import FORMAT_VERSION, TABLES_ID
from kvortex.slots import PAGE_BYTES


ECSQ = 5  # the codec's number in headers of records, below the level
SPREAD = 0.04  # the part by which the largest record of a model was larger than the mean (ECSQ.md), and a little more


cdef class BlockCoder:
    """Code blocks of one form, by `ecsq`.

    Parameters
    ----------
    packed : PackedBlock
        How slots in RAM have the blocks; planes of role "exact" are kept as they are.
    level : {1, 2, 3, 4}
    slot_ratio : float, optional
        How many times smaller a slot of the tier is than the block of the cache; see `DiskTier`.

    Attributes
    ----------
    name : str
        Of the codec.
    codec : int
        Its number, with the level, in headers of records.
    identity : bytes
        What tells its records from all others: part of the names under which they are kept.
    payload_bytes, block_bytes : int
        Of a block in its slot in RAM, and as the cache has it.
    stride_bytes : int
        Of a slot of the tier: a page and the longest record that it holds, in whole pages.
    scratch_bytes : int
        Memory that coding or decoding a block takes.

    Raises
    ------
    ValueError
        No plane is K or V, or there is no such level.
    """

    def __init__(self, packed, level, slot_ratio=None):
        if self.coded is not None:
            raise RuntimeError("BlockCoder.__init__ may be called once")
        if all(plane.role == "exact" for plane in packed.planes):
            raise ValueError("no vectors of bfloat16 are known in the blocks")
        self.coded = Coded.of(packed.planes, packed.block_bytes, level)
        self.name = "ecsq"
        self.identity = f"ecsq {FORMAT_VERSION} {level} {TABLES_ID:08x} {self.coded.planes_crc:08x}".encode()
        core = &self.core
        core.ecsq = &self.coded.ecsq
        core.coder.codec = ECSQ | level << 8
        core.coder.encode, core.coder.decode = _c.kv_ecsq_coder_encode, _c.kv_ecsq_coder_decode
        core.coder.payload_bytes = packed.block_bytes
        if packed.codec != "exact":
            self.planes = <_c.kv_plane *>calloc(len(packed.planes), sizeof(_c.kv_plane))
            if self.planes is NULL:
                raise MemoryError(f"no memory for a table of {len(packed.planes)} planes")
            fill_planes(packed, 0, 1, self.planes)
            core.planes, core.num_planes, core.flags_offset = self.planes, len(packed.planes), packed.flags_offset
            core.coder.payload_bytes = packed.packed_bytes
        core.coder.scratch_bytes = _c.kv_ecsq_coder_block_bytes(core) + _c.kv_ecsq_scratch_bytes(core.ecsq)
        most = (1 + SPREAD) * self.coded.typical_bytes if slot_ratio is None else packed.block_bytes / slot_ratio
        if slot_ratio == 1:
            most = self.coded.max_coded_bytes
        pages = min(math.ceil(most / PAGE_BYTES), -(-self.coded.max_coded_bytes // PAGE_BYTES))
        core.coder.coded_bytes, self.stride_bytes = pages * PAGE_BYTES, (1 + pages) * PAGE_BYTES

    cdef _c.kv_coder *get(self) noexcept:
        return &self.core.coder

    def __dealloc__(self):
        free(self.planes)

    @property
    def codec(self):
        return self.core.coder.codec

    @property
    def payload_bytes(self):
        return self.core.coder.payload_bytes

    @property
    def block_bytes(self):
        return self.core.ecsq.block_bytes

    @property
    def scratch_bytes(self):
        return self.core.coder.scratch_bytes

    def encode(self, const uint8_t[::1] payload not None, uint8_t[::1] coded not None):
        """Code the block of a slot, without the GIL.

        Parameters
        ----------
        payload : buffer of `payload_bytes`
        coded : writable buffer of ``stride_bytes - 4096``

        Returns
        -------
        int
            How many bytes of `coded` it took; 0: it would have taken more than there are.
        """
        cdef uint32_t nbytes
        require("payload", payload.shape[0], self.core.coder.payload_bytes)
        require("coded", coded.shape[0], self.core.coder.coded_bytes)
        cdef void *scratch = malloc(self.core.coder.scratch_bytes)
        if scratch is NULL:
            raise MemoryError(f"no memory of {self.core.coder.scratch_bytes} bytes for coding")
        with nogil:
            nbytes = _c.kv_ecsq_coder_encode(&self.core.coder, &payload[0], &coded[0], scratch)
        free(scratch)
        return nbytes

    def decode(self, const uint8_t[::1] coded not None, uint8_t[::1] payload not None):
        """Decode into a slot, without the GIL.

        Parameters
        ----------
        coded : buffer
            As many bytes as `encode` told.
        payload : writable buffer of `payload_bytes`

        Returns
        -------
        bool
            False: no block was coded like this; `payload` may have any bytes then.
        """
        cdef bint is_decoded
        require("payload", payload.shape[0], self.core.coder.payload_bytes)
        if not 1 <= coded.shape[0] <= self.core.coder.coded_bytes:
            return False
        cdef void *scratch = malloc(self.core.coder.scratch_bytes)
        if scratch is NULL:
            raise MemoryError(f"no memory of {self.core.coder.scratch_bytes} bytes for decoding")
        with nogil:
            is_decoded = _c.kv_ecsq_coder_decode(&self.core.coder, &coded[0], coded.shape[0], &payload[0], scratch)
        free(scratch)
        return is_decoded


cdef int require(str name, Py_ssize_t nbytes, Py_ssize_t wanted) except -1:
    if nbytes != wanted:
        raise ValueError(f"{name} must have {wanted} bytes, got {nbytes}")
    return 0
