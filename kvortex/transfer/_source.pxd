"""Source: what one call moves. The map; the code is in _source.pyx."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kvortex.driver._device cimport Device
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._copier cimport Direction
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._packing cimport Packing, Packings


cdef class Source:
    """What one call moves: block ids of the layout, or addresses with a size each; copies of the caller's arrays."""
    cdef bint by_block
    cdef KVLayout layout                 # by_block: of the carrier, or a part of it
    cdef Packing packing                 # by_block: how the blocks lie in their slots; None: as they are
    cdef int64_t[::1] block_ids          # by_block
    cdef uint64_t[::1] addresses         # otherwise
    cdef uint32_t[::1] lengths           # of every block, at i * length_step
    cdef size_t length_step
    cdef tuple memory                    # BorrowedMemory that the addresses came from; None: they came as numbers
    cdef uint8_t[::1] statuses           # of a save: one a key
    cdef bint chained                    # a save that continues `after`, which may be empty
    cdef const uint8_t[:, ::1] after     # keys, the caller's own
    cdef bint ordered                    # after `stream`
    cdef void *stream                    # of the caller


# Checks what a call moves and copies it, before anything is changed; `device_memory`: the layout's lies on the device.
# Runs other people's Python code.
cdef Source make_source(Device device, KVLayout layout, Packings packings, PinnedPool pool, bint device_memory,
                        Direction direction, Py_ssize_t n, object block_ids, object data_ptrs, object sizes,
                        object stream)

# The blocks from `first` on, so many of them; the rest is shared.
cdef Source part_of(Source whole, Py_ssize_t first, Py_ssize_t count)

# Refuses targets that overlap: two copies of one job have no order.
cdef int require_disjoint(object addresses, object lengths) except -1
