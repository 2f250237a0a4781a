"""Servers that the tests of this folder share, and a store on each."""

import dataclasses
import hashlib

import pytest
from proxy import Proxy
from servers import ACCESS_KEY, BUCKET, PASSWORD, SECRET_KEY, Gateway, Redis, RedisCluster, RedisWithTLS
from tier_rig import RemoteRig
from tiered_rig import EngineRig

from kvortex import ObjectTier, RedisTier
from kvortex.slots import PAGE_BYTES


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    server = Redis(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory):
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster")).start()
    yield cluster
    cluster.kill()


@pytest.fixture(scope="session")
def redis_tls(tmp_path_factory):
    server = RedisWithTLS(tmp_path_factory.mktemp("tls")).start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def gateway(tmp_path_factory):
    server = Gateway(tmp_path_factory.mktemp("s3")).start()
    yield server
    server.end()


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    monkeypatch.setenv("TEST_REDIS_PASSWORD", PASSWORD)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture
def settings_of(request):
    """Return a function: from the name of a server, the settings of a tier on it."""

    own = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]  # nobody else's blocks

    def make(kind, **settings):
        if kind.startswith("redis"):
            settings = {"key_prefix": f"kvortex:{own}:", **settings}
        if kind == "redis":
            return RedisTier(request.getfixturevalue("redis_server").url, **settings)
        if kind == "redis-socket":
            return RedisTier(f"unix://{request.getfixturevalue('redis_server').socket}", **settings)
        if kind == "redis-cluster":
            return RedisTier(request.getfixturevalue("redis_cluster").url, cluster=True, **settings)
        if kind == "redis-tls":
            server = request.getfixturevalue("redis_tls")
            return RedisTier(server.url, ca_file=server.ca, password_env="TEST_REDIS_PASSWORD", **settings)
        if kind == "file":
            return ObjectTier(f"file://{request.getfixturevalue('tmp_path')}/shared", **settings)
        server = request.getfixturevalue("gateway")
        url, region = f"s3://{BUCKET}/{own}", "default"
        if kind == "s3-tls":
            return ObjectTier(url, endpoint=server.tls_endpoint, region=region, ca_file=server.ca, **settings)
        return ObjectTier(url, endpoint=server.endpoint, region=region, **settings)

    return make


LOOKUP_MS = 30_000  # a deadline that no healthy machine comes near
KINDS = ["redis", "redis-socket", "redis-cluster", "redis-tls", "s3", "s3-tls", "file"]


@pytest.fixture(params=KINDS)
def rig(request, settings_of):
    """A store on each server in turn."""
    settings = settings_of(request.param)
    client = settings.client(PAGE_BYTES)
    made = RemoteRig(client, settings.client(PAGE_BYTES), name_format=f"kvortex:{request.node.name}/{{name}}")
    yield made
    made.raw.close()
    made.close()


@pytest.fixture
def remote(rig):
    return rig


@pytest.fixture
def open_engine(tmp_path):
    """Return a function that opens an engine over a tier, which gets time to answer."""
    opened = []

    def make(tier, **settings):
        tier = dataclasses.replace(tier, lookup_timeout_ms=LOOKUP_MS)
        opened.append(EngineRig(tmp_path, tier=tier, **settings))
        return opened[-1]

    yield make
    for rig in opened:
        rig.close()


@pytest.fixture
def open_proxy():
    """Return a function that puts a proxy in front of a port."""
    opened = []

    def make(port):
        opened.append(Proxy(port))
        return opened[-1]

    yield make
    for proxy in opened:
        proxy.close()


class RedisValues:
    """What an engine has on the server, by another client."""

    def __init__(self, rig, server):
        import redis

        self.client, self.prefix = redis.Redis(port=server.port), rig.store.names.name_format.partition("{")[0]

    def read(self):
        return {name: self.client.get(name) for name in self.client.keys(f"{self.prefix}*")}

    def write(self, values):
        for name, value in values.items():
            self.client.set(name, value)


class FileValues:
    def __init__(self, folder):
        self.folder = folder

    def read(self):
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def write(self, values):
        for path, value in values.items():
            path.write_bytes(value)


class ObjectValues:
    def __init__(self, rig, server):
        self.client, self.prefix = server.s3(), rig.tier_settings.url.partition(BUCKET + "/")[2]

    def read(self):
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=self.prefix)["Contents"]
        return {each["Key"]: self.client.get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read() for each in found}

    def write(self, values):
        for name, value in values.items():
            self.client.put_object(Bucket=BUCKET, Key=name, Body=value)


@pytest.fixture
def raw_of(request, tmp_path):
    """Return a function that gives the values of an engine, by kind of server."""

    def make(kind, rig):
        if kind == "file":
            return FileValues(tmp_path / "shared")
        if kind == "redis":
            return RedisValues(rig, request.getfixturevalue("redis_server"))
        return ObjectValues(rig, request.getfixturevalue("gateway"))

    return make
