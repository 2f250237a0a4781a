"""The trace parser: what it accepts, and what it says about what it refuses."""

import gc
import gzip
import json
import signal

import numpy as np
import pytest

from kvortex.replay import TraceError, read_trace, sample_path
from kvortex.replay.sample import sample_lines
from kvortex.replay.trace import loads, parse_lines

GOOD = {"timestamp": 12, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}


def line(**changes):
    return json.dumps(GOOD | changes).encode()


def test_a_line_becomes_a_request():
    (request,) = parse_lines([line()])
    assert (request.timestamp_ms, request.input_length, request.output_length) == (12, 1100, 5)
    assert request.hash_ids.dtype == np.int64
    assert request.hash_ids.tolist() == [7, 8, 9]


def test_the_last_block_counts_only_the_tokens_it_holds():
    (request,) = parse_lines([line()])
    assert [request.tokens(n) for n in range(4)] == [0, 512, 1024, 1100]


def test_a_prompt_without_ids_a_float_timestamp_and_further_fields_are_fine():
    (request,) = parse_lines([line(hash_ids=[], input_length=0, timestamp=0.5, chat="x")])
    assert request.hash_ids.shape == (0,)


def test_blank_lines_are_skipped_but_counted():
    with pytest.raises(TraceError, match="line 4: not valid JSON"):
        list(parse_lines([line(), b"\n", b"  \n", b"{"]))
    assert len(list(parse_lines([line(), b"\n", line()]))) == 2


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_missing_field_is_named(name):
    fields = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(TraceError, match=f"t.jsonl, line 2: the field '{name}' is missing"):
        list(parse_lines([line(), json.dumps(fields)], "t.jsonl"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"not json", "not valid JSON"),
        (b'{"timestamp": 1', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1, 2]", "a JSON object is expected"),
        (b"3", "a JSON object is expected"),
        (line(timestamp="now"), "'timestamp' must be"),
        (line(timestamp=-1), "'timestamp' must be"),
        (line(timestamp=True), "'timestamp' must be"),
        (line(timestamp=float("nan")), "'timestamp' must be"),
        (line(timestamp=float("inf")), "'timestamp' must be"),
        (line(input_length=-1), "'input_length' must be"),
        (line(input_length=1.5), "'input_length' must be"),
        (line(input_length=None), "'input_length' must be"),
        (line(input_length=2**31), "'input_length' must be"),
        (line(output_length="5"), "'output_length' must be"),
        (line(output_length=False), "'output_length' must be"),
        (line(hash_ids="789"), "'hash_ids' must be a list"),
        (line(hash_ids={"0": 7}), "'hash_ids' must be a list"),
        (line(hash_ids=[7, "8", 9]), r"'hash_ids'\[1\] must be"),
        (line(hash_ids=[7, 8, -1]), r"'hash_ids'\[2\] must be"),
        (line(hash_ids=[7.0]), r"'hash_ids'\[0\] must be"),
        (line(hash_ids=[2**63]), r"'hash_ids'\[0\] must be"),
        (line(hash_ids=[True]), r"'hash_ids'\[0\] must be"),
        (line(hash_ids=[1, 2, 3, 4]), "at most 3 fit"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(bad, message):
    with pytest.raises(TraceError, match=f"^some.jsonl, line 3: .*{message}"):
        list(parse_lines([line(), line(), bad, line()], "some.jsonl"))


def test_deeply_nested_json_is_a_malformed_line():
    with pytest.raises(TraceError, match="line 1: not valid JSON"):
        list(parse_lines([b"[" * 200_000]))


def test_limit_stops_before_later_lines(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\n".join([line(), line(), b"rubbish"]))
    assert len(read_trace(path, limit=2)) == 2
    with pytest.raises(TraceError, match="line 3"):
        read_trace(path)


def test_a_gzip_trace_reads_like_a_plain_one(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line() + b"\n" + line(hash_ids=[1]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    plain, packed = (read_trace(tmp_path / name) for name in ("a.jsonl", "a.jsonl.gz"))
    assert [r.hash_ids.tolist() for r in plain] == [r.hash_ids.tolist() for r in packed] == [[7, 8, 9], [1]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "holds no request"),
        ("blank.jsonl", b"\n\n", "holds no request"),
        ("plain.jsonl.gz", b"{}", "cannot read the trace"),
        ("cut.jsonl.gz", gzip.compress(line() * 1000, mtime=0)[:-20], "cannot read the trace"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(tmp_path / name)
    assert name in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(TraceError, match=r"cannot read the trace .*nowhere.jsonl"):
        read_trace(tmp_path / "nowhere.jsonl")


def test_the_sample_is_what_its_generator_makes():
    with gzip.open(sample_path()) as file:
        assert file.read().decode().splitlines() == sample_lines()


def test_the_sample_is_large_and_small_enough():
    requests = read_trace(sample_path())
    assert len(requests) >= 500
    assert sum(len(request.hash_ids) for request in requests) >= 20_000
    assert sample_path().stat().st_size < 150_000
    times = [request.timestamp_ms for request in requests]
    assert times == sorted(times)


def test_in_the_sample_an_id_names_everything_before_it():
    before = {}
    for request in read_trace(sample_path()):
        ids = request.hash_ids.tolist()
        for previous, current in zip([None, *ids], ids, strict=False):
            assert before.setdefault(current, previous) == previous


def test_ctrl_c_is_heard_while_one_long_text_is_parsed():
    text = "[" + ",".join(['{"a": [1, 2, 3]}'] * 500_000) + "]"

    def handler(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGVTALRM, handler)
    gc.disable()  # hypothesis watches the collector, and swallows what is raised meanwhile
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.02)  # of CPU time: the text takes ten times as long
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            loads(text)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        gc.enable()
        signal.signal(signal.SIGVTALRM, before)
    assert [entry.name for entry in caught.traceback][-2:] == ["_same", "handler"], "it was heard when all was parsed"
