"""One slot of a pinned pool, for other libraries."""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint64_t

cimport kvortex._c as _c

from kvortex.driver._memory import require_shareable
from kvortex.errors import EngineClosed


cdef class PoolSlot:
    """The payload of one slot for other libraries: uint8 in host memory, through the buffer protocol and DLPack.

    Made by `PinnedPool.slot`. ``np.asarray(slot)``, ``np.frombuffer(slot, dtype)``, ``torch.from_dlpack(slot)`` share
    the memory. It stays mapped while somebody holds it, even after the pool was closed; but then it is not pinned, and
    no device may use it. Its content changes when the slot gets another block: pin the block in the index.

    Attributes
    ----------
    pool : PinnedPool
    slot : int
    nbytes : int
    """

    def __init__(self):
        raise TypeError("PoolSlot has no constructor; use PinnedPool.slot(slot)")

    cdef int require_open(self) except -1:
        if self.pool is None:
            raise EngineClosed("this slot was never made; use PinnedPool.slot(slot)")
        self.pool._require_open()
        return 0

    @property
    def nbytes(self):
        """Bytes of the payload."""
        if self.pool is None:
            raise EngineClosed("this slot was never made; use PinnedPool.slot(slot)")
        return self.payload_bytes

    def __len__(self):
        return self.nbytes

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.require_open()
        PyBuffer_FillInfo(buffer, self, self.payload, <Py_ssize_t>self.payload_bytes, 0, flags)
        self.pool.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.pool.take_back()

    def __dlpack_device__(self):
        """(1, 0), memory of the CPU, which every library takes, though the memory is pinned."""
        return _c.KV_DLPACK_CPU, 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule over the payload as uint8, never a copy.

        Parameters
        ----------
        stream : None
        dl_device : (int, int), optional
            ``(3, 0)``, CUDA host, for libraries that use pinned memory on a GPU; a pool of the host device has (1, 0).
        max_version, copy
            As the array API standard has them.

        Raises
        ------
        BufferError
            A copy was asked for, or another device.
        ValueError
            `stream` is not None.
        EngineClosed
        """
        self.require_open()
        if stream is not None:
            raise ValueError(f"memory of the CPU has no streams, got stream {stream!r}; pass None")
        devices = ((_c.KV_DLPACK_CPU, 0),)
        if not self.is_host:
            devices += ((_c.KV_DLPACK_CUDA_HOST, 0),)
        device_type, device_id = require_shareable(dl_device, copy, devices)
        return self.pool.capsule(<uint64_t>self.payload, self.nbytes, device_type, device_id, max_version)

    def __repr__(self):
        if self.pool is None:
            return "<PoolSlot never made>"
        return f"<PoolSlot {self.slot}, {self.nbytes} bytes at {<uint64_t>self.payload:#x}>"
