"""DeviceBuffer: memory of a device, for callers without a framework. The map; the code is in _buffer.pyx."""

from kvortex._c cimport kv_devptr
from kvortex.driver._device cimport Device
from kvortex.driver._memory cimport BorrowedMemory, Lender
from kvortex.driver._stream cimport Stream


cdef class DeviceBuffer(Lender):
    cdef readonly Device device
    cdef readonly size_t nbytes
    cdef readonly bint closed
    cdef bint owns_device             # opened here from its name, so closed here
    cdef kv_devptr start              # 0: given back, which a closed buffer is once nobody holds its memory any more
    # Our own, for the calls without a stream. It waits for the work that the calls with one put on others', so that who
    # waits for it has waited for all of it.
    cdef Stream stream
    cdef bint worked_elsewhere        # there was such work
    cdef bint followed                # by a call with a stream, here: that work may not be over
    cdef bint shown                   # to others, by a protocol of GPUs: their work on it is not known here
    cdef object lent                  # what it reads or writes, as (older, BorrowedMemory) pairs; None: nothing
    cdef object __weakref__

    cdef int require_open(self) except -1
    cdef int require_inside(self, size_t offset, size_t nbytes) except -1
    cdef void *stream_for(self, object stream) except? NULL
    cdef int copy(self, object other, size_t offset, object stream, bint inward) except -1
    cdef int copy_held(self, object other, size_t offset, object stream, bint inward) except -1
    cdef int fill_held(self, size_t byte, size_t offset, object nbytes, object stream) except -1
    cdef int follow(self, void *handle) except -1
    cdef void release(self) noexcept
    cdef void give_back(self) noexcept


# Let work on a stream of the device wait for what the owner of the memory says may still be going on with it.
cdef int wait_for_producer(Device device, void *handle, BorrowedMemory memory) except -1
# A handle of ours as DLPack numbers streams: 1 is the legacy default one.
cdef object dlpack_stream(void *handle)
