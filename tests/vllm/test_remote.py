"""A server or folder below the pool, shared by several vLLMs: what one has saved, another finds."""

import logging
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from rig import HAS_WORKER_METADATA

from kvortex import ConfigError, ObjectTier, PinnedPool, RedisTier
from kvortex.integrations.vllm import tier
from kvortex.integrations.vllm.messages import ERASE, PUT, TierTransfer
from kvortex.integrations.vllm.options import ConnectorOptions
from kvortex.integrations.vllm.worker_tier import WorkerTier
from kvortex.tiers.remote.objects import FolderClient

LONG_MS = 20_000
NUM_BLOCKS = 10  # of a prompt, of 16 tokens each


@pytest.fixture
def prompts(prompt):
    return [prompt(number, NUM_BLOCKS * 16 + 1) for number in range(6)]


@pytest.fixture(params=[1, 5])
def joined(request):
    """Blocks that share an object."""
    return request.param


@pytest.fixture
def start(make_rig, tmp_path, joined):
    """Starts an engine over one folder."""

    def start(remote_options=None, extra=None, **options):
        settings = {"lookup_timeout_ms": LONG_MS, "view_blocks": 1000, "blocks_per_object": joined}
        remote = {
            "remote_url": f"file://{tmp_path}",
            "remote_options": settings | (remote_options or {}),
            "namespace": "the rig",
            "prefill_tokens_per_s": 0,
            "promote_timeout_ms": LONG_MS,
        }
        return make_rig(extra={**remote, **(extra or {})}, **options)

    return start


def serve(rig, prompts, name):
    """Blocks that each prompt finds."""
    found = [rig.serve(f"{name}{number}", prompt) // 16 for number, prompt in enumerate(prompts)]
    rig.require_clean()
    return found


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_one_vllm_saved_another_finds_while_both_run(start, prompts, num_ranks):
    first, second = start(num_ranks=num_ranks), start(num_ranks=num_ranks)
    assert serve(first, prompts, "a") == [0] * 6
    assert serve(second, prompts, "b") == [NUM_BLOCKS] * 6
    assert second.half.tier.promoter.num_promoted == 6 * NUM_BLOCKS


def test_a_prefix_that_nobody_has_is_computed_after_one_question(start, prompts):
    rig = start()
    asked = []
    assert serve(rig, prompts[:1], "a") == [0]
    view = rig.half.tier.view
    size_of = view.client._size
    view.client._size = lambda name: asked.append(name) or size_of(name)
    assert serve(rig, prompts[1:2], "b") == [0]
    assert len(asked) == 1
    rig.forget_device()
    assert serve(rig, prompts[1:2], "c") == [NUM_BLOCKS]
    assert len(asked) == 1, "what it has itself it does not ask for"


def test_a_request_waits_for_an_answer_no_longer_than_it_may(start, prompts):
    rig = start(remote_options={"lookup_timeout_ms": 20})
    serve(rig, prompts[:1], "a")
    rig.half.tier.view.client._size = lambda name: time.sleep(20) or 0
    begun = time.monotonic()
    assert serve(rig, prompts[1:2], "b") == [0]
    assert time.monotonic() - begun < 15, "the question is still out"


@pytest.mark.parametrize("opened_ms", [None, 36], ids=["stores open later", "stores open meanwhile"])
def test_the_time_for_an_answer_begins_with_the_first_look(start, prompts, monkeypatch, opened_ms):
    """Whatever of it passes while stores are opened."""
    now_ms, gate = [1000], threading.Event()
    monkeypatch.setattr(tier, "time", SimpleNamespace(monotonic=lambda: now_ms[0] / 1000))
    monkeypatch.setattr(FolderClient, "_size", lambda *_: gate.wait(LONG_MS / 1000) and 0)
    rig = start(remote_options={"lookup_timeout_ms": 50})
    request = rig.make_request("a", prompts[0], 2)
    assert rig.half.match(request, 0) == (None, False)
    if opened_ms is not None:
        now_ms[0] += opened_ms
        rig.step()
        assert rig.half.tier.view is not None
        assert rig.half.match(request, 0) == (None, False)
    now_ms[0] = 1049
    assert rig.half.match(request, 0) == (None, False)
    now_ms[0] = 1050
    assert rig.half.match(request, 0) == (0, False)
    gate.set()


def test_no_step_waits_for_the_import_of_a_client(start, prompts, monkeypatch):
    rig = start()
    monkeypatch.setattr(ObjectTier, "client", None)
    assert serve(rig, prompts[:1], "a") == [0]
    assert rig.half.tier.view is not None


def test_requests_go_on_when_the_server_cannot_be_asked(start, prompts):
    rig = start()
    serve(rig, prompts[:1], "a")

    def fail(name):
        raise OSError("planted")

    rig.half.tier.view.client._size = fail
    assert serve(rig, prompts[1:5], "b") == [0] * 4
    assert not rig.half.tier.breaker.allows(time.monotonic()), "three failures in a row"
    rig.forget_device()
    assert serve(rig, prompts[1:5], "c") == [NUM_BLOCKS] * 4, "the pool serves"


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "swap"])
def test_values_that_are_not_right_are_computed_anew(start, prompts, tmp_path, joined, harm):
    first = start(num_ranks=2)
    serve(first, prompts, "a")
    first.close()
    paths = sorted(files(tmp_path))
    contents = [path.read_bytes() for path in paths]
    for i, path in enumerate(paths):
        if harm == "flip":
            path.write_bytes(contents[i][:-9] + bytes([contents[i][-9] ^ 1]) + contents[i][-8:])
        elif harm == "cut":
            path.write_bytes(contents[i][:-1])
        elif harm == "swap":
            path.write_bytes(contents[(i + 1) % len(paths)])
        elif i % 3 == 0:
            path.unlink()
    again = start(num_ranks=2)
    found = serve(again, prompts, "b")
    if harm == "remove":
        assert sum(found) < 6 * NUM_BLOCKS
    else:
        assert found == [joined - 1 if harm == "flip" else 0] * 6, "the others of an object with a damaged record serve"
    again.close()
    assert serve(start(num_ranks=2), prompts, "c") == [NUM_BLOCKS] * 6, "what is right took the place of what was not"


