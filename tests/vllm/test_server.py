"""vLLM's server, over HTTP on the loopback: what makes it forget, and what shows that blocks came back."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import vllm
from engine_run import ENVIRONMENT, write_model
from pages import transfer_config

HERE = Path(__file__).resolve().parent
PROMPT = [5 + at % 900 for at in range(200)]
START_S, ANSWER_S = 240, 60

pytestmark = [
    pytest.mark.skipif(not vllm.__version__.startswith("0.32."), reason="a server is started with vLLM 0.32 alone"),
    pytest.mark.timeout(START_S + 6 * ANSWER_S),
]


class Server:
    """What one says to a server that runs already."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path, body=None, *, post=False):
        data = json.dumps(body).encode() if body is not None else b"" if post else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return answer.read().decode()

    def cached_tokens(self, prompt=PROMPT):
        """Of the prompt, when it is served once more."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        usage = json.loads(self.ask("/v1/completions", body))["usage"]
        return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def reset(self, query=""):
        """Until vLLM does it: not while a request holds blocks."""
        deadline = time.monotonic() + ANSWER_S
        while json.loads(self.ask("/reset_prefix_cache" + query, post=True)) != {"success": True}:
            assert time.monotonic() < deadline, "vLLM does not reset its prefix cache"

    def metric(self, name):
        """The sum of a counter of Prometheus."""
        lines = [line for line in self.ask("/metrics").splitlines() if line.startswith(f"vllm:{name}_total")]
        assert lines, f"no {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def wait_for(self, name, value):
        deadline = time.monotonic() + ANSWER_S
        while self.metric(name) < value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}"
            self.ask("/v1/completions", {"model": "m", "prompt": [7, 8, 9], "max_tokens": 4, "ignore_eos": True})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, "tiny", with_weights=True)
    return folder


@pytest.fixture(scope="module")
def server(model):
    with serve(model) as made:
        yield made


@contextlib.contextmanager
def serve(folder, dtype="float32", **extra):
    """A server with what README shows, a smaller pool, and these options more; told to end by SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    transfer = transfer_config() | {
        "kv_connector_module_path": "kvortex.integrations.vllm",
        "kv_connector_extra_config": {"cpu_pool_size_bytes": "64MiB", **extra},
    }
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "m",
        "--skip-tokenizer-init", "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager",
        "--max-model-len", "512", "--max-num-seqs", "4", "--block-size", "32", "--num-gpu-blocks-override", "40",
        "--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(transfer),
    ]  # fmt: skip
    environment = {**os.environ, **ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CACHE_ROOT": str(folder)}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # as a server has it
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    made, deadline = Server(port), time.monotonic() + START_S
    try:
        while True:
            tail = "\n".join(log.read_text().splitlines()[-40:])
            assert process.poll() is None, f"the server ended with {process.returncode}:\n{tail}"
            assert time.monotonic() < deadline, f"the server is not there after {START_S} s:\n{tail}"
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                made.ask("/health")
                break
            time.sleep(0.5)
        yield made
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_reset_over_http_forgets_what_the_connector_has_if_it_says_external(server):
    assert server.cached_tokens() == 0
    server.wait_for("kvortex_save_blocks", 6)
    assert server.cached_tokens() > 0 and server.metric("external_prefix_cache_hits") == 0  # the device's own
    server.reset()
    assert server.cached_tokens() == 192 == server.metric("external_prefix_cache_hits")
    server.wait_for("kvortex_load_blocks", 6)
    server.reset("?reset_connector=true")  # as in Python; here vLLM passes over it and says that all is well
    assert server.cached_tokens() == 192 and server.metric("external_prefix_cache_hits") == 2 * 192
    server.reset("?reset_external=true")
    assert server.cached_tokens() == 0 and server.metric("external_prefix_cache_hits") == 2 * 192


@pytest.mark.parametrize("codec", ["exact", "ecsq"])
def test_a_server_that_was_told_to_end_finds_its_blocks_on_disk_when_it_is_started_again(model, tmp_path, codec):
    prompts = [[7 + (number * 131 + at * 17) % 900 for at in range(200)] for number in range(8)]
    disk = {"disk_path": str(tmp_path), "disk_bytes": "256MiB", "prefill_tokens_per_s": 0, "promote_timeout_ms": 20_000,
            "disk_codec": codec, "dtype": "float32" if codec == "exact" else "bfloat16"}  # fmt: skip
    with serve(model, **disk) as first:
        assert [first.cached_tokens(prompt) for prompt in prompts] == [0] * 8
    with serve(model, **disk) as again:
        found = [again.cached_tokens(prompt) for prompt in prompts]
        assert sum(found) >= 0.95 * 192 * 8, found
        again.wait_for("kvortex_tier_blocks_read", 40)
