"""The whole of vLLM on a CPU, in float32: tokens say whether the KV that came back is right.

Engines run in processes of their own, see engine_run.py. Most of what one costs is its start, so each run makes several
scenarios in one engine, and the tests below look at what came of them.
"""

import json
import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import vllm
from engine_run import write_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VERSION = vllm.__version__.split("+")[0]
BLOCK_TOKENS = {"0.15.1": 16, "0.32.0": 32}

pytestmark = [
    pytest.mark.skipif(VERSION not in BLOCK_TOKENS, reason=f"no engine for vLLM {VERSION} runs on a CPU here"),
    pytest.mark.timeout(600),  # the first test waits for the first engine, which may share its cores with others
]

# 640 tokens on the device, where 32 requests of up to 282 tokens want more than that; and twice that on the host.
FEW_BLOCKS = ["--device-blocks", str(640 // BLOCK_TOKENS.get(VERSION, 16)), "--batched", "512"]
SMALL_POOL = ["--host-gib", "0.005"]
MANY_REQUESTS = ["--concurrency", "32", "--requests", "80", "--prefixes", "8", "--tokens"]
LATE = ["--late-us", "10000"]  # copies overlap the steps that follow, as on a GPU
ALL = ["restore", "stress", "overflow", *FEW_BLOCKS, *MANY_REQUESTS]
STRESS = ["stress", *FEW_BLOCKS, *SMALL_POOL, *MANY_REQUESTS, "--verify", "--late-us", "20000"]

ON_EVICT = ["--extra", '{"save": "on_evict"}']
BESIDE = ["again", *FEW_BLOCKS, *SMALL_POOL, "--verify", "--late-us", "80000"]

RUNS = {
    "plain": [*ALL, "--mode", "none", "--abort-rate", "0"],
    "async": [*ALL, *SMALL_POOL, *LATE, "--verify", "--load", "async"],
    "sync": [*ALL, *SMALL_POOL, *LATE, "--verify", "--load", "sync"],
    "other process": ["restore", *FEW_BLOCKS, *SMALL_POOL, "--by-name"],
    "leave": ["leave", *FEW_BLOCKS, *SMALL_POOL, "--late-us", "500000"],
    "after-save": [*STRESS, "--mutant", "after-save"],
    "after-load": [*STRESS, "--mutant", "after-load"],
}
FAULTS = ["after-save", "after-load", "after-eviction"]
MLA = ["restore", "--size", "mla"]
# Layers whose pages differ, in a pool that holds less than all prompts.
MIXED = ["overflow", "--options", '{"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["1"]}', "--batched", "512"]
OTHER_RUNS = {
    "mla plain": [*MLA, "--mode", "none"],
    "mla async": [*MLA, *SMALL_POOL, *LATE, "--verify", "--load", "async"],
    "mla sync": [*MLA, *SMALL_POOL, *LATE, "--verify", "--load", "sync"],
    "mixed plain": [*MIXED, "--mode", "none"],
    "mixed async": [*MIXED, *LATE, "--verify", "--host-gib", "0.002"],
}
PACKED = ["--verify", "--extra", '{"codec": "q8"}', "--options"]
PACKED_RUNS = {"packed": [*STRESS, *PACKED, '{"dtype": "bfloat16"}']}
only_on_0_32 = pytest.mark.skipif(VERSION != "0.32.0", reason="vLLM's CPU engine has neither MLA nor fp8 before")
if VERSION == "0.32.0":  # windows with heads of another shape than full attention, in the same pages
    PACKED_RUNS["gemma4 packed"] = [
        *("stress", "--size", "gemma4", "--device-blocks", "90", "--batched", "192", "--concurrency", "8"),
        *("--requests", "24", "--prefixes", "4", "--scale", "0.2", "--distinct", "10"),
        *(*PACKED, '{"dtype": "bfloat16", "load_format": "dummy"}'),
    ]
if VERSION != "0.15.1":  # which refuses it, see test_multi.py
    RUNS |= {
        "on evict": ["stress", "overflow", *FEW_BLOCKS, *MANY_REQUESTS, *SMALL_POOL, *LATE, "--verify", *ON_EVICT],
        "after-eviction": [*STRESS, "--mutant", "after-eviction", *ON_EVICT],
        "other first": [*BESIDE, "--other", "first"],
        "other last": [*BESIDE, "--other", "last"],
        "before-other": [*BESIDE, "--other", "first", "--mutant", "before-other"],
    }
BESIDE_ANOTHER = [name for name in RUNS if name.startswith("other ") and name != "other process"]


def install_entry_points(folder):
    """What an installed kvortex tells other packages, without an installation."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = folder / "kvortex-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvortex\nVersion: 0\n")
    lines = []
    for group, points in declared.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(name, folder, model):
    """What the run printed; it must end with 0."""
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(folder)}
    environment.pop("VLLM_PLUGINS", None)  # an empty one turns plug-ins off
    if name == "other process":
        install_entry_points(folder)
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment["PYTHONPATH"]])
    options = {**RUNS, **PACKED_RUNS, **OTHER_RUNS}[name]
    command = [sys.executable, str(HERE / "engine_run.py"), *options, "--model", str(model)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    tail = "\n".join(process.stderr.splitlines()[-40:])
    assert process.returncode == 0, f"{name} ended with {process.returncode}:\n{tail}"
    return json.loads(next(line for line in process.stdout.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What came of a run, by name, of engines with the same weights. Two at a time, in the order of `RUNS`."""
    models = {size: tmp_path_factory.mktemp(size) for size in ("tiny", "mla", "gemma4")}
    for size, model in models.items():
        write_model(model, size, with_weights=size != "gemma4")
    names = [*RUNS, *PACKED_RUNS, *(OTHER_RUNS if VERSION == "0.32.0" else ())]
    with ThreadPoolExecutor(2) as threads:
        futures = {
            name: threads.submit(run, name, tmp_path_factory.mktemp("run"), models.get(name.split()[0], models["tiny"]))
            for name in names
        }
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


@pytest.fixture(params=["async", "sync"])
def offloaded(request, runs):
    """An engine with the connector, by the way it loads."""
    return runs(request.param)


@pytest.fixture
def plain(runs):
    """The same engine without a connector."""
    return runs("plain")


def from_host(num_tokens, load="async"):
    """Tokens of a prompt that may come from host memory: whole blocks. A token is left to compute, for which a load
    inside a step leaves a block out; after one between steps vLLM computes it anew, and before 0.16 counts it so.
    """
    size = BLOCK_TOKENS[VERSION]
    if load == "sync":
        return (num_tokens - 1) // size * size
    return min(num_tokens // size * size, num_tokens - (VERSION == "0.15.1"))


# ---- back from the host ----------------------------------------------------------------------------------------------


def test_an_engine_without_connector_computes_everything(plain):
    assert [out["cached"] for out in plain["restore"].values() if isinstance(out, dict)] == [[0, 0, 0]] * 6


@pytest.mark.parametrize("name", RUNS)
def test_all_engines_compute_the_same_before_a_block_moves(plain, runs, name):
    """Where this fails, what the tests below say of tokens is not about blocks. Another number of threads changes the
    odds by 6e-6, and 1e-3 are enough for another token.
    """
    assert runs(name)["fingerprint"]["odds"] == pytest.approx(plain["fingerprint"]["odds"], abs=2e-5)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "other process"])  # its weights are out of reach
def test_all_engines_have_the_same_weights_and_none_changes_while_blocks_move(plain, runs, name):
    expected = plain["fingerprint"]["weights"]
    assert runs(name)["fingerprint"]["weights"] == runs(name)["weights_at_the_end"] == expected is not None


def test_kv_back_from_the_host_gives_the_same_tokens(plain, offloaded):
    restore = offloaded["restore"]
    assert restore["cold"] == {"tokens": plain["restore"]["cold"]["tokens"], "cached": [0, 0, 0]}
    assert restore["back"]["tokens"] == restore["cold"]["tokens"]
    assert restore["back"]["cached"] == [from_host(length, offloaded["load"]) for length in restore["lengths"]]


def test_generated_kv_comes_back_too_but_for_the_last_token(plain, offloaded):
    restore = offloaded["restore"]
    assert restore["follow_up_back"]["tokens"] == plain["restore"]["follow_up_cold"]["tokens"]
    # A follow-up is a prompt with all that came of it, and the last token of that has no KV: its block is not there.
    assert restore["follow_up_back"]["cached"] == [from_host(length + 40, "sync") for length in restore["lengths"]]


def test_after_a_reset_of_the_connector_nothing_hits(offloaded):
    restore = offloaded["restore"]
    for name, cold in (("follow_up_cold", "follow_up_back"), ("cold_again", "cold"), ("cold_at_last", "cold")):
        assert restore[name] == {"tokens": restore[cold]["tokens"], "cached": [0, 0, 0]}


def test_one_wrong_block_in_host_memory_changes_the_tokens(offloaded):
    """The control: were a single block wrong, the tests above would tell."""
    wrong, right = offloaded["restore"]["one_block_wrong"], offloaded["restore"]["back"]
    assert wrong["cached"] == right["cached"][:1]
    assert wrong["tokens"][0] != right["tokens"][0]


def test_random_host_memory_changes_all_tokens(offloaded):
    wrong, right = offloaded["restore"]["all_blocks_wrong"], offloaded["restore"]["back"]
    assert wrong["cached"] == right["cached"]
    assert all(one != other for one, other in zip(wrong["tokens"], right["tokens"], strict=True))


def test_a_pool_too_small_for_the_working_set_evicts_and_serves_the_right_tokens(plain, offloaded):
    overflow = offloaded["overflow"]
    assert overflow["blocks_evicted"] > 0
    assert overflow["first"]["tokens"] == plain["overflow"]["first"]["tokens"]
    assert overflow["backwards"]["tokens"] == plain["overflow"]["backwards"]["tokens"]
    assert sum(overflow["backwards"]["cached"]) > 0  # what is left of the first round is found


# ---- many requests at once -------------------------------------------------------------------------------------------


def test_preempted_and_aborted_requests_leave_the_tokens_of_the_others_as_they_are(plain, offloaded):
    stress = offloaded["stress"]
    assert stress["preemptions"] > 0 and stress["aborted"] > 0 and stress["blocks_evicted"] > 0
    assert stress["blocks_loaded"] > 0
    assert stress["requests"] + stress["aborted"] == plain["stress"]["requests"] == 80
    expected = plain["stress"]["output"]
    assert {name: tokens for name, tokens in stress["output"].items() if tokens != expected[name]} == {}


def test_every_block_that_moved_was_right(offloaded):
    for name in ("restore", "stress", "overflow"):
        part = offloaded[name]
        assert part["verify_blocks"] == part["blocks_saved"] + part["blocks_loaded"] > 0
        assert part["verify_mismatches"] == part["verify_skipped"] == part["transfers_failed"] == 0


@pytest.mark.skipif(VERSION == "0.15.1", reason="refused there, see test_saving.py")
def test_blocks_that_are_saved_when_they_are_evicted_are_right(plain, runs):
    parts, expected = runs("on evict"), plain["stress"]["output"]
    stress = parts["stress"]
    assert stress["preemptions"] > 0 and stress["blocks_loaded"] > 0
    assert {name: tokens for name, tokens in stress["output"].items() if tokens != expected[name]} == {}
    for name in ("stress", "overflow"):
        part = parts[name]
        assert part["verify_blocks"] == part["blocks_saved"] + part["blocks_loaded"] > 0
        assert part["verify_mismatches"] == part["verify_skipped"] == part["transfers_failed"] == 0


@pytest.mark.parametrize("name", PACKED_RUNS)
def test_every_packed_block_that_moved_was_right(runs, name):
    """Verify compares what a slot holds with what the codec makes of the block, both ways."""
    run = runs(name)
    assert run["verify_blocks"] == run["blocks_saved"] + run["blocks_loaded"] > run["blocks_saved"] > 0
    assert run["verify_mismatches"] == run["verify_skipped"] == run["transfers_failed"] == 0


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault in RUNS])
def test_verify_notices_a_wait_that_is_left_out(runs, fault):
    assert runs(fault)["verify_mismatches"] > 0


