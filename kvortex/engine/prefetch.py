"""Prefetch: the caller's handle of blocks that are read from a lower tier into RAM."""

import asyncio
import concurrent.futures
import os
import weakref
from collections.abc import Callable, Generator
from typing import Any, Self

from kvortex.arguments import require_ms
from kvortex.errors import EngineClosed


class Prefetch:
    """Blocks that are being read into RAM, and stay pinned there until their reader has them.

    Made by `KVortexEngine.prefetch`. The blocks are pinned until `close`, until ``load_blocks(..., prefetched=this)``
    has pinned them itself, until `hold_ms` after the last of them came, or until this object is dropped. It can be
    awaited, and is a context manager.
    """

    def __init__(self, promotion: Any, let_go: Callable[[Any], object]) -> None:
        self._promotion, self._pid = promotion, os.getpid()
        self._finalizer = weakref.finalize(self, let_go, promotion)
        self._finalizer.atexit = False

    @property
    def num_blocks(self) -> int:
        """Blocks of the leading run in RAM so far, those included that were there before; final once `done`."""
        return self._promotion.num_landed

    def done(self) -> bool:
        """Whether no more blocks will come. Does not block."""
        return self._promotion.future.done()

    def wait(self, timeout_ms: int | None = None) -> None:
        """Block (GIL released) until it is done: at the latest when the `timeout_ms` of `prefetch` is over.

        Raises
        ------
        TimeoutError
            This call's own `timeout_ms` passed first.
        EngineClosed
            In a forked child.
        """
        timeout_s = None if timeout_ms is None else require_ms("timeout_ms", timeout_ms) / 1000
        self._require_ours()
        try:
            self._promotion.future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            raise TimeoutError(f"the prefetch is not done after {timeout_ms} ms") from None

    def wait_for_more(self, num_blocks: int) -> tuple[int, bool]:
        """Block (GIL released) until `num_blocks` blocks are in RAM, or no more will come.

        Returns
        -------
        num_blocks : int
        is_over : bool
        """
        self._require_ours()
        while True:
            landed, is_over = self._promotion.progress.get()
            if is_over or landed >= num_blocks:
                return landed, is_over

    def close(self) -> None:
        """Unpin the blocks soon, and wait for no more of them. Idempotent."""
        self._finalizer()

    def _require_ours(self):
        if os.getpid() != self._pid:
            raise EngineClosed("this prefetch belongs to the parent process")

    def __await__(self) -> Generator[Any, None, Self]:
        yield from asyncio.shield(asyncio.wrap_future(self._promotion.future)).__await__()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
