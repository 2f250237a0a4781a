"""Dynamo's indexer of KV events, the real one, beside vLLM's real scheduler and publisher: what it answers a router.

KVORTEX_DYNAMO is the folder that has it; `make test-vllm-peers` makes one, and a network with nobody else in it.
"""

import contextlib
import fcntl
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from rig import BLOCK_TOKENS, Rig
from test_events import ADAPTERS
from test_schedules import live
from vllm.distributed.kv_events import ZmqEventPublisher

from kvortex.integrations.vllm.keys import keys_of

WAIT_S = 20


@pytest.fixture(scope="module", autouse=True)
def alone():
    """No route leads out of here, and the loopback is up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = 0x1  # IFF_UP
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH22x", b"lo", up))  # SIOCSIFFLAGS
    routes = Path("/proc/self/net/route").read_text().splitlines()[1:]
    assert not routes, "to be run in a network namespace of its own"


class Indexer:
    """One process of it, that listens to a rig."""

    def __init__(self, rig, log_path):
        self.log_path, port = log_path, free_port()
        self.url, events = f"http://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{port}"
        self.publisher = rig.scheduler.kv_event_publisher = ZmqEventPublisher(0, endpoint=f"tcp://*:{port}")
        code = "import sys; from dynamo.indexer.main import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "--port", self.url.rpartition(":")[2]]
        environment = {**os.environ, "PYTHONPATH": os.environ["KVORTEX_DYNAMO"], "DYN_LOG": "info"}
        with open(log_path, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.until(lambda: self.ask("/workers") == [])
        self.ask("/register", {"instance_id": 1, "endpoint": events, "model_name": "m", "block_size": BLOCK_TOKENS})
        self.until(lambda: "recv loop" in self.log())
        time.sleep(0.5)  # it has asked to be told; until the publisher has heard that, it is told nothing

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return json.loads(answer.read())

    def tokens(self, prompt, lora_name=None):
        """Leading tokens of a prompt that it knows to be on the device, and there or in host memory."""
        answer = self.ask("/query", {"token_ids": prompt, "model_name": "m", "lora_name": lora_name})
        found = answer["instances"].get("1", {"gpu": 0, "cpu": 0})
        return found["gpu"], found["cpu"]

    def require(self, prompt, expected):
        """Sooner or later this is what it knows."""
        answers = []

        def is_expected():
            answers.append(self.tokens(prompt))
            return answers[-1] == expected

        self.until(is_expected, answers)

    def until(self, is_true, answers=()):
        deadline = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(OSError):  # it does not listen yet
                if is_true():
                    return
            assert time.monotonic() < deadline and self.process.poll() is None, f"{answers[-1:]}\n{self.log()}"
            time.sleep(0.05)

    def log(self):
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_path.read_text())

    def close(self):
        self.process.terminate()
        self.process.wait(WAIT_S)
        assert [line for line in self.log().splitlines() if " INFO " not in line] == []


def free_port():
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        return any_socket.getsockname()[1]


@pytest.fixture
def indexer_of(tmp_path):
    indexers = []

    def make(rig):
        indexers.append(Indexer(rig, tmp_path / f"log{len(indexers)}"))
        return indexers[-1]

    yield make
    for indexer in indexers:
        indexer.close()


def serve_another(rig, prompt):
    """Events are taken with a step's output."""
    rig.serve(f"r{len(rig.requests)}", prompt(len(rig.requests), 20))


@pytest.mark.parametrize("num_groups", [1, 2])
def test_it_knows_all_of_a_prompt_that_the_device_has_no_more(make_rig, prompt, indexer_of, monkeypatch, num_groups):
    if num_groups == 2:  # vLLM has the layers of both groups in the same memory; nobody looks at the KV here
        make_cache = Rig.make_cache
        monkeypatch.setattr(Rig, "make_cache", lambda rig: dict.fromkeys(make_cache(rig), make_cache(rig)["layer0"]))
    rig = make_rig(events=True, num_groups=num_groups, num_blocks=401, num_slots=2000)  # all of a prompt may be held
    indexer, tokens = indexer_of(rig), prompt("p", 480)
    rig.serve("first", tokens)
    indexer.require(tokens, (480, 480))
    for name in "qrstuvwxyz":  # they need the device's blocks
        rig.serve(name, prompt(name, 700))
    indexer.require(tokens, (0, 480))
    rig.forget_device()
    serve_another(rig, prompt)
    indexer.require(prompt("z", 700), (0, 688))
    assert indexer.tokens(tokens) == (0, 480)
    assert rig.reset()  # /reset_prefix_cache?reset_external=true
    serve_another(rig, prompt)
    indexer.require(tokens, (0, 0))


def test_of_every_prompt_it_knows_what_can_be_loaded(make_rig, prompt, host, seed, indexer_of):
    rig = make_rig(events=True, num_slots=64, num_ranks=2)
    indexer, draw, add = indexer_of(rig), random.Random(seed), rig.add
    rig.add = lambda *what, **more: add(*what, **{"lora_request": draw.choice([*ADAPTERS.values()]), **more})
    host.set_delay_us(0, 500, seed)
    live(rig, draw, resets=True)
    rig.forget_device()
    rig.serve("last", prompt("last", 20), lora_request=None)
    indexer.require(prompt("last", 20), (16, 16))
    found = {}
    for name, request in rig.requests.items():
        tokens, lora = list(request.all_token_ids), request.lora_request
        keys = keys_of(request, rig.half.groups[0], 0, len(request.block_hashes))
        expected = rig.index.lookup(keys)[1] * BLOCK_TOKENS
        found[name] = (indexer.tokens(tokens, lora and lora.lora_name)[1], expected)
    assert {name: both for name, both in found.items() if both[0] != both[1]} == {}
    assert sum(expected > 0 for _, expected in found.values()) > 3
