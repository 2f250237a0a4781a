"""The command line as a user runs it: exit codes, files, messages."""

import json
import os
import subprocess
import sys

import pytest

from kvortex.cli import main
from kvortex.replay import report

DEVICE = os.environ.get("KVORTEX_TEST_DEVICE", "host")
FAST = ["--device", DEVICE, "--block-bytes", "4096", "--limit", "200", "--pool-blocks", "256"]


def run(*args):
    return subprocess.run([sys.executable, "-m", "kvortex", *args], capture_output=True, text=True, timeout=100)


def test_replay_writes_table_json_and_picture(tmp_path):
    done = run("replay", *FAST, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"))
    assert done.returncode == 0, done.stderr
    for row in ("requests", "blocks saved", "blocks loaded", "blocks evicted", "hit ratio", "lookup latency"):
        assert row in done.stdout
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    fields = json.loads((tmp_path / "r.json").read_text())
    for name in ("requests", "blocks_touched", "blocks_saved", "blocks_loaded", "blocks_evicted", "wrong_blocks",
                 "prefix_hit_block_ratio", "prefix_hit_token_ratio", "save_gbps", "load_gbps", "seconds", "device",
                 "policy", "pool_blocks"):  # fmt: skip
        assert name in fields
    assert (fields["requests"], fields["wrong_blocks"], fields["pool_blocks"]) == (200, 0, 256)
    assert 0 < fields["prefix_hit_block_ratio"] < 1 and fields["save_gbps"] > 0 and fields["load_gbps"] > 0


def test_corruption_exits_1():
    done = run("replay", *FAST, "--inject", "corrupt=2")
    assert done.returncode == 1, done.stderr
    assert "2 slots corrupted on purpose" in done.stdout


def test_help_has_examples():
    assert run("--help").returncode == 0
    done = run("replay", "--help")
    assert done.returncode == 0 and "examples:" in done.stdout and "--inject corrupt=3" in done.stdout


def test_info_names_version_and_device():
    done = run("info", "--device", DEVICE)
    assert done.returncode == 0, done.stderr
    assert "kvortex" in done.stdout and DEVICE in done.stdout


def test_a_malformed_line_exits_2_and_is_named(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}\n{"timestamp": 0}\n')
    assert main(["replay", str(path)]) == 2
    assert "bad.jsonl, line 2: the field 'input_length' is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["--limit", "0"],
        ["--limit", "x"],
        ["--pool-blocks", "-1"],
        ["--pool-blocks", "5", "--pool-bytes", "4096"],
        ["--pool-bytes", "12 parsecs"],
        ["--device", "tpu"],
        ["--inject", "corrupt=0"],
        ["--inject", "flip=1"],
        ["--no-such-option"],
    ],
)
def test_bad_usage_exits_2(args):
    with pytest.raises(SystemExit) as caught:
        main(["replay", *args])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--block-bytes", "1000"], "multiple of 128"),
        (["--inject", "corrupt=1", "--no-verify"], "verification on"),
        (["--json", "/no/such/directory/x.json"], "cannot write /no/such/directory/x.json"),
        (["--pool-bytes", "4096", "--block-bytes", "64KiB"], "4096"),
        (["--pool-bytes", "900TiB"], ""),
        (["/no/such/trace.jsonl"], "cannot read the trace"),
    ],
)
def test_bad_input_exits_2_with_a_message(args, message, capsys):
    assert main(["replay", "--device", "host", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvortex replay: error: ") and message in error


def test_corruption_of_a_trace_without_hits_exits_2(tmp_path, capsys):
    path = tmp_path / "once.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}\n')
    assert main(["replay", str(path), "--device", "host", "--inject", "corrupt=1"]) == 2
    assert "nothing could be corrupted" in capsys.readouterr().err


def test_sizes_take_binary_units(tmp_path):
    path = tmp_path / "r.json"
    assert main(["replay", *FAST[:2], "--limit", "5", "--block-bytes", "8KiB", "--pool-bytes", "1MiB",
                 "--json", str(path)]) == 0  # fmt: skip
    fields = json.loads(path.read_text())
    assert (fields["block_bytes"], fields["pool_bytes"], fields["pool_blocks"]) == (8192, 1 << 20, 128)


def test_interrupted_replay_exits_130(monkeypatch, capsys):
    def interrupt(self, result):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.Progress, "__call__", interrupt)
    assert main(["replay", *FAST]) == 130
    assert "interrupted" in capsys.readouterr().err