# ---- other caches ----------------------------------------------------------------------------------------------------


@only_on_0_32
@pytest.mark.parametrize("load", ["async", "sync"])
def test_mla_back_from_the_host_gives_the_same_tokens(runs, load):
    plain, restore = runs("mla plain"), runs(f"mla {load}")
    assert restore["fingerprint"] == {
        **plain["fingerprint"],
        "odds": pytest.approx(plain["fingerprint"]["odds"], abs=2e-5),
    }
    assert restore["back"]["tokens"] == restore["cold"]["tokens"] == plain["cold"]["tokens"]
    assert restore["back"]["cached"] == ([144, 128, 192] if load == "async" else [144, 112, 192])
    assert restore["follow_up_back"]["tokens"] == plain["follow_up_cold"]["tokens"]
    assert restore["verify_blocks"] == restore["blocks_saved"] + restore["blocks_loaded"] > 0
    assert restore["verify_mismatches"] == restore["verify_skipped"] == restore["transfers_failed"] == 0


@only_on_0_32
@pytest.mark.parametrize("load", ["async", "sync"])
def test_wrong_mla_in_host_memory_changes_the_tokens(runs, load):
    restore = runs(f"mla {load}")
    assert restore["one_block_wrong"]["tokens"][0] != restore["back"]["tokens"][0]
    for wrong, right in zip(restore["all_blocks_wrong"]["tokens"], restore["back"]["tokens"], strict=True):
        assert wrong != right


