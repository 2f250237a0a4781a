"""The folder of one process's part of a disk tier: made, checked, and locked for as long as the process has it."""

import contextlib
import fcntl
import os
import re
import socket
import stat
import time

from kvortex.errors import TierError
from kvortex.tiers.disk.manifest import NAME as MANIFEST_NAME

LOCK_NAME, SUFFIX = "lock", ".segment"
SPACE_NAME, PART_NAME = re.compile(r"[0-9a-f]{8}"), re.compile(r"dp(?P<replica>\d+)-rank(?P<rank>\d+)")
LOOK_S = 0.02  # a tool that asks whether the folder is in use has the lock for less


class Folder:
    """``path/<8 hex of the namespace>/dp<replica>-rank<rank>``, for its owner alone.

    Attributes
    ----------
    path : str
    """

    def __init__(self, path, namespace, *, replica=0, rank=0):
        self._lock = None
        try:
            parent = os.path.join(os.fspath(path), namespace[:4].hex())
            self.path = os.path.join(parent, f"dp{replica}-rank{rank}")
            os.makedirs(path, 0o700, exist_ok=True)
            for folder in (parent, self.path):
                _make_private(folder)
            self._lock = _lock(os.path.join(self.path, LOCK_NAME), self.path)
        except TierError:
            raise
        except OSError as error:
            raise TierError(
                f"the disk tier cannot use {path}: {error.strerror} ({error.filename}); make it a folder that this "
                f"user may write, or name another one"
            ) from error

    def close(self):
        """Let others have it. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def make_room(path, namespace, needed_bytes):
    """Delete folders of other namespaces that nobody locks, least recently opened first, until so much is free.

    Returns
    -------
    deleted : list of str
    """
    parts, deleted = [], []
    for space in folders_in(path, SPACE_NAME):
        if os.path.basename(space) != namespace[:4].hex():
            parts += folders_in(space, PART_NAME)
    for part in sorted(parts, key=_opened_at):
        free = os.statvfs(path)
        if free.f_bavail * free.f_frsize >= needed_bytes:
            break
        with contextlib.suppress(TierError, OSError):  # in use, or not ours
            lock = _lock(os.path.join(part, LOCK_NAME), part)
            try:
                for entry in os.scandir(part):
                    if entry.name.endswith(SUFFIX) or entry.name == MANIFEST_NAME:
                        os.unlink(entry.path)
                os.unlink(os.path.join(part, LOCK_NAME))
                deleted.append(part)
                os.rmdir(part)
                os.rmdir(os.path.dirname(part))
            finally:
                os.close(lock)
    return deleted


def folders_in(path, name):
    """The folders in `path` with such a name."""
    return [
        entry.path for entry in os.scandir(path) if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    ]


def _opened_at(part):
    """When a folder's lock was last taken."""
    try:
        return os.stat(os.path.join(part, LOCK_NAME)).st_mtime
    except OSError:
        return 0


def _make_private(folder):
    """Make a folder that nobody else may enter; one of another user is refused."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        facts = os.lstat(folder)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            what = f"belongs to user {facts.st_uid}" if stat.S_ISDIR(facts.st_mode) else "is no folder"
            raise TierError(f"{folder} {what}, and this process is user {os.geteuid()}; name another path") from None
        if stat.S_IMODE(facts.st_mode) != 0o700:
            os.chmod(folder, 0o700)


def _lock(path, folder):
    """Take the lock file; the kernel lets go of it when the process ends, however it ends."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOOK_S)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink == 0:  # whoever made room deleted it between our two calls
            raise BlockingIOError
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError:
        holder = os.pread(file, 512, 0).decode(errors="replace") or "another process"
        os.close(file)
        raise TierError(f"{folder} is in use by {holder}; end that first, or name another path") from None
    except BaseException:
        os.close(file)
        raise
    return file
