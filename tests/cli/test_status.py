"""How the command line ends: which status, and which line, whatever it is given and whatever is closed."""

import gzip
import os
import resource
import subprocess
import sys

import pytest

import kvortex
from kvortex import cli

LINE = '{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}\n'


def run(*args, **options):
    """Run a command as a user does; what it prints is not decoded."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 100} | options
    return subprocess.run([sys.executable, "-m", "kvortex", *args], **options)


def replay(*args, **options):
    return run("replay", "--device", "host", "--block-bytes", "4096", *args, **options)


def error_of(done, name="replay"):
    """The message of a command that was given what is bad: one line, and status 2."""
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 2 and line.startswith(f"kvortex {name}: error: ")
    return line


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(3 * LINE)
    return path


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "bits", "check sum", "no gzip", "empty"])
def test_damaged_gzip_is_bad_input(tmp_path, damage, capsys):
    packed = bytearray(gzip.compress(1000 * LINE.encode()))
    if damage == "cut":
        del packed[-20:]
    elif damage == "bits":
        packed[15:25] = bytes(byte ^ 0xFF for byte in packed[15:25])
    elif damage == "check sum":
        packed[-6] ^= 1
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes({"no gzip": b"no gzip", "empty": b""}.get(damage, packed))
    message = "holds no request" if damage == "empty" else "cannot read the trace"
    assert cli.main(["replay", "--device", "host", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a = " + 5000 * b"[" + 5000 * b"]", "is nested too deeply"),
        (b"a" + 5000 * b".a" + b" = 1", "is nested too deeply|is no setting"),
        (b"max_jobs = 0x" + 5000 * b"f", "max_jobs must be 1 to 65536, got an int of 20000 bits"),
        (b"max_jobs = " + 5000 * b"9", "is not TOML: "),
        (b"max_jobs = '" + 5000 * b"9" + b"'", r"got '9+\.\.\. "),
        (b"max_jobs = inf", "max_jobs must be a whole number, got inf"),
        (b"max_jobs = 1979-05-27", "max_jobs must be a whole number, got datetime"),
        (b'"' + 5000 * b"k" + b'" = 1', r"key 'k+\.\.\. of"),
        (b'"\\u001b[31m\\n" = 1', r"key '\\x1b\[31m\\n' of"),
        (b"\xff", "is not TOML: "),
        (b"#" * (1 << 20) + b"#", "longer than 1 MiB"),
    ],
)
def test_a_configuration_that_is_none_is_bad_input(tmp_path, text, message, capsys):
    path = tmp_path / "kvortex.toml"
    path.write_bytes(text)
    assert cli.main(["info", "--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 1000
    with pytest.raises(kvortex.ConfigError, match=message):
        kvortex.KVortexConfig.load(path, environ={})


def test_a_configuration_without_an_end_is_not_read_to_it():
    assert "longer than 1 MiB" in error_of(run("info", "--config", "/dev/zero"), "info")


@pytest.mark.parametrize(
    "name", [b"\xff.jsonl", b"a\nb\x1b[31m.jsonl", "\u202e\u00e9.jsonl".encode(), b"$\\frac$.jsonl"]
)
def test_a_trace_may_have_any_name_on_a_terminal_of_any_encoding(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "ignore"}
    assert "cannot read the trace" in error_of(replay(path, env=environment))
    with open(path, "w") as file:
        file.write(LINE)
    done = replay(path, "--plot", tmp_path / "x.svg", "--json", tmp_path / "x.json", env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    (row,) = [line for line in done.stdout.splitlines() if line.startswith(b"  trace ")]
    assert b"\x1b" not in done.stdout and b"jsonl" in row


@pytest.mark.parametrize(
    "args",
    [
        ["--limit", 5000 * "9"],
        ["--limit", "1" + 30 * "0"],
        ["--pool-blocks", 25 * "9"],
        ["--pool-blocks", str(2**63 - 1)],
        ["--pool-bytes", "99999999T"],
        ["--pool-bytes", 5000 * "9"],
        ["--block-bytes", "9999T"],
        ["--block-bytes", "2GiB", "--pieces", str(1 << 27)],
        ["--inflight", "1000000"],
        ["--inject", f"corrupt={5000 * '9'}"],
        ["--sweep", 25 * "9"],
        ["--sweep", ",".join(map(str, range(1, 2000)))],
        ["--sweep", "9999T"],
        ["--disk", "/tmp", "--disk-bytes", "99999999T"],
        ["--disk", "/tmp", "--disk-blocks", str(2**63 - 1)],
    ],
)
def test_a_huge_number_is_bad_input(trace, args, capsys):
    try:
        status = cli.main(["replay", "--device", "host", *args, str(trace)])
    except SystemExit as left:
        status = left.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and last.startswith("kvortex replay: error: ") and len(last) < 500


def test_more_requests_in_flight_than_there_are_take_no_memory(trace):
    options = ["--block-bytes", "2MiB", "--pool-blocks", "2", "--inflight"]
    assert cli.main(["replay", "--device", "host", *options, "256", str(trace)]) == 0


def test_a_process_without_memory_says_so(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"block_size": 64, "requests": [' + ",".join(["{}"] * 20_000_000) + "]}")  # 24 bytes each and more

    def little_memory():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    assert "not enough memory" in error_of(replay(path, preexec_fn=little_memory))


# ---- what nobody foresaw ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("a fault\nof ours"), RecursionError(), AssertionError("x"), KeyError(3)]
)
def test_the_unforeseen_exits_70_with_one_line(monkeypatch, capsys, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(cli.info, "collect", fail)
    assert cli.main(["info"]) == 70
    printed = capsys.readouterr().err
    assert printed.startswith(f"kvortex info: error: unforeseen {type(error).__name__}: ") and "--debug" in printed
    assert printed.count("\n") == 1
    for args in (["--debug", "info"], ["info", "--debug"]):
        assert cli.main(args) == 70
        assert "Traceback" in (printed := capsys.readouterr().err) and ", in fail" in printed


def test_debug_shows_where_bad_input_was_found(capsys):
    assert cli.main(["replay", "--debug", "/no/such/trace"]) == 2
    assert "Traceback" in capsys.readouterr().err


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-", "2>&- >&- <&-", "2>/dev/full"])
def test_closed_streams_change_no_status(trace, tmp_path, closed):
    command = f'"$0" -m kvortex replay --device host --block-bytes 4096 "$@" {closed}'

    def shell(*args):
        return subprocess.run(["bash", "-c", command, sys.executable, *args], capture_output=True, timeout=100)

    done = shell(trace, "--json", tmp_path / "x.json")
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "x.json").read_text().startswith("{")
    assert b"wrong blocks" in done.stdout or ">&- >&-" in closed or closed == ">&-"
    assert shell("/no/such/trace").returncode == 2
    assert trace.read_text() == 3 * LINE


@pytest.mark.parametrize(
    "args",
    [
        ["replay", "--help"],
        ["info"],
        ["info", "--json"],
        ["replay", "--limit", "50", "--json", "-"],
        ["inspect", "/no/such"],
    ],
)
def test_a_reader_that_leaves_ends_it_quietly(args):
    reading, writing = os.pipe()
    os.close(reading)
    done = run(*args, stdout=writing)
    os.close(writing)
    if args[0] == "inspect":
        assert b"no/such" in done.stderr and done.returncode == 2
    else:
        assert (done.returncode, done.stderr) == (0, b"")


def test_wrong_blocks_are_told_by_the_status_though_nobody_reads(trace, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = replay(trace, "--inject", "corrupt=1", "--json", tmp_path / "x.json", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"") and (tmp_path / "x.json").exists()


def test_a_full_disk_under_stdout_is_told(trace):
    with open("/dev/full", "w") as full:
        assert "No space left" in error_of(replay(trace, stdout=full))


def test_settings_are_shown_as_a_terminal_may_have_them(monkeypatch, capsys):
    monkeypatch.setenv("KVORTEX_NAMESPACE", "a\x1b[31m\nb")
    assert cli.main(["info", "--device", "host"]) == 0
    assert "a\\x1b[31m\\nb" in capsys.readouterr().out
