"""The whole of vLLM on a CPU over a disk: what an engine kept is there for the next, and its tokens are right."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from engine_run import write_model

HERE = Path(__file__).resolve().parent
VERSION = vllm.__version__.split("+")[0]
BLOCK_TOKENS = {"0.15.1": 16, "0.32.0": 32}.get(VERSION, 0)

pytestmark = [
    pytest.mark.skipif(not BLOCK_TOKENS, reason=f"no engine for vLLM {VERSION} runs on a CPU here"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, "tiny", with_weights=True)
    return folder


def serve(model, disk, *options, end="shutdown"):
    """What an engine printed that served the prompts over this disk; None: without a connector."""
    command = [sys.executable, str(HERE / "engine_run.py"), "serve", "--model", str(model), *options]
    command += ["--host-gib", "0.005"]
    if disk is None:
        command += ["--mode", "none"]
    else:
        extra = {"disk_path": str(disk), "disk_bytes": "256MiB", "prefill_tokens_per_s": 0, "promote_timeout_ms": 20000}
        command += ["--extra", json.dumps(extra), "--end", end, "--verify"]
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(model / "cache"), "PYTHONHASHSEED": "0"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    tail = "\n".join(process.stderr.splitlines()[-40:])
    assert process.returncode == (-signal.SIGKILL if end == "kill" and disk else 0), tail
    return json.loads(next(line for line in process.stdout.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def plain(model):
    """The tokens of an engine without a connector."""
    return serve(model, None)["tokens"]


def share_from_disk(report):
    """Of the whole blocks of all prompts, those that were found."""
    blocks = sum(length // BLOCK_TOKENS for length in report["lengths"])
    return sum(-(-cached // BLOCK_TOKENS) for cached in report["cached"]) / blocks


def test_what_an_engine_kept_is_there_after_it_was_told_to_end(model, plain, tmp_path):
    first = serve(model, tmp_path)
    assert first["tokens"] == plain and share_from_disk(first) == 0
    again = serve(model, tmp_path)
    assert again["tokens"] == plain and share_from_disk(again) >= 0.95
    assert again["verify_mismatches"] == 0 < again["verify_blocks"]


def test_what_reached_the_disk_before_a_kill_is_there_and_right(model, plain, tmp_path):
    killed = serve(model, tmp_path, end="kill")
    assert killed["tokens"] == plain
    again = serve(model, tmp_path)
    assert again["tokens"] == plain and share_from_disk(again) > 0
