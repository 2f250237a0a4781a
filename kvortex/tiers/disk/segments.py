"""Segments: files of fixed slots over one or several folders. Which there are follows from the quota alone."""

import contextlib
import errno
import os
import struct

from kvortex.config import bytes_text
from kvortex.errors import ConfigError, TierError
from kvortex.log import warn_once
from kvortex.slots import PAGE_BYTES
from kvortex.tiers._record import payload_sums
from kvortex.tiers.disk._io_calls import IoCalls
from kvortex.tiers.disk.file_system import go_direct
from kvortex.tiers.disk.folder import SUFFIX, Folder, make_room
from kvortex.tiers.disk.manifest import ROW_BYTES

SEGMENT_BYTES = 1 << 30
MAGIC, VERSION = b"VORTXKS1", 1
UNPREALLOCATED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# What the file system needs for itself is the quota's too: the map of a file's pieces, folders, the lock.
MAP_BYTES, MAP_SHARE, FOLDER_BYTES = 64 << 10, 2048, 64 << 10


class Segments:
    """The open segments of one process, in locked folders.

    Segment i lies in folder ``i % len(paths)``, and slot s in segment ``s // slots_per_segment``, behind its page. So a
    larger quota adds slots and a smaller one takes the last ones away, and the others stay where they are.

    Parameters
    ----------
    paths : sequence of path-like
        Folders on as many disks.
    namespace : bytes
        32 bytes that name the model as loaded.
    stride_bytes : int
        Of a slot: header page and payload in whole pages.
    codec : int, default 0
        Of the records, as their headers have it.
    disk_bytes : int
        What all of it may take of the disks, for this process.
    rank, replica : int, default 0
    segment_bytes : int, default 1 GiB
    direct : bool, default True
        Go past the page cache where the file system can.
    calls : IoCalls, optional

    Raises
    ------
    ConfigError
        No path, or a quota that holds no slot.
    TierError
        A folder is in use, of another user or not writable, or the disk has no room for the quota.
    """

    def __init__(self, paths, *, namespace, stride_bytes, disk_bytes, codec=0, rank=0, replica=0,
                 segment_bytes=SEGMENT_BYTES, direct=True, calls=None):  # fmt: skip
        self.stride_bytes, self.calls = stride_bytes, calls or IoCalls()
        self.slots_per_segment, self.num_slots = slots_of(disk_bytes - FOLDER_BYTES * len(paths),
                                                          stride_bytes + ROW_BYTES, segment_bytes)  # fmt: skip
        if not paths or self.num_slots < 1:
            raise ConfigError(
                f"a disk tier of {bytes_text(disk_bytes)} over {len(paths)} folders holds no block of {stride_bytes} "
                f"bytes; give it a path and a larger disk_bytes"
            )
        self.files, self.new_slots, self.buffered_reason = [], [], None if direct else "direct=False"
        self._folders, self._expelled, self._new, self._dropped, self._sparse = [], [], 0, 0, 0
        try:
            for path in paths:
                self._folders.append(Folder(path, namespace, replica=replica, rank=rank))
            self._delete_others()
            for folder, path in zip(self._folders, paths, strict=True):
                self._expelled += make_room(path, namespace, self._missing_bytes(folder))
            for number in range(-(-self.num_slots // self.slots_per_segment)):
                self._open(number, segment_page(namespace, rank, number, stride_bytes, codec))
        except BaseException:
            self.close()
            raise

    def _name(self, number):
        folder = self._folders[number % len(self._folders)]
        return os.path.join(folder.path, f"{number:06}{SUFFIX}")

    def _delete_others(self):
        """Delete what a larger quota or other folders left behind, before room is asked for."""
        wanted = {self._name(number) for number in range(-(-self.num_slots // self.slots_per_segment))}
        for folder in self._folders:
            for entry in os.scandir(folder.path):
                if entry.name.endswith(SUFFIX) and entry.path not in wanted:
                    os.unlink(entry.path)
                    self._dropped += 1

    def _count(self, number):
        return min(self.slots_per_segment, self.num_slots - number * self.slots_per_segment)

    def _missing_bytes(self, folder):
        """What the folder's segments will take of its disk beyond what they have."""
        missing = 0
        for number in range(-(-self.num_slots // self.slots_per_segment)):
            path = self._name(number)
            if os.path.dirname(path) == folder.path:
                has = os.stat(path).st_blocks * 512 if os.path.exists(path) else 0
                missing += max(0, PAGE_BYTES + self._count(number) * self.stride_bytes - has)
        return missing

    def _open(self, number, page):
        path, calls = self._name(number), self.calls
        first, count = number * self.slots_per_segment, self._count(number)
        nbytes = PAGE_BYTES + count * self.stride_bytes
        try:
            file = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW)
            self.files.append(file)
            size = os.fstat(file).st_size
            is_ours = size >= PAGE_BYTES and calls.read(file, PAGE_BYTES, 0) == page
            if not is_ours and size:
                calls.resize(file, 0)
                self._dropped += 1
            elif size > nbytes:
                calls.resize(file, nbytes)
            self._make_room(file, nbytes)
            if not is_ours:
                calls.write(file, page, 0)
                self.new_slots.append((first, count))
                self._new += 1
            if not self.buffered_reason:
                self.buffered_reason = go_direct(calls, file)
        except OSError as error:
            free = os.statvfs(os.path.dirname(path))
            room = f"{bytes_text(free.f_bavail * free.f_frsize)} are free; set disk_bytes lower"
            then = room if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name another path, or mend the disk"
            raise TierError(
                f"segment {path} of {bytes_text(nbytes)} cannot be used: {error.strerror}; {then}"
            ) from error

    def _make_room(self, file, nbytes):
        try:
            self.calls.allocate(file, nbytes)
        except OSError as error:
            if error.errno not in UNPREALLOCATED:
                raise
            warn_once(
                "segments_sparse",
                "the file system reserves no room; when the disk is full, the tier becomes read-only",
                folders=self.folders,
            )
            self.calls.resize(file, nbytes)
            self._sparse += 1

    @property
    def folders(self):
        """The folders, for messages."""
        return tuple(folder.path for folder in self._folders)

    def are_in_place(self):
        """Whether the files still lie in the folders: else those are deleted, or another process's by now."""
        try:
            return os.path.samestat(os.stat(self._name(0)), os.fstat(self.files[0]))
        except OSError:
            return False

    def facts(self):
        """What stats tell of the segments."""
        return {
            "folders": self.folders,
            "sparse_segments": self._sparse,
            "new_segments": self._new,
            "dropped_segments": self._dropped,
            "expelled_folders": tuple(self._expelled),
        }

    def close(self):
        """Close the files and unlock the folders. Idempotent."""
        files, self.files = self.files, []
        for file in files:
            with contextlib.suppress(OSError):  # closed all the same; what was not written is a miss
                self.calls.close(file)
        for folder in self._folders:
            folder.close()


def slots_of(disk_bytes, stride_bytes, segment_bytes=SEGMENT_BYTES):
    """Slots of a whole segment, and of all that the quota holds."""
    around = PAGE_BYTES + max(MAP_BYTES, segment_bytes // MAP_SHARE)
    segment_bytes, disk_bytes = max(segment_bytes, around + stride_bytes), max(0, disk_bytes)
    per_segment = (segment_bytes - around) // stride_bytes
    rest = max(0, disk_bytes % segment_bytes - around) // stride_bytes
    return per_segment, disk_bytes // segment_bytes * per_segment + rest


def disk_bytes_of(num_slots, stride_bytes, num_paths=1, segment_bytes=SEGMENT_BYTES):
    """The least `disk_bytes` with room for so many slots."""
    slot_bytes = stride_bytes + ROW_BYTES
    around = PAGE_BYTES + max(MAP_BYTES, segment_bytes // MAP_SHARE)
    segment_bytes = max(segment_bytes, around + slot_bytes)
    whole, rest = divmod(num_slots, (segment_bytes - around) // slot_bytes)
    return FOLDER_BYTES * num_paths + whole * segment_bytes + (around + rest * slot_bytes if rest else 0)


def segment_page(namespace, rank, number, stride_bytes, codec=0):
    """The first page of a segment. One that differs in any byte is of another, and nothing behind it is read."""
    fields = struct.pack("<8sIIIIQ32s", MAGIC, VERSION, codec, rank, number, stride_bytes, namespace)
    body = fields.ljust(PAGE_BYTES - 8, b"\0")
    return body + struct.pack("<Q", payload_sums(body)[0])
