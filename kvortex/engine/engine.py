"""KVortexEngine: the one module that joins the parts, and the promise made to users."""

import atexit
import hashlib
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Never, Self

from kvortex.arguments import require_ms
from kvortex.config import KVortexConfig
from kvortex.driver import Device
from kvortex.engine._engine import BlockHits, EngineCore
from kvortex.errors import ConfigError, EngineClosed
from kvortex.index import BlockIndex
from kvortex.log import log
from kvortex.memory import DevicePool, PinnedPool
from kvortex.transfer import Carrier, KVLayout, packed_bytes, slot_block

if TYPE_CHECKING:  # which most engines, and imports of kvortex, do without
    import numpy as np
    from numpy.typing import NDArray

    from kvortex.engine.prefetch import Prefetch

__all__ = ["BlockHits", "KVortexEngine"]

_engines = weakref.WeakSet()


class KVortexEngine(EngineCore):
    """Keep KV blocks in pinned host memory and bring them back on a prefix hit.

    Made by `create`. Every verb may be called from any thread; those that copy, look up or wait release the GIL. What
    each one does stands in its own docstring.

    Attributes
    ----------
    device : Device
    device_pool : DevicePool or None
        Of `gpu_pool_size_bytes`; closed with the engine, after its jobs.
    pool : PinnedPool
    index : BlockIndex
        Pool and index are for reading. Only the engine may commit, abort and release the slots of its jobs: if other
        code does, the process ends.
    layout : KVLayout or None
        The layout of calls that name none: that of `create`. If it was removed: the oldest one of the same
        `KVLayout.fingerprint` (a cache that was moved), or else the oldest.
    layouts : tuple of KVLayout
        That of `create` and those of `add_layout`.
    config : KVortexConfig
    """

    config: KVortexConfig

    def __init__(self, *parts: Never) -> None:  # for type checkers: nobody but `create` calls it
        if not parts or isinstance(parts[0], KVortexConfig):
            raise TypeError("an engine is made by KVortexEngine.create(config, layout=...)")
        super().__init__(*parts)

    def __repr__(self) -> str:
        if self.device is None:
            return "KVortexEngine(never created)"
        what = f"{len(self.layouts)} layouts" if self.layouts else "raw memory"
        state = "failed" if self.failed else "shut down" if self.is_closed else "serving"
        return f"KVortexEngine({state}, {self.device.name}, {what}, {self.pool!r})"

    @classmethod
    def create(cls, config: KVortexConfig, *, layout: KVLayout | None = None) -> Self:
        """Build an engine: pool, index, streams and the completion thread.

        Parameters
        ----------
        config : KVortexConfig
        layout : KVLayout, optional
            The KV cache that `block_ids` name. Without one, verbs take `data_ptrs` and `sizes`, and
            ``config.block_bytes`` gives the largest size. An engine only reads the layout's memory here (to
            find out whether strided copies are legal and pay).

        Returns
        -------
        KVortexEngine
            Serving with the first chunk of the pool; the rest follows in the background (`wait_ready`).

        Raises
        ------
        ConfigError
            A setting does not fit: no block size, a pool smaller than one slot, blocks of the layout above block_bytes,
            no such device, a codec (of the tier, too) that can pack nothing of the layout.
        PoolExhausted
            The machine or its cgroup cannot hold the pool, asked before any page is touched; or `gpu_pool_size_bytes`
            is too small for the gather.
        DriverError
            The driver refused. Whatever was made by then is given back.
        """
        if not isinstance(config, KVortexConfig):
            raise ConfigError(f"config must be a KVortexConfig, got {type(config).__name__}")
        if layout is not None and not isinstance(layout, KVLayout):
            raise TypeError(
                f"layout must be a KVLayout, got {type(layout).__name__}; KVLayout.from_tensors([tensor]) makes one"
            )
        block_bytes = config.block_bytes
        if layout is not None:
            slot_bytes = packed_bytes(layout, config.codec, config.exact_layers)
            block_bytes = slot_bytes if block_bytes is None else block_bytes
            if slot_bytes > block_bytes:
                raise ConfigError(
                    f"block_bytes is {block_bytes}, but the layout's blocks take {slot_bytes}; leave block_bytes out"
                )
        elif config.codec != "exact":
            raise ConfigError(
                f"the codec {config.codec!r} packs blocks of a layout, and there is none; pass "
                f"create(config, layout=...)"
            )
        if block_bytes is None:
            raise ConfigError("block_bytes is needed without a layout; set it to the size of your largest block")
        # Assigned to names as soon as they are made, so that a signal between two steps loses none.
        device = pool = device_pool = carrier = engine = None
        try:
            device = Device.open(config.device)
            require_reachable(layout, device, config)
            pool = PinnedPool(
                config.cpu_pool_size_bytes,
                block_bytes,
                device,
                header_bytes=config.header_bytes,
                first_chunk_bytes=config.pool_first_chunk_bytes,
                chunk_bytes=config.pool_chunk_bytes,
                huge_pages=config.pool_huge_pages,
                numa=config.enable_numa,
                driver_allocated=config.pool_driver_allocated,
            )
            if config.gpu_pool_size_bytes:
                device_pool = DevicePool(config.gpu_pool_size_bytes, device.name)
            index = BlockIndex(pool.num_slots)
            carrier = make_carrier(config, device, pool, layout, device_pool)
            parts = (device, pool, index, carrier, device_pool, config.deferred)
            engine = cls.__new__(cls, *parts)
            engine.config, engine._shutting_down = config, threading.RLock()
            engine.__init__(*parts)
            if engine.device is not device:
                raise TypeError(f"{cls.__name__}.__init__ must call super().__init__ with its arguments")
            if config.tiers:
                engine._open_tier(layout)
            _engines.add(engine)
            log(
                logging.INFO,
                "engine_created",
                "an engine serves",
                device=device.name,
                pool_bytes=pool.bytes_usable,
                pool_blocks=pool.slots_usable,
                block_bytes=block_bytes,
                numa_node=pool.numa_node,
                num_streams=len(carrier.queues),
            )
            return engine
        except BaseException:
            if engine is not None and engine.tiering is not None:
                engine.tiering.close(config.shutdown_timeout_ms)
            if engine is not None:
                EngineCore._close(engine, config.shutdown_timeout_ms)  # a subclass's `_close` may need parts not made
            for part in (carrier, device_pool, pool, device):  # what the engine has not closed
                if part is not None:
                    part.close()
            raise

    def _open_tier(self, layout):
        """Open the tier below RAM, and start the thread that moves blocks to it and back."""
        from kvortex.engine.tiering import Tiering, tag_of  # late: most engines have no tier

        config, (settings,) = self.config, self.config.tiers
        fingerprint = b"" if layout is None else self._fingerprint_of(layout)
        space = hashlib.sha256(f"kvortex 1 {self.pool.payload_bytes} {config.namespace}".encode() + b"\0" + fingerprint)
        coder = None
        if settings.codec != "exact":
            if layout is None:
                raise ConfigError(
                    f"the codec {settings.codec!r} of the tier codes blocks of a layout, and there is none; pass "
                    f"create(config, layout=...)"
                )
            coder = settings.coder(slot_block(layout, config.codec, config.exact_layers))
            space.update(b"\0" + coder.identity)
            self._coded_fingerprint = layout.fingerprint
        tier = settings.open(self.pool, namespace=space.digest(), tag=tag_of(config.weights), coder=coder)
        try:
            blocks_per_s = config.prefill_tokens_per_s / config.block_tokens if config.block_tokens else 0.0
            tiering = Tiering(
                self.pool, self.index, tier, bytes_per_s=settings.write_bytes_per_s, blocks_per_s=blocks_per_s
            )
        except BaseException:
            tier.close()
            raise
        self._attach_tiering(tiering)
        weakref.finalize(self, tiering.abandon).atexit = False

    def prefetch(
        self, keys: "NDArray[np.uint8]", timeout_ms: int = 2000, hold_ms: int = 5000, *, layout: KVLayout | None = None
    ) -> "Prefetch":
        """Begin to read blocks that only a lower tier has into RAM, to be loaded from there; returns at once.

        This is done for the leading run of keys that RAM and the tier together have, up to half of the pool. A thread
        of the engine pins all of it for the caller: first what RAM has, then each block that was read.

        Parameters
        ----------
        keys : uint8 array (n, 32)
        timeout_ms : int, default 2000
            How long it may take. The run ends before the first block that is not in RAM by then.
        hold_ms : int, default 5000
            How long the blocks stay pinned after that if nobody closes the prefetch.
        layout : KVLayout, optional
            As for `save_blocks`.

        Returns
        -------
        Prefetch
            To be awaited or waited for, given to ``load_blocks(..., prefetched=)``, and closed.

        Raises
        ------
        ValueError, TypeError
            `keys` is no uint8 array (n, 32), or a time is negative.
        ConfigError
            The engine has no tier.
        EngineClosed
            After `shutdown`, or in a forked child.

        Notes
        -----
        Thread-safe; waits for nothing. A thread of the engine does the rest.
        """
        self._require_ours()
        if self.tiering is None:
            raise ConfigError("this engine has no lower tier to fetch from; create it with tiers=(DiskTier(...),)")
        return self.tiering.prefetch(self._keys_of(keys, layout), timeout_ms, hold_ms)

    def flush(self, timeout_ms: int | None = None) -> int:
        """Write every block that only RAM has to the tier, whatever the write budget says, and make the tier durable.

        It waits for saves in flight, and writes their blocks, too. The GIL is released meanwhile.

        Parameters
        ----------
        timeout_ms : int, optional
            By default as long as it takes.

        Returns
        -------
        int
            How many blocks are left that the tier does not have: 0 unless the time was over, or the tier fails, is
            read-only, or smaller than what RAM has. 0 without a tier.

        Raises
        ------
        ValueError
            `timeout_ms` is not a number of milliseconds.
        TierError
            The disk could not make durable what was written.
        EngineClosed
            After `shutdown`, or in a forked child.
        """
        self._require_ours()
        if timeout_ms is not None:
            require_ms("timeout_ms", timeout_ms)
        return 0 if self.tiering is None else self.tiering.flush(timeout_ms)

    def add_layout(self, layout: KVLayout) -> None:
        """Let calls name blocks of one more KV cache: ``layout=`` in the verbs.

        It shares pool, index and counters with the others and has streams of its own. Two layouts of one
        `KVLayout.fingerprint` share keys: what was saved from one can be loaded into the other. For layouts of
        different fingerprints, a key names different blocks.

        Parameters
        ----------
        layout : KVLayout
            Its memory is only read here, as by `create`. A shape that was probed before is not probed again.
            A part need not be added: it belongs to its layout.

        Raises
        ------
        ConfigError
            Its blocks are larger than the pool's slots, or it lies on a GPU and the engine's device is the host; or it
            shares keys with the first layout, and the tier would code its blocks otherwise.
        ValueError, TypeError
            It was added before, is a part, or shares memory with a layout that is there; or there are too many.
        DriverError, MemoryError, PoolExhausted
            The driver or the system had no stream, event or memory left.
        EngineClosed
            After `shutdown`, or in a forked child.

        Notes
        -----
        Thread-safe. If it raises, nothing has changed. `shutdown` waits for it.
        """
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout must be a KVLayout, got {type(layout).__name__}")
        self._require_ours()
        with self._shutting_down:
            carrier = None
            try:
                self._require_fit(layout, self.config.codec, self.config.exact_layers)
                self._require_coded_alike(layout)
                require_reachable(layout, self.device, self.config)
                carrier = make_carrier(self.config, self.device, self.pool, layout, self.device_pool, self._signals)
                self._add_carrier(carrier)
            except BaseException:
                if carrier is not None:
                    self._drop_carrier(carrier)
                raise

    def _require_coded_alike(self, layout: KVLayout) -> None:
        """Refuse a layout that shares keys with the first one and has other numbers where the tier codes them."""
        if self.tiering is None or self.tiering.tier.codec == "exact" or layout.fingerprint != self._coded_fingerprint:
            return
        coder = self.config.tiers[0].coder(slot_block(layout, self.config.codec, self.config.exact_layers))
        if coder.identity != self.tiering.tier.store.coder.identity:
            raise ConfigError(
                f"{layout!r} has the fingerprint of the engine's first layout, but K and V elsewhere in its blocks, "
                f"and the tier codes these; give it a name of its own (name=...), or the same roles"
            )

    def remove_layout(self, layout: KVLayout, timeout_ms: int | None = None) -> None:
        """Let no call name a layout any more, wait for its jobs (GIL released), and give its streams back.

        Its blocks stay in the pool, for layouts of the same fingerprint, later ones too. The attribute `layout` then
        says which layout is meant by calls that name none.

        Parameters
        ----------
        layout : KVLayout
        timeout_ms : int, optional
            By default as long as it takes.

        Raises
        ------
        ValueError, TypeError
            The engine has no such layout.
        TimeoutError
            Jobs are still in flight, or a call of the driver has not returned. The layout takes no more jobs, and
            another call goes on waiting. It is the same after Ctrl-C.
        EngineClosed
            After `shutdown`, which ends the wait too, or in a forked child.

        Notes
        -----
        Thread-safe.
        """
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout must be a KVLayout, got {type(layout).__name__}")
        self._require_ours()
        carrier = self._retire_carrier(layout, timeout_ms)
        with self._shutting_down:
            self._drop_carrier(carrier)

    def _require_ours(self):
        """Refuse an engine that was never created, and one of the parent process: its lock may be held for ever."""
        if self.device is None:
            raise EngineClosed("this engine was never created; use KVortexEngine.create")
        if self.device.pid != os.getpid():
            raise EngineClosed("the engine belongs to the parent process; create another one")

    def wait_ready(self, timeout_ms: int | None = None) -> None:
        """Block (GIL released) until the whole pool is registered; see `PinnedPool.wait_ready` for what is raised."""
        if self.pool is None:
            raise EngineClosed("this engine was never created; use KVortexEngine.create")
        self.pool.wait_ready(timeout_ms)

    def shutdown(self) -> None:
        """Refuse new calls, wait for jobs in flight, give streams and memory back. Idempotent.

        Blocks that were admitted to a tier are written first, for at most half of ``config.shutdown_timeout_ms``; to
        write all blocks, call `flush` before. Jobs that are not over within that time are failed, which wakes whoever
        waits for them; their memory is leaked on purpose, because a copy may still be running into it. If Ctrl-C ends
        the waiting, new calls are refused, and jobs in flight go on and are retired; another call, or the end of the
        engine or of the interpreter, does the rest.
        """
        if self.device is None or self.device.pid != os.getpid():
            return  # never created, or of the parent process, where the lock may be held for ever
        with self._shutting_down:  # a second caller returns when the first has finished
            if self.tiering is not None:
                self._refuse_calls()
                self.tiering.close(self.config.shutdown_timeout_ms)
            self._close(self.config.shutdown_timeout_ms)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()


def require_reachable(layout, device, config):
    """Refuse memory of a GPU for the host device."""
    if layout is not None and layout.on_gpu and device.is_host:
        raise ConfigError(
            f"device {config.device!r} is host memory here, but the layout's memory is a GPU's; "
            f"`python -m kvortex info` says why there is no cuda device"
        )


def make_carrier(config, device, pool, layout, device_pool, signals=None):
    """Make the carrier of a layout, or of raw memory, as the config wants it."""
    num_streams = max(2, config.num_transfer_streams)  # loads and saves never share one
    return Carrier(
        device,
        pool,
        layout,
        num_savers=num_streams - num_streams // 2,
        num_loaders=num_streams // 2,
        max_jobs=config.max_jobs,
        signals=signals,
        gather_ctas=config.gather_ctas,
        device_pool=device_pool,
        codec=config.codec,
        exact_layers=config.exact_layers,
    )


@atexit.register
def _shutdown_all():
    """Shut down the engines that the program left open, while driver and interpreter still exist."""
    for engine in list(_engines):
        engine.shutdown()
