"""Small helpers for the index's tests."""

import numpy as np
import pytest

from kvortex.index import BlockIndex


@pytest.fixture
def make_keys():
    """Return a function: numbers -> one key each, equal numbers giving equal keys."""

    def make(*numbers):
        keys = np.zeros((len(numbers), 32), np.uint8)
        keys[:, :8] = np.array(numbers, np.uint64).reshape(-1, 1).view(np.uint8)
        return keys

    return make


@pytest.fixture
def make_index():
    """Return a function: number of slots -> an index that has them all."""

    def make(num_slots):
        index = BlockIndex(num_slots)
        index.add_slots(0, num_slots)
        return index

    return make
