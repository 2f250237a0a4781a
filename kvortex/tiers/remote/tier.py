"""RedisTier and ObjectTier: the settings of a tier that several engines share, and what they open."""

import contextlib
import os
import time
import urllib.parse
from dataclasses import dataclass, field, fields

import numpy as np

from kvortex.arguments import require_ms, shown, whole_number
from kvortex.config import nearest, parse_bytes
from kvortex.errors import ConfigError, EngineClosed
from kvortex.index import NO_SLOT, BlockIndex
from kvortex.tiers._record import HEADER_BYTES
from kvortex.tiers.base import BlockStatus, look_up
from kvortex.tiers.remote import objects, redis
from kvortex.tiers.remote.client import read_file, secret_of
from kvortex.tiers.remote.store import NOT_TO_BE_ERASED, RemoteStore
from kvortex.tiers.remote.view import View

NO_TAG = bytes(32)  # before any weights were named
MOST_THREADS = 256


@dataclass(frozen=True)
class RemoteTier:
    """The settings that all tiers on servers have; use `RedisTier` or `ObjectTier`.

    Attributes
    ----------
    url : str
        Where the server is. A password in it is refused: logs and process lists would show it.
    view_blocks : int, default 262144
        Blocks of the server that the engine can remember, in some memory each. If it forgot one, it asks again.
    num_threads : int, default 8
        Blocks in flight, 1 to 256.
    queue_blocks : int, default 4096
        Blocks that may wait. Beyond that, blocks are not written, and reads are misses.
    write_bytes_per_s : int or str, default 0
        How much may be written while blocks are saved, as for a `DiskTier`. 0: no limit.
    lookup_timeout_ms : int, default 50
        How long an unknown prefix may wait for the server's answer; then it is a miss.
    negative_ttl_s : float, default 10
        How long a block that was not there counts as missing before it is asked for again.
    request_timeout_ms, connect_timeout_ms : int, default 5000 and 1000
        Limits of the client for each call, and for a connection.
    ca_file : str or path, optional
        Certificates (PEM) of the authority that signed the server's.
    """

    url: str
    view_blocks: int = field(default=1 << 18, kw_only=True)
    num_threads: int = field(default=8, kw_only=True)
    queue_blocks: int = field(default=4096, kw_only=True)
    write_bytes_per_s: int = field(default=0, kw_only=True)
    lookup_timeout_ms: int = field(default=50, kw_only=True)
    negative_ttl_s: float = field(default=10, kw_only=True)
    request_timeout_ms: int = field(default=5000, kw_only=True)
    connect_timeout_ms: int = field(default=1000, kw_only=True)
    ca_file: str | None = field(default=None, kw_only=True)

    is_remote, codec = True, "exact"
    asks_at_once = False  # whether a question for many blocks, no chain, costs little more than one for one

    def __post_init__(self):
        if not isinstance(self.url, str):
            raise ConfigError(f"url must be a text such as {self.EXAMPLE!r}, got {shown(self.url)}")
        parts = self._parts()
        if parts.password is not None:
            raise ConfigError("the url has a password in it, which logs would show; " + self.SECRETS)
        if parts.scheme not in self.SCHEMES:
            raise ConfigError(f"url must begin with {', '.join(self.SCHEMES)}, such as {self.EXAMPLE!r}, "
                              f"got {shown(parts.scheme)}")  # fmt: skip
        if parts.query or parts.fragment:
            raise ConfigError("url has settings behind a '?' or '#', which are not read; give them as arguments")
        for name in self.TEXTS:
            if not isinstance(getattr(self, name), str | os.PathLike | None):
                raise ConfigError(f"{name} must be a text, got {shown(getattr(self, name))}")
        for name in self.FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {shown(getattr(self, name))}")
        if isinstance(self.write_bytes_per_s, str):
            object.__setattr__(self, "write_bytes_per_s", parse_bytes(self.write_bytes_per_s))
        for name in ("lookup_timeout_ms", "request_timeout_ms", "connect_timeout_ms"):
            try:
                require_ms(name, getattr(self, name))
            except ValueError as error:
                raise ConfigError(str(error)) from None
        limits = {"view_blocks": (1, 1 << 31), "num_threads": (1, MOST_THREADS), "queue_blocks": (1, 1 << 31),
                  "write_bytes_per_s": (0, 1 << 50), **self.LIMITS}  # fmt: skip
        for name, (least, most) in limits.items():
            number = whole_number(getattr(self, name), name)
            if not least <= number <= most:
                raise ConfigError(f"{name} must be {least} to {most}, got {number}")
        if isinstance(self.negative_ttl_s, bool) or not isinstance(self.negative_ttl_s, int | float) \
                or not 0 <= self.negative_ttl_s <= 1 << 31:  # fmt: skip
            raise ConfigError(f"negative_ttl_s must be a number of seconds from 0 on, got {shown(self.negative_ttl_s)}")

    LIMITS, TEXTS, FLAGS = {}, ("ca_file",), ()

    def _parts(self):
        try:
            parts = urllib.parse.urlsplit(self.url)
            parts.port  # noqa: B018  (it may be none)
        except ValueError:  # its text may contain a part of a password
            raise ConfigError(f"url cannot be read; it must be such as {self.EXAMPLE!r}") from None
        return parts

    def open(self, pool, *, namespace, tag=NO_TAG, rank=0, **whose):
        """Begin to use the server. No request is sent yet.

        Parameters
        ----------
        pool : PinnedPool
            With a header page before each payload.
        namespace, tag : bytes
            32 bytes that name the model as loaded, and its weights.
        rank : int
            The rank whose blocks are stored.

        Returns
        -------
        tier : OpenRemoteTier

        Raises
        ------
        ConfigError
            As `open_store`.
        """
        return OpenRemoteTier(self, self.open_store(pool, namespace=namespace, rank=rank), tag)

    def open_store(self, pool, *, namespace, rank=0, **whose):
        """Begin to use the server for the blocks of one rank; `whose` has arguments that only a `DiskTier` needs.

        Returns
        -------
        store : RemoteStore

        Raises
        ------
        ConfigError
            The client's package is missing, a secret or certificate cannot be read, or the server would not take blocks
            of this size.
        """
        return RemoteStore(
            pool,
            self.client(HEADER_BYTES + pool.payload_bytes),
            namespace=namespace,
            num_slots=self.view_blocks,
            rank=rank,
            name_format=self.name_format(namespace),
            num_threads=self.num_threads,
            queue_blocks=self.queue_blocks,
        )


