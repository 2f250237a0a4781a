"""Choose how each group of pieces moves, strided or in batches. This is measured once for a layout, within 0.3 s.

The driver decides whether strided copies are legal: it refuses rows in several allocations. The machine decides whether
they pay: a strided copy is twice as fast as batches at 4 KiB, and a third as fast at a pitch of 2 GiB.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memset

cimport kvortex._c as _c
from kvortex.driver._device cimport check, try_again
from kvortex.transfer._copier cimport D2H, H2D, Copier
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._transfer_queue cimport TransferQueue

from typing import NamedTuple

cdef size_t TRIAL_BYTES = 8 << 20   # what one trial moves: 0.2 ms at the rate of the link
cdef int NUM_REPEATS = 3            # trials of a shape; the fastest counts
cdef int MAX_TRIALS = 16            # shapes timed in one layout; further ones use strided copies if these are legal
# For a whole layout. If timing one shape would take longer, the copies of one block decide for it; later shapes use
# strided copies if these are legal. A copy over thousands of mappings (arenas, torch's expandable segments) may take
# a thousand times as long as others.
cdef uint64_t BUDGET_NS = 300_000_000
# Strided copies take a thirtieth of the CPU time that batches take, so they are preferred even if this much slower.
cdef double STRIDED_HANDICAP = 1.15
cdef object MAX_KNOWN = 4096        # answers that a device remembers for later layouts


class PlannerRow(NamedTuple):
    """How the groups of one shape move in one direction, and what the probe measured (None: it did not measure)."""

    direction: str              # "D2H" saves, "H2D" loads
    piece_bytes: int
    rows: int                   # pieces of a block at equal distances, which one strided copy can move
    pitch_bytes: int            # that distance
    num_groups: int
    backend: str                # "strided" or "batch"
    strided_gbps: float | None
    batch_gbps: float | None


def probe_layout(KVLayout layout not None, TransferQueue queue not None, *, measure=None, dict known=None):
    """Find out which groups of a layout move faster by strided copies in a queue's direction; the layout remembers it.

    Probe the D2H queue first. It finds out whether strided copies are legal: the first and the last block, copied
    strided and piece by piece, must be equal. Then it times them; the registered cache is only read. The H2D queue
    times copies into scratch memory of the same shape except for the pitch. Where saves use batches, so do loads. If
    there is no device memory for the scratch, loads move as saves do.

    Parameters
    ----------
    layout : KVLayout
    queue : TransferQueue
        Best an idle one: jobs in flight go on, but make the measured times longer.
    measure : bool, optional
        Whether to time the copies; by default on CUDA only, because the host driver's times say nothing about a link.
    known : dict, optional
        What was measured for other layouts on this device; this call adds to it. Groups of the same shape are not
        measured again. A shape is the number of rows, their bytes, their distances on both sides, and whether all rows
        lie in one allocation. If the time of another layout is wrong here, copies are slower, no worse. If its legality
        is wrong here, the driver refuses the first illegal copy, and the same call goes on piece by piece. (A trial of
        two blocks proves nothing of the other blocks either.) If all rows lie in one allocation, a refusal is
        not remembered, because somebody may have written to the blocks while they were compared.

    Returns
    -------
    list of PlannerRow
        This direction's rows, which `KVLayout.planner` has from now on.

    Raises
    ------
    DriverError
        The driver refused something other than a strided copy. Strided copies then count as illegal.
    EngineClosed
        The queue is closed.

    Notes
    -----
    The call waits (GIL released) a few milliseconds for each shape, 0.3 s in all, or longer if a single copy takes
    longer. Nobody may write to the first and the last block meanwhile. If somebody does, strided copies count as
    illegal, and copies are slower, no worse.
    """
    queue._require_open()
    if measure is None:
        measure = not queue.device.is_host
    cdef Copier copier = Copier(queue.device, queue.direction_)  # a stream of its own: jobs of the queue go on
    open_copier(copier)
    try:
        return probe(copier, layout, measure, {} if known is None else known)
    finally:
        close_copier(copier)


cdef int open_copier(Copier copier) except -1:
    cdef int mode = 0, code
    with nogil:
        code = copier.device.enter(&mode)
        if code == 0:
            code = copier.open()
            copier.device.leave(mode)
    return check(copier.device, code)


cdef void close_copier(Copier copier) noexcept:
    cdef int mode = 0, attempts = 0, code = 0
    with nogil:
        while try_again(&attempts, code):  # one passing error is no reason to leak the stream
            code = copier.device.enter(&mode)
            if code == 0:
                copier.close()
                copier.device.leave(mode)


cdef list probe(Copier copier, KVLayout layout, bint measure, dict known):
    cdef uint32_t bit = 1 << <int>copier.direction
    cdef uint32_t index
    cdef _c.kv_group *group
    cdef double strided_ns, batch_ns
    cdef uint64_t deadline = _c.kv_now_ns() + BUDGET_NS
    cdef str direction = "D2H" if copier.direction == D2H else "H2D"
    if len(known) > MAX_KNOWN:
        known.clear()
    shapes = []
    for index in range(layout.num_groups):
        group = &layout.groups[index]
        group.strided |= bit if _c.kv_group_may_be_strided(group) else 0
        shapes.append((group.row_bytes, group.rows, group.device_pitch, group.slot_pitch,
                       group.strided and lies_in_one_allocation(copier, group)))
    if copier.direction == D2H:
        legality = tuple([(shape, layout.groups[index].block_stride) for index, shape in enumerate(shapes)])
        if legality in known:
            layout.strided = known[legality]
        else:
            require_agreement(copier, layout)
            if layout.strided or not all([in_one or rows < 2 for _, rows, _, _, in_one in shapes]):
                known[legality] = layout.strided
    tried, counts = {}, {}
    for index, shape in enumerate(shapes):
        group = &layout.groups[index]
        if shape not in tried:
            strided_ns, batch_ns = known.get((direction, measure, shape), (0, 0))
            if (not strided_ns and layout.strided and group.strided & bit and measure and len(tried) < MAX_TRIALS
                    and (not tried or _c.kv_now_ns() < deadline)):
                time_group(copier, layout, group, deadline, &strided_ns, &batch_ns)
                if strided_ns:
                    known[direction, measure, shape] = strided_ns, batch_ns
            tried[shape] = strided_ns, batch_ns
        counts[shape] = counts.get(shape, 0) + 1
        strided_ns, batch_ns = tried[shape]
        if strided_ns > STRIDED_HANDICAP * batch_ns:
            group.strided &= ~bit
        elif copier.direction == H2D and not group.strided & (1 << <int>D2H):
            group.strided &= ~bit
    rows = []
    for index, shape in enumerate(shapes):
        group = &layout.groups[index]
        if shape in counts:
            nbytes = trial_blocks(group) * group.rows * group.row_bytes
            gbps = [nbytes / ns if ns else None for ns in tried[shape]]
            backend = "strided" if layout.strided and group.strided & bit else "batch"
            rows.append(PlannerRow(direction, group.row_bytes, group.rows, group.device_pitch, counts.pop(shape),
                                   backend, *gbps))
    layout.planner = (*(row for row in layout.planner if row.direction != direction), *rows)
    layout.tell_parts()
    return rows


cdef bint lies_in_one_allocation(Copier copier, const _c.kv_group *group) noexcept:
    """Tell whether all rows of the first block lie in one allocation, as far as the driver can say."""
    cdef const _c.kv_driver *drv = copier.device.drv
    cdef uint64_t start = 0
    cdef size_t nbytes = 0
    cdef int mode = 0, code
    with nogil:
        code = copier.device.enter(&mode)
        if code == 0:
            code = _c.kv_call(drv, _c.pointer_get_attribute, &start, _c.KV_POINTER_RANGE_START_ADDR, group.base)
            if code == 0:
                code = _c.kv_call(drv, _c.pointer_get_attribute, &nbytes, _c.KV_POINTER_RANGE_SIZE, group.base)
            copier.device.leave(mode)
    return code == 0 and group.base - start + (group.rows - 1) * group.device_pitch + group.row_bytes <= nbytes


cdef size_t trial_blocks(const _c.kv_group *group) noexcept nogil:
    return max(<size_t>1, TRIAL_BYTES // (group.rows * group.row_bytes))


cdef int require_agreement(Copier copier, KVLayout layout) except -1:
    """Set `layout.strided`: whether the driver takes strided copies of this layout, and they copy what pieces copy."""
    cdef const _c.kv_driver *drv = copier.device.drv
    cdef void *scratch = NULL
    cdef int mode = 0, code
    cdef uint32_t index
    layout.strided = False
    for index in range(layout.num_groups):
        layout.strided |= layout.groups[index].strided != 0
    if not layout.strided:
        return 0
    with nogil:
        code = copier.device.enter(&mode)
        if code == 0:
            code = _c.kv_call(drv, _c.mem_host_alloc, &scratch, 4 * layout.block_bytes, _c.KV_HOST_ALLOC_PORTABLE)
            if code == 0:
                code = compare(copier, layout, <char *>scratch)
                copier.device.give_back(drv.mem_free_host, scratch)
            copier.device.leave(mode)
    if code:
        layout.strided = False
    return check(copier.device, code)


cdef int compare(Copier copier, KVLayout layout, char *scratch) noexcept nogil:
    """Copy two blocks strided and piece by piece; clear `layout.strided` if one failed or they differ. A CUresult."""
    cdef int64_t ids[2]
    cdef uint32_t slots[2]
    cdef _c.kv_slots space
    cdef _c.kv_plan plan
    cdef int code, finished
    cdef size_t nbytes = 2 * layout.block_bytes
    ids[0], ids[1] = 0, layout.num_blocks - 1
    slots[0], slots[1] = 0, 1
    space = scratch_slots(scratch, layout.block_bytes, 2)
    memset(scratch, 0x5A, nbytes)
    memset(scratch + nbytes, 0xA5, nbytes)
    plan = _c.kv_plan_of_blocks(layout.groups, layout.num_groups, layout.strided_bit(D2H), ids, &space, slots, 2)
    code = copier.copy_plan(&plan, layout, _c.KV_NEVER_NS)  # an INVALID_VALUE clears layout.strided
    space.base = scratch + nbytes
    plan = _c.kv_plan_of_blocks(layout.groups, layout.num_groups, 0, ids, &space, slots, 2)
    if code == 0:
        code = copier.copy_plan(&plan, layout, _c.KV_NEVER_NS)
    finished = copier.synchronize()
    if code == 0:
        code = finished
    if code or memcmp(scratch, scratch + nbytes, nbytes):
        layout.strided = False
    return code


cdef int time_group(Copier copier, KVLayout layout, const _c.kv_group *group, uint64_t deadline,
                    double *strided_ns, double *batch_ns) except -1:
    """Measure in nanoseconds how long `trial_blocks` blocks of a group take either way; 0: no memory for a trial."""
    cdef const _c.kv_driver *drv = copier.device.drv
    cdef _c.kv_group trial = group[0]
    cdef size_t n = trial_blocks(group), index
    cdef size_t stride = (group.rows - 1) * group.slot_pitch + group.row_bytes
    cdef void *host = NULL
    cdef _c.kv_devptr scratch = 0
    cdef int64_t *ids = <int64_t *>malloc(n * sizeof(int64_t))
    cdef uint32_t *slots = <uint32_t *>malloc(n * sizeof(uint32_t))
    cdef int mode = 0, code
    if ids is NULL or slots is NULL:
        free(ids)
        free(slots)
        raise MemoryError(f"no memory for a trial of {n} blocks")
    with nogil:
        code = copier.device.enter(&mode)
        if code == 0:
            code = _c.kv_call(drv, _c.mem_host_alloc, &host, n * stride, _c.KV_HOST_ALLOC_PORTABLE)
            if code == 0 and copier.direction == H2D:
                code = _c.kv_call(drv, _c.mem_alloc, &scratch, n * group.rows * group.row_bytes)
            if code == 0:
                trial.slot_offset = 0
                trial.strided = 3
                if copier.direction == H2D:  # scratch without gaps: the registered cache is not written
                    trial.base, trial.block_stride, trial.device_pitch = scratch, group.row_bytes, n * group.row_bytes
                for index in range(n):
                    ids[index] = index if copier.direction == H2D else index % layout.num_blocks
                    slots[index] = <uint32_t>index
                code = time_both(copier, layout, &trial, host, stride, ids, slots, n, deadline, strided_ns, batch_ns)
            elif _c.kv_result_code(code) == _c.KV_CUDA_OUT_OF_MEMORY:
                code = 0
            if scratch:
                copier.device.give_memory_back(scratch)
            if host is not NULL:
                copier.device.give_back(drv.mem_free_host, host)
            copier.device.leave(mode)
    free(ids)
    free(slots)
    return check(copier.device, code)


cdef int time_both(Copier copier, KVLayout layout, const _c.kv_group *trial, void *host, size_t stride,
                   const int64_t *ids, const uint32_t *slots, size_t n, uint64_t deadline, double *strided_ns,
                   double *batch_ns) noexcept nogil:
    cdef _c.kv_slots space = scratch_slots(<char *>host, stride, <uint32_t>n)
    cdef _c.kv_plan plan
    cdef int code = 0, finished, repeat
    cdef uint32_t strided
    cdef uint64_t start
    cdef double elapsed
    cdef double *best
    # Batches and strided copies in turn. One block first: once to warm up, once to see how long all of them will take.
    for repeat in range(2 * (NUM_REPEATS + 2)):
        if repeat == 4 and n * (strided_ns[0] + batch_ns[0]) > BUDGET_NS:
            strided_ns[0] *= n
            batch_ns[0] *= n
            break
        if repeat > 4 and not repeat & 1 and _c.kv_now_ns() > deadline:
            break
        if repeat in (2, 4):
            strided_ns[0] = batch_ns[0] = 0
        strided = 3 * (repeat & 1)
        best = strided_ns if strided else batch_ns
        plan = _c.kv_plan_of_blocks(trial, 1, strided, ids, &space, slots, n if repeat > 3 else 1)
        start = _c.kv_now_ns()
        code = copier.copy_plan(&plan, layout, _c.KV_NEVER_NS)
        finished = copier.synchronize()
        code = code or finished
        if code:
            return code
        elapsed = _c.kv_now_ns() - start
        if best[0] == 0 or elapsed < best[0]:
            best[0] = elapsed
    return 0


cdef _c.kv_slots scratch_slots(char *base, size_t stride, uint32_t count) noexcept nogil:
    cdef _c.kv_slots space
    memset(&space, 0, sizeof(space))
    space.base = base
    space.stride_bytes = space.payload_bytes = stride
    space.num_slots = space.first_chunk_slots = space.chunk_slots = count
    return space
