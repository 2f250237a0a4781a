"""KVLayout: runs, constructors over them, and the groups that strided copies can move."""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

cimport kvortex._c as _c
from kvortex.driver._device cimport Device
from kvortex.driver._memory cimport BorrowedMemory, borrow_memory, is_integer, whole_number
from kvortex.memory._pinned_pool cimport PinnedPool

import weakref

import numpy as np

from kvortex.codec.planes import UNIT_BYTES, planes_of
from kvortex.transfer._runs import (
    MAX_RUNS,
    distinct_runs,
    group_evenly_spaced,
    merge_touching,
    runs_of_tensor,
    spans_of_part,
)
from kvortex.transfer.fingerprint import fingerprint_of_layout, fingerprint_of_part, piece_of_axes
from kvortex.transfer.planes import (
    is_bfloat16,
    layers_of_roles,
    planes_of_part,
    planes_of_runs,
    planes_of_tensor,
    roles_of_tensors,
)


@cython.no_gc_clear  # in a garbage cycle the owners must outlive the engine that ends its copies
cdef class KVLayout:
    """Describe a paged KV cache as opaque bytes: a list of runs.

    A run is ``(base, block_stride, piece_bytes)``: the piece of block ``b`` lies at ``base + b * block_stride``. A
    block is the concatenation of its pieces in the order of the runs; that order is the block's format in host memory,
    so use the logical one: layer after layer, K before V.

    No byte may belong to two blocks or to two pieces. Only the very same run may be named again, as for layers that
    share a cache: it counts once, where it stands first, in `runs`, in `block_bytes` and in the block's format.

    Parameters
    ----------
    runs : iterable of (int or object, int, int)
        Base, bytes from block to block, bytes of a piece. A base is an address, or memory that says where it is (see
        `from_tensors`). Such memory is held as long as the layout.
    num_blocks : int
        Device blocks, valid ids are 0 to num_blocks - 1.
    block_size : int, default 0
        Tokens of one block; only `slot_mapping` needs it.
    owners : iterable, optional
        Objects to keep alive as long as the layout.
    name : str, default ""
        Of the cache. Two layouts may be alike and still have different content, as for two models. Then they need
        different names, or one may get blocks that were saved from the other; see `fingerprint`.
    planes : iterable of Plane, default ()
        Which bytes of a block, counted over the runs in their order, are vectors of K and V, for a codec to pack; each
        lies in one run. Bytes of no plane are opaque: every codec keeps them as they are.

    Raises
    ------
    TypeError
        A number is not whole.
    ValueError
        A null base, a piece of zero bytes, a piece longer than its stride, blocks of 2^32 bytes and more, memory beyond
        the address space. Two blocks that share a byte; or more interleaved runs of different strides than can be
        compared in a second (runs of one stride, however many, can).

    Notes
    -----
    The memory is not touched here, and no stream waits for it, whatever stream its owner names: a layout is a place,
    and each save or load names the stream that its content is ordered with. Threads may share a layout. Only one thing
    of it changes, whether strided copies are used: a probe allows them, a refused one forbids them.
    """

    def __init__(self, runs, num_blocks, *, block_size=0, owners=(), name="", planes=()):
        cdef bint apart = True  # each run begins behind the one before it, as in most layouts
        cdef uint64_t end = 0
        if self.groups is not NULL:
            raise RuntimeError("KVLayout.__init__ may be called once")
        bases, runs = [], as_list(runs, "runs")
        if not runs:
            raise ValueError("a layout needs at least one run, got none")
        num_blocks, block_size = whole_number(num_blocks, "num_blocks"), whole_number(block_size, "block_size")
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {type(name).__name__}")
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        if block_size < 0:
            raise ValueError(f"block_size must not be negative, got {block_size}")
        if num_blocks * max(block_size, 1) >= 1 << 63:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens are too many, 2^63 in all are the limit")
        for number, run in enumerate(runs):
            runs[number] = base, stride, piece = read_run(run, number, num_blocks, bases)
            apart &= <uint64_t>base >= end
            end = base + (num_blocks - 1) * stride + piece
        num_named, named_pieces = len(runs), [piece for _, _, piece in runs]
        if not apart:
            self.kept = distinct_runs(runs, num_blocks)
            runs = [runs[number] for number in self.kept]
            if len(runs) == num_named:
                self.kept = None
        self.planes = planes_of_runs(planes, named_pieces, self.kept)
        self.pieces = [piece for _, _, piece in runs]
        runs = merge_touching(runs, num_blocks)
        block_bytes = sum(piece for _, _, piece in runs)
        if block_bytes >= 1 << 32:
            raise ValueError(f"a block must be smaller than 2^32 bytes, got {block_bytes}")
        groups = group_evenly_spaced(runs)
        self.groups = <_c.kv_group *>calloc(len(groups), sizeof(_c.kv_group))
        if self.groups is NULL:
            raise MemoryError("no memory for the groups of the layout")
        self.num_groups = len(groups)
        for index, group in enumerate(groups):
            (self.groups[index].base, self.groups[index].block_stride, self.groups[index].slot_offset,
             self.groups[index].row_bytes, self.groups[index].device_pitch, self.groups[index].slot_pitch,
             self.groups[index].rows) = group
            self.groups[index].strided = 3 if _c.kv_group_may_be_strided(&self.groups[index]) else 0
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.block_size = block_size
        self.name = str(name)
        self.runs = tuple(runs)
        self.hold(bases, owners)
        self.planner = ()

    cdef int hold(self, object borrowed, object owners) except -1:
        cdef BorrowedMemory memory
        self.borrowed = tuple(borrowed)
        self.owners = (*owners, *[memory.owner for memory in self.borrowed])
        for memory in self.borrowed:
            self.read_only |= memory.read_only
            self.on_gpu |= memory.is_cuda is True
        return 0

    cdef int require_reachable(self, Device device, bint as_target) except -1:
        """Refuse what would end the process: writing to read-only memory, a GPU's memory for the host device."""
        if as_target and self.read_only:
            raise ValueError("the layout's memory is read-only, so nothing can be loaded into it; make the layout over "
                             "memory that may be written")
        if self.on_gpu and device.is_host:
            raise ValueError(f"the layout's memory is a GPU's, out of reach for the device {device.name}; use its cuda "
                             f"device")
        return 0

    cdef uint32_t strided_bit(self, int direction) noexcept nogil:
        return <uint32_t>1 << direction if self.strided else 0

    def __dealloc__(self):
        free(self.groups)

    @property
    def fingerprint(self):
        """32 bytes, equal for two layouts if the same bytes of a block mean the same in both, as far as the constructor
        was told: `name`, and the pieces in their order, with types and axes. It does not say where the memory lies, how
        far apart the blocks are, or how many. `kvortex.transfer.fingerprint` has the text that it is the SHA-256 of.
        """
        if self.known_fingerprint is None:
            kept = self.kept if self.is_described else None
            self.known_fingerprint = fingerprint_of_layout(self.name, self.block_bytes, self.pieces, kept)
        return self.known_fingerprint

    @property
    def piece_bytes(self):
        """Bytes of the largest contiguous part of a block."""
        return max(piece for _, _, piece in self.runs)

    @property
    def pieces_per_block(self):
        """Contiguous parts of one block on the device."""
        return len(self.runs)

    # ---- constructors -----------------------------------------------------------------------------------------------

    @classmethod
    def contiguous(cls, base, *, kv=2, num_layers, num_blocks, block_size, num_heads, head_dim, itemsize, name="",
                   dtype=None):
        """One allocation of shape ``(kv, num_layers, num_blocks, block_size, num_heads, head_dim)``.

        `base` is an address, or memory that says where it is (see `from_tensors`), without gaps and large enough;
        `itemsize` is in bytes. If `dtype` is ``"bfloat16"``, a codec can pack the blocks: K is the first of two parts.
        """
        borrowed = []
        kv, num_layers, num_blocks, block_size, num_heads, head_dim, itemsize = as_sizes(dict(
            kv=kv, num_layers=num_layers, num_blocks=num_blocks, block_size=block_size, num_heads=num_heads,
            head_dim=head_dim, itemsize=itemsize))
        if kv * num_layers > MAX_RUNS:
            raise ValueError(f"kv * num_layers must be {MAX_RUNS} at most, got {kv} * {num_layers}")
        piece = block_size * num_heads * head_dim * itemsize
        start = take_whole(base, borrowed, "base", kv * num_layers * num_blocks * piece)
        runs = [(start + (part * num_layers + layer) * num_blocks * piece, piece, piece)
                for layer in range(num_layers) for part in range(kv)]
        layer = piece_of_axes(itemsize, enumerate((kv, block_size, num_heads, head_dim)))
        planes = []
        if is_bfloat16(dtype, itemsize) and kv <= 2 and 2 * head_dim % UNIT_BYTES == 0:
            for number in range(kv * num_layers):
                planes += planes_of("kv"[number % kv], number * piece, block_size * num_heads, 2 * head_dim,
                                    2 * head_dim, number // kv, num_heads)
        return lay_out(cls, runs, num_blocks, block_size, borrowed, name, [layer] * num_layers, planes)

    @classmethod
    def mla(cls, bases, *, num_blocks, block_size, latent_dim, itemsize, name="", dtype=None, rope_dim=64):
        """One allocation a layer of shape ``(num_blocks, block_size, latent_dim)``: multi-head latent attention.

        If `dtype` is ``"bfloat16"``, a codec can pack the blocks, except the last `rope_dim` numbers of each token.
        """
        borrowed = []
        num_blocks, block_size, latent_dim, itemsize = as_sizes(dict(
            num_blocks=num_blocks, block_size=block_size, latent_dim=latent_dim, itemsize=itemsize))
        piece = block_size * latent_dim * itemsize
        runs = [(take_whole(base, borrowed, f"base {number}", num_blocks * piece), piece, piece)
                for number, base in enumerate(as_list(bases, "bases"))]
        layer = piece_of_axes(itemsize, enumerate((block_size, latent_dim)))
        rope_dim, planes = whole_number(rope_dim, "rope_dim"), []
        if not 0 <= rope_dim <= latent_dim:
            raise ValueError(f"rope_dim must be 0 to latent_dim ({latent_dim}), got {rope_dim}")
        if is_bfloat16(dtype, itemsize) and rope_dim < latent_dim and (latent_dim - rope_dim) % 8 == 0:
            for number in range(len(runs)):
                planes += planes_of("k", number * piece, block_size, 2 * (latent_dim - rope_dim), 2 * latent_dim,
                                    number)
        return lay_out(cls, runs, num_blocks, block_size, borrowed, name, [layer] * len(runs), planes)

    @classmethod
    def cross_layer(cls, base, *, num_blocks, block_bytes, block_size=0, name="", planes=()):
        """One allocation in which all layers of a block lie together: ``(num_blocks, block_bytes)``.

        `planes` as for the constructor.
        """
        borrowed = []
        num_blocks, block_bytes = as_sizes(dict(num_blocks=num_blocks, block_bytes=block_bytes))
        start = take_whole(base, borrowed, "base", num_blocks * block_bytes)
        return lay_out(cls, [(start, block_bytes, block_bytes)], num_blocks, block_size, borrowed, name, [block_bytes],
                       planes)

    @classmethod
    def from_tensors(cls, tensors, block_dim=0, *, block_size=0, name="", num_blocks=None, roles=None):
        """Read the runs from the strides of tensors, in the order of the tensors.

        Parameters
        ----------
        tensors : iterable
            One tensor a layer (or any split): objects that describe their shape by ``data_ptr()``, ``shape``,
            ``stride()`` and ``element_size()`` (torch), ``__cuda_array_interface__``, the buffer protocol,
            ``__array_interface__`` or DLPack. Nothing is copied; they are held as long as the layout, buffers stay
            exported, and the deleters of DLPack tensors are called with its end.
        block_dim : int, default 0
            Which dimension counts blocks.
        num_blocks : int, optional
            How many blocks there must be.
        roles : str or sequence of str, optional
            What a block of each tensor (or of all) contains, so that a codec can pack it: ``"k"``, ``"v"``; ``"kv"``,
            K's part and then V's; ``"interleaved"``, rows of K beside V in the last dimension; ``"latent"``, rows of
            MLA, whose last 64 numbers stay exact; ``"exact"``, none of these. The last dimension is that of a head, or
            with ``"interleaved"`` twice as long. Tensors of bfloat16 can be packed, and of 16-bit integers, whose bits
            are read as bfloat16. All others stay exact.

        Raises
        ------
        TypeError
            A tensor has none of these interfaces; or `tensors` is a tensor itself.
        ValueError
            There are not `num_blocks` blocks. A tensor is not block-contiguous: the elements of one block leave gaps
            within its stride, or blocks interleave. Moving it would move other bytes, too. Or two tensors share bytes
            and are not the same one.
        """
        runs, borrowed, pieces, planes, block_bytes = [], [], [], [], 0
        expected = None if num_blocks is None else whole_number(num_blocks, "num_blocks")
        num_blocks = None
        block_dim = whole_number(block_dim, "block_dim")
        if hasattr(tensors, "shape"):
            raise TypeError(f"from_tensors takes a list of tensors, one a layer, got one {type(tensors).__name__}; "
                            f"write from_tensors([tensor]), or list(tensor) where its first dimension counts layers")
        tensors = as_list(tensors, "tensors")
        roles = roles_of_tensors(roles, len(tensors))
        layers = layers_of_roles(roles)
        for number, tensor in enumerate(tensors):
            memory = borrow_memory(tensor)
            tensor_runs, count, piece = runs_of_tensor(memory, block_dim, f"tensor {number}")
            if num_blocks not in (None, count):
                raise ValueError(f"tensor {number} has {count} blocks, the others {num_blocks}; check block_dim")
            num_blocks = count
            borrowed.append(memory)
            runs += tensor_runs
            pieces.append(piece)
            nbytes = sum([run[2] for run in tensor_runs])
            planes += planes_of_tensor(roles[number], memory.shape, memory.strides, memory.itemsize,
                                       getattr(memory.owner, "dtype", ""), block_bytes, nbytes, layers[number],
                                       block_dim, block_size)
            block_bytes += nbytes
        if expected not in (None, num_blocks):
            raise ValueError(f"the tensors have {num_blocks} blocks along dimension {block_dim}, and num_blocks says "
                             f"{expected}; check block_dim")
        return lay_out(cls, runs, num_blocks or 0, block_size, borrowed, name, pieces, planes)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def part(self, runs, *, fingerprint=None):
        """Make a layout of some of the bytes of each block, which a transfer may name in place of this one.

        It has the same block ids. Transfers of a block of the part are ordered with those of the same block of this
        layout. A block of the part, as saved, has the bytes of the part alone, in the order of its runs.

        Parameters
        ----------
        runs : iterable
            Runs as in `runs`, or their numbers there. Each may also be a stretch of one of them: at the same stride.
        fingerprint : bytes, optional
            The part's fingerprint, 32 bytes: that of a layout whose blocks hold the same. By default it says which
            bytes of which layout the part has: if two layouts share keys, equal parts of them do.

        Returns
        -------
        KVLayout
            It keeps this one alive.

        Raises
        ------
        TypeError, ValueError
            As for a layout. A run does not lie in one of this layout's, or a fingerprint has another length.
        """
        cdef KVLayout part, whole = self if self.whole is None else self.whole
        chosen = [self.runs[run] if is_integer(run) and 0 <= run < len(self.runs) else run
                  for run in as_list(runs, "runs")]
        if fingerprint is not None and len(bytes(memoryview(fingerprint))) != 32:
            raise ValueError(f"fingerprint must have 32 bytes, got {len(fingerprint)}; pass the one of a layout")
        part = KVLayout(chosen, self.num_blocks, block_size=self.block_size, owners=self.owners, name=self.name)
        spans_of_part(part.runs, self.runs, self.num_blocks)
        spans = spans_of_part(part.runs, whole.runs, whole.num_blocks)
        part.known_fingerprint = fingerprint_of_part(whole.fingerprint, spans)
        if fingerprint is not None:
            part.known_fingerprint = bytes(fingerprint)
        part.whole, part.read_only, part.on_gpu = whole, self.read_only, self.on_gpu
        part.planes = planes_of_part(whole.planes, spans)
        part.follow()
        if whole.parts is None:
            whole.parts = weakref.WeakSet()
        whole.parts.add(part)
        return part

    cdef int follow(self) except -1:
        """Make each group strided if the group of the whole layout that has its first row is."""
        cdef uint32_t index, other
        cdef uint64_t ahead
        cdef _c.kv_group *group
        cdef _c.kv_group *wider
        for index in range(self.num_groups):
            group = &self.groups[index]
            group.strided = 0
            for other in range(self.whole.num_groups if _c.kv_group_may_be_strided(group) else 0):
                wider = &self.whole.groups[other]
                ahead = group.base - wider.base  # unsigned: huge if it comes before
                if ahead // wider.device_pitch < wider.rows and ahead % wider.device_pitch < wider.row_bytes:
                    group.strided = wider.strided
                    break
        self.strided = self.whole.strided
        return 0

    cdef int tell_parts(self) except -1:
        cdef KVLayout part
        for part in self.parts or ():
            part.follow()
        return 0

    # ---- use --------------------------------------------------------------------------------------------------------

    def slot_mapping(self, block_ids, num_tokens=None):
        """Token slots of a sequence: ``block_id * block_size + offset``, int64, one a token.

        `num_tokens` defaults to all tokens of the blocks.
        """
        if not self.block_size:
            raise ValueError("block_size of this layout is unknown; pass it to the constructor")
        ids = np.asarray(as_block_ids(block_ids, self))
        limit = ids.size * self.block_size
        num_tokens = limit if num_tokens is None else whole_number(num_tokens, "num_tokens")
        if not 0 <= num_tokens <= limit:
            raise ValueError(f"num_tokens must be 0 to {limit} for {ids.size} blocks, got {num_tokens}")
        return (ids[:, None] * self.block_size + np.arange(self.block_size)).reshape(-1)[:num_tokens]

    def __repr__(self):
        return (f"KVLayout({self.num_blocks} blocks of {self.block_bytes} bytes, {len(self.runs)} pieces each, "
                f"{self.num_groups} groups)")


cdef object lay_out(object cls, object runs, object num_blocks, object block_size, list borrowed, object name,
                    list pieces, object planes):
    layout = cls(runs, num_blocks, block_size=block_size, name=name, planes=planes)
    (<KVLayout>layout).hold(borrowed, ())
    (<KVLayout>layout).pieces, (<KVLayout>layout).is_described = pieces, True
    return layout


cdef list as_list(object things, str what):
    try:
        return list(things)
    except TypeError as error:
        raise TypeError(f"{what} must be an iterable, got {type(things).__name__}: {error}") from None


cdef list as_sizes(dict sizes):
    """The sizes in their order."""
    numbers = []
    for name, size in sizes.items():
        size = whole_number(size, name)
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
        numbers.append(size)
    return numbers


cdef tuple read_run(object run, object number, object num_blocks, list bases):
    """A run as whole numbers whose pieces lie in the address space; memory it names is added to `bases`."""
    try:
        base, stride, piece = run
    except (TypeError, ValueError):
        raise ValueError(f"run {number} must be (base, block_stride, piece_bytes), got {run!r}") from None
    if type(stride) is not int or type(piece) is not int:  # a layout may have a million runs, and texts take time
        stride = whole_number(stride, f"run {number}: block_stride")
        piece = whole_number(piece, f"run {number}: piece_bytes")
    if piece < 1 or (num_blocks > 1 and piece > stride):
        raise ValueError(f"run {number}: piece_bytes must be 1 to block_stride ({stride}), got {piece}")
    if not 0 <= stride < 1 << 63:  # of a single block, too
        raise ValueError(f"run {number}: block_stride must be 0 to 2^63 - 1, got {stride}")
    nbytes = (num_blocks - 1) * stride + piece
    base = whole_number(base, "base") if is_integer(base) else take_whole(base, bases, f"run {number}", nbytes)
    if base < 4096:
        raise ValueError(f"run {number}: base address must not be null, got {base:#x}")
    if base + nbytes >= 1 << 64:
        raise ValueError(f"run {number}: {num_blocks} blocks from base {base:#x} at block_stride {stride} reach beyond "
                         f"the address space")
    return base, stride, piece


cdef object integers(object items, str name, object count=None):
    """A one-dimensional array of whole numbers; with `count`, a single number stands for all. A copy, so that nobody
    changes it after the check.
    """
    wanted = "a one-dimensional array of integers" if count is None else f"an int or {count} integers"
    if type(items) is not np.ndarray and isinstance(items, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array, and masked elements would count; pass {wanted}")
    try:
        array = np.array(items, order="C")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {wanted}: {error}") from None
    if array.ndim == 0 and count is not None:
        array = np.full(count, array)
    if (array.ndim != 1 or (array.size and array.dtype.kind not in "iu")
            or (count is not None and array.size != count)):
        raise ValueError(f"{name} must be {wanted}, got shape {array.shape}, dtype {array.dtype}")
    return array


@cython.boundscheck(False)  # the loop looks at each id of a call
@cython.wraparound(False)
@cython.initializedcheck(False)
cdef int64_t[::1] as_block_ids(object block_ids, KVLayout layout) except *:
    """Device block ids as an int64 array, each checked against the layout."""
    cdef int64_t[::1] ids = np.asarray(integers(block_ids, "block_ids"), dtype=np.int64)
    cdef Py_ssize_t index
    cdef int64_t limit = layout.num_blocks
    for index in range(ids.shape[0]):
        if not 0 <= ids[index] < limit:
            raise ValueError(f"block_ids[{index}] is {ids[index]}, outside the layout's 0 to {limit - 1}")
    return ids


cdef object take_whole(object base, list borrowed, object what, object nbytes=None):
    """The address of a base. If the base is memory, it must have `nbytes` bytes, and is added to `borrowed`."""
    cdef BorrowedMemory memory = borrow_memory(base)
    if memory.owner is not None:
        if nbytes is not None and memory.shape is not None and not (memory.is_contiguous and memory.nbytes >= nbytes):
            raise ValueError(f"{what} must have {nbytes} bytes without gaps, got {memory.nbytes} (shape {memory.shape},"
                             f" strides {memory.strides} bytes)")
        borrowed.append(memory)
    return memory.address


def plan_copies(KVLayout layout not None, block_ids, slot_ids, PinnedPool pool not None, strided=None):
    """The copies that a transfer of these blocks would run, for tests.

    A group is strided here if it is strided in one direction. `strided` says whether strided copies are legal; by
    default the layout does.

    Returns
    -------
    list of dict
        ``device, host`` (addresses), ``row_bytes, device_pitch, host_pitch, rows``, in the order of the plan.
    """
    cdef int64_t[::1] ids = as_block_ids(block_ids, layout)
    cdef const uint32_t[::1] slots = np.ascontiguousarray(slot_ids, dtype=np.uint32)
    cdef _c.kv_copy copies[16]
    cdef uint32_t directions = 3 if (layout.strided if strided is None else strided) else 0
    cdef _c.kv_plan plan = _c.kv_plan_of_blocks(layout.groups, layout.num_groups, directions, &ids[0], &pool.slots,
                                                &slots[0], ids.shape[0])
    found = []
    while count := _c.kv_plan_next(&plan, copies, 16):
        for index in range(count):
            found.append({"device": copies[index].device, "host": <uintptr_t>copies[index].host,
                          "row_bytes": copies[index].row_bytes, "device_pitch": copies[index].device_pitch,
                          "host_pitch": copies[index].host_pitch, "rows": copies[index].rows})
    return found