@dataclass(frozen=True)
class RedisTier(RemoteTier):
    """Blocks in Redis or Valkey, for all engines that reach it.

    Attributes
    ----------
    url : str
        ``redis://[user@]host[:port]``, ``rediss://...`` with TLS, or ``unix:///path``. ``valkey`` and ``valkeys`` too.
    cluster : bool, default False
        Whether the server is a node of a cluster.
    password_env, password_file : str, optional
        The variable of the environment, or the file, that has the password.
    key_prefix : str, default "kvortex:"
    ttl_s : int, default 0
        Seconds after which a block that nobody reads expires; 0: never, so that the server's ``maxmemory`` decides.
    max_value_bytes : int, default 512 MiB
        The longest value that the server takes (its ``proto-max-bulk-len``).

    For the other settings see ``help(kvortex.tiers.remote.RemoteTier)``.
    """

    cluster: bool = field(default=False, kw_only=True)
    password_env: str | None = field(default=None, kw_only=True)
    password_file: str | None = field(default=None, kw_only=True)
    key_prefix: str = field(default="kvortex:", kw_only=True)
    ttl_s: int = field(default=0, kw_only=True)
    max_value_bytes: int = field(default=512 << 20, kw_only=True)

    SCHEMES = ("redis", "rediss", "valkey", "valkeys", "unix")
    EXAMPLE = "redis://cache:6379"
    SECRETS = "name its place with password_env or password_file"
    LIMITS = {"ttl_s": (0, 1 << 31), "max_value_bytes": (1, 1 << 31)}
    TEXTS, FLAGS = ("ca_file", "password_env", "password_file"), ("cluster",)

    def __post_init__(self):
        if isinstance(self.max_value_bytes, str):
            object.__setattr__(self, "max_value_bytes", parse_bytes(self.max_value_bytes))
        if not isinstance(self.key_prefix, str):
            raise ConfigError(f"key_prefix must be a text, got {shown(self.key_prefix)}")
        super().__post_init__()
        parts = self._parts()
        if parts.scheme == "unix":
            if not os.path.isabs(parts.path) or parts.netloc:
                raise ConfigError("the url of a unix socket is unix:///path")
            if self.cluster:
                raise ConfigError("a cluster cannot be reached by a unix socket; give a node's host and port")
        elif not parts.hostname or parts.path.strip("/"):
            raise ConfigError(f"url must be such as {self.EXAMPLE!r}, without a path")

    name, asks_at_once = "redis", True

    def name_format(self, namespace):
        """The names of blocks on the server, with ``{name}`` for the part of each block."""
        return self.key_prefix.replace("{", "{{").replace("}", "}}") + namespace[:4].hex() + ":{name}"

    def client(self, record_bytes):
        """A client, which connects at its first use."""
        if record_bytes > self.max_value_bytes:
            raise ConfigError(f"a block with its header has {record_bytes} bytes, more than max_value_bytes="
                              f"{self.max_value_bytes}; use an ObjectTier, or smaller blocks")  # fmt: skip
        redis.require_package()
        parts = self._parts()
        is_socket = parts.scheme == "unix"
        return redis.RedisClient(
            parts.path if is_socket else (parts.hostname, parts.port or 6379),
            is_cluster=self.cluster,
            username=parts.username,
            password=secret_of("password", self.password_env, self.password_file),
            tls=parts.scheme in ("rediss", "valkeys"),
            ca=read_file("ca_file", self.ca_file),
            ttl_s=self.ttl_s,
            request_timeout_ms=self.request_timeout_ms,
            connect_timeout_ms=self.connect_timeout_ms,
        )


