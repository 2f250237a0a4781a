"""The model of what is saved when: where nothing is forgotten, the moment does not matter."""

import pytest

from bench.saving import main, replay
from kvortex.replay import read_trace, sample_path, sweep

MANY = 1 << 20


def test_pools_that_never_evict_find_all_that_was_there_whenever_it_is_saved():
    requests = read_trace(sample_path())
    all_that_was_there = sweep(requests, [1]).unbounded_blocks
    for hits in (0, None):
        assert sum(replay(requests, 300, MANY, hits)[:2]) == all_that_was_there
    assert 0 < sum(replay(requests, 300, MANY, 1)[:2]) < all_that_was_there


def test_a_row_is_printed_for_each_moment(capsys):
    main([str(sample_path()), "--device", "300", "--host", "50,100"])
    rows = capsys.readouterr().out.splitlines()[3:]
    assert [row.split("|")[1].strip() for row in rows] == ["at once", "after 1 hit", "after 2 hits", "on evict"]
    assert all(row.count("%") == 2 for row in rows)


def test_a_device_that_cannot_hold_a_request_is_refused():
    with pytest.raises(SystemExit, match="a request has .* blocks, and the device 20"):
        main([str(sample_path()), "--device", "20"])