@only_on_0_32
def test_layers_with_pages_of_their_own_share_a_small_pool(runs):
    """fp8 but for one layer: vLLM's scheduler takes one page for all."""
    plain, mixed = runs("mixed plain"), runs("mixed async")
    assert mixed["blocks_evicted"] > 0 and mixed["blocks_loaded"] > 0
    for name in ("first", "backwards"):
        assert mixed[name]["tokens"] == plain[name]["tokens"]
    assert mixed["verify_blocks"] == mixed["blocks_saved"] + mixed["blocks_loaded"]
    assert mixed["verify_mismatches"] == mixed["verify_skipped"] == mixed["transfers_failed"] == 0


# ---- beside another connector ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BESIDE_ANOTHER)
def test_beside_another_connector_every_block_and_token_is_right(runs, name):
    run = runs(name)
    assert run["rounds"] == [run["rounds"][0]] * 4  # the first is computed
    assert run["verify_blocks"] == run["blocks_saved"] + run["blocks_loaded"] > 0
    assert run["verify_mismatches"] == run["verify_skipped"] == run["transfers_failed"] == 0
    assert run["blocks_of_other" if name == "other first" else "blocks_loaded"] > 0


@pytest.mark.skipif(not BESIDE_ANOTHER, reason="refused with this vLLM")
def test_verify_notices_that_another_connector_fills_what_is_being_saved(runs):
    """The control."""
    assert runs("before-other")["verify_mismatches"] > 0


# ---- as users run it -------------------------------------------------------------------------------------------------


def test_by_its_name_alone_and_with_the_engine_in_a_process_of_its_own(plain, runs):
    restore = runs("other process")
    assert restore["back"] == {
        "tokens": plain["restore"]["cold"]["tokens"],
        "cached": [from_host(length) for length in restore["lengths"]],
    }
    assert restore["cold_again"]["cached"] == [0, 0, 0]


def test_the_process_ends_well_with_transfers_in_flight(runs):
    """That it ended with 0 is seen wherever a run is looked at; here a load and a save had just begun."""
    assert runs("leave")["in_flight"] == ["load", "save"]
