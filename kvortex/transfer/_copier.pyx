# cython: nonecheck=False
"""The three back ends of a plan, and the opt-in fourth: batch copies, strided copies, plain ones, gathered ones."""

cimport cython
from libc.stdint cimport uint64_t
from libc.string cimport memset

cimport kvortex._c as _c
from kvortex.driver._device cimport Device
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._packing cimport Packing

cdef size_t FIRST_BATCH_COPIES = 32


@cython.no_gc_clear  # copies in flight need what the collector would clear before
cdef class Copier:
    """Issue copies on one stream, in one direction. Only the thread whose job has its turn calls it."""

    def __init__(self, Device device not None, Direction direction):
        self.device = device
        self.direction = direction

    cdef int open(self) noexcept nogil:
        """Create the stream. A CUresult."""
        return _c.kv_call(self.device.drv, _c.stream_create, &self.stream, _c.KV_STREAM_NON_BLOCKING)

    cdef int synchronize(self) noexcept nogil:
        """Block until everything issued is over. A CUresult."""
        cdef int code = _c.kv_call(self.device.drv, _c.stream_synchronize, self.stream)
        if code == 0 and self.gather is not None:
            code = _c.kv_call(self.device.drv, _c.stream_synchronize, self.gather.stream)
        return code

    cdef void close(self) noexcept nogil:
        """Give the stream and the gather back; nothing is in flight, and the context is current."""
        if self.gather is not None:
            self.gather.close()
        if self.stream is not NULL:
            self.device.give_back(self.device.drv.stream_destroy, self.stream)

    cdef int copy(self, _c.kv_plan *plan, KVLayout layout, void *packing, uint64_t until_ns) noexcept nogil:
        """Issue the copies of the plan, by the `Packing` if there is one, until the time is over. A CUresult.

        The plan's cursor stays where it stopped; another call goes on from there.
        """
        if packing is not NULL:
            return self.copy_gathered(plan, <Packing>packing, until_ns)
        return self.copy_plan(plan, layout, until_ns)

    cdef int copy_plan(self, _c.kv_plan *plan, KVLayout layout, uint64_t until_ns) noexcept nogil:
        """Issue the copies of the plan: strided ones as they come, plain ones in batches.

        The device starts a batch when all of it is issued. The first ones are small, so that it need not wait 0.2 ms.
        """
        cdef size_t count, index, row, batched
        cdef size_t full = <size_t>_c.KV_BATCH_COPIES if _c.kv_plan_is_begun(plan) else FIRST_BATCH_COPIES
        cdef _c.kv_copy *copy
        cdef int code = 0
        while code == 0:
            count = _c.kv_plan_next(plan, self.copies, full)
            if count == 0:
                break
            batched = 0
            for index in range(count):
                copy = &self.copies[index]
                if copy.rows > 1 and plan.strided:
                    code = self.copy_strided(copy)
                    if code == 0:
                        continue
                    if code != _c.kv_answer(_c.KV_CUDA_INVALID_VALUE, _c.memcpy_2d_async):
                        return code
                    # The rows lie in several allocations after all: piece by piece from here on.
                    layout.strided = False
                    plan.strided = 0
                for row in range(copy.rows):
                    self.sizes[batched] = copy.row_bytes
                    if self.direction == D2H:
                        self.sources[batched] = copy.device + row * copy.device_pitch
                        self.targets[batched] = <_c.kv_devptr>(copy.host + row * copy.host_pitch)
                    else:
                        self.sources[batched] = <_c.kv_devptr>(copy.host + row * copy.host_pitch)
                        self.targets[batched] = copy.device + row * copy.device_pitch
                    batched += 1
                    if batched == full:
                        code = self.copy_batch(batched)
                        if code:
                            return code
                        batched = 0
            code = self.copy_batch(batched)
            full = min(2 * full, <size_t>_c.KV_BATCH_COPIES)
            if until_ns != _c.KV_NEVER_NS and _c.kv_now_ns() >= until_ns:
                break
        return code

    cdef int copy_gathered(self, _c.kv_plan *plan, Packing packing, uint64_t until_ns) noexcept nogil:
        """Issue a job in two steps a part: kernel and copy, or copy and kernel, each on a stream of its own.

        While one half of the staging goes through the second step, the other is in the first. The job's waits are on
        the queue's stream already, and what waits for the job waits for the queue's stream.
        """
        cdef const _c.kv_driver *drv = self.device.drv
        cdef bint saving = self.direction == D2H
        cdef void *first_stream = self.gather.stream if saving else self.stream
        cdef void *second_stream = self.stream if saving else self.gather.stream
        cdef size_t count, index
        cdef uint64_t staged
        cdef int code = 0
        if saving and not _c.kv_plan_is_begun(plan):
            code = self.pass_on(self.gather.began, self.stream, self.gather.stream)
        while code == 0 and not _c.kv_plan_is_done(plan):
            count = min(plan.num_blocks - plan.block, self.gather.blocks_at_once(packing))
            for index in range(count):
                staged = (self.gather.staging + self.gather.half * self.gather.half_bytes
                          + index * packing.packed_bytes)
                self.targets[index] = staged
                self.sources[index] = <_c.kv_devptr>_c.kv_slots_payload(plan.slots, plan.slot_ids[plan.block + index])
                if saving:
                    self.targets[index], self.sources[index] = self.sources[index], staged
                self.sizes[index] = packing.packed_bytes
            code = self.wait_for(first_stream, self.gather.emptied[self.gather.half])
            if code == 0:
                code = self.launch(plan, packing, count) if saving else self.copy_batch(count)
            if code == 0:
                code = self.pass_on(self.gather.filled[self.gather.half], first_stream, second_stream)
            if code == 0:
                code = self.copy_batch(count) if saving else self.launch(plan, packing, count)
            if code == 0:
                code = _c.kv_call(drv, _c.event_record, self.gather.emptied[self.gather.half], second_stream)
            self.gather.half ^= 1
            plan.block += count
            if until_ns != _c.KV_NEVER_NS and _c.kv_now_ns() >= until_ns:
                break
        if not saving and _c.kv_plan_is_done(plan):
            for index in range(2):
                if code == 0:  # the job is over when its last kernels are
                    code = self.wait_for(self.stream, self.gather.emptied[index])
        return code

    cdef int launch(self, const _c.kv_plan *plan, Packing packing, size_t count) noexcept nogil:
        return self.gather.launch(packing, plan.block_ids + plan.block, count, self.direction == D2H)

    cdef int wait_for(self, void *stream, void *event) noexcept nogil:
        return _c.kv_call(self.device.drv, _c.stream_wait_event, stream, event, 0)

    cdef int pass_on(self, void *event, void *earlier, void *later) noexcept nogil:
        """Let the stream `later` wait for what is on the stream `earlier` now."""
        cdef int code = _c.kv_call(self.device.drv, _c.event_record, event, earlier)
        return code if code else self.wait_for(later, event)

    cdef int copy_strided(self, const _c.kv_copy *copy) noexcept nogil:
        cdef _c.kv_memcpy_2d copy_2d
        memset(&copy_2d, 0, sizeof(copy_2d))
        copy_2d.width_bytes = copy.row_bytes
        copy_2d.height = copy.rows
        if self.direction == D2H:
            copy_2d.source_memory_type = _c.KV_MEMORY_TYPE_DEVICE
            copy_2d.source_device = copy.device
            copy_2d.source_pitch = copy.device_pitch
            copy_2d.target_memory_type = _c.KV_MEMORY_TYPE_HOST
            copy_2d.target_host = copy.host
            copy_2d.target_pitch = copy.host_pitch
        else:
            copy_2d.source_memory_type = _c.KV_MEMORY_TYPE_HOST
            copy_2d.source_host = copy.host
            copy_2d.source_pitch = copy.host_pitch
            copy_2d.target_memory_type = _c.KV_MEMORY_TYPE_DEVICE
            copy_2d.target_device = copy.device
            copy_2d.target_pitch = copy.device_pitch
        return _c.kv_call(self.device.drv, _c.memcpy_2d_async, &copy_2d, self.stream)

    cdef int copy_batch(self, size_t count) noexcept nogil:
        """Copy the first `count` of sources, targets and sizes: in one call, or by plain calls if a batch is refused or
        slower. A CUresult.
        """
        cdef const _c.kv_driver *drv = self.device.drv
        cdef size_t index
        cdef int code = 0
        if count > 1:
            code = self.issue_batch(count)
        if count == 1 or code == _c.kv_answer(_c.KV_CUDA_NOT_SUPPORTED, _c.memcpy_batch_async):
            code = 0
            for index in range(count):
                if code == 0 and self.direction == D2H:
                    code = _c.kv_call(drv, _c.memcpy_dtoh_async, <void *>self.targets[index], self.sources[index],
                                      self.sizes[index], self.stream)
                elif code == 0:
                    code = _c.kv_call(drv, _c.memcpy_htod_async, self.targets[index],
                                      <const void *>self.sources[index], self.sizes[index], self.stream)
        if count == 1 and _c.kv_result_code(code) == _c.KV_CUDA_INVALID_VALUE:
            code = self.issue_batch(count)  # the block is the CPU's memory, which CUDA takes in batches only
        return code

    cdef int issue_batch(self, size_t count) noexcept nogil:
        cdef _c.kv_memcpy_attributes attributes
        cdef size_t attribute_index = 0, fail_index = 0
        memset(&attributes, 0, sizeof(attributes))
        attributes.source_access_order = _c.KV_SRC_ACCESS_ORDER_STREAM
        return _c.kv_call(self.device.drv, _c.memcpy_batch_async, self.targets, self.sources, self.sizes, count,
                          &attributes, &attribute_index, 1, &fail_index, self.stream)
