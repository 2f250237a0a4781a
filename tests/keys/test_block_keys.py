"""block_keys against hashlib and the preimage its docstring gives."""

import hashlib
import struct
import threading

import numpy as np
import pytest

from kvortex.keys import block_keys, block_keys_many


def expected_keys(tokens, block_size, salt=b""):
    """The documented preimage, in plain Python."""
    preimage = b"kvortex-keys-v1" + struct.pack("<II", block_size, len(salt)) + salt
    parent, keys = hashlib.sha256(preimage).digest(), []
    for first in range(0, len(tokens) - block_size + 1, block_size):
        block = struct.pack(f"<{block_size}I", *tokens[first : first + block_size])
        parent = hashlib.sha256(parent + block).digest()
        keys.append(parent)
    return keys


def as_bytes(keys):
    assert (keys.dtype, keys.shape[1:]) == (np.uint8, (32,))
    return [key.tobytes() for key in keys]


@pytest.mark.parametrize("block_size", [1, 2, 5, 16, 63, 64, 65, 100, 512])
@pytest.mark.parametrize("salt", [b"", b"tenant-a", b"s" * 200])
def test_keys_are_the_documented_chain(block_size, salt, seed):
    tokens = np.random.default_rng(seed).integers(0, 1 << 32, 1100).tolist()
    assert as_bytes(block_keys(tokens, block_size, salt)) == expected_keys(tokens, block_size, salt)


def test_keys_are_the_same_in_every_release():
    """Persistent tiers find their blocks by these bytes; if this changes, so must the prefix of the root."""
    keys = block_keys(range(8), block_size=4, salt=b"tenant-a")
    assert keys[1].tobytes().hex() == "1dd39139468b09aefee0fa6bab3997ebf9eb5d34f48c2009302ba6998b84edb4"


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i4", ">i4", "<u4", ">u4", "<i8", ">i8", "<u8", "O"])
def test_every_integer_dtype_gives_the_same_keys(dtype):
    tokens = np.arange(100) % 100
    assert as_bytes(block_keys(tokens.astype(dtype), 16)) == expected_keys(tokens.tolist(), 16)


@pytest.mark.parametrize("wrap", [list, tuple, range, memoryview, lambda t: t[::-1].copy()[::-1]])
def test_every_array_like_gives_the_same_keys(wrap):
    tokens = np.arange(50)
    given = range(50) if wrap is range else wrap(tokens)
    assert as_bytes(block_keys(given, 16)) == expected_keys(list(range(50)), 16)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64, object])
def test_the_largest_token_is_legal(dtype):
    assert as_bytes(block_keys(np.array([0, (1 << 32) - 1], dtype), 2)) == expected_keys([0, (1 << 32) - 1], 2)


def test_only_whole_blocks_get_keys():
    assert [len(block_keys(np.arange(n), 16)) for n in (0, 1, 15, 16, 17, 31, 32)] == [0, 0, 0, 1, 1, 1, 2]
    assert block_keys([], 16).shape == (0, 32)