@dataclass(frozen=True)
class ObjectTier(RemoteTier):
    """Blocks as objects of S3 and its kin, or as files of a folder that several engines share.

    Obstore finds the credentials: in the environment (``AWS_ACCESS_KEY_ID``, ...), or in the machine's role. It does
    not read the files and profiles of AWS's own tools.

    Attributes
    ----------
    url : str
        ``s3://bucket[/prefix]``, or with ``gs`` or ``az``, or ``file:///folder``. `kvortex sweep` bounds what is there.
    endpoint : str, optional
        For S3 servers other than Amazon's: ``https://host[:port]``.
    region : str, optional
    virtual_hosted : bool, default False
        Whether the bucket is a part of the host's name, instead of the path.
    refresh_s : int, default 0
        If an object that is read is older than that, it is written again, so that a sweep by age keeps it. Set it to
        half of the ``--older-than`` of `kvortex sweep`. 0: never. On ``file://`` every read renews the file's time.

    For the other settings see ``help(kvortex.tiers.remote.RemoteTier)``.
    """

    endpoint: str | None = field(default=None, kw_only=True)
    region: str | None = field(default=None, kw_only=True)
    virtual_hosted: bool = field(default=False, kw_only=True)
    refresh_s: int = field(default=0, kw_only=True)

    SCHEMES = ("s3", "gs", "az", "file")
    EXAMPLE = "s3://bucket/prefix"
    SECRETS = "put it into the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    LIMITS, TEXTS, FLAGS = {"refresh_s": (0, 1 << 31)}, ("ca_file", "endpoint", "region"), ("virtual_hosted",)

    def __post_init__(self):
        super().__post_init__()
        parts = self._parts()
        if parts.username is not None:
            raise ConfigError("the url has a user in it; " + self.SECRETS)
        if parts.scheme == "file":
            if parts.netloc not in ("", "localhost") or not os.path.isabs(self._folder()):
                raise ConfigError("the url of a folder is file:///absolute/path")
        elif not parts.netloc or ":" in parts.netloc:
            raise ConfigError(f"url must name a bucket, such as {self.EXAMPLE!r}")
        if "@" in str(self.endpoint):
            raise ConfigError("endpoint has a user or password in it, which logs would show; " + self.SECRETS)

    @property
    def name(self):
        """Name of the tier in statistics and logs: "s3", ..."""
        return self._parts().scheme

    def _folder(self):
        return urllib.parse.unquote(self._parts().path)

    def name_format(self, namespace):
        """The names of blocks below the prefix, with ``{name}`` for the part of each block; 256 folders a model."""
        return namespace[:4].hex() + "/{name:.2}/{name}"

    def client(self, record_bytes=0):
        """A client, which connects at its first use."""
        objects.require_package()
        if self.name == "file":
            return objects.FolderClient(self._folder())
        config = {"endpoint": self.endpoint, "region": self.region} if self.name == "s3" else {}
        config = {name: value for name, value in config.items() if value is not None}
        if self.virtual_hosted:
            config["virtual_hosted_style_request"] = True
        return objects.ObjectClient(
            self.url,
            config=config,
            ca=read_file("ca_file", self.ca_file),
            refresh_s=self.refresh_s,
            request_timeout_ms=self.request_timeout_ms,
            connect_timeout_ms=self.connect_timeout_ms,
        )


