"""Servers that the tests of this folder share, and a store on each."""

import pytest
from servers import ACCESS_KEY, BUCKET, PASSWORD, SECRET_KEY, Gateway, Redis, RedisCluster, RedisWithTLS
from tier_rig import RemoteRig

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
    monkeypatch.setenv("TEST_REDIS_PASSWORD", PASSWORD.replace(" ", "-"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture
def settings_of(request):
    """Return a function: from the name of a server, the settings of a tier on it."""

    def make(kind, **settings):
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
        url, region = f"s3://{BUCKET}/{request.node.name[:40].replace('[', '-').rstrip(']')}", "default"
        if kind == "s3-tls":
            return ObjectTier(url, endpoint=server.tls_endpoint, region=region, ca_file=server.ca, **settings)

        return ObjectTier(url, endpoint=server.endpoint, region=region, **settings)

    return make


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
