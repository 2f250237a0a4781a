"""DiskTier: the settings of a tier on local disks, and what they open."""

import contextlib
import numbers
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvortex.arguments import shown, whole_number
from kvortex.codec._coder import BlockCoder
from kvortex.codec._ecsq import LEVELS
from kvortex.config import parse_bytes
from kvortex.errors import ConfigError, EngineClosed
from kvortex.index import NO_SLOT, BlockIndex
from kvortex.slots import PAGE_BYTES
from kvortex.tiers.base import look_up
from kvortex.tiers.disk._disk_store import DiskStore
from kvortex.tiers.disk.adoption import Adoption
from kvortex.tiers.disk.file_system import warn_of_file_systems
from kvortex.tiers.disk.manifest import take_manifest, write_manifest
from kvortex.tiers.disk.segments import SEGMENT_BYTES, Segments

CODECS = ("exact", "ecsq")
NO_TAG = bytes(32)  # before any weights were named


@dataclass(frozen=True)
class DiskTier:
    """Blocks on local disks.

    Attributes
    ----------
    paths : str, path-like or sequence of them
        Folders, best one on each disk; missing ones are made. Segments are spread over them in turn.
    disk_bytes : int or str
        What all ranks and replicas of an engine may take together. Sizes may be texts, here and below: ``"500GiB"``.
    num_threads : int, default 4
        Blocks in flight, 1 to 64.
    queue_blocks : int, default 4096
        Blocks that may wait. If there are more, they are not written, or count as a miss.
    direct : bool, default True
        Bypass the page cache if the file system can.
    io : {"threads", "aio"}, default "threads"
        What moves the blocks: threads, or Linux AIO. If the pool lies on huge pages, neither was faster.
    segment_bytes : int, default 1 GiB
    write_bytes_per_s : int, default 256 MiB/s
        What may be written while blocks are saved; it spares the disk. Ten seconds of it may be spent at once. Blocks
        beyond the limit stay in RAM only, until the engine has been idle for a second: then it writes them too. 0: no
        limit.
    codec : {"exact", "ecsq"}, default "exact"
        How blocks are coded on their way to the disk, and decoded on their way back, by the threads. "ecsq" takes a
        third to a quarter of the room, and is lossy: `kvortex/codec/ECSQ.md` says what it costs a model. It needs a
        layout that names its vectors. What comes from such a record is not coded again while RAM has it.
    level : {1, 2, 3, 4}, default 1
        Of "ecsq": from the most exact one to the smallest.
    slot_ratio : float, optional
        How many times less room a slot has than a block, 1 to 16. By default what K and V of two small models took, and
        4 %. A block that takes more is not written (`blocks_too_large`); 1: every block has room.
    """

    is_remote = False

    paths: tuple[str, ...]
    disk_bytes: int
    num_threads: int = 4
    queue_blocks: int = 4096
    direct: bool = True
    io: str = "threads"
    segment_bytes: int = SEGMENT_BYTES
    write_bytes_per_s: int = 256 << 20
    codec: str = "exact"
    level: int = 1
    slot_ratio: float | None = None

    if TYPE_CHECKING:  # what may be passed, of which the fields are made

        def __init__(
            self,
            paths: str | bytes | os.PathLike[str] | Sequence[str | bytes | os.PathLike[str]],
            disk_bytes: int | str,
            num_threads: int = 4,
            queue_blocks: int = 4096,
            direct: bool = True,
            io: str = "threads",
            segment_bytes: int | str = SEGMENT_BYTES,
            write_bytes_per_s: int | str = 256 << 20,
            codec: str = "exact",
            level: int = 1,
            slot_ratio: float | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        paths = self.paths
        alone = isinstance(paths, str | bytes | os.PathLike)
        object.__setattr__(self, "paths", tuple(os.fsdecode(path) for path in ([paths] if alone else paths)))
        if not self.paths or not all(path and "\0" not in path for path in self.paths):
            raise ConfigError(f"paths must name a folder, or several, got {shown(paths)}")
        if len({os.path.abspath(path) for path in self.paths}) != len(self.paths):
            raise ConfigError(f"paths must differ, got {', '.join(self.paths)}")
        for name in ("disk_bytes", "segment_bytes", "write_bytes_per_s"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, parse_bytes(getattr(self, name)))
        for name in ("disk_bytes", "segment_bytes", "write_bytes_per_s", "num_threads", "queue_blocks", "level"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name))
        if self.io not in ("threads", "aio"):
            raise ConfigError(f"io must be 'threads' or 'aio', got {self.io!r}")
        for name in ("disk_bytes", "segment_bytes"):
            if not 0 < getattr(self, name) <= 1 << 50:  # each segment takes time and memory when a tier is opened
                raise ConfigError(f"{name} must be larger than 0 and at most 2^50, got {getattr(self, name)}")
        if self.codec not in CODECS:
            raise ConfigError(f"codec of a disk tier must be one of {', '.join(CODECS)}, got {shown(self.codec)}")
        if self.level not in LEVELS:
            raise ConfigError(f"level must be {LEVELS[0]} to {LEVELS[-1]}, got {self.level}")
        if self.slot_ratio is not None:
            is_number = isinstance(self.slot_ratio, numbers.Real) and not isinstance(self.slot_ratio, bool)
            if not is_number or not 1 <= self.slot_ratio <= 16:
                raise ConfigError(f"slot_ratio must be a number from 1 to 16, or None, got {shown(self.slot_ratio)}")
        if self.codec == "exact" and (self.level, self.slot_ratio) != (1, None):
            raise ConfigError("level and slot_ratio are of a codec; add codec='ecsq', or leave them out")
        if self.write_bytes_per_s < 0:
            raise ConfigError(f"write_bytes_per_s must be 0 (no limit) or more, got {self.write_bytes_per_s}")

    def coder(self, packed):
        """Return the `BlockCoder` of blocks that slots of the pool have as the PackedBlock `packed` says.

        Raises
        ------
        ConfigError
            There is nothing in the blocks that the codec could code.
        """
        try:
            return BlockCoder(packed, self.level, self.slot_ratio)
        except ValueError as error:
            raise ConfigError(
                f"the codec {self.codec!r} of the disk tier cannot code these blocks: {error}; name the roles of their "
                f"tensors (KVLayout.from_tensors(..., roles='kv')), or leave codec out"
            ) from None

    def open(self, pool, *, namespace, tag=NO_TAG, **whose):
        """Open the part of one rank, and begin to adopt what is there; see `open_store`.

        Parameters
        ----------
        tag : bytes
            32 bytes that name the weights.

        Returns
        -------
        tier : OpenDiskTier
        """
        store = self.open_store(pool, namespace=namespace, **whose)
        segments = store.segments
        return OpenDiskTier(store, tag, segments.new_slots, segments.folders[0], self.queue_blocks)

    def open_store(self, pool, *, namespace, rank=0, num_ranks=1, replica=0, num_replicas=1, coder=None):
        """Open the store of one rank: lock its folders, lay out segments.

        Parameters
        ----------
        pool : PinnedPool
            With a header page before each payload.
        namespace : bytes
            32 bytes that name the model as loaded.
        rank, num_ranks, replica, num_replicas : int
            Whose part of `disk_bytes` it is.
        coder : BlockCoder, optional
            What the method `coder` made; needed with a codec.

        Returns
        -------
        store : DiskStore

        Raises
        ------
        ConfigError, TierError
            As `Segments` and `DiskStore`.
        """
        if self.codec != "exact" and coder is None:
            raise ConfigError(f"a tier with the codec {self.codec!r} needs a coder: pass coder=tier.coder(packed)")
        segments = Segments(
            self.paths,
            namespace=namespace,
            stride_bytes=pool.stride_bytes if coder is None else coder.stride_bytes,
            codec=0 if coder is None else coder.codec,
            disk_bytes=self.disk_bytes // (num_ranks * num_replicas),
            rank=rank,
            replica=replica,
            segment_bytes=self.segment_bytes,
            direct=self.direct,
        )
        try:
            warn_of_file_systems(self.paths)
            return DiskStore(
                pool,
                segments,
                namespace=namespace,
                rank=rank,
                num_threads=self.num_threads,
                queue_blocks=self.queue_blocks,
                io=self.io,
                coder=coder,
            )
        except BaseException:
            segments.close()
            raise


