"""KVLayout: where the blocks of a KV cache lie on the device. The map; the code is in _layout.pyx."""

from libc.stdint cimport int64_t, uint32_t

from kvortex._c cimport kv_group
from kvortex.driver._device cimport Device


cdef class KVLayout:
    cdef kv_group *groups              # runs, merged and grouped; constant from creation
    cdef readonly uint32_t num_groups
    cdef readonly size_t num_blocks
    cdef readonly size_t block_bytes   # payload of one slot
    cdef readonly size_t block_size    # tokens of one block, 0 when unknown
    cdef readonly str name             # of the cache: caches of different content are told apart by it
    cdef list pieces                   # what a block consists of, see fingerprint.py
    cdef list kept                     # numbers of the runs that count, where some were named again; or None
    cdef bint is_described             # `pieces` are those of a constructor that knows more than runs
    cdef bytes known_fingerprint       # None: not computed yet
    cdef readonly KVLayout whole       # of a part: what it is a part of
    cdef object parts                  # WeakSet: they follow what a probe finds; None: there are none
    cdef readonly object runs          # tuple of (base, block_stride, piece_bytes), merged
    cdef readonly tuple planes         # what is known of a block's bytes, for codecs: `kvortex.codec.Plane`s
    cdef readonly object owners        # tensors the addresses come from; held as long as the layout
    cdef tuple borrowed                # what holds their memory: buffers, DLPack tensors
    cdef readonly bint read_only       # some of it may not be written: no loads
    cdef readonly bint on_gpu          # some of it surely lies on a GPU: nothing for the host device
    cdef bint strided                  # strided copies are legal: set by a probe, cleared by a refusal
    cdef readonly tuple planner        # what the probe found, for people: a PlannerRow for each shape of group
    cdef object __weakref__

    cdef int require_reachable(self, Device device, bint as_target) except -1
    cdef int hold(self, object borrowed, object owners) except -1
    cdef int follow(self) except -1        # a part: which groups are strided, as the whole layout knows it
    cdef int tell_parts(self) except -1    # a probe is over
    # What kv_plan_of_blocks wants: the bit of the direction (0 D2H, 1 H2D) where strided copies are legal, else 0.
    cdef uint32_t strided_bit(self, int direction) noexcept nogil


cdef object integers(object items, str name, object count=*)
cdef int64_t[::1] as_block_ids(object block_ids, KVLayout layout) except *
