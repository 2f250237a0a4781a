"""Clients of object stores, and of folders that several engines share: a value is an object, or a file."""

import contextlib
import datetime
import os
import threading
import time

from kvortex.errors import ConfigError
from kvortex.tiers.remote.client import Value, parts_of

INSTALL = "the object tier needs the package obstore; install kvortex[s3]"
MAX_RETRIES = 2


def require_package():
    """Raise ConfigError if the client's package is missing."""
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{INSTALL} ({error})") from None


def leading_sizes(size_of, names):
    """Find by bisection the lengths of the values of a chain that are there; 0 behind them.

    Writers of a chain begin at its head, and evictions at its tail. So if a value is there, the values before it are
    assumed to be there, too, and to be as long. An absent chain takes one request, one of 2 048 values 12.
    """
    sizes, low, high, at = [0] * len(names), 0, len(names), 0
    while low < high:
        if size := size_of(names[at]):
            sizes[low : at + 1] = [size] * (at + 1 - low)
            low = at + 1
        else:
            high = at
        at = (low + high) // 2
    return sizes


def behind(parts, count):
    """The rest of these buffers after the first `count` bytes."""
    for i, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[i + 1 :]]
        count -= len(part)
    return []


class ObjectClient:
    """Objects in a bucket.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``, or with ``gs`` or ``az``.
    config : dict
        For obstore: endpoint, region and such. It finds credentials where they usually are for the kind of bucket.
    ca : bytes or None
        Certificates (PEM) to trust besides the system's.
    refresh_s : int
        If an object older than that is read, it is written again. 0: never.
    request_timeout_ms, connect_timeout_ms : int
    """

    def __init__(self, url, *, config, ca, refresh_s, request_timeout_ms, connect_timeout_ms):
        self._url, self._config, self._refresh_s = url, config, refresh_s
        timeout, connect = (datetime.timedelta(milliseconds=ms) for ms in (request_timeout_ms, connect_timeout_ms))
        self._options = {"timeout": timeout, "connect_timeout": connect, "pool_max_idle_per_host": "64"}
        if ca is not None:
            self._options["root_certificate"] = ca
        if str(config.get("endpoint", "")).startswith("http://"):
            self._options["allow_http"] = True
        self._retries = {"max_retries": MAX_RETRIES, "retry_timeout": timeout}
        self._lock, self._made = threading.Lock(), None

    def put(self, name, record):
        import obstore

        obstore.put(self._store(), name, record, use_multipart=False)

    def get(self, name, record):
        import obstore

        try:
            result = obstore.get(self._store(), name)
        except FileNotFoundError:
            return None
        meta, parts = result.meta, parts_of(record)
        if meta["size"] == sum(map(len, parts)):
            value, start = memoryview(result.bytes()), 0
            for part in parts:
                part[:] = value[start : start + len(part)]
                start += len(part)
        return Value(meta["size"], time.time() - meta["last_modified"].timestamp())

    def refresh(self, name, record, age_s):
        if self._refresh_s and age_s > self._refresh_s:
            self.put(name, record)

    def sizes(self, names, is_chain):
        return leading_sizes(self._size, names) if is_chain else [self._size(name) for name in names]

    def delete(self, name):
        import obstore

        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store(), name)

    def list(self):
        """Yield name, bytes and time of writing (seconds since 1970) of each object."""
        import obstore

        for page in obstore.list(self._store(), chunk_size=1000):
            for each in page:
                yield each["path"], each["size"], each["last_modified"].timestamp()

    def remove(self, names):
        """Remove objects; those that are gone already do no harm."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store(), names)

    def close(self):
        self._made = None

    def _size(self, name):
        import obstore

        try:
            return obstore.head(self._store(), name)["size"]
        except FileNotFoundError:
            return 0

    def _store(self):
        """obstore's store; made at the first use."""
        made = self._made
        if made is None:
            with self._lock:
                made = self._made = self._made or self._make()
        return made

    def _make(self):
        from obstore.store import from_url

        settings = {"config": self._config, "client_options": self._options, "retry_config": self._retries}
        return from_url(self._url, **settings)


class FolderClient(ObjectClient):
    """Files in a folder. obstore writes them, under another name first. They are read directly into the buffers."""

    def __init__(self, folder):
        self._folder, self._lock, self._made = folder, threading.Lock(), None

    def get(self, name, record):
        try:
            file = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            about, left, read = os.fstat(file), parts_of(record), 0
            while left and about.st_size == read + sum(map(len, left)):
                count = os.preadv(file, left, read)
                if not count:
                    raise OSError("the file ends before the block does")
                read += count
                left = behind(left, count)
        finally:
            os.close(file)
        return Value(about.st_size, time.time() - about.st_mtime)

    def refresh(self, name, record, age_s):
        os.utime(self._path(name))

    def _size(self, name):
        try:
            return os.stat(self._path(name)).st_size
        except FileNotFoundError:
            return 0

    def list(self):
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    about = os.stat(path, follow_symlinks=False)
                    yield os.path.relpath(path, self._folder), about.st_size, about.st_mtime

    def remove(self, names):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(name))

    def _path(self, name):
        return os.path.join(self._folder, name)

    def _make(self):
        from obstore.store import LocalStore

        return LocalStore(self._folder, mkdir=True)
