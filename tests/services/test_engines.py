"""Engines over real servers: what they share, and what they do when a server fails."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import BUCKET, PASSWORD, SECRET_KEY, Redis, RedisCluster, RedisWithTLS, make_certificates
from tiered_rig import keys_of, wait_until

from kvortex import ObjectTier, RedisTier
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.remote.sweep import sweep

KINDS = ["redis", "redis-cluster", "redis-tls", "s3", "file"]
WAIT = {"promote_timeout_ms": 30_000}
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_engine_saved_another_finds(settings_of, open_engine, kind):
    a, b = open_engine(settings_of(kind)), open_engine(settings_of(kind))
    a.save(range(12))
    assert a.engine.flush(30_000) == 0
    assert b.load(range(12), **WAIT) == 12
    stats = b.engine.get_stats().tiers[0]
    assert (stats.blocks_promoted, stats.blocks_scanned) == (12, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_two_engines_that_write_the_same_blocks_both_have_them(settings_of, open_engine, kind):
    rigs = [open_engine(settings_of(kind)) for _ in range(2)]
    for rig in rigs:
        rig.save(range(8))
    for rig in rigs:
        assert rig.engine.flush(30_000) == 0
        rig.forget_ram()
    assert [rig.load(range(8), **WAIT) for rig in rigs] == [8, 8]


@pytest.mark.parametrize("kind", ["redis", "s3", "file"])
def test_blocks_of_other_weights_models_and_salts_are_not_found(settings_of, open_engine, kind):
    a = open_engine(settings_of(kind), weights="step 1")
    a.save(range(4))
    assert a.engine.flush(30_000) == 0
    b = open_engine(settings_of(kind), weights="step 2")
    assert b.load(range(4), **WAIT) == 0
    b.engine.clear(weights="step 1")
    b.weights = "step 1"
    assert b.load(range(4), **WAIT) == 4, "cleared, it has the weights that a named"
    a.engine.clear()
    a.weights = "unnamed"
    assert a.load(range(4), **WAIT) == 0


@pytest.mark.parametrize("kind", ["redis", "s3", "file"])
def test_clear_deletes_nothing_of_others_and_discard_does(settings_of, open_engine, kind):
    a, b = open_engine(settings_of(kind, negative_ttl_s=0)), open_engine(settings_of(kind, negative_ttl_s=0))
    a.save(range(4))
    assert a.engine.flush(30_000) == 0
    a.engine.clear(weights="other")
    assert b.load(range(4), **WAIT) == 4
    b.engine.discard_blocks(keys_of(range(2)))
    assert b.engine.flush(30_000) == 0
    c = open_engine(settings_of(kind))
    assert c.found(range(4)) == [2, 3]


@pytest.mark.parametrize("kind", ["redis", "file"])
def test_blocks_that_are_no_chain_are_asked_for_at_once(settings_of, open_engine, kind):
    """As those of windows are: with Redis a round trip each would take longer than a prefix may wait."""
    rig = open_engine(settings_of(kind))
    rig.save([1, 3, 4])
    assert rig.engine.flush(30_000) == 0
    rig.tier.catalogue.clear()
    sizes, asked = rig.store.client.sizes, []
    rig.store.client.sizes = lambda names, is_chain: asked.append(len(names)) or sizes(names, is_chain)
    question = rig.tier.adoption.ask(keys_of(range(6)), is_chain=False)
    wait_until(lambda: question.is_over)
    assert (rig.known(range(6)), asked) == ([1, 3, 4], [6])


def test_what_was_not_there_counts_as_missing_for_a_while(settings_of, open_engine):
    a, b = open_engine(settings_of("redis")), open_engine(settings_of("redis", negative_ttl_s=3600))
    assert b.load(range(100, 104), **WAIT) == 0
    a.save(range(100, 104))
    assert a.engine.flush(30_000) == 0
    assert b.load(range(100, 104), **WAIT) == 0, "it was asked for a moment ago"
    b.tier.adoption.clear(b.tier.tag)
    assert b.load(range(100, 104), **WAIT) == 4


def test_a_hit_lets_a_block_live_for_longer(settings_of, open_engine, redis_server):
    rig = open_engine(settings_of("redis", ttl_s=1000, key_prefix="ttl:"))
    rig.save([0])
    assert rig.engine.flush(30_000) == 0
    (name,) = redis_server.cli("keys", "ttl:*").split()
    redis_server.cli("expire", name, "100")
    rig.forget_ram()
    assert rig.load([0], **WAIT) == 1
    assert int(redis_server.cli("ttl", name)) > 900


def test_a_block_that_the_server_evicted_is_a_miss_and_is_written_again(settings_of, open_engine, redis_server):
    rig = open_engine(settings_of("redis", key_prefix="gone:"))
    rig.save(range(4))
    assert rig.engine.flush(30_000) == 0
    redis_server.cli("del", *redis_server.cli("keys", "gone:*").split())
    rig.forget_ram()
    assert rig.load(range(4), **WAIT) == 0
    assert rig.engine.get_stats().tiers[0].misses["MISSING"]
    rig.save(range(4))
    assert rig.engine.flush(30_000) == 0
    rig.forget_ram()
    assert rig.load(range(4), **WAIT) == 4


@pytest.mark.parametrize("refresh_s, is_renewed", [(1, True), (1000, False), (0, False)])
def test_an_object_that_is_old_when_it_is_read_is_written_again(
    settings_of, open_engine, raw_of, refresh_s, is_renewed
):
    rig = open_engine(settings_of("s3", refresh_s=refresh_s))
    rig.save([0])
    assert rig.engine.flush(30_000) == 0
    client = rig.tier_settings.client()
    ((name, nbytes, written_s),) = client.list()
    time.sleep(2.5)  # the gateway tells whole seconds
    rig.forget_ram()
    assert rig.load([0], **WAIT) == 1
    ((same_name, same_nbytes, last_s),) = client.list()
    assert (same_name, same_nbytes, last_s > written_s) == (name, nbytes, is_renewed)
    rig.forget_ram()
    assert rig.load([0], **WAIT) == 1, "and what was written again is right"


def test_a_bucket_is_swept_beside_a_running_engine(settings_of, open_engine):
    rig = open_engine(settings_of("s3"))
    rig.save(range(8))
    assert rig.engine.flush(30_000) == 0
    nbytes = sweep(rig.tier_settings, older_than_s=3600).bytes // 8
    swept = sweep(rig.tier_settings, max_bytes=3 * nbytes)
    assert (swept.blocks, swept.removed_blocks) == (8, 5)
    rig.forget_ram()
    assert len(rig.found(range(8))) == 3, "what is gone is a miss, and what is left is right"
    assert sweep(rig.tier_settings, older_than_s=0).removed_blocks >= 3


# ---- what a server may do wrong --------------------------------------------------------------------------------------


def damage_truncated(values):
    return {name: value[:-1] for name, value in values.items()}


def damage_flipped(values):
    return {name: value[:5000] + bytes([value[5000] ^ 4]) + value[5001:] for name, value in values.items()}


def damage_swapped(values):
    names = list(values)
    return dict(zip(names, [values[name] for name in names[1:] + names[:1]], strict=True))


def damage_empty(values):
    return dict.fromkeys(values, b"")


def damage_longer(values):
    return {name: value + b"x" for name, value in values.items()}


def damage_version(values):
    return {name: value[:8] + b"\xff" + value[9:] for name, value in values.items()}


DAMAGES = [damage_truncated, damage_flipped, damage_swapped, damage_empty, damage_longer, damage_version]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("kind", ["redis", "s3", "file"])
def test_a_value_that_is_not_right_is_a_miss(settings_of, open_engine, raw_of, kind, damage):
    rig = open_engine(settings_of(kind))
    rig.save(range(4))
    assert rig.engine.flush(30_000) == 0
    raw = raw_of(kind, rig)
    raw.write(damage(raw.read()))
    rig.forget_ram()
    assert rig.found(range(4)) == []  # what comes is compared: a wrong block fails the test
    rig.save(range(4))
    assert rig.engine.flush(30_000) == 0
    rig.forget_ram()
    assert rig.found(range(4)) == [0, 1, 2, 3], "and the right one takes its place"


def works_without_tier(rig):
    """RAM serves, whatever the tier does."""
    rig.save(range(8))
    assert rig.load(range(8)) == 8


def last_error(rig):
    return f"{rig.tier.store.stats()['last_error']} {rig.tier.adoption.last_error}"


def test_a_wrong_password_is_told_and_shown_nowhere(redis_tls, open_engine, monkeypatch, caplog, capfd):
    monkeypatch.setenv("WRONG_PASSWORD", "a-wrong-secret")
    tier = RedisTier(redis_tls.url, ca_file=redis_tls.ca, password_env="WRONG_PASSWORD", request_timeout_ms=2000)
    rig = open_engine(tier)
    works_without_tier(rig)
    assert rig.engine.flush(2000) > 0
    assert rig.load(range(50, 54), promote_timeout_ms=5000) == 0
    assert "WRONGPASS" in last_error(rig) or "authentication" in last_error(rig).lower()
    shown = "".join(
        [repr(tier), repr(rig.engine), str(rig.engine.get_stats()), last_error(rig), caplog.text, *capfd.readouterr()]
    )
    assert "a-wrong-secret" not in shown and PASSWORD not in shown


def test_a_user_without_rights_writes_nothing_and_serves_from_ram(redis_tls, open_engine):
    tier = RedisTier(redis_tls.url, ca_file=redis_tls.ca, password_env="TEST_REDIS_PASSWORD", key_prefix="other:")
    rig = open_engine(tier)
    works_without_tier(rig)
    assert rig.engine.flush(2000) > 0
    assert "NOPERM" in last_error(rig) or "permission" in last_error(rig).lower()


def test_a_certificate_that_has_expired_is_not_trusted(tmp_path, open_engine):
    server = RedisWithTLS(tmp_path / "expired", days=0).start()
    try:
        tier = RedisTier(server.url, ca_file=server.ca, password_env="TEST_REDIS_PASSWORD", connect_timeout_ms=500)
        rig = open_engine(tier)
        works_without_tier(rig)
        assert rig.engine.flush(3000) > 0
        assert not server.cli("keys", "*").strip()
    finally:
        server.kill()


@pytest.mark.parametrize("kind", ["redis-tls", "s3-tls"])
def test_an_authority_that_nobody_named_is_not_trusted(settings_of, open_engine, tmp_path, kind):
    (tmp_path / "others").mkdir()
    tier = dataclasses.replace(
        settings_of(kind), ca_file=make_certificates(tmp_path / "others"), connect_timeout_ms=500
    )
    rig = open_engine(tier)
    works_without_tier(rig)
    assert rig.engine.flush(3000) > 0


def test_a_wrong_key_and_a_missing_bucket_are_told(gateway, open_engine, monkeypatch, capfd):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongsecretkey")
    rig = open_engine(ObjectTier(f"s3://{BUCKET}/x", endpoint=gateway.endpoint, region="default"))
    works_without_tier(rig)
    assert rig.engine.flush(3000) > 0
    assert (
        "403" in last_error(rig) or "PermissionDenied" in last_error(rig) or "SignatureDoesNotMatch" in last_error(rig)
    )
    assert "wrongsecretkey" not in last_error(rig) + repr(rig.engine) + "".join(capfd.readouterr())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    rig = open_engine(ObjectTier("s3://no-such-bucket/x", endpoint=gateway.endpoint, region="default"))
    works_without_tier(rig)
    assert rig.engine.flush(3000) > 0
    assert "NoSuchBucket" in last_error(rig) or "404" in last_error(rig)


@pytest.mark.parametrize("status", [403, 404, 412, 500, 503])
def test_a_gateway_that_only_refuses_costs_misses(gateway, open_engine, open_proxy, status):
    proxy = open_proxy(gateway.port)
    tier = ObjectTier(f"s3://{BUCKET}/refused", endpoint=f"http://127.0.0.1:{proxy.port}", region="default",
                      request_timeout_ms=2000)  # fmt: skip
    rig = open_engine(tier)
    rig.save(range(4))
    assert rig.engine.flush(30_000) == 0
    proxy.http_status = status
    proxy.drop_connections()
    rig.forget_ram()
    assert rig.load(range(4), promote_timeout_ms=10_000) == 0
    works_without_tier(rig)
    assert proxy.num_requests
    proxy.http_status = None
    proxy.drop_connections()
    wait_until(lambda: rig.engine.flush(30_000) == 0, 120)
    rig.forget_ram()
    wait_until(lambda: rig.load(range(4), **WAIT) == 4, 120)


def test_a_full_server_takes_nothing_and_serves_all_the_same(tmp_path, open_engine):
    server = Redis(tmp_path / "full", maxmemory="4mb", maxmemory_policy="noeviction").start()
    try:
        rig = open_engine(RedisTier(server.url), pool_slots=300)
        for first in range(0, 256, 16):
            rig.save(range(first, first + 16))
        assert rig.engine.flush(5000) > 0
        assert "OOM" in last_error(rig) or "memory" in last_error(rig).lower()
        there = rig.known(range(256))
        assert there
        rig.forget_ram()
        assert rig.load(there[:1], **WAIT) == 1, "writing is suspended, reading is not"
    finally:
        server.kill()


def test_a_server_that_dies_and_comes_back_is_used_again(tmp_path, open_engine):
    server = Redis(tmp_path / "dying").start()
    try:
        rig = open_engine(RedisTier(server.url, request_timeout_ms=1000, negative_ttl_s=0))
        rig.save(range(8))
        assert rig.engine.flush(30_000) == 0
        server.kill()
        rig.forget_ram()
        assert rig.load(range(8), promote_timeout_ms=10_000) == 0
        works_without_tier(rig)
        server.start()
        wait_until(lambda: rig.engine.flush(30_000) == 0, 120)
        rig.forget_ram()
        wait_until(lambda: rig.load(range(8), **WAIT) == 8, 120)
    finally:
        server.kill()


def test_a_server_that_is_killed_in_mid_transfer_is_used_again(tmp_path, open_engine):
    server = Redis(tmp_path / "killed").start()
    try:
        rig = open_engine(RedisTier(server.url, request_timeout_ms=1000, negative_ttl_s=0), pool_slots=300)
        put, num_begun = rig.store.client.put, []
        rig.store.client.put = lambda *value: (num_begun.append(1), len(num_begun) == 20 and server.kill(), put(*value))
        rig.save(range(200))
        wait_until(lambda: len(num_begun) >= 20)
        works_without_tier(rig)
        server.start()
        wait_until(lambda: rig.engine.flush(30_000) == 0, 120)
        rig.forget_ram()
        assert 100 < len(rig.found(range(200))) < 200, "the server lost what it had when it was killed"
        rig.save(range(200))
        assert rig.engine.flush(30_000) == 0
        rig.forget_ram()
        assert rig.found(range(200)) == list(range(200))
    finally:
        server.kill()


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_a_writer_that_was_killed_leaves_no_part_of_a_block(settings_of, open_engine, kind, tmp_path):
    settings = settings_of(kind)
    program = f"""
