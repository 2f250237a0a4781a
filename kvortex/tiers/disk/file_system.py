"""The file system under a path: whether I/O goes past the page cache."""

from kvortex.slots import PAGE_BYTES


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
