"""KVortexEngine: the one module that joins the parts, and the promise made to users."""

import atexit
import logging
import os
import threading
import weakref

from kvortex._engine import BlockHits, EngineCore
from kvortex.config import KVortexConfig
from kvortex.driver import Device
from kvortex.errors import ConfigError, EngineClosed
from kvortex.index import BlockIndex
from kvortex.log import log
from kvortex.memory import DevicePool, PinnedPool
from kvortex.transfer import Carrier

__all__ = ["BlockHits", "KVortexEngine"]

_engines = weakref.WeakSet()


class KVortexEngine(EngineCore):
    """Keep KV blocks in pinned host memory and bring them back on a prefix hit.

    Made by `create`. Every verb may be called from any thread; all but `get_stats` release the GIL. What each one does
    stands in its own docstring.

    Attributes
    ----------
    device : Device
    device_pool : DevicePool or None
        Of `gpu_pool_size_bytes`; closed with the engine, after its jobs.
    pool : PinnedPool
    index : BlockIndex
        Both to look at. Slots that the engine moves blocks through are its own to commit, abort and release: who does
        that beside it ends the process.
    layout : KVLayout or None
    config : KVortexConfig
    """

    @classmethod
    def create(cls, config, *, layout=None):
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
            no such device.
        PoolExhausted
            The machine or its cgroup cannot hold the pool, asked before any page is touched; or `gpu_pool_size_bytes`
            is too small for the gather.
        DriverError
            The driver refused. Whatever was made by then is given back.
        """
        if not isinstance(config, KVortexConfig):
            raise ConfigError(f"config must be a KVortexConfig, got {type(config).__name__}")
        block_bytes = config.block_bytes
        if layout is not None:
            block_bytes = layout.block_bytes if block_bytes is None else block_bytes
            if layout.block_bytes > block_bytes:
                raise ConfigError(
                    f"block_bytes is {block_bytes}, but the layout's blocks have {layout.block_bytes}; "
                    f"leave block_bytes out"
                )
        if block_bytes is None:
            raise ConfigError("block_bytes is needed without a layout; set it to the size of your largest block")
        num_streams = max(2, config.num_transfer_streams)  # loads and saves never share one
        num_loaders = num_streams // 2
        # Assigned to names as soon as they are made, so that a signal between two steps loses none.
        device = pool = device_pool = carrier = engine = None
        try:
            device = Device.open(config.device)
            if layout is not None and layout.on_gpu and device.is_host:
                raise ConfigError(
                    f"device {config.device!r} is host memory here, but the layout's memory is a GPU's; "
                    f"`python -m kvortex info` says why there is no cuda device"
                )
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
            carrier = Carrier(
                device,
                pool,
                layout,
                num_savers=num_streams - num_loaders,
                num_loaders=num_loaders,
                max_jobs=config.max_jobs,
                gather_ctas=config.gather_ctas,
                device_pool=device_pool,
            )
            parts = (device, pool, index, carrier, device_pool, config.deferred)
            engine = cls.__new__(cls, *parts)
            engine.config, engine._shutting_down = config, threading.RLock()
            engine.__init__(*parts)
            if engine.device is not device:
                raise TypeError(f"{cls.__name__}.__init__ must call super().__init__ with its arguments")
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
                num_streams=num_streams,
            )
            return engine
        except BaseException:
            if engine is not None:
                EngineCore._close(engine, config.shutdown_timeout_ms)  # a subclass's own may rely on what was not made
            for part in (carrier, device_pool, pool, device):  # what the engine has not closed
                if part is not None:
                    part.close()
            raise

    def wait_ready(self, timeout_ms=None):
        """Block (GIL released) until the whole pool is registered; see `PinnedPool.wait_ready` for what is raised."""
        if self.pool is None:
            raise EngineClosed("this engine was never created; use KVortexEngine.create")
        self.pool.wait_ready(timeout_ms)

    def shutdown(self):
        """Refuse new calls, wait for jobs in flight, give streams and memory back. Idempotent.

        Jobs that are not over within ``config.shutdown_timeout_ms`` are failed, which wakes whoever waits for them;
        their memory is then leaked on purpose, because a copy may still be running into it. Ctrl-C ends the waiting:
        then new calls are refused, jobs in flight go on and are retired, and another call, or the end of the engine or
        of the interpreter, does the rest.
        """
        if self.device is None or self.device.pid != os.getpid():
            return  # never created; or the engine is the parent's, and so is whoever holds the lock
        with self._shutting_down:  # a second caller returns when the first has finished
            self._close(self.config.shutdown_timeout_ms)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.shutdown()


@atexit.register
def _shutdown_all():
    """End the threads of engines nobody shut down while driver and interpreter are still there."""
    for engine in list(_engines):
        engine.shutdown()