def test_a_longer_prompt_keeps_the_keys_of_its_prefix():
    long = block_keys(np.arange(1000), 16)
    for length in (0, 16, 160, 992):
        assert (block_keys(np.arange(length), 16) == long[: length // 16]).all()


def test_a_changed_token_changes_its_block_and_all_behind_it():
    tokens = np.arange(160)
    before = block_keys(tokens, 16)
    tokens[16 * 4 + 3] += 1
    same = (before == block_keys(tokens, 16)).all(axis=1)
    assert same.tolist() == [True] * 4 + [False] * 6


def test_salts_and_block_sizes_share_no_key():
    tokens = np.zeros(64, np.int64)
    seen = [
        key
        for salt in (b"", b"a", b"b", b"\0", b"a\0")
        for block_size in (1, 2, 4, 8)
        for key in as_bytes(block_keys(tokens, block_size, salt))
    ]
    assert len(set(seen)) == len(seen) == 5 * (64 + 32 + 16 + 8)


def test_many_prompts_give_what_each_gives_alone(seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 50_000, n) for n in (0, 5, 16, 17, 333, 0, 64)]
    prompts.append([1, 2, 3] * 20)
    keys, offsets = block_keys_many(prompts, 16, b"salt")
    assert offsets.tolist() == [0, 0, 0, 1, 2, 22, 22, 26, 29]
    assert keys.shape == (29, 32)
    for i, prompt in enumerate(prompts):
        assert (keys[offsets[i] : offsets[i + 1]] == block_keys(prompt, 16, b"salt")).all()


@pytest.mark.parametrize("block_size", [1, 8, 16, 40])
def test_prompts_of_any_lengths_side_by_side_do_not_mix(block_size, seed):
    rng = np.random.default_rng(seed)
    dtypes = [np.int64, np.int32, np.uint32, np.uint16, object]
    for num_prompts in (1, 2, 3, 20):
        prompts = [rng.integers(0, 60_000, rng.integers(0, 200)).astype(dtypes[i % 5]) for i in range(num_prompts)]
        keys, offsets = block_keys_many(prompts, block_size)
        assert as_bytes(keys) == [key for prompt in prompts for key in expected_keys(prompt.tolist(), block_size)]
        assert offsets.tolist() == [0, *np.cumsum([len(prompt) // block_size for prompt in prompts])]


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64, object, ">i4"])
@pytest.mark.parametrize("columns", [slice(None), slice(None, None, -1), slice(0, 40)])
def test_a_two_dimensional_array_is_one_prompt_a_row(dtype, columns):
    tokens = np.arange(96).reshape(2, 48)[:, columns]
    keys, offsets = block_keys_many(tokens.astype(dtype), 16)
    num_blocks = tokens.shape[1] // 16
    assert offsets.tolist() == [0, num_blocks, 2 * num_blocks]
    assert as_bytes(keys) == [key for row in tokens.tolist() for key in expected_keys(row, 16)]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_bad_token_of_an_array_of_prompts_is_named_by_row_and_index(dtype):
    tokens = np.zeros((5, 20), dtype)
    tokens[3, 19] = -2  # behind the last whole block
    with pytest.raises(ValueError, match=r"prompts\[3\]\[19\] = -2 is not in 0 .. 4294967295"):
        block_keys_many(tokens, 16)


def test_no_prompts_give_no_keys():
    keys, offsets = block_keys_many([], 16)
    assert (keys.shape, offsets.tolist()) == ((0, 32), [0])


def test_eight_threads_get_the_same_keys():
    tokens, results = np.arange(20_000), [None] * 8

    def work(i):
        results[i] = block_keys(tokens, 16)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert as_bytes(results[0]) == expected_keys(tokens.tolist(), 16)
    assert all((result == results[0]).all() for result in results)


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2, -7, 4],
        np.array([1, 2, -7], np.int32),
        np.array([1, 2, -7], np.int8),
        [1, 2, 1 << 32],
        np.array([1, 2, 1 << 63], np.uint64),
        [1, 2, 1 << 70],
    ],
)
def test_a_token_out_of_range_is_named_by_index_and_value(tokens):
    with pytest.raises(ValueError, match=rf"token_ids\[2\] = {tokens[2]} is not in 0 .. 4294967295"):
        block_keys(tokens, 16)
    with pytest.raises(ValueError, match=rf"prompts\[1\]\[2\] = {tokens[2]} is not in 0 .. 4294967295"):
        block_keys_many([[1], tokens], 16)


@pytest.mark.parametrize("tokens", [[1.0, 2.0], np.array([True]), ["a"], [1, "a"], [1 << 70, 0.5], b"abc"])
def test_tokens_that_are_no_integers_are_refused(tokens):
    with pytest.raises((TypeError, ValueError), match="token_ids"):
        block_keys(tokens, 1)


def test_tokens_in_two_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"one-dimensional, got shape \(2, 3\); block_keys_many"):
        block_keys(np.zeros((2, 3), int), 1)


@pytest.mark.parametrize("block_size", [0, -1, 1 << 32])
def test_absurd_block_sizes_are_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size must be in 1 .. 4294967295 tokens, got {block_size}"):
        block_keys([1], block_size)


def test_a_block_size_that_is_no_integer_is_refused():
    with pytest.raises(TypeError):
        block_keys([1], 16.0)


def test_a_salt_that_is_text_is_refused():
    with pytest.raises(TypeError, match="write b'tenant'"):
        block_keys([1], 16, "tenant")
