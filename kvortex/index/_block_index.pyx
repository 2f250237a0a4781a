# cython: boundscheck=False, wraparound=False, initializedcheck=False, nonecheck=False
"""BlockIndex: which slot holds which block, in which state, and who may go when room is needed.

The C headers know buckets, links and fields; here is what they mean: when a slot may be given, shown, taken back.
"""

import os
from enum import IntEnum, IntFlag
from typing import NamedTuple

import numpy as np

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign

from kvortex cimport _c
from kvortex.keys._arrays cimport as_keys

from kvortex.arguments import whole_number

cdef extern from "<sys/mman.h>" nogil:
    const int MADV_HUGEPAGE
    int madvise(void *address, size_t bytes, int advice)

cdef enum:
    CHUNK = 16       # keys hashed and prefetched together: enough to hide memory's latency, few enough for its queues
    SMALL_BATCH = 64  # keys copied on the stack, where a view's copy would take as long as the rest of a small call
    AHEAD = 6        # evictions between the first look at a victim and its end
    KEY_BYTES = 32
    ENTRY_BYTES = 64
    HUGE_PAGE_BYTES = 2 << 20

NO_SLOT = _c.KV_NO_SLOT

# Made once: numpy looks a type up anew each time it is named, and a small batch notices.
cdef object UINT32 = np.dtype(np.uint32)
cdef object UINT8 = np.dtype(np.uint8)
cdef object BOOL = np.dtype(np.bool_)


class ReserveStatus(IntEnum):
    """What `BlockIndex.reserve` answers for a key."""

    NEW = _c.KV_RESERVE_NEW          #: a slot was given: write it, then commit or abort
    PRESENT = _c.KV_RESERVE_PRESENT  #: already there with this length: nothing to write
    PENDING = _c.KV_RESERVE_PENDING  #: another writer has it, or readers pin it with another length
    FULL = _c.KV_RESERVE_FULL        #: no free slot and nothing that may be evicted


class CommitStatus(IntEnum):
    """What `BlockIndex.commit` answers for a slot."""

    READY = _c.KV_COMMIT_READY          #: visible from now on
    DISCARDED = _c.KV_COMMIT_DISCARDED  #: forgotten while it was written: the slot is free again, pinned or not


class BlockFact(IntFlag):
    """What an index knows of a block for whoever keeps copies of it on a lower tier."""

    ADMITTED = _c.KV_ADMITTED  #: a lower tier is to have it (`BlockIndex.reserve`, `admit`)
    CLEAN = _c.KV_CLEAN        #: a lower tier has it
    OFFERED = _c.KV_OFFERED    #: `BlockIndex.coldest` took it, and nobody has used it since
    RAM_ONLY = _c.KV_RAM_ONLY  #: no lower tier is given it: it was coded with loss before, or would not fit there


class Blocks(NamedTuple):
    """Blocks as `BlockIndex.coldest` and `BlockIndex.reserve` tell of them, the first to go first."""

    slots: np.ndarray    # (n,) uint32
    keys: np.ndarray     # (n, 32) uint8
    lengths: np.ndarray  # (n,) uint32
    facts: np.ndarray    # (n,) uint8, a `BlockFact` each


