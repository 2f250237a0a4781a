"""What a newcomer writes first works, or one line says what to write instead."""

import numpy as np
import pytest

import kvortex
from kvortex import KVLayout, KVortexConfig, KVortexEngine, block_keys

CONFIG = {"cpu_pool_size_bytes": "1MiB", "block_bytes": 4096, "device": "host"}


class Tensor:
    """Says of itself what torch's do, as far as it is asked here."""

    shape, dtype = (4, 32), "torch.uint8"

    def numpy(self):
        raise NotImplementedError


@pytest.fixture
def engine():
    with KVortexEngine.create(KVortexConfig(**CONFIG)) as made:
        yield made


@pytest.mark.parametrize(
    ("write", "answer"),
    [
        (lambda engine: KVortexEngine(engine.config), "KVortexEngine.create"),
        (lambda engine: KVortexEngine(), "KVortexEngine.create"),
        (lambda engine: KVortexEngine.create(engine.config, layout=np.zeros((4, 8))), r"KVLayout\.from_tensors\("),
        (lambda engine: engine.check_blocks([bytes(32), bytes(32)]), r"numpy\.frombuffer\(b''\.join\(keys\)"),
        (lambda engine: engine.check_blocks(Tensor()), r"keys\.cpu\(\)\.numpy\(\)"),
        (lambda engine: engine.check_blocks(bytes(64)), "block_keys makes one"),
        (lambda engine: block_keys(np.arange(64), 16, salt="a"), "write b'a'"),
        (lambda engine: block_keys(np.zeros((2, 32), int), 16), "block_keys_many"),
        (lambda engine: KVLayout.from_tensors(np.zeros((4, 4096), np.uint8)), r"write from_tensors\(\[tensor\]\)"),
        (
            lambda engine: KVLayout.from_tensors([np.zeros((4, 8), np.uint8)], num_blocks=8),
            "4 blocks .* check block_dim",
        ),
        (lambda engine: KVLayout.from_tensors([np.zeros((4, 8), np.uint8)], 2), "block_dim 2 is outside"),
    ],
)
def test_one_line_says_what_to_write(engine, write, answer):
    with pytest.raises((TypeError, ValueError), match=answer) as caught:
        write(engine)
    assert "\n" not in str(caught.value)


def test_several_prompts_have_keys_in_one_call():
    keys, offsets = kvortex.block_keys_many([range(32), range(16)], 16)
    assert len(keys) == 3 and offsets.tolist() == [0, 2, 3]


def test_what_one_has_in_hand_says_what_it_is(engine):
    job = engine.save_blocks(block_keys(range(32), 16), data_ptrs=[np.zeros(4096, np.uint8)] * 2)
    job.wait(30_000)
    assert (
        repr(job) == "Job(done, 2 blocks)"
        and repr(engine.load_blocks(block_keys([], 16), data_ptrs=[], sizes=[])) == "Job(done, 0 blocks)"
    )
    engine.wait_ready(30_000)
    pool = "PinnedPool(256 slots of 4096 bytes, 256 ready)"
    assert repr(engine.pool) == pool
    assert repr(engine) == f"KVortexEngine(serving, {engine.device.name}, raw memory, {pool})"
    assert repr(engine.index) == "BlockIndex(256 slots: 2 with a block, 0 of them pinned, 0 being written, 254 free)"
    engine.shutdown()
    assert repr(engine).startswith("KVortexEngine(shut down, ") and repr(engine.pool).endswith("closed)")
    assert repr(KVortexEngine.__new__(KVortexEngine)) == "KVortexEngine(never created)"
