"""The file system under a path: which it is, what is free, whether I/O goes past the page cache, what to mind."""

import os
import re
import tempfile
from pathlib import Path

from kvortex.config import bytes_text
from kvortex.log import warn_once
from kvortex.slots import PAGE_BYTES
from kvortex.tiers.disk._io_calls import IoCalls

MOUNTS = Path("/proc/self/mountinfo")
REMOTE = re.compile(
    r"nfs4?|cifs|smb3|smbfs|lustre|ceph|9p|afs|beegfs|gpfs|glusterfs|gfs2|ocfs2|orangefs|panfs|wekafs|virtiofs|fuse(\..+)?"
)
OVERLAY_ADVICE = "the container's own layer: slow, and gone with the container; mount a volume there"
REMOTE_ADVICE = "not a local disk: its delays and failures become the tier's; name a folder on a local disk"


def file_system_of(path):
    """Return what lies under a path that need not be there yet.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    dict
        `path`; `file_system` and `mount_point`, None where the kernel does not tell; `free_bytes`; `warning`, a
        sentence or None.

    Raises
    ------
    OSError
        The path cannot be looked at.
    """
    there = _nearest(path)
    mount_point, kind = _mount_of(there)
    room = os.statvfs(there)
    advice = OVERLAY_ADVICE if kind == "overlay" else REMOTE_ADVICE if REMOTE.fullmatch(kind or "") else None
    return {
        "path": os.fspath(path),
        "file_system": kind,
        "mount_point": mount_point,
        "free_bytes": room.f_bavail * room.f_frsize,
        "warning": advice and f"{os.fspath(path)} lies on {kind}, {advice}",
    }


def direct_io_of(path, calls=None):
    """Find out, by a file without a name, how a tier's I/O would go.

    Returns
    -------
    dict
        `io`: "direct", "buffered", or None where no file can be made; `io_reason` why not direct; `align_bytes`, None
        where the kernel does not tell.
    """
    calls = calls or IoCalls()
    try:
        with tempfile.TemporaryFile(dir=_nearest(path)) as file:
            reason = go_direct(calls, file.fileno())
            try:
                align_bytes = calls.direct_align(file.fileno())
            except OSError:  # an older kernel
                align_bytes = None
    except OSError as error:
        return {"io": None, "io_reason": f"no file can be made there: {error.strerror}", "align_bytes": None}
    return {"io": "buffered" if reason else "direct", "io_reason": reason, "align_bytes": align_bytes}


def go_direct(calls, file):
    """Go past the page cache; return why not, or None."""
    try:
        align = calls.direct_align(file)
        if align == 0 or PAGE_BYTES % align:
            return f"direct I/O needs {align} bytes of alignment" if align else "the file system has no direct I/O"
    except OSError:
        pass  # an older kernel does not tell: what it refuses, shows
    try:
        calls.set_direct(file, True)
    except OSError as error:
        return f"direct I/O was refused: {error.strerror}"
    return None


def warn_of_file_systems(paths):
    """Log a warning, once, for each path that is not on a local disk."""
    for path in paths:
        facts = file_system_of(path)
        if facts["warning"]:
            message = f"{facts['warning']} ({bytes_text(facts['free_bytes'])} are free)"
            warn_once("disk_file_system", message, path=path, file_system=facts["file_system"])


def _nearest(path):
    """The path, or the first of its parents that is there."""
    path = os.path.realpath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _mount_of(path):
    """Where the file system under a path is mounted, and which it is."""
    best = (None, None)
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return best
    for line in lines:
        about, _, kind = line.partition(" - ")
        fields = about.split(" ")
        if len(fields) < 5 or not kind:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
        is_below = path == point or path.startswith(point.rstrip("/") + "/")
        if is_below and (best[0] is None or len(point) >= len(best[0])):  # the last one covers those before it
            best = (point, kind.split(" ")[0])
    return best
