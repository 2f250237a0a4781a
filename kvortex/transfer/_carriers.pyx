# cython: nonecheck=False
"""Which carrier moves the blocks of which layout, and which layouts may be there together. Everything under the GIL."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint64_t

cimport kvortex._c as _c
from kvortex.driver._device cimport require_timeout
from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._carrier cimport Carrier
from kvortex.transfer._completion cimport CompletionThread
from kvortex.transfer._job_table cimport retire_hook
from kvortex.transfer._layout cimport KVLayout
from kvortex.transfer._packing cimport Packing
from kvortex.transfer._submitter cimport Submitter
from kvortex.transfer._transfer_queue cimport TransferQueue

from kvortex.errors import ConfigError
from kvortex.transfer._packing import packed_bytes
from kvortex.transfer.overlaps import find_shared

cdef uint64_t NAP_NS = 100_000


@cython.no_gc_clear  # in a garbage cycle the engine still closes its queues through it
cdef class Carriers:
    def __cinit__(self, PinnedPool pool not None):
        self.pool, self.by_layout, self.queues = pool, {}, ()

    cdef int start(self, Carrier first, retire_hook hook, void *owner) except -1:
        """Serve a first carrier."""
        self.signals, self.hook, self.hook_owner = first.signals, hook, owner
        self.thread = CompletionThread(first.device, self.signals, ())
        return self.add(first)

    cdef int require_submitter(self) except -1:
        if self.submitter is None:
            self.submitter = Submitter(self.pool.device, self.signals, self.queues)
        return 0

    cdef Carrier of(self, object layout):
        cdef Carrier carrier
        if layout is None:
            if self.first is None:
                raise ValueError("all layouts of this engine were removed; call add_layout")
            return self.first
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout must be a KVLayout, got {type(layout).__name__}")
        carrier = self.by_layout.get((<KVLayout>layout).whole or layout)
        if carrier is None or carrier.refuses:
            raise ValueError(f"{layout!r} is none of this engine's {len(self.layouts)} layouts; call add_layout with "
                             f"it, or with the layout that it is a part of")
        return carrier

    @property
    def layouts(self):
        """The layouts that calls may name, in the order of adding."""
        return tuple([layout for layout, carrier in self.by_layout.items()
                      if layout is not None and not (<Carrier>carrier).refuses])

    cdef bytes fingerprint_of(self, KVLayout layout):
        """`KVLayout.fingerprint`, or for packed blocks one that also says how they are packed.

        Only blocks of one fingerprint answer for each other.
        """
        cdef Carrier carrier = self.by_layout.get(layout.whole or layout)
        cdef Packing packing = None
        if carrier is not None and carrier.packings is not None:
            packing = carrier.packings.of(layout)
        return layout.fingerprint if packing is None else packing.fingerprint

    cdef int require_fit(self, KVLayout layout, object codec, object exact_layers) except -1:
        """Refuse a layout that cannot be moved, or that shares memory with another one."""
        cdef KVLayout other
        if layout.whole is not None:
            raise ValueError(f"{layout!r} is a part; add the layout that it is a part of, and name the part in calls")
        if layout in self.by_layout:
            raise ValueError(f"{layout!r} was added already" + (
                "; it is being removed: let remove_layout return first" if (<Carrier>self.by_layout[layout]).refuses
                else ""))
        slot_bytes = packed_bytes(layout, codec, exact_layers)
        if slot_bytes > self.pool.slots.payload_bytes:
            raise ConfigError(f"the layout's blocks take {slot_bytes} bytes, and slots of this engine's pool hold "
                              f"{self.pool.payload_bytes}; create it with block_bytes={slot_bytes}")
        for other in self.by_layout:
            if other is None:
                continue
            found = find_shared(layout.runs, layout.num_blocks, other.runs, other.num_blocks)
            if found is not None:
                (run, block), (other_run, other_block) = found
                raise ValueError(
                    f"block {block} of the layout (run {layout.runs[run]}) and block {other_block} of {other!r} (run "
                    f"{other.runs[other_run]}) share bytes, as (base, block_stride, piece_bytes); remove_layout that "
                    f"one first, or make one layout of both and name its parts (KVLayout.part)")
        return 0

    cdef int add(self, Carrier carrier) except -1:
        for queue in carrier.queues:
            (<TransferQueue>queue).hook, (<TransferQueue>queue).hook_owner = self.hook, self.hook_owner
        self.thread.polled.add(carrier.queues)
        try:
            if self.submitter is not None:
                self.submitter.add(carrier.queues)
            self.queues += carrier.queues
            self.by_layout[carrier.layout] = carrier
        except BaseException:
            self.drop(carrier, False)
            raise
        return self.choose()

    cdef Carrier refuse(self, object layout):
        cdef Carrier carrier = self.by_layout.get(layout)
        if carrier is None:
            self.of(layout)  # says why
            raise ValueError(f"{layout!r} is a part, which goes with its layout; remove that")
        carrier.refuse()
        self.choose()
        return carrier

    cdef int await_jobs(self, Carrier carrier, object timeout_ms, const bint *closing) except -1:
        cdef uint64_t deadline = _c.kv_deadline_ns(require_timeout(timeout_ms))
        cdef bint any_in_flight
        while True:
            any_in_flight = carrier.any_in_flight()
            if not any_in_flight and self.is_left(carrier):
                break
            if _c.kv_now_ns() >= deadline:
                what = f"jobs of {carrier.layout!r}" if any_in_flight else "calls of the driver"
                raise TimeoutError(f"{what} are not done after {timeout_ms} ms; the layout takes no more jobs, and "
                                   f"another remove_layout goes on waiting")
            with nogil:
                _c.kv_nap_ns(NAP_NS)
            PyErr_CheckSignals()
            if closing[0]:
                break
        return 0

    cdef bint is_left(self, Carrier carrier) noexcept:
        """Take the queues of a carrier from the threads. Return whether no thread looks at them any more."""
        cdef bint is_left = self.thread.polled.remove(carrier.queues)
        return (self.submitter is None or self.submitter.remove(carrier.queues)) and is_left

    cdef int drop(self, Carrier carrier, bint ended) except -1:
        if not ended:
            while not self.is_left(carrier):
                with nogil:
                    _c.kv_nap_ns(NAP_NS)
            if self.by_layout.get(carrier.layout) is carrier:
                del self.by_layout[carrier.layout]
            self.queues = tuple([queue for queue in self.queues if queue not in carrier.queues])
            self.choose()
        for queue in carrier.queues:
            (<TransferQueue>queue).end(_c.kv_deadline_ns(1000), False)
            (<TransferQueue>queue).hook = NULL
        return 0

    cdef int choose(self) except -1:
        """Set `first`: the carrier of the oldest layout, of the first fingerprint if one has it; else of raw memory."""
        cdef Carrier first = self.by_layout.get(None)
        layouts = self.layouts
        if layouts:
            if self.fingerprint is None:
                self.fingerprint = self.fingerprint_of(layouts[0])
            alike = [layout for layout in layouts if self.fingerprint_of(layout) == self.fingerprint]
            first = self.by_layout[(alike or layouts)[0]]
        self.first = first
        return 0
