"""The line that shows progress, on a real terminal: as wide as it is at that moment, and gone or ended afterwards."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from types import SimpleNamespace

import pytest

from kvortex.replay import report

END = b"\0"


class Terminal:
    """A pseudo-terminal: `out` is what a program writes to, `text` what arrived."""

    def __init__(self, columns):
        self._reader, writer = pty.openpty()
        self.out, self._parts = os.fdopen(writer, "w"), []
        self.resize(columns)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def resize(self, columns):
        fcntl.ioctl(self.out, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def _read(self):
        while not self._parts or END not in self._parts[-1]:
            self._parts.append(os.read(self._reader, 65536))

    def text(self):
        """Everything that was written. The kernel may lose what was not read when the writer is closed."""
        self.out.write(END.decode())
        self.out.flush()
        self._thread.join()
        self.out.close()
        os.close(self._reader)
        return b"".join(self._parts).removesuffix(END).decode()


def lines_of(text):
    """Each state of the line, without what clears the rest of it."""
    return [line for line in re.sub(r"\x1b\[K", "", text).replace("\n", "\r").split("\r") if line]


@pytest.fixture
def make_terminal(monkeypatch):
    made = []
    monkeypatch.setenv("COLUMNS", "500")  # of a shell that was told another width once

    def make(columns):
        made.append(Terminal(columns))
        return made[-1]

    yield make
    for terminal in made:
        if not terminal.out.closed:
            terminal.text()


@pytest.fixture(autouse=True)
def always_time_to_show(monkeypatch):
    times = iter(range(1_000_000))
    monkeypatch.setattr(report.time, "monotonic", lambda: next(times))


def result(done):
    return SimpleNamespace(requests=done, seconds=123.0 * done, blocks_loaded=5, blocks_touched=7, wrong_blocks=12_345)


def test_the_line_fits_every_terminal(make_terminal):
    for columns in range(40, 201):
        terminal = make_terminal(columns)
        with report.Bar(terminal.out) as bar:
            progress = report.Progress(1_000_000, bar)
            bar.show(0.5, lambda: "reading  file 123,456/999,999")
            progress.pinning(0.25)
            for done in (1, 400_000, 1_000_000):
                progress(result(done))
        lines = lines_of(terminal.text())
        assert len(lines) == 5 and max(map(len, lines)) < columns
        assert all("1,000,000 requests" in line for line in lines[2:])
        assert columns < 60 or all("[" in line for line in lines)
        assert columns < 110 or "wrong 12,345" in lines[-1]


def test_the_line_follows_a_terminal_that_is_resized(make_terminal):
    terminal = make_terminal(200)
    widths = (200, 40, 80, 41, 120)
    with report.Bar(terminal.out) as bar:
        for columns in widths:
            terminal.resize(columns)
            report.Progress(1_000_000, bar)(result(500_000))
    lengths = list(map(len, lines_of(terminal.text())))
    assert all(length < columns for length, columns in zip(lengths, widths, strict=True))
    assert lengths[0] > 80 and lengths[2] > 41 and lengths[4] > 80


def test_a_terminal_that_tells_no_width_gets_a_line_all_the_same(make_terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    terminal = make_terminal(0)
    with report.Bar(terminal.out) as bar:
        report.Progress(1_000_000, bar)(result(500_000))
    (line,) = lines_of(terminal.text())
    assert 25 < len(line) < 50


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_what_follows_begins_on_a_line_of_its_own(make_terminal, error):
    terminal = make_terminal(80)
    try:
        with report.Bar(terminal.out) as bar:
            bar.show(0.5, lambda: "reading")
            if error:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    terminal.out.write("next")
    assert terminal.text().endswith("\r\nnext")


def test_a_line_that_is_cleared_leaves_nothing(make_terminal):
    terminal = make_terminal(80)
    with report.Bar(terminal.out) as bar:
        bar.clear()
        bar.show(0.5, lambda: "reading")
        bar.clear()
    assert terminal.text().endswith("\r\x1b[K")


def test_a_replay_shows_reading_and_pinning(tmp_path, make_terminal):
    """As a user sees it; everything is shown at once, since the machine may be too fast for a tenth of a second."""
    line = '{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}\n'
    (tmp_path / "trace.jsonl").write_text(20_000 * line)
    program = (
        "import sys\n"
        "from kvortex import cli\n"
        "from kvortex.replay import report, run\n"
        "show, run._PINNING_MS = report.Bar.show, 0\n"
        "report.Bar.show = lambda self, share, text: (setattr(self, '_next_s', 0), show(self, share, text))\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    terminal = make_terminal(60)
    done = subprocess.run(
        [sys.executable, "-c", program, "replay", "--device", "host", "--block-bytes", "4096", "--pool-bytes", "512MiB"]
        + ["--limit", "50", tmp_path / "trace.jsonl"],
        stdout=subprocess.PIPE, stderr=terminal.out, timeout=100, check=True, text=True,
    )  # fmt: skip
    lines = lines_of(terminal.text())
    stages = [re.search("reading|pinning the pool|requests", line)[0] for line in lines]
    assert sorted(set(stages), key=stages.index) == ["reading", "pinning the pool", "requests"]
    assert stages == sorted(stages, key=["reading", "pinning the pool", "requests"].index)
    assert "100% 50/50 requests" in lines[-1] and "wrong blocks" in done.stdout
