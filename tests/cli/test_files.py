"""What `kvortex replay` writes: where, in which format, and never over a trace."""

import json
import os
import shutil

import pytest

from kvortex.cli import main

LINE = '{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}\n'
FAST = ["replay", "--device", "host", "--block-bytes", "4096", "--limit", "20"]
SIGNATURES = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "traces" / "trace.jsonl"
    path.parent.mkdir()
    path.write_text(20 * LINE)
    return path


def leads_to(trace, how):
    """Another way to name the trace, a file with the suffix of a picture where it may be one."""
    link = trace.with_name("link.png")
    if how == "itself":
        return trace
    if how == "relative":
        return os.path.relpath(trace)
    if how == "detour":
        return trace.parent / ".." / trace.parent.name / trace.name
    (link.symlink_to if how == "symlink" else link.hardlink_to)(trace)
    return link


@pytest.mark.parametrize("sweep", [[], ["--sweep", "5"]])
@pytest.mark.parametrize("of_the_trace", ["file", "folder", "second"])
@pytest.mark.parametrize("how", ["itself", "relative", "detour", "symlink", "hardlink"])
def test_a_trace_is_never_overwritten(trace, tmp_path, capsys, how, of_the_trace, sweep):
    other = shutil.copy(trace, tmp_path / "other.jsonl")
    named = {"file": [trace], "folder": [trace.parent], "second": [other, trace]}[of_the_trace]
    target = str(leads_to(trace, how))
    before = trace.read_bytes()
    for option in ("--json", *["--plot"] * target.endswith(".png")):
        assert main([*FAST, *map(str, named), *sweep, option, target]) == 2
        error = capsys.readouterr().err
        assert "is a trace that is read, and would be overwritten" in error and error.count("\n") == 1
    assert trace.read_bytes() == before


def test_the_bundled_trace_is_not_overwritten_either(monkeypatch, trace, capsys):
    monkeypatch.setattr("kvortex.cli.sample_path", lambda: trace)
    assert main([*FAST, "--json", str(trace)]) == 2
    assert trace.read_text() == 20 * LINE


def test_json_and_plot_are_two_files(trace, capsys):
    path = str(trace.with_name("x.png"))
    assert main([*FAST, str(trace), "--json", path, "--plot", path]) == 2
    assert "the same file" in capsys.readouterr().err and not os.path.exists(path)


def test_an_earlier_result_is_replaced(trace, tmp_path):
    path = tmp_path / "x.json"
    path.write_text("an earlier and longer one" * 1000)
    assert main([*FAST, str(trace), "--json", str(path)]) == 0
    assert json.loads(path.read_text())["requests"] == 20
    assert main([*FAST, str(trace), "--json", os.devnull]) == 0


@pytest.mark.parametrize("sweep", [[], ["--sweep", "5"]])
def test_json_on_stdout_stands_alone(trace, tmp_path, monkeypatch, capsys, sweep):
    monkeypatch.chdir(tmp_path)
    assert main([*FAST, str(trace), *sweep, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 20
    assert not os.path.exists("-")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "SVG"])
@pytest.mark.parametrize("sweep", [[], ["--sweep", "1,5"]])
def test_the_suffix_of_a_plot_decides(trace, tmp_path, suffix, sweep):
    path = tmp_path / f"x.{suffix}"
    assert main([*FAST, str(trace), *sweep, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(SIGNATURES[suffix.lower()])


@pytest.mark.parametrize("name", ["x", "x.jpeg", "x.json", "-", ".png"])
def test_another_suffix_is_refused_before_the_run(trace, tmp_path, capsys, name):
    assert main([*FAST, str(trace), "--plot", str(tmp_path / name)]) == 2
    assert "a picture is .png, .svg, .pdf, as its suffix says" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_the_plot_of_a_sweep_tells_sizes_in_gib_too(trace, tmp_path):
    path = tmp_path / "x.svg"
    args = ["replay", str(trace), "--plot", str(path), "--sweep", "100,10000"]
    assert main([*args, "--block-bytes", "100MiB"]) == 0
    picture = path.read_text()  # which has every text in a comment, too
    assert "<!-- pool (GiB, blocks of 100 MiB) -->" in picture and "<!-- pool (blocks) -->" in picture
    assert "<!-- 10,000 -->" in picture and "<!-- 100 -->" in picture  # and 1,000 GiB above the first
    assert "<!-- 10 -->" in picture
    assert main(args) == 0
    assert "GiB" not in path.read_text()


# ---- sweeps in bytes -------------------------------------------------------------------------------------------------


def test_a_sweep_takes_sizes(trace, tmp_path, capsys):
    path = tmp_path / "x.json"
    args = ["replay", str(trace), "--json", str(path)]
    assert main([*args, "--sweep", "1MiB,5,40K,16KiB", "--block-bytes", "8KiB"]) == 0
    table = capsys.readouterr().out
    fields = json.loads(path.read_text())
    assert fields["block_bytes"] == 8192
    assert [(p["pool_blocks"], p["pool_bytes"]) for p in fields["points"]] == [
        (2, 16384), (4, 32768), (5, 40960), (128, 1 << 20)
    ]  # fmt: skip
    assert "16 KiB" in table and "1 MiB" in table
    assert main([*args, "--sweep", "5"]) == 0
    fields = json.loads(path.read_text())
    assert fields["block_bytes"] is fields["points"][0]["pool_bytes"] is None
    assert "KiB" not in capsys.readouterr().out


def test_blocks_of_a_sweep_take_whole_pages_as_in_a_pool(trace, capsys):
    assert main(["replay", str(trace), "--sweep", "40KiB", "--block-bytes", "4097", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["points"][0]["pool_blocks"] == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sweep", "1GiB"], "--sweep 1GiB is a size in bytes: say with --block-bytes how large a block is"),
        (["--sweep", "4095B", "--block-bytes", "16"], None),
        (["--sweep", "1KiB", "--block-bytes", "16"], "--sweep 1KiB holds no block of 4096 bytes"),
    ],
)
def test_a_size_without_blocks_is_refused(trace, capsys, args, message):
    try:
        status = main(["replay", str(trace), *args])
    except SystemExit as left:
        status = left.code
    assert status == 2 and (message or "a size such as 32GiB") in capsys.readouterr().err