def test_nothing_saved_before_a_reset_is_served_after_it_and_others_keep_theirs(start, prompts, tmp_path):
    rig = start()
    serve(rig, prompts, "a")
    num_files = len(files(tmp_path))
    rig.reset()
    assert serve(rig, prompts, "b") == [0] * 6
    assert len(files(tmp_path)) > num_files
    assert serve(start(), prompts, "c") == [NUM_BLOCKS] * 6, "another, of the weights that were loaded"


def test_a_put_that_is_dropped_before_it_began_takes_nothing_from_the_server(tmp_path):
    """Its slot was another block's, which the server has all the same."""
    pool = PinnedPool(2 * 8192, 4096, "host", header_bytes=4096)
    pool.wait_ready(60)
    tier = WorkerTier(ObjectTier(f"file://{tmp_path}").open_store(pool, namespace=bytes(32)), 4096)
    slots, keys = np.zeros(1, np.uint32), np.eye(2, 32, dtype=np.uint8)
    tier.begin([TierTransfer(PUT, 1, slots, slots, keys[:1], bytes(32), LONG_MS)])
    tier.store.flush(LONG_MS)
    assert len(files(tmp_path)) == 1
    tier.begin([TierTransfer(PUT, 2, slots, slots, keys[1:], bytes(32), LONG_MS, save=1)])
    tier.begin([TierTransfer(ERASE, 0, slots, slots[:0], keys[:0], bytes(32), 0)])
    assert set(tier.moved) == {2}, "dropped"
    tier.close(LONG_MS)
    assert len(files(tmp_path)) == 1


