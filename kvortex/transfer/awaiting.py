"""`await job`: each event loop has one eventfd, which the thread that retires a job writes to, without the GIL."""

import contextlib
import os
import weakref

POLL_S = 0.0005

# loop -> {signals: _LoopListener}. Both are weak: waiting coroutines hold their listener. If a loop is dropped while
# coroutines wait, it takes them along.
_listeners = weakref.WeakKeyDictionary()


class _LoopListener:
    """The waits of one event loop for jobs of one engine."""

    def __init__(self, loop, signals):
        self.loop = loop
        self.signals = signals
        self.waiting = {}  # future -> job
        self.eventfd, self.is_told = -1, False
        try:
            self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            if signals.add_listener(self.eventfd):
                loop.add_reader(self.eventfd, self._on_retired)
                self.is_told = True
        except Exception:  # no descriptor is left, or the loop cannot watch one; loops raise different errors
            pass
        if not self.is_told:
            self.close()

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
            if self.is_told and not self.loop.is_closed():
                with contextlib.suppress(Exception):  # the job is over, whatever the loop raises
                    self.loop.remove_reader(self.eventfd)
            os.close(self.eventfd)
            self.eventfd = -1

    __del__ = close


async def wait_in_loop(job, signals):
    """Return when `job` is done. Cancelling leaves the job alone."""
    import asyncio  # here: it would be a third of `import kvortex`, and whoever awaits has it

    loop = asyncio.get_running_loop()
    of_loop = _listeners.setdefault(loop, weakref.WeakValueDictionary())
    listener = _listener(of_loop, loop, signals) if signals.served else None
    if listener is None:  # without an engine no other thread retires jobs; or the loop cannot be woken
        while not job.done():
            await asyncio.sleep(POLL_S)
        return
    future = loop.create_future()
    listener.waiting[future] = job
    try:
        # If the job was retired before the listener was there, no wake-up comes.
        if not job.done():
            await future
    finally:
        del listener.waiting[future]
        if not listener.waiting:
            of_loop.pop(signals, None)
            listener.close()


def _listener(of_loop, loop, signals):
    """Return the listener of a loop for these signals; None if there are too many, or no descriptor is left."""
    listener = of_loop.get(signals)
    if listener is None:
        listener = _LoopListener(loop, signals)
        if not listener.is_told:
            return None
        of_loop[signals] = listener
    return listener