class OpenDiskTier:
    """A catalogue and a store that forget together.

    Attributes
    ----------
    catalogue : BlockIndex
    store : Store
    adoption : Adoption
    tag : bytes
        Of the weights: for every put and get from now on.
    queue_blocks : int
        Blocks that the store lets wait.
    codec : str
        Of the records.
    record_bytes : int
        That a block takes on the disk, at the most.
    slot_ratio : float or None
        How many times smaller a record may be than its block; None: it is not coded.
    """

    name = "disk"
    is_remote = False

    def __init__(self, store, tag, new_slots=(), folder=None, queue_blocks=4096):
        self.store, self.tag, self._folder, self.queue_blocks = store, tag, folder, queue_blocks
        self.codec, self.record_bytes = store.codec, store.record_bytes
        coder = getattr(store, "coder", None)
        self.slot_ratio = None if coder is None else round(coder.block_bytes / (coder.stride_bytes - PAGE_BYTES), 2)
        self.catalogue = BlockIndex(store.num_slots)
        known = take_manifest(folder, tag, store.num_slots, store.payload_bytes) if folder else None
        self.adoption = Adoption(store, self.catalogue, tag, new_slots, known)

    @property
    def is_adopting(self):
        """Whether some slots have not been read yet, in which an earlier process may have left blocks."""
        return not self.adoption.is_over

    def look_up(self, keys):
        """HIT, MISS or BUSY for each key, without I/O."""
        return look_up(self.catalogue, keys)

    def ask(self, keys):
        """None: what is on the disk is known, or will be when the adoption is over."""

    def was_wrong(self, keys, statuses):
        """Blocks were read that are damaged, another's, or cannot be read: forget and erase them."""
        self.discard(keys)

    def discard(self, keys):
        """Forget blocks at once, and erase them; return how many were there. `store.flush` makes it durable."""
        self.adoption.discard(keys)
        slots = self.catalogue.slots_of(keys)
        if (slots != NO_SLOT).any():  # before a slot is free, so before whatever is put there
            self.store.erase(slots[slots != NO_SLOT], timeout_ms=None)
        return self.catalogue.discard(keys)

    def clear(self, tag):
        """Forget everything at once: what is on the disk has another tag from now on."""
        self.tag = tag
        self.adoption.clear(tag)
        self.catalogue.clear()

    def close(self, timeout_ms=5000):
        """End the adoption, write what was given and the manifest, close the store. Idempotent.

        A disk that does not write within `timeout_ms` gets no manifest: the next start scans the headers.
        """
        self.adoption.stop()
        folder, self._folder = self._folder, None
        deadline = time.monotonic() + timeout_ms / 1000
        with contextlib.suppress(EngineClosed):
            is_written = folder and self.store.flush(timeout_ms, durable=False) == 0
            if is_written and self.store.segments.are_in_place():  # and as long as the folder is locked
                blocks = self.catalogue.coldest(self.catalogue.num_slots)
                write_manifest(folder, self.tag, blocks.slots[::-1], blocks.keys[::-1], blocks.lengths[::-1])
        self.store.close(max(0, int(1000 * (deadline - time.monotonic()))))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
