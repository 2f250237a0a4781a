# cython: nonecheck=False
"""Wake the submitter when a job is handed over, the completion thread when one is sealed, event loops when retired."""

from posix.unistd cimport getpid

cimport kvortex._c as _c


cdef extern from *:
    """
    #include <sys/eventfd.h>
    /* It fails only if the counter is full, and then the loop is awake anyway. */
    static inline void kv_wake(int file) { (void)!eventfd_write(file, 1); }
    """
    void wake "kv_wake"(int file) nogil


cdef class JobSignals:
    """The wake-ups shared by the queues of one engine; nothing here takes the GIL."""

    def __cinit__(self):
        if _c.kv_monitor_init(&self.monitor):
            raise MemoryError("pthread_mutex_init failed")
        if _c.kv_monitor_init(&self.handing):
            _c.kv_monitor_destroy(&self.monitor)
            raise MemoryError("pthread_mutex_init failed")
        self.pid = getpid()

    def __dealloc__(self):
        # In a forked child the completion thread still counts as waiting, and destroying would wait for it for ever.
        if self.pid == getpid():
            _c.kv_monitor_destroy(&self.handing)
            _c.kv_monitor_destroy(&self.monitor)

    cdef void sealed(self) noexcept nogil:
        _c.kv_monitor_lock(&self.monitor)
        self.num_sealed += 1
        _c.kv_monitor_broadcast(&self.monitor)
        _c.kv_monitor_unlock(&self.monitor)
        _c.kv_monitor_lock(&self.handing)
        if self.is_held_up:
            self.num_handed += 1
            _c.kv_monitor_broadcast(&self.handing)
        _c.kv_monitor_unlock(&self.handing)

    cdef void retired(self) noexcept nogil:
        # The eventfds are non-blocking and written under the lock, so that none is closed in between.
        cdef int index
        _c.kv_monitor_lock(&self.monitor)
        for index in range(self.num_listeners):
            wake(self.listeners[index])
        _c.kv_monitor_unlock(&self.monitor)

    cdef void stop(self) noexcept nogil:
        _c.kv_monitor_lock(&self.monitor)
        self.stopping = True
        _c.kv_monitor_broadcast(&self.monitor)
        _c.kv_monitor_unlock(&self.monitor)

    def add_listener(self, int eventfd):
        """Write to `eventfd` (non-blocking) whenever a job is retired. False if there are `MAX_LISTENERS` already."""
        _c.kv_monitor_lock(&self.monitor)
        cdef bint added = self.num_listeners < MAX_LISTENERS
        if added:
            self.listeners[self.num_listeners] = eventfd
            self.num_listeners += 1
        _c.kv_monitor_unlock(&self.monitor)
        return added

    def remove_listener(self, int eventfd):
        """Stop writing to `eventfd`; after this call it may be closed."""
        cdef int index
        _c.kv_monitor_lock(&self.monitor)
        for index in range(self.num_listeners):
            if self.listeners[index] == eventfd:
                self.num_listeners -= 1
                self.listeners[index] = self.listeners[self.num_listeners]
                break
        _c.kv_monitor_unlock(&self.monitor)
