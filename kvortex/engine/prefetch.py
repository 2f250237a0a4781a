"""Prefetch: the caller's hold on blocks that come into RAM from a lower tier."""

import asyncio
import concurrent.futures
import weakref


def require_ms(name, value):
    """Refuse what is no time in milliseconds."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be an int of 0 or more, got {value!r}")


class Prefetch:
    """Blocks that come into RAM, and stay there until their reader has them.

    Made by `KVortexEngine.prefetch`. The blocks are pinned until `close`, until ``load_blocks(..., prefetched=this)``
    has pinned them itself, until `hold_ms` after the last of them came, or until this object is dropped. It can be
    awaited, and is a context manager.
    """

    def __init__(self, promoter, promotion):
        self._promoter, self._promotion = promoter, promotion
        self._finalizer = weakref.finalize(self, promoter.let_go, promotion)
        self._finalizer.atexit = False

    @property
    def num_blocks(self):
        """Blocks of the leading run in RAM so far, those included that were there before; final once `done`."""
        return self._promotion.num_landed

    def done(self):
        """Whether it has come as far as it will. Does not block."""
        return self._promotion.future.done()

    def wait(self, timeout_ms=None):
        """Block (GIL released) until it is done: at the latest when the `timeout_ms` of `prefetch` is over.

        Raises
        ------
        TimeoutError
            This call's own `timeout_ms` passed first.
        """
        try:
            self._promotion.future.result(None if timeout_ms is None else timeout_ms / 1000)
        except concurrent.futures.TimeoutError:
            raise TimeoutError(f"the prefetch is not done after {timeout_ms} ms") from None

    def wait_for_more(self, num_blocks):
        """Block (GIL released) until a window more than `num_blocks` has come, or all that will.

        Returns
        -------
        num_blocks : int
        is_over : bool
        """
        return self._promoter.wait_for_more(self._promotion, num_blocks)

    def close(self):
        """Let the blocks be evicted again; what has not come yet is no longer waited for. Idempotent."""
        self._finalizer.detach()
        self._promoter.close(self._promotion)

    def __await__(self):
        yield from asyncio.shield(asyncio.wrap_future(self._promotion.future)).__await__()
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
