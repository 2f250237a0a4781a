# cython: nonecheck=False
"""What one call moves, as the caller's objects describe it: checked and copied."""

from libc.stdint cimport uint32_t, uint64_t

from kvortex.driver._buffer cimport dlpack_stream, wait_for_producer
from kvortex.driver._device cimport Device, check
from kvortex.driver._memory cimport BorrowedMemory, borrow_memory, is_integer
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._copier cimport H2D, Direction
from kvortex.transfer._layout cimport KVLayout, as_block_ids, integers
from kvortex.transfer._packing cimport Packings

import numpy as np


cdef class Source:
    pass


cdef Source make_source(Device device, KVLayout layout, Packings packings, PinnedPool pool, bint device_memory,
                        Direction direction, Py_ssize_t n, object block_ids, object data_ptrs, object sizes,
                        object stream):
    cdef Source source = Source.__new__(Source)
    cdef BorrowedMemory memory
    cdef Py_ssize_t index
    cdef int code = 0
    if (block_ids is None) == (data_ptrs is None):
        raise ValueError("pass either block_ids or data_ptrs with sizes")
    if block_ids is not None:
        if layout is None:
            raise ValueError("this engine has no layout, so block_ids mean nothing; pass data_ptrs and sizes")
        if sizes is not None:
            raise ValueError("sizes go with data_ptrs; the size of a block comes from the layout")
        layout.require_reachable(device, direction == H2D)
        source.by_block, source.layout = True, layout
        source.block_ids = as_block_ids(block_ids, layout)
        if packings is not None:
            source.packing = packings.of(layout)
            if source.packing is not None:
                source.packing.require_table()
        source.lengths = np.array([layout.block_bytes if source.packing is None else source.packing.packed_bytes],
                                  dtype=np.uint32)
        named = source.block_ids.shape[0]
    else:
        if packings is not None and packings.codec != "exact":
            raise ValueError(f"this engine packs blocks by the codec {packings.codec!r}, and the meaning of the "
                             f"bytes at data_ptrs is not known; pass block_ids of a layout")
        if isinstance(data_ptrs, (list, tuple)) and not all_integers(data_ptrs):
            source.memory = borrow_all(device, data_ptrs, stream, direction == H2D)
            data_ptrs = [borrowed.address for borrowed in source.memory]
            if sizes is None:
                sizes = [borrowed.nbytes for borrowed in source.memory]
        if sizes is None or (isinstance(sizes, list) and None in sizes):
            raise ValueError("data_ptrs need sizes: an int, or one for each")
        source.addresses = as_addresses(data_ptrs)
        source.lengths = as_lengths(sizes, source.addresses.shape[0], pool.payload_bytes)
        if source.memory is not None:
            require_inside(source.memory, source.lengths)
        source.length_step = 1
        named = source.addresses.shape[0]
    if named != n:
        raise ValueError(f"{n} keys but {named} blocks; they must pair up")
    device.require_open()  # the caller's objects may have closed it
    source.ordered = stream is not None or device_memory
    for memory in source.memory or ():
        source.ordered |= memory.stream is not None
    if not source.ordered and not source.by_block:
        with nogil:
            for index in range(n):
                code = device.lies_on_device(source.addresses[index], &source.ordered)
                if code or source.ordered:
                    break
        check(device, code)
    if source.ordered:
        source.stream = device.borrow_stream(stream)
    if n and source.memory is not None:
        wait_for_producers(device, source.stream, source.memory)
    return source


cdef Source part_of(Source whole, Py_ssize_t first, Py_ssize_t count):
    cdef Source part = Source.__new__(Source)
    part.by_block, part.layout, part.length_step = whole.by_block, whole.layout, whole.length_step
    part.memory, part.lengths, part.ordered, part.stream = whole.memory, whole.lengths, whole.ordered, whole.stream
    part.packing = whole.packing
    if whole.by_block:
        part.block_ids = whole.block_ids[first:first + count]
    else:
        part.addresses = whole.addresses[first:first + count]
        part.lengths = whole.lengths[first:first + count]
    return part


cdef bint all_integers(object items) except -1:
    for item in items:
        if not is_integer(item):
            return False
    return True


cdef tuple borrow_all(Device device, object data_ptrs, object stream, bint as_target):
    """Borrow the memory of objects, or mixed with them addresses, for copies on `stream`."""
    cdef BorrowedMemory memory
    cdef object consumer = -1 if stream is None else dlpack_stream(device.borrow_stream(stream))
    borrowed = []
    for index, item in enumerate(data_ptrs):
        try:
            memory = borrow_memory(item, consumer)
        except TypeError as error:
            raise TypeError(f"data_ptrs[{index}]: {error}") from None
        if memory.shape is not None:
            memory.require_copyable(as_target)
        if device.is_host and memory.is_cuda:
            raise ValueError(f"data_ptrs[{index}] is memory of a GPU, out of reach for the device {device.name}")
        borrowed.append(memory)
    return tuple(borrowed)


cdef int require_inside(tuple borrowed, const uint32_t[::1] lengths) except -1:
    cdef BorrowedMemory memory
    for index, memory in enumerate(borrowed):
        if memory.shape is not None and lengths[<Py_ssize_t>index] > memory.nbytes:
            raise ValueError(f"sizes[{index}] is {lengths[<Py_ssize_t>index]}, but the memory in data_ptrs[{index}] "
                             f"has {memory.nbytes} bytes")
    return 0


cdef int wait_for_producers(Device device, void *caller, tuple borrowed) except -1:
    """Let the caller's stream wait for each stream that the owner of some memory names."""
    cdef BorrowedMemory memory
    seen = set()
    for memory in borrowed:
        if memory.stream is not None and memory.stream not in seen:
            seen.add(memory.stream)
            wait_for_producer(device, caller, memory)
    return 0


cdef uint64_t[::1] as_addresses(object data_ptrs) except *:
    """Raw addresses, none of them null or unaligned."""
    array = integers(data_ptrs, "data_ptrs")
    for index in np.flatnonzero((array < 4096) | (array % 4 != 0))[:1]:
        raise ValueError(f"data_ptrs[{index}] is {int(array[index]):#x}; addresses must not be null and must be "
                         f"multiples of 4")
    return np.asarray(array, dtype=np.uint64)


cdef uint32_t[::1] as_lengths(object sizes, Py_ssize_t n, size_t limit) except *:
    """One size a block, each within the payload of a slot."""
    array = integers(sizes, "sizes", n)
    for index in np.flatnonzero((array < 1) | (array > limit))[:1]:
        raise ValueError(f"sizes[{index}] is {array[index]}; it must be 1 to {limit}, the payload of a slot "
                         f"(block_bytes of the config)")
    return np.asarray(array, dtype=np.uint32)


cdef int require_disjoint(object addresses, object lengths) except -1:
    """Refuse targets that overlap: two copies of one job have no order."""
    order = np.argsort(addresses)
    starts, ends = addresses[order], addresses[order] + lengths[order]
    for index in np.flatnonzero(starts[1:] < ends[:len(ends) - 1])[:1]:
        raise ValueError(f"data_ptrs[{order[index]}] and data_ptrs[{order[index + 1]}] overlap; each target of a load "
                         f"must be its own memory")
    return 0
