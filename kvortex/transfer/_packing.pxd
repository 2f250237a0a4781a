"""Packing: how the blocks of one layout lie packed in their slots. The code is in _packing.pyx."""

from libc.stdint cimport uint32_t, uint64_t

from kvortex._c cimport kv_devptr, kv_plane
from kvortex.driver._device cimport Device
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._layout cimport KVLayout


cdef class Packing:
    cdef Device device
    cdef kv_plane *planes
    cdef kv_devptr table               # the same in device memory, ours; 0 until require_table
    cdef readonly uint32_t num_planes
    cdef readonly size_t block_bytes   # of a block on the device
    cdef readonly size_t packed_bytes  # of a block in its slot
    cdef uint64_t flags_offset         # 0: a block has no flags
    cdef readonly bytes fingerprint    # of the layout; of packed blocks one that also says how they are packed

    # Whether the packed block in a slot has a flag set (pack.h), so that it must not be kept. To be asked when its save
    # is done.
    cdef bint is_refused(self, PinnedPool pool, uint32_t slot) noexcept nogil
    cdef int require_table(self) except -1
    cdef int place(self, kv_devptr *table) noexcept nogil
    cdef void close(self) noexcept


cdef class Packings:
    """The packings of a layout and of its parts by one codec, each made when it is first asked for."""
    cdef Device device
    cdef readonly KVLayout layout
    cdef readonly str codec
    cdef readonly tuple exact_layers
    cdef object exact                  # numbers of these, from 0
    cdef readonly Packing whole        # that of `layout`
    cdef object known                  # WeakKeyDictionary: part -> Packing
    cdef int num_users                 # gathers; the last one gives the memory back

    cdef Packing of(self, KVLayout layout)  # None: exact, and copied piece by piece
    cdef void let_go(self) noexcept         # when a gather is closed; the last one frees the tables
