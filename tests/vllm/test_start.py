"""What the log says at start, and what vLLM's ``kv_role`` asks for."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from forms import FORMS, STATES
from rig import HAS_TRANSFER_RESULTS, HAS_WORKER_METADATA
from rig_cache import Group, configure_cache, make_groups
from test_per_request import asked
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

from kvortex import ConfigError
from kvortex.config import parse_bytes
from kvortex.integrations.vllm.connector import VLLM_VERSION, groups_to_keep, hears_of_blocks_of_others
from kvortex.integrations.vllm.groups import KINDS, RUN, groups_of, way_out_of_groups

AS_ONE = "--disable-hybrid-kv-cache-manager"
KEPT = [name for name in FORMS if name not in STATES or HAS_TRANSFER_RESULTS]


@pytest.fixture
def said(caplog):
    """What the log says when an engine starts, as a list of (level, text)."""
    caplog.set_level("INFO", "vllm.kvortex")

    def said(make_rig, **options):
        caplog.clear()
        make_rig(**options).close()
        return [(record.levelname, record.getMessage()) for record in caplog.records if "kvortex" in record.name]

    return said


def warnings_of(lines):
    return [text for level, text in lines if level == "WARNING"]


# ---- sizes, in tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_pool_is_told_in_tokens_beside_the_gpus_cache_and_the_longest_prompt(make_rig, said, num_ranks):
    lines = said(make_rig, num_blocks=67, num_slots=512, num_ranks=num_ranks)
    (text,) = [text for _, text in lines if "the pool holds" in text]
    assert "the pool holds 8192 tokens: 7.64x of the GPU's KV cache (1072 tokens), 2.00x of the longest prompt" in text
    assert "(max_model_len, 4096 tokens); that is 512 blocks of 4096 bytes" in text
    assert ("in each of 2 ranks" in text) == (num_ranks == 2)
    assert warnings_of(lines) == []


@pytest.mark.parametrize(
    ("num_blocks", "num_slots", "below"),
    [
        (67, 255, ["the longest prompt (0.99x)"]),
        (67, 256, []),
        (307, 306, ["the GPU's KV cache (0.99x)"]),
        (307, 307, []),
        (307, 128, ["the longest prompt (0.50x)", "the GPU's KV cache (0.41x)"]),
    ],
)
def test_a_pool_below_one_of_either_is_warned_of(make_rig, said, num_blocks, num_slots, below):
    texts = warnings_of(said(make_rig, num_blocks=num_blocks, num_slots=num_slots))
    assert [re.search(r"is below 1x of (.*?):", text)[1] for text in texts] == below


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("retention", [None, 0])
@pytest.mark.parametrize("name", KEPT)
def test_the_size_that_a_warning_asks_for_is_enough(make_rig, said, name, retention, num_ranks):
    form = {**FORMS[name], "load_async": name in STATES, "retention": retention, "num_ranks": num_ranks}
    texts = warnings_of(said(make_rig, num_slots=2, **form))
    sizes = [re.search(r"cpu_pool_size_bytes to at least (?:.*\((\d+) bytes\)|(.*))$", text) for text in texts]
    asked_for = max(parse_bytes(size[1] or size[2]) for size in sizes if size)
    for less, is_enough in ((0, True), (4096 * num_ranks, False)):
        texts = warnings_of(said(make_rig, extra={"cpu_pool_size_bytes": asked_for - less}, **form))
        assert is_enough != any("below 1x" in text for text in texts)


@pytest.mark.skipif(not HAS_WORKER_METADATA, reason="0.15 shows nobody what it evicts")
def test_a_pool_that_takes_what_the_gpu_evicts_may_be_smaller_than_the_gpus_cache(make_rig, said):
    sizes = {"num_blocks": 307, "num_slots": 256, "extra": {"save": "on_evict"}}
    assert warnings_of(said(make_rig, **sizes)) == []
    assert "longest prompt (0." in warnings_of(said(make_rig, **{**sizes, "num_slots": 100}))[0]


class Packable(Group):
    """Layers that a codec can pack: 4 heads of 64 numbers in bfloat16, 16 KiB a block and layer."""

    def spec(self, heads, page_bytes, *, pad_bytes=0):
        return FullAttentionSpec(block_size=self.block_tokens, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)


@pytest.mark.parametrize("codec", ["exact", "q8", "q4"])  # those for CPUs
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_codec_is_called_lossy_beside_what_the_pool_would_hold_without_it(make_rig, caplog, codec, num_ranks):
    rig = make_rig()
    rig.config.parallel_config.tensor_parallel_size = num_ranks
    options = {"cpu_pool_size_bytes": num_ranks * (8 << 20), "codec": codec}
    rig.config.kv_transfer_config.kv_connector_extra_config = options
    cache = configure_cache(rig.config, 67, [Packable(0, "full", 67, 16, [f"layer{at}" for at in range(8)])])
    caplog.set_level("INFO", "vllm.kvortex")
    caplog.clear()  # of what the rig said
    KVConnectorFactory.create_connector(rig.config, KVConnectorRole.SCHEDULER, cache)
    told = [record.getMessage() for record in caplog.records if "is lossy" in record.getMessage()]
    assert len(told) == (codec != "exact")
    (size,) = [record.getMessage() for record in caplog.records if "the pool holds" in record.getMessage()]
    holds, num_slots, stride = map(int, re.search(r"holds (\d+) tokens.* (\d+) blocks of (\d+) bytes", size).groups())
    assert (holds, num_slots) == (16 * num_slots, (8 << 20) // stride) and holds >= 1024
    for text in told:
        assert f"the codec {codec} " in text and "without a codec (1024 tokens, 64 blocks of 131072 bytes)" in text
        ratio = float(re.search(r"it holds ([\d.]+)x", text)[1])
        assert ratio == int(100 * num_slots / 64) / 100 >= {"q8": 1.75, "q4": 3}[codec]


# ---- what vLLM does about loads that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("load_async", [True, False])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_policy_by_which_requests_fail_is_warned_of(make_rig, said, policy, load_async):
    texts = warnings_of(said(make_rig, num_slots=256, failure_policy=policy, load_async=load_async))
    told = [text for text in texts if "kv_load_failure_policy is 'fail'" in text and '"recompute"' in text]
    assert texts == told and len(told) == (policy == "fail" and load_async)  # inside a step it is the right one


@pytest.mark.skipif(not hears_of_blocks_of_others(), reason="refused with this vLLM")
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_beside_another_connector_the_policy_of_vllm_counts(make_rig, said, policy):
    texts = warnings_of(said(make_rig, num_slots=256, failure_policy=policy, other={"load_async": True}))
    assert len(texts) == (policy == "fail")


@pytest.mark.parametrize("name", ["full_and_window", "window"])
def test_a_vllm_that_cannot_hear_of_failed_loads_is_named_with_the_way_out(make_rig, said, name):
    form = {**FORMS[name], "num_slots": 256, "load_async": HAS_WORKER_METADATA}
    texts = [text for text in warnings_of(said(make_rig, **form)) if "cannot hear of a load that failed" in text]
    assert len(texts) == (not HAS_TRANSFER_RESULTS)
    assert all("vLLM 0.32 or later" in text and (AS_ONE in text) == (name != "window") for text in texts)


# ---- models that are kept in part, or not at all ---------------------------------------------------------------------


def is_one_of_full_attention(groups):
    """Whether vLLM, told to have one KV cache group, makes one of full attention of all layers of these groups."""
    try:
        from vllm.v1.core.kv_cache_planning import unify_hybrid_kv_cache_specs
    except ImportError:  # before 0.33
        unify_hybrid_kv_cache_specs = kv_cache_utils.unify_hybrid_kv_cache_specs
    specs = {layer: group.spec(1, 16 * 8) for group in groups for layer in group.layers}
    try:
        unify_hybrid_kv_cache_specs(specs)
    except (ValueError, AssertionError):  # of vLLM
        return False
    return {KINDS[type(spec).__name__] for spec in specs.values()} == {RUN}


def has_one_reach(kinds):
    """Whether all windows are equal, and all chunks; if not, only some versions make one group of them, at times."""
    return all(len({kind for kind in kinds if kind.startswith(name)}) <= 1 for name in ("window", "chunk"))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_group_for_all_layers_is_a_way_out_where_vllm_makes_one_of_full_attention(count):
    forms = ("full", "mla", "window:64", "window:32", "chunk:64", "state")
    for kinds in itertools.combinations_with_replacement(forms, count):
        groups = make_groups(kinds, 61, 16, 2)
        of_vllm = [KVCacheGroupSpec(group.layers, group.spec(1, 16 * 8)) for group in groups]
        way_out = way_out_of_groups(groups_of(SimpleNamespace(kv_cache_groups=of_vllm)), count)
        is_one = has_one_reach(kinds) and is_one_of_full_attention(groups)
        assert (AS_ONE in way_out) == (is_one and not {*kinds} <= {"full", "mla"}), kinds


def test_one_group_for_all_layers_is_no_way_out_where_blocks_differ_or_vllm_leaves_some_alone():
    groups = make_groups(("full", "window:64"), 61, (16, 32), 2)
    of_vllm = [KVCacheGroupSpec(group.layers, group.spec(1, group.block_tokens * 8)) for group in groups]
    assert way_out_of_groups(groups_of(SimpleNamespace(kv_cache_groups=of_vllm)), 2) == ""
    groups = make_groups(("full", "window:64"), 61, 16, 2)
    of_vllm = [KVCacheGroupSpec(group.layers, group.spec(1, 16 * 8)) for group in groups]
    assert way_out_of_groups(groups_of(SimpleNamespace(kv_cache_groups=of_vllm)), 3) == ""


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("interval", [0, 192, None])
def test_what_is_kept_in_part_is_named_with_the_way_out(make_rig, said, name, interval):
    extra = {} if interval is None else {"window_interval_tokens": interval}
    form = {**FORMS[name], "load_async": name in STATES, "extra": extra, "retention": None}
    texts = [text for _, text in said(make_rig, **form) if "with windows or states" in text]
    forgets = any(group.startswith(("window", "state")) for group in form["groups"])
    assert len(texts) == (forgets and interval is not None)
    for text in texts:
        assert ("a multiple of 192 tokens" if interval else "where vLLM sees that they part") in text
        is_one = isinstance(form.get("block_tokens", 16), int) and "full" in form["groups"] and name not in STATES
        assert (AS_ONE in text) == (is_one and has_one_reach(form["groups"]))


def test_a_server_that_loads_inside_steps_for_its_vllm_says_so_with_the_way_out(make_rig, said):
    lines = said(make_rig, **{**FORMS["full_and_window"], "load_async": True})
    texts = [text for _, text in lines if "loads inside steps" in text]
    assert bool(texts) == (not HAS_WORKER_METADATA)
    assert all("use vLLM 0.26 or later, or start vLLM with " + AS_ONE in text for text in texts)


def test_what_is_refused_names_model_and_version(make_rig):
    rig = make_rig()
    rig.config.kv_transfer_config.kv_connector_extra_config["cpu_pool_size_bytes"] = "1MiB"
    rig.cache_config.kv_cache_groups[0].enable_kv_transfer = False
    with pytest.raises(ConfigError) as caught:
        KVConnectorFactory.create_connector(rig.config, KVConnectorRole.SCHEDULER, rig.cache_config)
    assert str(caught.value).endswith(f"tiny, vLLM {VLLM_VERSION})")
    assert "without --kv-transfer-config" in str(caught.value) and AS_ONE not in str(caught.value)


@pytest.mark.skipif(HAS_TRANSFER_RESULTS, reason="kept from 0.32 on")
def test_a_version_that_cannot_keep_states_is_named_with_the_one_that_can(make_rig):
    with pytest.raises(ConfigError, match=rf"use vLLM 0\.32 or later.*without --kv-transfer-config.*{VLLM_VERSION}"):
        make_rig(**FORMS["full_and_state"])


@pytest.mark.parametrize("name, helps", [("full_and_window", True), ("full_and_chunks", True), ("window", False)])
def test_with_context_parallelism_one_group_for_all_layers_is_a_way_out_where_it_is_one(make_rig, name, helps):
    rig = make_rig(**{**FORMS[name], "load_async": False})
    rig.config.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(ConfigError, match="leave both sizes at 1") as caught:
        groups_to_keep(rig.config, rig.cache_config)
    assert (AS_ONE in str(caught.value)) == helps


# ---- roles -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    return {
        "disk_path": str(tmp_path), "disk_bytes": "64MiB", "namespace": "the rig", "prefill_tokens_per_s": 0,
        "promote_timeout_ms": 20_000,
    }  # fmt: skip


def started(make_rig, **options):
    rig = make_rig(**options)
    assert all(half.tier.adoption.wait(20_000) for half in rig.halves)
    return rig


@pytest.mark.parametrize("wish", [{}, {"load": True, "save": True}])
def test_a_producer_saves_and_never_loads(make_rig, prompt, load_async, wish):
    rig = make_rig(kv_role="kv_producer", load_async=load_async)
    rig.serve("first", prompt("p", 100), **asked(**wish))
    assert rig.index.num_ready == 6
    rig.forget_device()
    assert rig.serve("again", prompt("p", 100), **asked(**wish)) == 0
    rig.require_clean()


@pytest.mark.parametrize("wish", [{}, {"load": True, "save": True}, {"max_save_tokens": 64}])
def test_a_consumer_loads_what_a_producer_saved_and_never_saves(make_rig, prompt, load_async, disk, wish):
    producer = started(make_rig, kv_role="kv_producer", load_async=load_async, extra=disk)
    producer.serve("first", prompt("p", 100))
    producer.close()
    rig = started(make_rig, kv_role="kv_consumer", load_async=load_async, extra=disk)
    assert rig.serve("second", prompt("p", 100), **asked(**wish)) == 96
    rig.serve("other", prompt("q", 200), **asked(**wish))
    assert rig.index.num_ready == 6
    rig.forget_device()
    assert rig.serve("again", prompt("q", 200)) == 0
    rig.require_clean()
    rig.close()
    assert started(make_rig, extra=disk).serve("q", prompt("q", 200)) == 0


@pytest.mark.skipif(not HAS_WORKER_METADATA, reason="0.15 shows nobody what it evicts")
def test_a_consumer_saves_nothing_that_the_gpu_evicts(make_rig, prompt):
    rig = make_rig(kv_role="kv_consumer", num_blocks=31, extra={"save": "on_evict"})
    for name in "pqr":
        rig.serve(name, prompt(name, 400))
    assert rig.index.num_ready == 0
    rig.require_clean()


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer", "kv_both"])
def test_a_role_is_told_and_warned_of_where_nobody_has_anything_of_it(make_rig, said, disk, role):
    for extra, level in (({}, "WARNING"), (disk, "INFO")):
        lines = said(make_rig, num_slots=256, kv_role=role, extra=extra)
        never = {"kv_producer": "loads no blocks", "kv_consumer": "saves no blocks"}.get(role, "with this kv_role")
        told = [(at, text) for at, text in lines if never in text]
        assert [at for at, _ in told] == [level] * (role != "kv_both")
        assert all(("set kv_role to kv_both" in text) == (level == "WARNING") for _, text in told)


@pytest.mark.skipif(not hears_of_blocks_of_others(), reason="refused with this vLLM")
@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_beside_another_connector_the_role_of_vllm_counts_too(make_rig, prompt, role):
    """vLLM holds blocks of requests that end early for loads of a consumer alone."""
    rig = make_rig(kv_role=role, other={"load_async": True})
    rig.serve("first", prompt("p", 100))
    assert rig.index.num_ready == (6 if role == "kv_producer" else 0)
    rig.forget_device()
    assert rig.serve("again", prompt("p", 100)) == 0
    rig.require_clean()
