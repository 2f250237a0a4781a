"""Whatever lies where a record or a segment should, nothing breaks, and nothing false is taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_fuzz import HEADER_BYTES, RECORD, SEGMENT, fuzz_folder, fuzz_record

ROOT = Path(__file__).resolve().parents[2]
FUZZER = """
import sys
import atheris
with atheris.instrument_imports(include=["kvortex.tiers", "record_fuzz"]):
    import record_fuzz
atheris.Setup(sys.argv[:1] + sys.argv[2:], getattr(record_fuzz, "fuzz_" + sys.argv[1]))
atheris.Fuzz()
"""
SOAK = os.environ.get("KVORTEX_SOAK") == "1"
places = st.one_of(st.integers(0, 200), st.integers(0, HEADER_BYTES), st.integers(0, 0xFFFF))
edits = st.lists(st.tuples(places, st.binary(max_size=15)), max_size=4)


def edits_of(starts):
    """A fuzzer's bytes that edit a few places behind one of these starts, so that they meet fields."""

    def as_bytes(choice, start, edits):
        parts = (min(start + at, 0xFFFF).to_bytes(2, "little") + bytes([len(data)]) + data for at, data in edits)
        return bytes([choice]) + b"".join(parts)

    return st.builds(as_bytes, st.integers(0, 255), st.sampled_from(starts), edits)


@settings(max_examples=20_000 if SOAK else 300, deadline=None)
@given(data=st.one_of(edits_of([0]), st.binary(max_size=64)))
def test_a_changed_record_is_refused_or_unchanged_in_what_counts(data):
    fuzz_record(data)


@settings(max_examples=20_000 if SOAK else 300, deadline=None)
@given(data=st.one_of(edits_of([0, 4096, 16384, 28672]), st.binary(max_size=64)))
def test_of_a_changed_segment_only_whole_records_are_counted(data):
    fuzz_folder(data)


def test_the_reader_in_python_takes_what_was_written():
    fuzz_record(b"")
    fuzz_folder(b"\0")
    assert len(SEGMENT) == HEADER_BYTES + 3 * len(RECORD)


@pytest.mark.host
@pytest.mark.skipif(not SOAK, reason="downloads atheris, which has wheels for few Pythons, and runs for minutes")
@pytest.mark.parametrize("target", ["record", "folder"])
def test_atheris_finds_nothing(tmp_path, target):
    wheels, corpus = tmp_path / "atheris", tmp_path / "corpus"
    corpus.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", wheels, "atheris==3.0.0"]
    subprocess.run(pip, check=True)
    folders = (wheels, ROOT, Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    seconds = os.environ.get("KVORTEX_FUZZ_SECONDS", "600")
    command = [sys.executable, "-c", FUZZER, target, f"-max_total_time={seconds}", corpus]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
