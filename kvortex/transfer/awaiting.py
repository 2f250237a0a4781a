"""`await job`: one eventfd a loop, written by whoever retires a job, without the GIL."""

import os
import weakref

POLL_S = 0.0005

# loop -> {signals: _LoopListener}. Weak on both sides: the coroutines that wait keep their listener, and a loop that is
# dropped with coroutines still waiting takes them along.
_listeners = weakref.WeakKeyDictionary()


class _LoopListener:
    """The jobs of one engine that one event loop waits for."""

    def __init__(self, loop, signals):
        self.loop = loop
        self.signals = signals
        self.waiting = {}  # future -> job
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        signals.add_listener(self.eventfd)
        loop.add_reader(self.eventfd, self._on_retired)

    def _on_retired(self):
        try:
            os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return
        for future, job in list(self.waiting.items()):
            if not future.done() and job.done():
                future.set_result(None)

    def close(self):
        if self.eventfd >= 0:
            self.signals.remove_listener(self.eventfd)
            if not self.loop.is_closed():
                self.loop.remove_reader(self.eventfd)
            os.close(self.eventfd)
            self.eventfd = -1

    __del__ = close


async def wait_in_loop(job, signals):
    """Return when `job` is done. Cancelling leaves the job alone."""
    import asyncio  # here, since it is a third of what `import kvortex` would take, and those who await have it

    if not signals.served:  # a queue without an engine: nobody else retires its jobs
        while not job.done():
            await asyncio.sleep(POLL_S)
        return
    loop = asyncio.get_running_loop()
    of_loop = _listeners.setdefault(loop, weakref.WeakValueDictionary())
    listener = of_loop.get(signals)
    if listener is None:
        listener = of_loop[signals] = _LoopListener(loop, signals)
    future = loop.create_future()
    listener.waiting[future] = job
    try:
        # Retired between the caller's look and the listener's start: nobody would tell.
        if not job.done():
            await future
    finally:
        del listener.waiting[future]
        if not listener.waiting:
            of_loop.pop(signals, None)
            listener.close()