@pytest.mark.skipif(not HAS_WORKER_METADATA, reason="this vLLM keeps one group")
@pytest.mark.parametrize("groups", [("full", "window:64"), ("full", "chunk:64")])
def test_a_model_with_windows_finds_what_another_saved(start, prompts, groups):
    serve(start(groups=groups), prompts, "a")
    assert min(serve(start(groups=groups), prompts, "b")) >= NUM_BLOCKS - 4


@pytest.mark.skipif(not HAS_WORKER_METADATA, reason="this vLLM keeps one group")
@pytest.mark.parametrize("groups", [("full", "window:64"), ("full", "chunk:64"), ("full", "window:32", "window:80")])
def test_the_next_turn_of_a_conversation_finds_the_last_one_on_another_server(start, prompts, groups, monkeypatch):
    """Its windows were kept where its prompt ended, its full attention behind what it generated."""
    monkeypatch.setattr(ObjectTier, "asks_at_once", True)  # as of Redis
    first = start(groups=groups, num_slots=200, num_blocks=134)
    first.serve("a", prompts[0], max_tokens=40)
    second = start(groups=groups, num_slots=200, num_blocks=134)
    assert second.serve("b", [*prompts[0], *first.outputs("a"), *prompts[1][:33]]) >= NUM_BLOCKS * 16
    second.require_clean()


def test_two_vllms_save_the_same_at_once(start, prompts):
    first, second = start(), start()
    for number, prompt in enumerate(prompts):
        first.add(f"a{number}", prompt)
        second.add(f"a{number}", prompt)
    while first.scheduler.requests or second.scheduler.requests:
        first.step()
        second.step()
    for rig in (first, second):
        rig.run()
        rig.require_clean()
        rig.close()
    assert serve(start(), prompts, "b") == [NUM_BLOCKS] * 6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"remote_url": "redis://:hush@host"}, "password_env"),
        ({"remote_url": "redis://host", "remote_options": {"password": "hush"}}, "password_"),
        ({"remote_url": "redis://host", "remote_options": {"tll_s": 3}}, "did you mean 'ttl_s'"),
        ({"remote_url": "redis://host", "remote_options": {"blocks_per_objects": 3}}, "did you mean .blocks_"),
        ({"remote_options": {"blocks_per_object": 3}}, "lower tier"),
        ({"remote_url": "redis://host", "remote_options": "x"}, "table"),
        ({"remote_url": "redis://host", "remote_options": {"ttl_s": 1.5}}, "ttl_s"),
        ({"remote_url": "redis://host", "disk_path": "/x", "disk_bytes": 1 << 30}, "two lower tiers"),
        ({"remote_url": "ftp://host"}, "must begin with"),
        ({"remote_options": {}}, "lower tier"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ConnectorOptions.parse({"cpu_pool_size_bytes": "1GiB", **options})
    assert "hush" not in str(caught.value)


def test_the_url_says_which_tier_it_is():
    parse = ConnectorOptions.parse
    redis = parse({"cpu_pool_size_bytes": 1 << 30, "remote_url": "redis://h", "remote_options": {"ttl_s": 60}}).tier
    assert isinstance(redis, RedisTier) and redis.ttl_s == 60
    assert isinstance(parse({"cpu_pool_size_bytes": 1 << 30, "remote_url": "s3://b/p"}).tier, ObjectTier)


def test_what_the_library_has_to_say_is_in_vllms_log(start, prompts, caplog):
    rig = start()
    serve(rig, prompts[:1], "first")
    rig.half.tier.view.client.sizes = lambda names, *_: 1 / 0
    logging.getLogger("vllm").addHandler(caplog.handler)
    try:
        serve(rig, prompts[1:5], "a")
    finally:
        logging.getLogger("vllm").removeHandler(caplog.handler)
    assert "tier_suspended" in [getattr(record, "event", None) for record in caplog.records]