cdef class BlockIndex:
    """Map keys to slots, and decide which block goes when room is needed (least recently used first).

    The index knows keys and slot numbers, never memory or devices. A slot is written in two steps, ``reserve`` and
    ``commit``, and is visible only after the second; it is read between ``acquire`` and ``release``, and cannot be
    evicted in between. Every verb takes a batch, releases the GIL and may be called from any thread. ``lookup`` takes
    no lock; the others take one mutex for the length of the batch and never wait for anything else.

    Parameters
    ----------
    num_slots : int
        Capacity. All memory (about 71 bytes a slot) is allocated and touched here. No slot can be handed out before
        `add_slots` has named it.

    Raises
    ------
    ValueError
        If `num_slots` is not in 1 .. 2**32 - 4.
    MemoryError
        If there is no memory for the entries.

    Notes
    -----
    Wherever keys are taken they are a C-contiguous ``(n, 32)`` uint8 array; slots come back as uint32, and are taken
    as any one-dimensional array-like of integers. Bad arguments raise before anything is changed.
    """

    # ---- life -------------------------------------------------------------------------------------------------------

    def __cinit__(self, object num_slots):
        cdef object limit = 0xFFFFFFFF - 3
        num_slots = whole_number(num_slots, "num_slots")
        if not 1 <= num_slots <= limit:
            raise ValueError(f"num_slots must be in 1 .. {limit}, got {num_slots}")
        cdef bytes seed = os.urandom(KEY_BYTES)
        self.num_slots = num_slots
        self.free_list = self.num_slots
        cdef size_t entries_bytes = (<size_t>self.num_slots + 3) * ENTRY_BYTES
        self.memory_bytes = entries_bytes + _c.kv_table_bytes(self.num_slots)
        cdef void *memory = NULL
        cdef size_t alignment = HUGE_PAGE_BYTES if self.memory_bytes >= HUGE_PAGE_BYTES else ENTRY_BYTES
        if posix_memalign(&memory, alignment, self.memory_bytes) != 0:
            raise MemoryError(f"an index of {num_slots} slots needs {self.memory_bytes} bytes")
        if alignment == HUGE_PAGE_BYTES:  # random access over megabytes: a quarter more lookups/s
            madvise(memory, self.memory_bytes, MADV_HUGEPAGE)
        self.entries = <_c.kv_entry *>memory
        with nogil:
            memset(memory, 0, self.memory_bytes)  # touched now: no page fault later under the lock
        _c.kv_table_init(&self.table, <uint8_t *>memory + entries_bytes, self.entries, self.num_slots, seed)
        _c.kv_list_init(self.entries, self.free_list)
        _c.kv_lru_init(&self.lru, self.entries, self.num_slots + 1, self.num_slots + 2)
        _c.pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        if self.entries != NULL:  # takes no lock, so it is safe in a forked child
            _c.pthread_mutex_destroy(&self.mutex)
            free(self.entries)

    def add_slots(self, first, count):
        """Make the slots `first` .. ``first + count - 1`` available, to be handed out in ascending order.

        Parameters
        ----------
        first, count : int
            A range within ``num_slots`` of which no slot was added before. O(count).

        Raises
        ------
        ValueError
            If the range is not within the capacity, or one of its slots was added before.
        """
        first, count = whole_number(first, "first"), whole_number(count, "count")
        if first < 0 or count < 0 or first + count > self.num_slots:
            raise ValueError(f"slots {first} .. {first + count - 1} are not within the {self.num_slots} of this index")
        cdef uint32_t slot, begin = first, end = first + count, taken = _c.KV_NO_SLOT
        with nogil:
            _c.pthread_mutex_lock(&self.mutex)
            for slot in range(begin, end):
                if _c.kv_entry_state(&self.entries[slot]) != _c.KV_ABSENT:
                    taken = slot
                    break
            else:
                self.add_locked(begin, end - begin)
            _c.pthread_mutex_unlock(&self.mutex)
        if taken != _c.KV_NO_SLOT:
            raise ValueError(f"slot {taken} was added before; each slot is added once")

    def adopt(self, slots, keys, lengths):
        """Make slots available as `add_slots` does, some of which hold a block already.

        So a tier's index learns what an earlier process left in the tier. What is adopted is colder than all that the
        index has, the first of the batch before the next ones.

        Parameters
        ----------
        slots : (n,) array-like of int
            Slots none of which was added before.
        keys : (n, 32) uint8 array
        lengths : int or (n,) array-like of int
            Bytes of the block that each slot holds; 0: it holds none.

        Returns
        -------
        adopted : (n,) bool array
            False where the slot holds none, or the index has the key already; the slot is free then.

        Raises
        ------
        ValueError
            A slot is not within the capacity, was added before, or occurs twice. Then nothing has changed.
        """
        cdef const uint32_t[::1] slot_view = as_slots(slots)
        cdef const uint8_t[:, ::1] key_view = as_keys(keys)
        cdef size_t n = slot_view.shape[0], i, bad
        cdef const uint32_t[::1] length_view = as_lengths(lengths, n)
        cdef size_t length_step = length_view.shape[0] > 1
        cdef uint64_t hash_value
        cdef _c.kv_entry *entry
        if <size_t>key_view.shape[0] != n:
            raise ValueError(f"keys must be {n}, one a slot; got {key_view.shape[0]}")
        adopted = np.zeros(n, BOOL)
        cdef uint8_t[::1] adopted_view = adopted.view(UINT8)
        with nogil:
            _c.pthread_mutex_lock(&self.mutex)
            bad = self.first_not_in_state(&slot_view[0], n, _c.KV_ABSENT)
            for i in range(n if bad == n else 0):
                if length_view[i * length_step] != 0:
                    self.hash_chunk(&key_view[0, 0], i + 1, i, &hash_value)
                    adopted_view[i] = self.find(&key_view[i, 0], hash_value) == _c.KV_NO_SLOT
                if not adopted_view[i]:
                    self.add_locked(slot_view[i], 1)
                    continue
                entry = &self.entries[slot_view[i]]
                _c.kv_entry_begin(entry, _c.kv_key_load(&key_view[i, 0]), length_view[i * length_step], 0)
                _c.kv_table_insert(&self.table, hash_value, slot_view[i])
                _c.kv_lru_push_coldest(&self.lru, slot_view[i])
                _c.kv_entry_set_state(entry, _c.KV_READY)
                self.count.slots_added += 1
                self.count.num_ready += 1
            _c.pthread_mutex_unlock(&self.mutex)
        if bad != n:
            raise bad_slot("adopt", slot_view[bad], bad, self.num_slots, "added before, or given twice")
        return adopted

    # ---- writing ----------------------------------------------------------------------------------------------------

    def reserve(self, keys, lengths, *, after=None, stops=None, admit=0, bint victims=False):
        """Ask for a slot for each key that is not there yet.

        A free slot is taken, else the least recently used block that is not pinned is evicted; where there is none the
        answer is FULL. Keys that are PRESENT become the most recently used, the first of them most of all, and no later
        key of the batch evicts them. A key that is READY with another length is discarded and reserved anew (its bytes
        would serve nobody who asks for this length), or PENDING while it is pinned. A key that occurs twice in the
        batch is PENDING the second time.

        Parameters
        ----------
        keys : (n, 32) uint8 array
        lengths : int or (n,) array-like of int
            Bytes that will be written, for all or each; `acquire` compares with it.
        after : (m, 32) uint8 array, optional
            The keys that this batch continues, from the first block of the prefix on. Both are one chain: what is there
            of it is touched first, tail-first, and a key evicts no block of the chain that comes before it. So where
            room ends, the tail gets FULL and the head stays. Without it the index can't know what comes before.
        stops : (n,) array-like of int, optional
            For each key the slot at which eviction for it ends: neither the block there nor any that was used later is
            evicted, the answer is FULL. `NO_SLOT` where eviction has no such end. For whoever reserves for several
            chains at once, and knows the least recently used block of each.
        admit : int, default 0
            How many of the NEW keys, from the first on, a lower tier is to have: a fact of their blocks.
        victims : bool, default False
            Also tell which blocks were evicted. A block replaced by one of another length is none of them.

        Returns
        -------
        slots : (n,) uint32 array
            The caller owns these until `commit` or `abort`; `NO_SLOT` where the status is not NEW.
        statuses : (n,) uint8 array
            A `ReserveStatus` each.
        victims : Blocks
            Only where `victims` are asked for.
        """
        cdef const uint8_t[:, ::1] key_view = as_keys(keys)
        cdef size_t n = key_view.shape[0], length_step = 0, num_admitted = as_count(admit, "admit")
        # Each key is read twice: one that another thread changed in between would break the table.
        cdef uint8_t copied[SMALL_BATCH * KEY_BYTES]
        cdef const uint8_t *key_ptr = copied
        if n <= SMALL_BATCH:
            memcpy(copied, &key_view[0, 0], n * KEY_BYTES)
        else:
            key_view = key_view.copy()
            key_ptr = &key_view[0, 0]
        cdef uint32_t length = 0
        cdef const uint32_t *length_ptr = &length
        cdef const uint32_t[::1] length_view
        if type(lengths) is int and 0 <= lengths <= 0xFFFFFFFF:
            length = lengths
        else:
            length_view = as_lengths(lengths, n)
            length_ptr = &length_view[0]
            length_step = length_view.shape[0] > 1
        cdef const uint8_t[:, ::1] after_view
        cdef const uint8_t *after_ptr = NULL
        cdef size_t num_after = 0
        if after is not None:
            after_view = as_keys(after)
            num_after = after_view.shape[0]
            after_ptr = &after_view[0, 0] if num_after else NULL
        cdef const uint32_t[::1] stop_view
        cdef const uint32_t *stop_ptr = NULL
        if stops is not None:
            stop_view = as_slots(stops, "stops")
            if <size_t>stop_view.shape[0] != n:
                raise ValueError(f"stops must be {n}, one a key; got {stop_view.shape[0]}")
            stop_ptr = &stop_view[0]
        slots, statuses = np.empty(n, UINT32), np.empty(n, UINT8)
        cdef uint32_t *slot_ptr = <uint32_t *>memory_of(slots)
        cdef uint8_t *status_ptr = <uint8_t *>memory_of(statuses)
        cdef BlockArrays noted
        cdef object blocks = new_blocks(n, &noted) if victims else None
        with nogil:
            self.reserve_keys(key_ptr, length_ptr, length_step, n, slot_ptr, status_ptr, after is not None, after_ptr,
                              num_after, stop_ptr, num_admitted, &noted if victims else NULL)
        if victims:
            return slots, statuses, blocks_so_far(blocks, noted.count)
        return slots, statuses

    def commit(self, slots, bint pin=False, *, pins=None, bint clean=False, bint ram_only=False):
        """Make written slots visible; the batch is linked tail-first, so that the first slot ends most recently used.

        Parameters
        ----------
        slots : (n,) array-like of int
            Slots from `reserve`, completely written.
        pin : bool
            Also pin them, in the same step, as `acquire` would: nothing can evict them in between.
        pins : (n,) array-like of int, optional
            Instead of `pin`, how many pins each gets, one for every reader that is to release it; 0 is none.
        clean : bool
            A lower tier has them: a fact of the blocks.
        ram_only : bool
            No lower tier is to be given them, `BlockFact.RAM_ONLY`.

        Returns
        -------
        statuses : (n,) uint8 array
            A `CommitStatus` each. A slot whose key was discarded while it was written is DISCARDED: it is free
            already, and not pinned.

        Raises
        ------
        ValueError
            If a slot is not being written, or occurs twice. Then nothing has changed.
        """
        cdef const uint32_t[::1] slot_view = as_slots(slots), pin_view
        cdef size_t n = slot_view.shape[0], bad
        cdef uint32_t same = pin
        cdef const uint32_t *pin_ptr = &same
        if pins is not None:
            pin_view = as_slots(pins, "pins")
            if pin or <size_t>pin_view.shape[0] != n:
                raise ValueError(f"pins must be {n}, one a slot, and not beside pin=True; got {pin_view.shape[0]}")
            pin_ptr = &pin_view[0]
        statuses = np.empty(n, UINT8)
        cdef uint8_t *status_ptr = <uint8_t *>memory_of(statuses)
        with nogil:
            _c.pthread_mutex_lock(&self.mutex)
            bad = self.first_not_in_state(&slot_view[0], n, _c.KV_WRITING)
            if bad == n:
                self.commit_locked(&slot_view[0], n, pin_ptr, pins is not None, status_ptr, clean, NULL, ram_only)
            _c.pthread_mutex_unlock(&self.mutex)
        if bad != n:
            raise bad_slot("commit", slot_view[bad], bad, self.num_slots, "not being written, or given twice")
        return statuses

    def abort(self, slots):
        """Give back slots that were not written after all; their keys are as if never reserved.

        Parameters
        ----------
        slots : (n,) array-like of int
            Slots from `reserve`.

        Raises
        ------
        ValueError
            If a slot is not being written, or occurs twice. Then nothing has changed.
        """
        cdef const uint32_t[::1] slot_view = as_slots(slots)
        cdef size_t n = slot_view.shape[0], bad
        with nogil:
            _c.pthread_mutex_lock(&self.mutex)
            bad = self.first_not_in_state(&slot_view[0], n, _c.KV_WRITING)
            if bad == n:
                self.abort_locked(&slot_view[0], n)
            _c.pthread_mutex_unlock(&self.mutex)
        if bad != n:
            raise bad_slot("abort", slot_view[bad], bad, self.num_slots, "not being written, or given twice")

    # ---- reading ----------------------------------------------------------------------------------------------------

    def lookup(self, keys, bint touch=False):
        """Tell which keys are READY. No side effects, no lock, no waiting.

        Each key's answer was true at one moment during the call; only `acquire` makes it last.

        Parameters
        ----------
        keys : (n, 32) uint8 array
        touch : bool
            Also mark those that are READY as used now, as `touch` does: one pass instead of two, and one moment for all
            answers. Takes the lock.

        Returns
        -------
        mask : (n,) bool array
        leading : int
            How many keys from the first on are READY without a gap.
        """
        cdef const uint8_t[:, ::1] key_view = as_keys(keys)
        cdef size_t n = key_view.shape[0], leading
        mask = np.empty(n, BOOL)
        cdef uint8_t *mask_ptr = <uint8_t *>memory_of(mask)
        with nogil:
            if touch:
                self.touch_keys(&key_view[0, 0], n, mask_ptr)
                leading = 0
                while leading < n and mask_ptr[leading]:
                    leading += 1
            else:
                leading = self.lookup_keys(&key_view[0, 0], n, mask_ptr)
        return mask, leading

    def acquire(self, keys, lengths=None, *, bint gaps=False):
        """Pin the leading run: the keys before the first that is not READY, or has another length.

        A pinned block keeps its slot and its bytes until `release`. Pins count: each acquire wants its own release.

        Parameters
        ----------
        keys : (n, 32) uint8 array
        lengths : int or (n,) array-like of int, optional
            Bytes the caller is going to read. A block with another length ends the run, and is counted. None takes
            blocks of any length.
        gaps : bool
            Pin whatever is there, behind gaps too.

        Returns
        -------
        slots : (run,) uint32 array
            With gaps (n,), `NO_SLOT` where there is none.
        """
        cdef const uint8_t[:, ::1] key_view = as_keys(keys)
        cdef size_t n = key_view.shape[0], run, num_lengths = 0
        cdef const uint32_t[::1] length_view
        cdef const uint32_t *length_ptr = NULL
        if lengths is not None:
            length_view = as_lengths(lengths, n)
            num_lengths = length_view.shape[0]
            length_ptr = &length_view[0]
        slots = np.empty(n, UINT32)
        cdef uint32_t *slot_ptr = <uint32_t *>memory_of(slots)
        with nogil:
            run = self.acquire_keys(&key_view[0, 0], length_ptr, num_lengths > 1, n, slot_ptr, gaps)
        return slots if gaps else slots[:run]

    def release(self, slots, *, offered=None, clean=False, ram_only=False):
        """Unpin; a block whose last pin goes becomes most recently used, the batch tail-first, or free if discarded.

        With `offered` it ends what `coldest` began, and leaves recency as it was: a block that nobody has used
        meanwhile stays colder than every block that the cleaner has not passed, and hotter than every one that it has.

        Parameters
        ----------
        slots : (n,) array-like of int
            Slots from `acquire` or ``commit(pin=True)``; with `offered` a batch of `coldest`, in its order.
        offered : bool or (n,) array-like of bool, optional
            Whether the cleaner has passed the block. One that it has not, because writing it failed, is the next that
            `coldest` takes.
        clean : bool or (n,) array-like of bool, default False
            With `offered`, whether a lower tier has the block now.
        ram_only : bool or (n,) array-like of bool, default False
            With `offered`, whether no lower tier is to be given the block any more, `BlockFact.RAM_ONLY`.

        Raises
        ------
        ValueError
            If a slot is given more often than it is pinned. Then nothing has changed.
        """
        cdef const uint32_t[::1] slot_view = as_slots(slots)
        cdef const uint8_t[::1] passed_view, clean_view, ram_only_view
        cdef size_t n = slot_view.shape[0], bad
        cdef bint is_offer = offered is not None
        for name, flags in (("clean", clean), ("ram_only", ram_only)):
            if not is_offer and flags is not False:
                raise ValueError(f"{name} says what a cleaner did, got {flags!r} without offered; pass offered with it")
        if is_offer:
            passed_view, clean_view = as_flags(offered, n, "offered"), as_flags(clean, n, "clean")
            ram_only_view = as_flags(ram_only, n, "ram_only")
        with nogil:
            _c.pthread_mutex_lock(&self.mutex)
            bad = self.first_not_pinned(&slot_view[0], n)
            if bad == n and is_offer:
                self.release_offered_locked(&slot_view[0], &passed_view[0], &clean_view[0], &ram_only_view[0], n)
            elif bad == n:
                self.release_locked(&slot_view[0], n)
            _c.pthread_mutex_unlock(&self.mutex)
        if bad != n:
            raise bad_slot("release", slot_view[bad], bad, self.num_slots, "not pinned, or not so often")

    def coldest(self, n):
        """Take the coldest blocks that the cleaner has not passed yet: pinned, and offered from now on.

        The cleaner writes them to a lower tier, or not, and gives them back with ``release(slots, offered=True)``,
        batch after batch in the order of the calls. Whoever uses one meanwhile makes it not offered.

        Parameters
        ----------
        n : int
            The most.

        Returns
        -------
        blocks : Blocks
            With the facts as they are now, OFFERED among them.

        Raises
        ------
        ValueError
            If `n` is negative.
        """
        cdef size_t count, most = min(as_count(n, "n"), self.num_slots)
        cdef BlockArrays noted
        blocks = new_blocks(most, &noted)
        with nogil:
            count = self.take_coldest(most, &noted)
        return blocks_so_far(blocks, count)

    def offer_again(self):
        """Let `coldest` begin at the cold end again: nothing is offered any more, the order stays. O(1).

        No batch of `coldest` may be out, or its blocks go behind those that were offered before.
        """
        with nogil:
            self.take_border_back()

    def touch(self, keys):
        """Mark blocks as used now, tail-first, so that ``keys[0]`` ends most recent; keys not READY are passed over.

        Parameters
        ----------
        keys : (n, 32) uint8 array

        Returns
        -------
        count : int
            How many of the keys are READY.
        """
        cdef const uint8_t[:, ::1] key_view = as_keys(keys)
        cdef size_t n = key_view.shape[0], count
        with nogil:
            count = self.touch_keys(&key_view[0, 0], n)
        return count

    def slots_of(self, keys):
        """Tell which slots have these keys, READY or being written. Takes the lock.

        Nothing is pinned: where others reserve, a slot may have another tenant right after.

        Parameters
        ----------
        keys : (n, 32) uint8 array

        Returns
        -------
        slots : (n,) uint32 array
            `NO_SLOT` where a key is not there.
        """
        cdef const uint8_t[:, ::1] key_view = as_keys(keys)
        cdef size_t n = key_view.shape[0]
        slots = np.empty(n, UINT32)
        cdef uint32_t *slot_ptr = <uint32_t *>memory_of(slots)
        with nogil:
            self.find_keys(&key_view[0, 0], n, slot_ptr)
        return slots

    def lengths_of(self, slots):
        """The length that each slot's block was reserved with; 0 for a slot without one. Takes the lock.

        Parameters
        ----------
        slots : (n,) array-like of int
            Pinned, or the caller's to write: another's may have another tenant right after.

        Returns
        -------
        lengths : (n,) uint32 array

        Raises
        ------
        ValueError
            A slot is not within the capacity.
        """
        cdef const uint32_t[::1] slot_view = as_slots(slots)
        cdef size_t n = slot_view.shape[0], i
        for i in range(n):
            if slot_view[i] >= self.num_slots:
                raise bad_slot("lengths_of", slot_view[i], i, self.num_slots, "")
        lengths = np.empty(n, UINT32)
        cdef uint32_t *length_ptr = <uint32_t *>memory_of(lengths)
        with nogil:
            self.read_lengths(&slot_view[0], n, length_ptr)
        return lengths

    # ---- forgetting -------------------------------------------------------------------------------------------------

    def evict(self, n):
        """Drop the `n` least recently used blocks, or as many as are not pinned.

        Parameters
        ----------
        n : int

        Returns
        -------
        count : int
            How many were dropped.

        Raises
        ------
        ValueError
            If `n` is negative.
        """
        cdef size_t count, most = min(as_count(n, "n"), self.num_slots)
        with nogil:
            count = self.evict_slots(most)
        return count

    def discard(self, keys):
        """Forget keys at once, whatever their state: from now on they answer as if never saved.

        The slot of a pinned block is freed by its last release, that of one being written by its commit or abort.

        Parameters
        ----------
        keys : (n, 32) uint8 array

        Returns
        -------
        count : int
            How many were there, READY or being written.
        """
        cdef const uint8_t[:, ::1] key_view = as_keys(keys)
        cdef size_t n = key_view.shape[0], count
        with nogil:
            count = self.discard_keys(&key_view[0, 0], n)
        return count

    def clear(self):
        """Discard every key. O(num_slots), under the lock."""
        with nogil:
            self.clear_all()

    def __repr__(self):
        counts = self.counters()
        return (f"BlockIndex({self.num_slots} slots: {counts['num_ready']} with a block, {counts['num_pinned']} of "
                f"them pinned, {counts['num_writing']} being written, {counts['num_free']} free)")

    # ---- numbers ----------------------------------------------------------------------------------------------------

    def counters(self):
        """Return all counters, taken at one moment.

        Returns
        -------
        counters : dict of str to int
            Since creation: ``reserved``, ``full``, ``evictions``, ``dirty_evictions`` (of these, those that no lower
            tier had), ``hits`` (keys pinned by acquire), ``misses`` (keys of an acquire behind its run),
            ``length_mismatches``, ``discards``. Now: ``slots_added``, ``num_free``, ``num_writing``, ``num_ready``
            (both with those discarded meanwhile), and of these ``num_pinned`` and ``num_clean``.
        """
        cdef IndexCounters now
        with nogil:
            self.read_counters(&now)
        return now

    @property
    def slots_added(self):
        """Slots that `add_slots` has made available."""
        return self.counters()["slots_added"]

    @property
    def num_free(self):
        """Slots without a tenant."""
        return self.counters()["num_free"]

    @property
    def num_writing(self):
        """Slots between reserve and commit or abort."""
        return self.counters()["num_writing"]

    @property
    def num_ready(self):
        """Slots with a block, pinned or not."""
        return self.counters()["num_ready"]

    @property
    def num_pinned(self):
        """Slots with a block that is pinned."""
        return self.counters()["num_pinned"]

    def slot_info(self, slot):
        """Describe one slot, for tests and diagnosis.

        Returns
        -------
        info : dict
            ``state`` (``"absent"``, ``"free"``, ``"writing"`` or ``"ready"``), ``discarded``, ``generation`` (tenants
            so far), ``length``, ``pins``, ``facts`` (a `BlockFact`) and ``key`` of the present or last tenant.
        """
        slot = whole_number(slot, "slot")
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot must be in 0 .. {self.num_slots - 1}, got {slot}")
        cdef _c.kv_entry *entry = &self.entries[<uint32_t>slot]
        cdef _c.kv_key key
        cdef uint32_t state, generation, length, pins, facts
        cdef bint discarded
        with nogil:
            _c.pthread_mutex_lock(&self.mutex)
            key = _c.kv_entry_key(entry)
            state, discarded = _c.kv_entry_state(entry), _c.kv_entry_is_discarded(entry)
            generation, length, pins = _c.kv_entry_generation(entry), entry.length, entry.pins
            facts = entry.facts
            _c.pthread_mutex_unlock(&self.mutex)
        return {
            "state": ("absent", "free", "writing", "ready")[state],
            "discarded": discarded,
            "generation": generation,
            "length": length,
            "pins": pins,
            "facts": BlockFact(facts),
            "key": (<uint8_t *>&key)[:KEY_BYTES],
        }

    def probe_lengths(self):
        """Tell how far searches go: groups of 16 buckets read to find a key that is there. O(num_slots), for tests.

        Returns
        -------
        mean, longest : float, int
            1.0 and 1 are the best; both 0 when no key is there.
        """
        cdef uint64_t total = 0
        cdef uint32_t slot, state, probes, keys = 0, longest = 0
        with nogil:
            _c.pthread_mutex_lock(&self.mutex)
            for slot in range(self.num_slots):
                state = _c.kv_entry_state(&self.entries[slot])
                if state >= _c.KV_WRITING and not _c.kv_entry_is_discarded(&self.entries[slot]):
                    probes = _c.kv_table_probes(&self.table, self.hash_of(slot), slot)
                    keys += 1
                    total += probes
                    longest = max(longest, probes)
            _c.pthread_mutex_unlock(&self.mutex)
        return <double>total / max(keys, 1), longest

    # ---- the verbs, for callers without the GIL ---------------------------------------------------------------------

    cdef size_t reserve_keys(self, const uint8_t *keys, const uint32_t *lengths, size_t length_step, size_t n,
                             uint32_t *slots, uint8_t *statuses, bint chained=False, const uint8_t *after=NULL,
                             size_t num_after=0, const uint32_t *stops=NULL, size_t num_admitted=0,
                             BlockArrays *victims=NULL, bint ram_only=False) noexcept nogil:
        cdef uint64_t hashes[CHUNK]
        cdef uint32_t slot, length, scout
        cdef uint32_t kept = self.lru.recent  # the least recently used block that this batch must not evict; none yet
        cdef size_t i, num_new = 0
        cdef _c.kv_entry *entry
        _c.pthread_mutex_lock(&self.mutex)
        scout = _c.kv_lru_cold_list(&self.lru)
        if chained:  # from now on nothing was used later than the chain, nor any of it later than what comes before
            self.touch_locked(keys, n, NULL, NULL)
            self.touch_locked(after, num_after, NULL, &kept)
        for i in range(n):
            if i % CHUNK == 0:
                self.hash_chunk(keys, n, i, hashes)
            length = lengths[i * length_step]
            slots[i] = _c.KV_NO_SLOT
            slot = self.find(keys + i * KEY_BYTES, hashes[i % CHUNK])
            if slot != _c.KV_NO_SLOT:
                entry = &self.entries[slot]
                if _c.kv_entry_state(entry) == _c.KV_WRITING:
                    statuses[i] = _c.KV_RESERVE_PENDING
                    continue
                if entry.length == length:
                    statuses[i] = _c.KV_RESERVE_PRESENT
                    if entry.pins == 0 and slot != kept:
                        # Among the most recent, and behind what comes before it: heads outlive their tails.
                        _c.kv_lru_use_behind(&self.lru, kept, slot)
                        kept = slot
                    entry.facts &= ~_c.KV_OFFERED
                    continue
                self.count.length_mismatches += 1
                if entry.pins > 0:
                    statuses[i] = _c.KV_RESERVE_PENDING
                    continue
                if slot == kept:
                    kept = _c.kv_list_before(self.entries, slot)
                self.forget(slot, hashes[i % CHUNK])
            if _c.kv_list_is_empty(self.entries, self.free_list):
                scout = self.look_ahead(scout)
            slot = self.take_slot(kept, stops[i] if stops is not NULL else _c.KV_NO_SLOT, victims)
            if slot == _c.KV_NO_SLOT:
                statuses[i] = _c.KV_RESERVE_FULL
                self.count.full += 1
                continue
            _c.kv_entry_begin(&self.entries[slot], _c.kv_key_load(keys + i * KEY_BYTES), length,
                              _c.KV_RAM_ONLY if ram_only else _c.KV_ADMITTED if num_new < num_admitted else 0)
            _c.kv_table_insert(&self.table, hashes[i % CHUNK], slot)
            slots[i] = slot
            statuses[i] = _c.KV_RESERVE_NEW
            num_new += 1
        self.count.num_writing += <uint32_t>num_new
        self.count.reserved += num_new
        _c.pthread_mutex_unlock(&self.mutex)
        return num_new

    cdef size_t commit_slots(self, const uint32_t *slots, size_t n, bint pin, uint8_t *statuses=NULL,
                             uint64_t *nbytes=NULL) noexcept nogil:
        cdef uint32_t pins = pin
        cdef size_t num_ready
        _c.pthread_mutex_lock(&self.mutex)
        num_ready = self.commit_locked(slots, n, &pins, 0, statuses, False, nbytes)
        _c.pthread_mutex_unlock(&self.mutex)
        return num_ready

    cdef void abort_slots(self, const uint32_t *slots, size_t n) noexcept nogil:
        _c.pthread_mutex_lock(&self.mutex)
        self.abort_locked(slots, n)
        _c.pthread_mutex_unlock(&self.mutex)

    cdef size_t acquire_keys(self, const uint8_t *keys, const uint32_t *lengths, size_t length_step, size_t n,
                             uint32_t *slots, bint gaps=False) noexcept nogil:
        cdef uint64_t hashes[CHUNK]
        cdef uint32_t slot
        cdef size_t i, count = 0, rest = n
        cdef bint is_there
        cdef _c.kv_entry *entry
        _c.pthread_mutex_lock(&self.mutex)
        for i in range(n):
            if i % CHUNK == 0:
                self.hash_chunk(keys, n, i, hashes)
            slot = self.find(keys + i * KEY_BYTES, hashes[i % CHUNK])
            is_there = slot != _c.KV_NO_SLOT and _c.kv_entry_state(&self.entries[slot]) == _c.KV_READY
            if is_there and lengths != NULL and self.entries[slot].length != lengths[i * length_step]:
                self.count.length_mismatches += 1
                is_there = False
            if not is_there:
                slots[i] = _c.KV_NO_SLOT
                if gaps:
                    continue
                rest = i
                break
            entry = &self.entries[slot]
            if entry.pins == 0:
                _c.kv_lru_unlink(&self.lru, slot)
                self.count.num_pinned += 1
            entry.pins += 1
            entry.facts &= ~_c.KV_OFFERED
            slots[i] = slot
            count += 1
        self.count.hits += count
        self.count.misses += n - count
        _c.pthread_mutex_unlock(&self.mutex)
        for i in range(rest, n):
            slots[i] = _c.KV_NO_SLOT
        return count

    cdef void release_slots(self, const uint32_t *slots, size_t n) noexcept nogil:
        _c.pthread_mutex_lock(&self.mutex)
        self.release_locked(slots, n)
        _c.pthread_mutex_unlock(&self.mutex)

    cdef size_t take_coldest(self, size_t n, BlockArrays *blocks) noexcept nogil:
        cdef uint32_t slot
        cdef size_t count = 0
        _c.pthread_mutex_lock(&self.mutex)
        while count < n:
            slot = _c.kv_lru_coldest_recent(&self.lru)
            if slot == self.lru.recent:
                break
            _c.kv_lru_unlink(&self.lru, slot)
            self.entries[slot].pins = 1
            self.entries[slot].facts |= _c.KV_OFFERED
            self.note_block(blocks, slot)
            count += 1
        self.count.num_pinned += <uint32_t>count
        _c.pthread_mutex_unlock(&self.mutex)
        return count

    cdef void take_border_back(self) noexcept nogil:
        _c.pthread_mutex_lock(&self.mutex)
        _c.kv_lru_offer_again(&self.lru)
        _c.pthread_mutex_unlock(&self.mutex)

    cdef size_t lookup_keys(self, const uint8_t *keys, size_t n, uint8_t *mask) noexcept nogil:
        cdef uint64_t hashes[CHUNK]
        cdef size_t i, leading = n
        cdef _c.kv_key key
        cdef _c.kv_table table = self.table  # never changes, but lies beside what writers change all the time
        for i in range(n):
            if i % CHUNK == 0:
                _c.kv_table_prefetch(&table, keys + i * KEY_BYTES, min(n - i, <size_t>CHUNK), hashes)
            key = _c.kv_key_load(keys + i * KEY_BYTES)
            mask[i] = _c.kv_table_has_ready(&table, &key, hashes[i % CHUNK])
            if not mask[i] and leading == n:
                leading = i
        return leading

    cdef size_t touch_keys(self, const uint8_t *keys, size_t n, uint8_t *mask=NULL) noexcept nogil:
        cdef size_t count
        _c.pthread_mutex_lock(&self.mutex)
        count = self.touch_locked(keys, n, mask, NULL)
        _c.pthread_mutex_unlock(&self.mutex)
        return count

    cdef void find_keys(self, const uint8_t *keys, size_t n, uint32_t *slots) noexcept nogil:
        cdef uint64_t hashes[CHUNK]
        cdef size_t i
        _c.pthread_mutex_lock(&self.mutex)
        for i in range(n):
            if i % CHUNK == 0:
                self.hash_chunk(keys, n, i, hashes)
            slots[i] = self.find(keys + i * KEY_BYTES, hashes[i % CHUNK])
        _c.pthread_mutex_unlock(&self.mutex)

    cdef void read_lengths(self, const uint32_t *slots, size_t n, uint32_t *lengths) noexcept nogil:
        cdef size_t i
        _c.pthread_mutex_lock(&self.mutex)
        for i in range(n):
            lengths[i] = 0
            if _c.kv_entry_state(&self.entries[slots[i]]) >= _c.KV_WRITING:
                lengths[i] = self.entries[slots[i]].length
        _c.pthread_mutex_unlock(&self.mutex)

    cdef size_t discard_keys(self, const uint8_t *keys, size_t n) noexcept nogil:
        cdef uint64_t hashes[CHUNK]
        cdef uint32_t slot
        cdef size_t i, count = 0
        _c.pthread_mutex_lock(&self.mutex)
        for i in range(n):
            if i % CHUNK == 0:
                self.hash_chunk(keys, n, i, hashes)
            slot = self.find(keys + i * KEY_BYTES, hashes[i % CHUNK])
            if slot != _c.KV_NO_SLOT:
                self.forget(slot, hashes[i % CHUNK])
                count += 1
        self.count.discards += count
        _c.pthread_mutex_unlock(&self.mutex)
        return count

    cdef size_t evict_slots(self, size_t n) noexcept nogil:
        cdef uint32_t slot
        cdef size_t count = 0
        _c.pthread_mutex_lock(&self.mutex)
        while count < n and not _c.kv_lru_is_empty(&self.lru):
            slot = _c.kv_lru_coldest(&self.lru)
            self.count.dirty_evictions += (self.entries[slot].facts & _c.KV_CLEAN) == 0
            self.forget(slot, self.hash_of(slot))
            count += 1
        self.count.evictions += count
        _c.pthread_mutex_unlock(&self.mutex)
        return count

    cdef void clear_all(self) noexcept nogil:
        cdef uint32_t slot, state
        _c.pthread_mutex_lock(&self.mutex)
        for slot in range(self.num_slots):
            state = _c.kv_entry_state(&self.entries[slot])
            if state >= _c.KV_WRITING and not _c.kv_entry_is_discarded(&self.entries[slot]):
                self.drop(slot)
                self.count.discards += 1
        _c.kv_table_clear(&self.table)
        _c.pthread_mutex_unlock(&self.mutex)

    cdef void add_slot_range(self, uint32_t first, uint32_t count) noexcept nogil:
        _c.pthread_mutex_lock(&self.mutex)
        self.add_locked(first, count)
        _c.pthread_mutex_unlock(&self.mutex)

    cdef void read_counters(self, IndexCounters *target) noexcept nogil:
        _c.pthread_mutex_lock(&self.mutex)
        target[0] = self.count
        _c.pthread_mutex_unlock(&self.mutex)

    # ---- steps, with the mutex held ---------------------------------------------------------------------------------

    # Fills hashes for the chunk of keys that begins with the i-th, and prefetches what finding them reads.
    cdef void hash_chunk(self, const uint8_t *keys, size_t n, size_t i, uint64_t *hashes) noexcept nogil:
        _c.kv_table_prefetch(&self.table, keys + i * KEY_BYTES, min(n - i, <size_t>CHUNK), hashes)

    cdef uint64_t hash_of(self, uint32_t slot) noexcept nogil:
        cdef _c.kv_key key = _c.kv_entry_key(&self.entries[slot])
        return _c.kv_table_hash(&self.table, &key)

    cdef uint32_t find(self, const uint8_t *key_bytes, uint64_t hash) noexcept nogil:
        cdef _c.kv_key key = _c.kv_key_load(key_bytes)
        return _c.kv_table_find(&self.table, &key, hash)

    # A slot off the free list, or the coldest block unless it is `kept` or `kept_too`; otherwise NO_SLOT, as when
    # everything is pinned or being written.
    cdef uint32_t take_slot(self, uint32_t kept, uint32_t kept_too, BlockArrays *victims) noexcept nogil:
        cdef uint32_t slot
        if not _c.kv_list_is_empty(self.entries, self.free_list):
            slot = _c.kv_list_first(self.entries, self.free_list)
            self.count.num_free -= 1
        elif not _c.kv_lru_is_empty(&self.lru):
            slot = _c.kv_lru_coldest(&self.lru)
            if slot == kept or slot == kept_too:
                return _c.KV_NO_SLOT
            if victims != NULL:
                self.note_block(victims, slot)
            _c.kv_table_erase(&self.table, self.hash_of(slot), slot)
            self.count.num_ready -= 1
            self.count.evictions += 1
            self.count.dirty_evictions += (self.entries[slot].facts & _c.KV_CLEAN) == 0
            self.set_clean(&self.entries[slot], False)
        else:
            return _c.KV_NO_SLOT
        _c.kv_list_unlink(self.entries, slot)
        return slot

    # Takes the scout one block further up from the cold end, and asks memory for what evicting that block will read. A
    # list is a chain of cache misses, each known only after the one before; so somebody walks ahead. The scout is a
    # sentinel at first. Blocks that move meanwhile lead it astray, which costs speed only.
    cdef uint32_t look_ahead(self, uint32_t scout) noexcept nogil:
        cdef int steps = AHEAD if scout == self.lru.recent or scout == self.lru.offered else 1
        while steps > 0:
            scout = _c.kv_list_before(self.entries, scout)
            _c.kv_table_prefetch_home(&self.table, self.hash_of(scout))
            steps -= 1
        _c.kv_entry_prefetch(self.entries, _c.kv_list_before(self.entries, scout))
        return scout

    # Unlinks the key at once, whatever its state.
    cdef void forget(self, uint32_t slot, uint64_t hash) noexcept nogil:
        _c.kv_table_erase(&self.table, hash, slot)
        self.drop(slot)

    # Writes down what is known of a block, before it goes or while it is pinned.
    cdef void note_block(self, BlockArrays *blocks, uint32_t slot) noexcept nogil:
        cdef _c.kv_key key = _c.kv_entry_key(&self.entries[slot])
        memcpy(blocks.keys + blocks.count * KEY_BYTES, &key, KEY_BYTES)
        blocks.slots[blocks.count] = slot
        blocks.lengths[blocks.count] = self.entries[slot].length
        blocks.facts[blocks.count] = <uint8_t>self.entries[slot].facts
        blocks.count += 1

    # The part of forget after the table: the slot is freed now, or by whoever holds it.
    cdef void drop(self, uint32_t slot) noexcept nogil:
        cdef _c.kv_entry *entry = &self.entries[slot]
        if _c.kv_entry_state(entry) == _c.KV_WRITING or entry.pins > 0:
            _c.kv_entry_set_discarded(entry)
        else:
            _c.kv_list_unlink(self.entries, slot)
            self.count.num_ready -= 1
            self.free_slot(slot)

    cdef void set_clean(self, _c.kv_entry *entry, bint is_clean) noexcept nogil:
        if is_clean != ((entry.facts & _c.KV_CLEAN) != 0):
            entry.facts ^= _c.KV_CLEAN
            if is_clean:
                self.count.num_clean += 1
            else:
                self.count.num_clean -= 1

    cdef void free_slot(self, uint32_t slot) noexcept nogil:
        self.set_clean(&self.entries[slot], False)
        _c.kv_entry_set_state(&self.entries[slot], _c.KV_FREE)
        _c.kv_list_push_first(self.entries, self.free_list, slot)
        self.count.num_free += 1

    # Tail-first; -> how many are READY. `mask` tells which; `coldest`, the sentinel before, which was moved first. Both
    # may be NULL.
    cdef size_t touch_locked(self, const uint8_t *keys, size_t n, uint8_t *mask, uint32_t *coldest) noexcept nogil:
        cdef uint64_t hashes[CHUNK]
        cdef uint32_t slots[CHUNK]
        cdef uint32_t slot
        cdef size_t i, first, last = n, count = 0
        while last > 0:
            first = (last - 1) // CHUNK * CHUNK
            self.hash_chunk(keys, n, first, hashes)
            for i in range(first, last):
                slot = self.find(keys + i * KEY_BYTES, hashes[i % CHUNK])
                if slot != _c.KV_NO_SLOT and _c.kv_entry_state(&self.entries[slot]) != _c.KV_READY:
                    slot = _c.KV_NO_SLOT
                if slot != _c.KV_NO_SLOT:
                    _c.kv_list_prefetch_neighbours(self.entries, slot)
                if mask != NULL:
                    mask[i] = slot != _c.KV_NO_SLOT
                slots[i - first] = slot
            for i in range(last, first, -1):
                slot = slots[i - 1 - first]
                if slot != _c.KV_NO_SLOT:
                    count += 1
                    self.entries[slot].facts &= ~_c.KV_OFFERED
                    if self.entries[slot].pins == 0:
                        if coldest != NULL and coldest[0] == slot:  # named twice: the next hotter one is now
                            coldest[0] = _c.kv_list_before(self.entries, slot)
                        _c.kv_lru_use(&self.lru, slot)
                        if coldest != NULL and coldest[0] == self.lru.recent:
                            coldest[0] = slot
            last = first
        return count

    cdef size_t commit_locked(self, const uint32_t *slots, size_t n, const uint32_t *pins, size_t pin_step,
                              uint8_t *statuses, bint clean, uint64_t *nbytes=NULL,
                              bint ram_only=False) noexcept nogil:
        cdef uint32_t slot
        cdef size_t i, num_ready = 0
        cdef uint64_t length_sum = 0
        cdef bint discarded
        for i in range(n, 0, -1):
            slot = slots[i - 1]
            if slot == _c.KV_NO_SLOT:
                continue
            _c.KV_ASSERT(slot < self.num_slots and _c.kv_entry_state(&self.entries[slot]) == _c.KV_WRITING)
            self.count.num_writing -= 1
            discarded = _c.kv_entry_is_discarded(&self.entries[slot])
            if statuses != NULL:
                statuses[i - 1] = _c.KV_COMMIT_DISCARDED if discarded else _c.KV_COMMIT_READY
            if discarded:
                self.free_slot(slot)
                continue
            num_ready += 1
            length_sum += self.entries[slot].length
            self.count.num_ready += 1
            if clean:
                self.set_clean(&self.entries[slot], True)
            if ram_only:
                self.entries[slot].facts |= _c.KV_RAM_ONLY
            self.entries[slot].pins = pins[(i - 1) * pin_step]
            if self.entries[slot].pins:
                self.count.num_pinned += 1
            else:
                _c.kv_lru_push(&self.lru, slot)
            _c.kv_entry_set_state(&self.entries[slot], _c.KV_READY)
        if nbytes != NULL:
            nbytes[0] = length_sum
        return num_ready

    cdef void abort_locked(self, const uint32_t *slots, size_t n) noexcept nogil:
        cdef uint32_t slot
        cdef size_t i
        for i in range(n, 0, -1):  # backwards, so that the free list hands them out in this order again
            slot = slots[i - 1]
            if slot == _c.KV_NO_SLOT:
                continue
            _c.KV_ASSERT(slot < self.num_slots and _c.kv_entry_state(&self.entries[slot]) == _c.KV_WRITING)
            if not _c.kv_entry_is_discarded(&self.entries[slot]):
                _c.kv_table_erase(&self.table, self.hash_of(slot), slot)
            self.count.num_writing -= 1
            self.free_slot(slot)

    cdef void release_locked(self, const uint32_t *slots, size_t n) noexcept nogil:
        cdef uint32_t slot
        cdef size_t i
        cdef _c.kv_entry *entry
        for i in range(n, 0, -1):
            slot = slots[i - 1]
            if slot == _c.KV_NO_SLOT:
                continue
            entry = &self.entries[slot]
            entry.facts &= ~_c.KV_OFFERED
            if unpin(self, slot, entry):
                _c.kv_lru_push(&self.lru, slot)

    # In the order in which they were taken, for those that passed; the others go back as they were, the coldest last.
    cdef void release_offered_locked(self, const uint32_t *slots, const uint8_t *passed, const uint8_t *clean,
                                     const uint8_t *ram_only, size_t n) noexcept nogil:
        cdef size_t i
        cdef _c.kv_entry *entry
        for i in range(n):
            if not passed[i]:
                continue
            entry = &self.entries[slots[i]]
            if clean[i]:
                self.set_clean(entry, True)
            if ram_only[i]:
                entry.facts |= _c.KV_RAM_ONLY
            if unpin(self, slots[i], entry):
                if entry.facts & _c.KV_OFFERED:
                    _c.kv_lru_push_offered(&self.lru, slots[i])
                else:  # used meanwhile
                    _c.kv_lru_push(&self.lru, slots[i])
        for i in range(n, 0, -1):
            if passed[i - 1]:
                continue
            entry = &self.entries[slots[i - 1]]
            if unpin(self, slots[i - 1], entry):
                if entry.facts & _c.KV_OFFERED:
                    _c.kv_lru_push_coldest_recent(&self.lru, slots[i - 1])
                else:
                    _c.kv_lru_push(&self.lru, slots[i - 1])
            entry.facts &= ~_c.KV_OFFERED

    cdef void add_locked(self, uint32_t first, uint32_t count) noexcept nogil:
        cdef uint32_t slot
        _c.KV_ASSERT(first <= self.num_slots and count <= self.num_slots - first)
        for slot in range(first, first + count):
            _c.KV_ASSERT(_c.kv_entry_state(&self.entries[slot]) == _c.KV_ABSENT)
            _c.kv_entry_set_state(&self.entries[slot], _c.KV_FREE)
            _c.kv_list_push_last(self.entries, self.free_list, slot)
        self.count.num_free += count
        self.count.slots_added += count

    # The index in `slots` of the first that is in another state or was met before; n if all are well.
    cdef size_t first_not_in_state(self, const uint32_t *slots, size_t n, uint32_t state) noexcept nogil:
        cdef size_t i, bad = n
        for i in range(n):
            if (slots[i] >= self.num_slots or _c.kv_entry_state(&self.entries[slots[i]]) != state
                    or self.entries[slots[i]].mark):
                bad = i
                break
            self.entries[slots[i]].mark = 1
        for i in range(bad):
            self.entries[slots[i]].mark = 0
        return bad

    # The index in `slots` of the first that is not pinned so often; n if all are well. Counts down, then up again.
    cdef size_t first_not_pinned(self, const uint32_t *slots, size_t n) noexcept nogil:
        cdef size_t i, bad = n
        for i in range(n):
            if (slots[i] >= self.num_slots or _c.kv_entry_state(&self.entries[slots[i]]) != _c.KV_READY
                    or self.entries[slots[i]].pins == 0):
                bad = i
                break
            self.entries[slots[i]].pins -= 1
        for i in range(bad):
            self.entries[slots[i]].pins += 1
        return bad


