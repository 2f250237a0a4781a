"""The paged KV cache of a pretended model, in device memory: what replay saves from and loads into.

It is reached with plain copies of one run of rows each (or directly, on the host device), never through the transfer
planner: the planner is what is being checked.
"""

import os
import queue
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import kvortex
from kvortex.memory.limits import require_memory
from kvortex.replay.oracle import POISON, rows_differ
from kvortex.slots import stride_bytes

_ARENA_UNIT_BYTES = 2 << 20  # arenas round up to it
_MAX_COPY_THREADS = 8  # copies to and from a GPU; more than this and the memory bus is the limit


class ModelCache:
    """Device memory of shape ``[kv, layers, num_blocks, piece_bytes]``, filled and checked by an oracle.

    `write` and `count_wrong` are complete on return, and come after nothing: nobody else may be using the blocks.

    Parameters
    ----------
    device : kvortex.Device
    num_blocks, num_pieces : int
        `num_pieces` is even: K and V of half as many layers.
    oracle : Oracle
    max_rows : int
        Most blocks one call will write or check.
    direct : bool, optional
        Reach the memory through a view of it instead of copies: what the host device allows, and its default.

    Raises
    ------
    kvortex.ConfigError
        The device cannot hold it.
    """

    def __init__(self, device, num_blocks, num_pieces, oracle, max_rows, direct=None):
        self.num_pieces = num_pieces
        self.piece_bytes = oracle.piece_bytes
        self._num_blocks = num_blocks
        self._oracle = oracle
        self._buffer = _allocate(device, num_pieces, num_blocks * self.piece_bytes)
        self._threads = self._view = self._pinned = None
        try:
            self._reach(device, max_rows, device.is_host if direct is None else direct)
        except BaseException:
            self.close()  # or a traceback would keep it, and its memory would outlive the device that frees it
            raise

    def _reach(self, device, max_rows, direct):
        """Make what the memory is reached with."""
        num_pieces, num_blocks = self.num_pieces, self._num_blocks
        self.layout = kvortex.KVLayout.contiguous(
            self._buffer,
            kv=2,
            num_layers=num_pieces // 2,
            num_blocks=num_blocks,
            block_size=1,
            num_heads=1,
            head_dim=self.piece_bytes,
            itemsize=1,
        )
        workers = 1
        if direct:
            self._view = np.frombuffer(self._buffer, dtype=np.uint8).reshape(num_pieces, num_blocks, self.piece_bytes)
        else:
            workers = min(_MAX_COPY_THREADS, os.cpu_count(), num_pieces)
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="kvortex-replay")
            scratch_bytes = 2 * max_rows * self.piece_bytes
            pool_bytes = workers * stride_bytes(scratch_bytes)
            self._pinned = kvortex.PinnedPool(pool_bytes, scratch_bytes, device)  # pageable copies are 5x slower
            self._pinned.wait_ready()
        self._workers = workers
        self._scratch = queue.SimpleQueue()  # a pair of row buffers for each worker
        for worker in range(workers):
            shape = (2, max_rows, self.piece_bytes)
            if self._pinned is None:
                self._scratch.put(np.zeros(shape, dtype=np.uint8))
            else:
                self._scratch.put(np.frombuffer(self._pinned.view(worker), dtype=np.uint8).reshape(shape))

    def close(self):
        """Free the device memory. No job may still use it."""
        if self._threads is not None:
            self._threads.shutdown()
        self._view = self.layout = None
        self._buffer.close()
        if self._pinned is not None:
            self._pinned.close()

    def write(self, first, words, generations):
        """Give the blocks from `first` on the content that belongs to `words` and `generations`."""

        def write_piece(piece, scratch):
            rows = self._rows(piece, first, len(words), scratch[0])
            self._oracle.write(rows, words, generations, piece)
            if self._view is None:
                self._buffer.copy_from(rows, offset=self._offset(piece, first))

        self._each_piece(write_piece)

    def poison(self, first, count, stream):
        """Overwrite `count` blocks from `first` on with one byte, in the order of `stream`; may return early."""
        for piece in range(self.num_pieces):
            self._buffer.fill(POISON, self._offset(piece, first), count * self.piece_bytes, stream)

    def count_wrong(self, first, words, generations, num_loaded):
        """How many blocks from `first` on are wrong.

        The first `num_loaded` must have the content of `words` and `generations`; the rest, up to ``len(words)``,
        must still be poisoned.
        """

        def check_piece(piece, scratch):
            rows = self._rows(piece, first, len(words), scratch[0])
            if self._view is None:
                self._buffer.copy_to(rows, offset=self._offset(piece, first))
            expected = scratch[1, : len(words)]
            self._oracle.write(expected[:num_loaded], words[:num_loaded], generations[:num_loaded], piece)
            expected[num_loaded:] = POISON
            return rows_differ(rows, expected)

        return int(np.logical_or.reduce(self._each_piece(check_piece)).sum())

    def _rows(self, piece, first, count, scratch):
        return scratch[:count] if self._view is None else self._view[piece, first : first + count]

    def _offset(self, piece, first):
        return (piece * self._num_blocks + first) * self.piece_bytes

    def _each_piece(self, work):
        """Call ``work(piece, scratch)`` for every piece, on all workers, and return the results."""

        def every_nth(start):
            scratch = self._scratch.get()
            try:
                return [work(piece, scratch) for piece in range(start, self.num_pieces, self._workers)]
            finally:
                self._scratch.put(scratch)

        if self._threads is None:
            return every_nth(0)
        return [result for part in self._threads.map(every_nth, range(self._workers)) for result in part]


def _allocate(device, num_layers, layer_bytes):
    """Memory for all layers, grown one by one as a runtime would, and one range all the same: a `DeviceArena`."""
    num_bytes = num_layers * layer_bytes
    try:
        if device.is_host:  # it would hand out address space, and the process would be killed when it is touched
            require_memory(num_bytes)
        with kvortex.DevicePool(num_bytes + _ARENA_UNIT_BYTES, device) as pool:
            arena = pool.arena(num_bytes)
            try:
                for _ in range(num_layers):
                    arena.grow(layer_bytes)
            except BaseException:
                arena.close()
                raise
    except (kvortex.DriverError, kvortex.PoolExhausted) as error:
        raise kvortex.ConfigError(
            f"{device.name} cannot hold the replayed model's KV cache of {num_bytes} bytes; lower --inflight or "
            "--block-bytes, or leave the largest requests out with --limit"
        ) from error
    return arena
