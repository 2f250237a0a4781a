# cython: nonecheck=False
"""Which carrier moves the blocks of which layout, and which layouts may be there together. Everything under the GIL."""

from kvortex.memory._pinned_pool cimport PinnedPool
from kvortex.transfer._carrier cimport Carrier
from kvortex.transfer._layout cimport KVLayout

from kvortex.errors import ConfigError
from kvortex.transfer.overlaps import find_shared


cdef class Carriers:
    def __cinit__(self, PinnedPool pool not None, Carrier first not None):
        self.pool, self.by_layout, self.queues = pool, {}, ()
        self.add(first)

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
        """Those that calls may name, in the order of adding."""
        return tuple([layout for layout, carrier in self.by_layout.items()
                      if layout is not None and not (<Carrier>carrier).refuses])

    cdef int require_fit(self, KVLayout layout) except -1:
        """Refuse what could not be moved, and what would share memory with a layout that is there."""
        cdef KVLayout other
        if layout.whole is not None:
            raise ValueError(f"{layout!r} is a part; add the layout that it is a part of, and name the part in calls")
        if layout in self.by_layout:
            raise ValueError(f"{layout!r} was added already" + (
                "; it is being removed: let remove_layout return first" if (<Carrier>self.by_layout[layout]).refuses
                else ""))
        if layout.block_bytes > self.pool.slots.payload_bytes:
            raise ConfigError(f"the layout's blocks have {layout.block_bytes} bytes, and slots of this engine's pool "
                              f"hold {self.pool.payload_bytes}; create it with block_bytes={layout.block_bytes}")
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
        cdef tuple queues = self.queues + carrier.queues
        self.by_layout[carrier.layout] = carrier
        self.queues = queues
        return self.choose()

    cdef int refuse(self, Carrier carrier) except -1:
        carrier.refuse()
        return self.choose()

    cdef int remove(self, Carrier carrier) except -1:
        if self.by_layout.get(carrier.layout) is not carrier:
            return 0
        del self.by_layout[carrier.layout]
        self.queues = tuple([queue for queue in self.queues if queue not in carrier.queues])
        return self.choose()

    cdef int choose(self) except -1:
        """The first is that of the oldest layout; only where there is none, that for raw memory alone."""
        cdef Carrier carrier
        self.first = self.by_layout.get(None)
        for carrier in self.by_layout.values():
            if carrier.layout is not None and not carrier.refuses:
                self.first = carrier
                break
        return 0
