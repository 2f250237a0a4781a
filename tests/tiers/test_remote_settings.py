"""RedisTier and ObjectTier: what settings they take, and that secrets stay where they are."""

import dataclasses

import pytest
from tier_rig import SPACE, make_pool

from kvortex import ConfigError, ObjectTier, RedisTier
from kvortex.tiers.remote.objects import leading_sizes


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RedisTier("redis://:hush@host"), "password_env or password_file"),
        (lambda: RedisTier("redis://me:hush@host:6379"), "password_env or password_file"),
        (lambda: ObjectTier("s3://key:hush@bucket/x"), "the environment"),
        (lambda: RedisTier("redis://me:hush/1@host"), "cannot be read"),
        (lambda: RedisTier("redis://me:12/hush@host"), "without a path"),
        (lambda: RedisTier("redis://[hush@host]"), "cannot be read"),
        (lambda: RedisTier("unix:me:hush@host"), "unix:///path"),
        (lambda: RedisTier("unix://hush/path"), "unix:///path"),
        (lambda: ObjectTier("s3:key:hush@bucket/x"), "name a bucket"),
        (lambda: ObjectTier("s3://key:12/hush@bucket"), "name a bucket"),
        (lambda: ObjectTier("file://hush/x"), "file:///absolute"),
        (lambda: ObjectTier("s3://bucket", endpoint="https://key:hush@host"), "endpoint has a user or password"),
        (lambda: ObjectTier("s3://bucket", endpoint=7), "endpoint must be a text"),
        (lambda: ObjectTier("s3://bucket", virtual_hosted="no"), "virtual_hosted must be true or false"),
        (lambda: RedisTier("redis://h", cluster="no"), "cluster must be true or false"),
        (lambda: RedisTier("redis://h", password_env=7), "password_env must be a text"),
        (lambda: RedisTier("redis://h", key_prefix=7), "key_prefix must be a text"),
        (lambda: RedisTier("redis://h", key_prefix=None), "key_prefix must be a text"),
        (lambda: ObjectTier("s3://key@bucket/x"), "user"),
        (lambda: RedisTier("http://host"), "must begin with redis"),
        (lambda: RedisTier("host:6379"), "must begin with redis"),
        (lambda: RedisTier("redis://"), "redis://cache:6379"),
        (lambda: RedisTier("redis://host/3"), "without a path"),
        (lambda: RedisTier("redis://host:port"), "cannot be read"),
        (lambda: RedisTier("redis://host?db=3"), r"'\?'"),
        (lambda: RedisTier("unix://relative/path"), "unix:///path"),
        (lambda: RedisTier("unix:///path", cluster=True), "cluster"),
        (lambda: ObjectTier("s3://"), "name a bucket"),
        (lambda: ObjectTier("file://relative"), "file:///absolute"),
        (lambda: ObjectTier(7), "must be a text"),
        (lambda: RedisTier("redis://h", num_threads=0), "num_threads must be 1 to 256, got 0"),
        (lambda: RedisTier("redis://h", ttl_s=-1), "ttl_s must be 0"),
        (lambda: RedisTier("redis://h", negative_ttl_s=-1), "negative_ttl_s"),
        (lambda: RedisTier("redis://h", negative_ttl_s=float("nan")), "negative_ttl_s"),
        (lambda: RedisTier("redis://h", lookup_timeout_ms=-5), "lookup_timeout_ms"),
        (lambda: ObjectTier("s3://b", view_blocks=0), "view_blocks must be 1"),
        (lambda: RedisTier("redis://h", password_env="A", password_file="b").client(10), "not both"),
        (lambda: RedisTier("redis://h", password_env="NOT_THERE_AT_ALL").client(10), "NOT_THERE_AT_ALL"),
        (lambda: RedisTier("redis://h", password_file="/not/there").client(10), "password_file cannot be read"),
        (lambda: RedisTier("rediss://h", ca_file="/not/there").client(10), "ca_file cannot be read"),
        (lambda: RedisTier("redis://h", max_value_bytes="1KiB").client(1025), "max_value_bytes=1024"),
    ],
)
def test_what_cannot_be_is_refused_and_no_secret_is_told(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["num_threads", "view_blocks", "queue_blocks", "ttl_s", "write_bytes_per_s"])
@pytest.mark.parametrize("value", [1.5, True, None])
def test_whole_numbers_are_whole(name, value):
    with pytest.raises(TypeError, match=name):
        RedisTier("redis://h", **{name: value})


@pytest.mark.parametrize("url", ["redis://h", "rediss://me@h:7000", "valkey://h", "valkeys://h", "unix:///run/r.sock"])
def test_what_names_a_server_is_taken(url):
    RedisTier(url).client(100).close()


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://bucket/a/b", "gs://bucket/x", "az://container/x", "file:///a%20b"]
)
def test_what_names_a_bucket_or_a_folder_is_taken(url):
    ObjectTier(url).client(100).close()


def test_a_secret_is_not_a_part_of_the_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_REDIS", "hush")
    (tmp_path / "secret").write_text("hush\n")
    for tier in (
        RedisTier("redis://h", password_env="SECRET_OF_REDIS"),
        RedisTier("redis://h", password_file=tmp_path / "secret"),
    ):
        client = tier.client(10)
        assert client._settings[1] == "hush"
        assert "hush" not in repr(tier) + repr(client) + str(dataclasses.asdict(tier))


def test_a_server_that_is_not_there_is_no_reason_not_to_start():
    with (
        make_pool() as pool,
        RedisTier("redis://127.0.0.1:1", connect_timeout_ms=100).open(pool, namespace=SPACE) as tier,
    ):
        assert tier.look_up(pool_keys()).tolist() == [0]


def pool_keys():
    from tier_rig import keys_of

    return keys_of([1])


@pytest.mark.parametrize("num_there", [0, 1, 2, 7, 1000, 2047, 2048])
def test_bisection_finds_the_end_of_a_chain(num_there):
    asked = []
    sizes = leading_sizes(lambda name: asked.append(name) or (10 if name < num_there else 0), range(2048))
    assert sizes == [10] * num_there + [0] * (2048 - num_there)
    assert len(asked) <= (12 if num_there else 1)
