"""The table under the index: collisions, churn, and lookups beside a writer."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def random_keys(rng, n):
    return rng.integers(0, 256, (n, 32), dtype=np.uint8)


def fill(index, keys):
    slots, statuses = index.reserve(keys, 1)
    assert not statuses.any()
    index.commit(slots)


def test_keys_with_equal_tags_are_told_apart(make_index, make_keys):
    """Twelve keys share one group and 128 tags: about one in eleven of the absent ones meets an equal tag."""
    index = make_index(12)
    fill(index, make_keys(*range(12)))
    mask, leading = index.lookup(make_keys(*range(20_000)))
    assert leading == 12
    assert mask.sum() == 12


@pytest.mark.parametrize("pattern", ["counter", "high word", "one bit", "byte steps"])
def test_keys_chosen_by_a_caller_spread_like_digests(make_index, pattern):
    n = 30_000
    words = np.zeros((n, 4), np.uint64)
    counter = np.arange(n, dtype=np.uint64)
    if pattern == "counter":
        words[:, 0] = counter
    elif pattern == "high word":
        words[:, 3] = counter << np.uint64(48)
    elif pattern == "one bit":  # two bits set anywhere
        i, j = np.triu_indices(256, 1)
        bits = np.zeros((len(i), 256), np.uint8)
        bits[np.arange(len(i)), i] = bits[np.arange(len(i)), j] = 1
        words = np.packbits(bits[:n], axis=1).view(np.uint64)
    else:
        words[:] = (counter * np.uint64(0x0101010101010101))[:, None]
    index = make_index(n)
    fill(index, np.ascontiguousarray(words).view(np.uint8))
    mean, longest = index.probe_lengths()
    assert mean < 1.1
    assert longest < 30


def test_two_indexes_do_not_share_a_seed(make_index):
    """Else keys that collide in one table could be found by trying, and then used against all."""
    keys = random_keys(np.random.default_rng(5), 4096)
    shapes = set()
    for _ in range(3):
        index = make_index(4096)
        fill(index, keys)
        shapes.add(index.probe_lengths())
    assert len(shapes) > 1


def test_the_table_does_not_wear_out(make_index):
    """Twenty times the capacity in new keys: searches stay as short as in the first round, and clear restores them."""
    index, rng = make_index(20_000), np.random.default_rng(6)
    means = []
    for _ in range(80):
        fill(index, random_keys(rng, 5000))
        means.append(index.probe_lengths()[0])
    assert index.counters()["evictions"] == 80 * 5000 - 20_000
    assert max(means) < 1.3
    assert max(means[60:]) < means[20] + 0.05
    index.clear()
    assert index.probe_lengths() == (0, 0)
    keys = random_keys(rng, 20_000)
    fill(index, keys)
    assert index.probe_lengths()[0] < 1.1
    assert index.lookup(keys)[1] == 20_000


@pytest.mark.parametrize("flags", [[], ["-DKV_TABLE_PORTABLE"]], ids=["sse2", "portable"])
def test_table_and_unlocked_lookups_hold_in_c(tmp_path, flags):
    program = tmp_path / "index_tsan"
    source = ROOT / "tests/c/index_tsan.c"
    build = [os.environ.get("CC", "cc"), "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", *flags]
    subprocess.run([*build, f"-I{ROOT / 'include'}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "")
