"""One slot of a pinned pool as others see it."""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint64_t

cimport kvortex._c as _c

from kvortex.driver._memory import require_shareable
from kvortex.errors import EngineClosed


cdef class PoolSlot:
    """The payload of one slot as others see it: uint8 in host memory, through the buffer protocol and DLPack.

    Made by `PinnedPool.slot`. ``np.asarray(slot)``, ``np.frombuffer(slot, dtype)``, ``torch.from_dlpack(slot)`` share
    the memory. It stays mapped while somebody holds it, also after the pool was closed; then it is pinned no more, so
    that no device may use it. Its content is the block that the slot holds at the time: pin that in the index.

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
        """(1, 0), memory of the CPU: what every library takes, though it is pinned."""
        return _c.KV_DLPACK_CPU, 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule over the payload as uint8, never a copy.

        Parameters
        ----------
        stream : None
        dl_device : (int, int), optional
            ``(3, 0)``, CUDA host, for who reaches pinned memory from a GPU; in a pool of the host device (1, 0) only.
        max_version, copy
            As the array API standard has them.

        Raises
        ------
        BufferError
            A copy was asked for, or another device.
        ValueError
            There is a stream.
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