# Takes one pin back. True if it was the last one of a block that stays, which belongs on a list now. No method, because
# those are not inlined, and a release would take a tenth longer.
cdef inline bint unpin(BlockIndex index, uint32_t slot, _c.kv_entry *entry) noexcept nogil:
    _c.KV_ASSERT(slot < index.num_slots and _c.kv_entry_state(entry) == _c.KV_READY and entry.pins > 0)
    entry.pins -= 1
    if entry.pins > 0:
        return False
    index.count.num_pinned -= 1
    if not _c.kv_entry_is_discarded(entry):
        return True
    index.count.num_ready -= 1
    index.free_slot(slot)
    return False


# Where an array begins that was just made here. A typed view of it costs several times as much, and guards against
# what nobody else can do to it yet.
cdef void *memory_of(object made_here) except? NULL:
    cdef Py_buffer buffer
    PyObject_GetBuffer(made_here, &buffer, PyBUF_WRITABLE)
    PyBuffer_Release(&buffer)
    return buffer.buf


cdef object new_blocks(size_t n, BlockArrays *noted):
    """`Blocks` with room for n, and where their arrays begin."""
    blocks = Blocks(np.empty(n, UINT32), np.empty((n, KEY_BYTES), UINT8), np.empty(n, UINT32), np.empty(n, UINT8))
    noted.slots, noted.keys = <uint32_t *>memory_of(blocks.slots), <uint8_t *>memory_of(blocks.keys)
    noted.lengths, noted.facts = <uint32_t *>memory_of(blocks.lengths), <uint8_t *>memory_of(blocks.facts)
    noted.count = 0
    return blocks


