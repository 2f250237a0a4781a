"""The whole of vLLM on a CPU over a disk: what an engine kept is there for the next, and its tokens are right."""

import json
import os
import shutil
import signal
import socket
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


def serve(model, disk, *options, end="shutdown", remote=None, joined=1):
    """What an engine printed that served the prompts over this disk, or this URL; with neither, without a connector."""
    command = [sys.executable, str(HERE / "engine_run.py"), "serve", "--model", str(model), *options]
    command += ["--host-gib", "0.005"]
    if disk is None and remote is None:
        command += ["--mode", "none"]
    else:
        extra = {"disk_path": str(disk), "disk_bytes": "256MiB"}
        if remote:
            settings = {"lookup_timeout_ms": 20_000, "blocks_per_object": joined}
            extra = {"remote_url": remote, "remote_options": settings}
        extra |= {"prefill_tokens_per_s": 0, "promote_timeout_ms": 20_000}
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


def share_found(report, joined=1):
    """Of the whole blocks of all prompts, or of those that fill an object with others, those that were found."""
    blocks = sum(length // BLOCK_TOKENS // joined * joined for length in report["lengths"])
    return sum(-(-cached // BLOCK_TOKENS) for cached in report["cached"]) / blocks


def test_what_an_engine_kept_is_there_after_it_was_told_to_end(model, plain, tmp_path):
    first = serve(model, tmp_path)
    assert first["tokens"] == plain and share_found(first) == 0
    again = serve(model, tmp_path)
    assert again["tokens"] == plain and share_found(again) >= 0.95
    assert again["verify_mismatches"] == 0 < again["verify_blocks"]


def test_what_reached_the_disk_before_a_kill_is_there_and_right(model, plain, tmp_path):
    killed = serve(model, tmp_path, end="kill")
    assert killed["tokens"] == plain
    again = serve(model, tmp_path)
    assert again["tokens"] == plain and share_found(again) > 0


@pytest.fixture
def remote(request, tmp_path):
    """The URL of a folder, or of a Redis."""
    if request.param == "file":
        yield f"file://{tmp_path}"
        return
    if not shutil.which("redis-server"):
        pytest.skip("NO redis-server HERE: `make test-services` installs it, and CI runs that first")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    yield f"redis://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.mark.parametrize("remote, joined", [("file", 2), ("redis", 1)], indirect=["remote"])
def test_what_one_engine_computed_another_finds(model, plain, remote, joined):
    first = serve(model, None, remote=remote, joined=joined)
    assert first["tokens"] == plain and share_found(first) == 0
    other = serve(model, None, remote=remote, joined=joined)
    assert other["tokens"] == plain and share_found(other, joined) >= 0.95
    assert other["verify_mismatches"] == 0 < other["verify_blocks"]
