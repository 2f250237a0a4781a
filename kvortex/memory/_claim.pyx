"""Memory that a pool was admitted for and has not touched yet: the kernel counts it as free, and it is not.

The number of bytes is in a page of a file that the user's other processes can read. Threads that touch memory lower the
number, without the GIL; others read it at any time. The file is locked while its process lives, however that ends, and
counts only while it is locked. The lock is one of the process (POSIX), so a forked child does not keep it. Closing any
descriptor of the file releases the lock, so a process never opens the files of its own claims a second time.

Nothing here runs Python code, so that no signal handler is called while a pool is closed.
"""

from libc.stdint cimport uint64_t
from libc.stdio cimport rename
from libc.string cimport memset
from posix.fcntl cimport F_SETLK, F_WRLCK, O_CREAT, O_EXCL, O_RDWR, fcntl, flock, open
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close, getpid, pwrite, unlink

cdef extern from "<fcntl.h>" nogil:
    const int O_CLOEXEC, O_NOFOLLOW

NUMBER_BYTES = sizeof(uint64_t)

cdef dict own = {}  # address of `left` -> path: the claims of the process `own_pid`
cdef int own_pid = getpid()


cdef class Claim:
    """Claim memory until `end`.

    Parameters
    ----------
    nbytes : int
    hidden, path : bytes
        Where to make the file, and where to move it when it is locked. If that fails, only this process sees the
        claim.
    about : bytes
        What the file has behind the number.
    """

    def __cinit__(self, uint64_t nbytes, bytes hidden, bytes path, bytes about):
        global own_pid
        self.file, self.pid, self.here, self.left = -1, getpid(), nbytes, &self.here
        if not self.share(hidden, path, about):
            self.end()
            self.left[0] = nbytes
        if own_pid != self.pid:
            own.clear()
            own_pid = self.pid
        own[<size_t>self.left] = self.path

    cdef bint share(self, bytes hidden, bytes path, bytes about) noexcept:
        cdef flock lock
        cdef void *page
        cdef bytes content = (<char *>&self.here)[:sizeof(uint64_t)] + about
        self.file = open(hidden, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0o600)
        if self.file < 0:
            return False
        self.path = hidden
        memset(&lock, 0, sizeof(lock))
        lock.l_type = F_WRLCK
        if fcntl(self.file, F_SETLK, &lock):
            return False
        # Written, not only made longer: writing takes the memory. In a full folder, touching it would be a SIGBUS.
        if pwrite(self.file, <char *>content, len(content), 0) != len(content):
            return False
        page = mmap(NULL, sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED, self.file, 0)
        if page == MAP_FAILED:
            return False
        self.left = <uint64_t *>page
        if rename(hidden, path):
            return False
        self.path = path
        return True

    cdef void end(self) noexcept:
        """Claim nothing any more. Idempotent. No thread may touch memory for the claim by now."""
        own.pop(<size_t>self.left, None)
        if self.path is not None and self.pid == getpid():
            unlink(self.path)
        self.path = None
        if self.left != &self.here:
            munmap(self.left, sizeof(uint64_t))
        self.here, self.left = 0, &self.here
        if self.file >= 0:
            close(self.file)
        self.file = -1

    def __dealloc__(self):
        self.end()


def own_claims():
    """Return (bytes yet to be touched, path of the file that says so or None) of each pool of this process."""
    if own_pid != getpid():
        return []
    return [((<uint64_t *><size_t>address)[0], path) for address, path in own.items()]