cdef object blocks_so_far(object blocks, size_t count):
    return Blocks(*[array[:count] for array in blocks])


cdef object as_count(object n, str name):
    if type(n) is not int:
        n = whole_number(n, name)
    if n < 0:
        raise ValueError(f"{name} must be at least 0, got {n}")
    return min(n, 0xFFFFFFFF)


cdef object as_flags(object flags, size_t n, str name):
    """One bool for each of n, as bytes."""
    array = np.asarray(flags)
    if array.shape == (n,) == (0,):  # an empty list has no dtype of its own
        array = array.astype(BOOL)
    if array.dtype != BOOL or array.shape not in ((), (n,)):
        raise ValueError(f"{name} must be a bool or {n}, one a slot; got dtype {array.dtype}, shape {array.shape}")
    return np.array(np.broadcast_to(array, (n,)), order="C").view(UINT8)


cdef object as_uint32(object values, str name):
    array = np.asarray(values)
    if array.dtype == UINT32:  # whatever it holds is in range
        return array
    if array.size == 0:
        return np.empty(array.shape, np.uint32)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got dtype {array.dtype}")
    low, high = array.min(), array.max()
    if low < 0 or high > 0xFFFFFFFF:
        raise ValueError(f"{name} must be in 0 .. {0xFFFFFFFF}, got {low if low < 0 else high}")
    return array.astype(UINT32)


cdef object as_lengths(object lengths, size_t n):
    if type(lengths) is int and 0 <= lengths <= 0xFFFFFFFF:
        return np.array([lengths], np.uint32)
    array = as_uint32(lengths, "lengths")
    if array.ndim == 0:
        return array.reshape(1)
    if array.ndim != 1 or array.shape[0] != n:
        raise ValueError(f"lengths must be one int or {n}, one a key; got shape {array.shape}")
    return np.ascontiguousarray(array)


cdef object as_slots(object slots, str name="slots"):
    array = as_uint32(slots, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    return array.copy()  # dense, and nobody changes it between the check and the use


cdef object bad_slot(str verb, uint32_t slot, size_t position, uint32_t num_slots, str reason):
    if slot >= num_slots:
        reason = f"not within the {num_slots} slots of this index"
    return ValueError(f"{verb}: slots[{position}] = {slot} is {reason}; nothing was changed")