import itertools
from tiered_rig import EngineRig
from kvortex import ObjectTier, RedisTier
rig = EngineRig({str(tmp_path)!r}, tier={settings!r})
for i in itertools.count():
    rig.save(range(8 * i, 8 * i + 8))
    i or rig.engine.flush()
    print("saved", flush=True)
"""
    folders = [str(TESTS / "tiering"), str(TESTS / "tiers"), str(TESTS), os.environ["PYTHONPATH"]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    for round_ in range(1, 4):
        with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=-1) as process:
            for _ in range(2 * round_):
                process.stdout.readline()
            process.kill()
    rig = open_engine(settings)
    there = rig.found(range(64))  # compared
    stats = rig.engine.get_stats().tiers[0]
    assert there and set(stats.misses) <= {"MISSING", "UNANSWERED"}, stats.misses


def test_a_forked_child_has_no_use_of_the_client(settings_of, open_engine):
    rig = open_engine(settings_of("redis"))
    rig.save(range(4))
    assert rig.engine.flush(30_000) == 0
    child = os.fork()
    if not child:
        signal.alarm(20)
        batch = rig.store.get([0], [20], keys_of([0]), rig.pool.payload_bytes, tag=rig.tier.tag, timeout_ms=10_000)
        os._exit(not (batch.done() and batch.statuses.tolist() == [BlockStatus.DROPPED]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    rig.forget_ram()
    assert rig.load(range(4), **WAIT) == 4


def test_a_hung_server_keeps_nobody_waiting(tmp_path, open_engine):
    server = Redis(tmp_path / "hung").start()
    try:
        rig = open_engine(RedisTier(server.url, request_timeout_ms=1000))
        rig.save(range(8))
        assert rig.engine.flush(30_000) == 0
        rig.forget_ram()
        server.hang()
        begun = time.monotonic()
        assert rig.load(range(8), promote_timeout_ms=300) == 0
        assert time.monotonic() - begun < 20
        works_without_tier(rig)
        server.wake()
        wait_until(lambda: rig.load(range(8), **WAIT) == 8, 120)
    finally:
        server.wake()
        server.kill()


@pytest.mark.parametrize(
    "harm, value",
    [("stops_after", 9000), ("stops_after", 0), ("cuts_after", 9000), ("flips", True)],
    ids=["stops in mid-value", "accepts and never answers", "hangs up in mid-value", "flips a bit"],
)
@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_an_answer_that_is_not_right_is_no_block(settings_of, request, open_engine, open_proxy, kind, harm, value):
    settings = settings_of(kind)
    proxy = open_proxy(request.getfixturevalue("redis_server" if kind == "redis" else "gateway").port)
    there = (
        {"url": f"redis://127.0.0.1:{proxy.port}"}
        if kind == "redis"
        else {"endpoint": f"http://127.0.0.1:{proxy.port}"}
    )
    writer = open_engine(settings)
    writer.save(range(8))
    assert writer.engine.flush(30_000) == 0
    setattr(proxy, harm, value)  # of a record's 24 000 bytes
    rig = open_engine(dataclasses.replace(settings, request_timeout_ms=1000, **there))
    found = rig.load(range(8), promote_timeout_ms=10_000)  # compared
    assert not found or (kind, harm) == ("s3", "cuts_after")  # there the client asks for the rest
    works_without_tier(rig)


def test_a_node_of_a_cluster_dies_and_the_others_serve(tmp_path, open_engine):
    cluster = RedisCluster(tmp_path / "c").start()
    try:
        for node in cluster.nodes:
            node.cli("config", "set", "cluster-require-full-coverage", "no")
        rig = open_engine(RedisTier(cluster.url, cluster=True, request_timeout_ms=1000, negative_ttl_s=0))
        rig.save(range(12))
        assert rig.engine.flush(30_000) == 0
        cluster.nodes[2].kill()
        rig.forget_ram()
        found = rig.found(range(12), timeout_ms=5000)
        assert len(found) < 12
        works_without_tier(rig)
    finally:
        cluster.kill()


def test_slots_that_move_to_another_node_are_followed(tmp_path, open_engine):
    cluster = RedisCluster(tmp_path / "m").start()
    try:
        rig = open_engine(RedisTier(cluster.url, cluster=True))
        rig.save(range(12))
        assert rig.engine.flush(30_000) == 0
        first, second = (node.cli("cluster", "myid").strip() for node in cluster.nodes[:2])
        from servers import run

        run("redis-cli", "--cluster", "reshard", f"127.0.0.1:{cluster.nodes[0].port}", "--cluster-from", first,
            "--cluster-to", second, "--cluster-slots", "2000", "--cluster-yes")  # fmt: skip
        rig.forget_ram()
        assert rig.load(range(12), **WAIT) == 12
    finally:
        cluster.kill()
