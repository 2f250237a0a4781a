"""A client of Redis and Valkey: one server, or a cluster."""

import threading

from kvortex.errors import ConfigError
from kvortex.tiers.remote.client import Value, parts_of

INSTALL = "the Redis tier needs the package valkey-glide-sync; install kvortex[redis]"


def require_package():
    """Raise ConfigError if the client's package is missing."""
    try:
        import glide_sync  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{INSTALL} ({error})") from None


class RedisClient:
    """Values in Redis or Valkey; the contract is `kvortex.tiers.remote.client.Client`.

    Parameters
    ----------
    address : (host, port), or str
        A str is the path of a unix socket.
    is_cluster : bool
    username, password : str or None
    tls, ca : bool, bytes or None
        Whether to encrypt, and the certificates (PEM) to trust instead of the system's.
    ttl_s : int
        Values expire so many seconds after they were last written or read; 0: never.
    request_timeout_ms, connect_timeout_ms : int
    """

    def __init__(self, address, *, is_cluster, username, password, tls, ca, ttl_s, request_timeout_ms,
                 connect_timeout_ms):  # fmt: skip
        self._address, self._is_cluster, self._ttl_s = address, is_cluster, ttl_s
        self._settings = (username, password, tls, ca, request_timeout_ms, connect_timeout_ms)
        self._lock, self._made, self._is_closed = threading.Lock(), None, False

    def put(self, name, record):
        from glide_shared.commands.core_options import ExpirySet, ExpiryType

        expiry = ExpirySet(ExpiryType.SEC, self._ttl_s) if self._ttl_s else None
        parts = parts_of(record)
        self._client().set(name, parts[0] if len(parts) == 1 else b"".join(parts), expiry=expiry)

    def get(self, name, record):
        import glide_sync

        client, parts = self._client(), parts_of(record)
        value = parts[0] if len(parts) == 1 else memoryview(bytearray(sum(map(len, parts))))
        try:
            found = client.get(name, buffer=value)
        except glide_sync.RequestError:
            nbytes = client.strlen(name)
            if nbytes <= len(value):  # otherwise the value was too long, and nothing else is wrong
                raise
            return Value(nbytes)
        if found is None:
            return None
        start = 0
        for part in parts if len(parts) > 1 else ():
            part[:] = value[start : start + len(part)]
            start += len(part)
        return Value(int(found))

    def refresh(self, name, record, age_s):
        if self._ttl_s:
            self._client().expire(name, self._ttl_s)

    def sizes(self, names, is_chain):
        import glide_sync

        batch = (glide_sync.ClusterBatch if self._is_cluster else glide_sync.Batch)(is_atomic=False)
        for name in names:
            batch.strlen(name)
        return self._client().exec(batch, raise_on_error=True)

    def delete(self, name):
        self._client().unlink([name])

    def close(self):
        with self._lock:
            made, self._made, self._is_closed = self._made, None, True
        if made is not None:
            made.close()

    def _client(self):
        """The connection; made at the first use."""
        made = self._made
        if made is None:
            with self._lock:
                if self._is_closed:
                    raise ConnectionError("the client is closed")
                made = self._made = self._made or self._make()
        return made

    def _make(self):
        import glide_sync
        from glide_shared import config

        glide_sync.Logger.init(glide_sync.LogLevel.OFF)  # it would write to stderr; the store reports errors
        username, password, tls, ca, request_timeout_ms, connect_timeout_ms = self._settings
        if isinstance(self._address, str):
            address = config.NodeAddress(unix_socket_path=self._address)
        else:
            address = config.NodeAddress(*self._address)
        settings = {
            "addresses": [address],
            "use_tls": tls,
            "credentials": config.ServerCredentials(password, username) if password else None,
            "request_timeout": request_timeout_ms,
            "lazy_connect": True,
            "client_name": "kvortex",
        }
        advanced = {"connection_timeout": connect_timeout_ms}
        if ca is not None:
            advanced["tls_config"] = config.TlsAdvancedConfiguration(root_pem_cacerts=ca)
        if self._is_cluster:
            advanced = config.AdvancedGlideClusterClientConfiguration(**advanced)
            made = config.GlideClusterClientConfiguration(**settings, advanced_config=advanced)
            return glide_sync.GlideClusterClient.create(made)
        advanced = config.AdvancedGlideClientConfiguration(**advanced)
        return glide_sync.GlideClient.create(config.GlideClientConfiguration(**settings, advanced_config=advanced))