def tier_at(url, options, beside=(), **others):
    """The settings of a tier by its URL: an `ObjectTier`, or a `RedisTier`.

    Parameters
    ----------
    url : str
    options : dict
        Settings by name, as the user wrote them.
    beside : iterable of str, default ()
        Further names for the hint "did you mean", which are no settings of the tier.
    **others
        Further settings, which `options` may not have.

    Raises
    ------
    ConfigError
        There is no such setting, or its value is wrong.
    """
    kind = ObjectTier if isinstance(url, str) and url.partition(":")[0] in ObjectTier.SCHEMES else RedisTier
    known = {field.name for field in fields(kind)} - {"url", *others}
    for name in options:
        if name not in known:
            near = nearest(name, [*known, *beside])
            raise ConfigError(
                f"remote_options has an unknown setting {name!r}; "
                + (f"did you mean {near!r}?" if near else f"{kind.__name__} has {', '.join(sorted(known))}")
            )
    try:
        return kind(url, **others, **options)
    except TypeError as error:
        raise ConfigError(f"remote_options: {error}") from None


class OpenRemoteTier:
    """A view of a server as the catalogue, and a store.

    Attributes
    ----------
    catalogue : BlockIndex
        The blocks that the server probably has.
    store : RemoteStore
    adoption : View
        It fills the catalogue.
    tag : bytes
        The tag of the weights for every put and get from now on.
    queue_blocks : int
        Blocks that the store lets wait.
    record_bytes : int
        Of a block as the server has it.
    lookup_s : float
        How long a prefix waits for an answer.
    """

    is_remote = True
    is_adopting = False
    codec, slot_ratio = "exact", None

    def __init__(self, settings, store, tag):
        self.name, self.queue_blocks = settings.name, settings.queue_blocks
        self.lookup_s = settings.lookup_timeout_ms / 1000
        self.store, self._tag, self.record_bytes = store, tag, store.pool.stride_bytes
        self.catalogue = BlockIndex(store.num_slots)
        self.catalogue.add_slots(0, store.num_slots)
        self.adoption = View(
            store.client, store.names, store.payload_bytes, self.catalogue, tag, settings.negative_ttl_s, store.signal
        )
        store.threads.append(self.adoption.thread)

    @property
    def tag(self):
        return self._tag

    @tag.setter
    def tag(self, tag):
        self._tag = tag
        self.store.disown()  # blocks that are written under the old tag stay on the server, for others

    def ask(self, keys):
        """A `Question` about the unknown part of a chain of keys; None if there is nothing to ask."""
        return self.adoption.ask(keys)

    def look_up(self, keys):
        """HIT, MISS or BUSY for each key, by the catalogue, without I/O."""
        return look_up(self.catalogue, keys)

    def discard(self, keys):
        """Forget blocks at once, and remove them from the server; return how many were known to be there."""
        self.store.delete(keys, self.tag, timeout_ms=None)
        return self._forget(keys)

    def was_wrong(self, keys, statuses):
        """Forget blocks whose reads failed, and remove those that are wrong on the server."""
        with contextlib.suppress(EngineClosed):
            self.store.delete(keys[~np.isin(statuses, NOT_TO_BE_ERASED)], self.tag, timeout_ms=None)
        self._forget(keys[statuses == BlockStatus.MISSING])
        self.catalogue.discard(keys)

    def _forget(self, keys):
        slots = self.catalogue.slots_of(keys)
        self.adoption.forget(keys)
        return int((slots != NO_SLOT).sum())

    def clear(self, tag):
        """Forget everything at once. Blocks on the server stay, for others: they have another tag."""
        self.tag = tag
        self.adoption.clear(tag)
        self.catalogue.clear()

    def close(self, timeout_ms=5000):
        """Write the blocks that were put, end the threads, close the client. Idempotent."""
        self.adoption.stop()
        deadline_s = time.monotonic() + timeout_ms / 1000
        with contextlib.suppress(EngineClosed):
            self.store.flush(timeout_ms)
        self.store.close(max(0, int(1000 * (deadline_s - time.monotonic()))))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
