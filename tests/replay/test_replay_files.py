"""Trace files: formats told apart by content, many files as one trace, and what is said about the bad ones."""

import gzip
import itertools
import json
import os
import random
import tracemalloc

import numpy as np
import pytest

from kvortex.replay import ReplayOptions, TraceError, files, read_trace, replay
from kvortex.replay.trace import Request

MOONCAKE = {"timestamp": 12, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}
TURN = {"t": 0.5, "type": "n", "model": "m", "in": 130, "out": 4, "hash_ids": [1, 2, 3], "stop": "", "api_time": 1.0}
CONVERSATION = {
    "id": "c",
    "models": ["m"],
    "block_size": 64,
    "hash_id_scope": "local",
    "tool_tokens": 10,
    "requests": [
        TURN,
        {
            "t": 1.0,
            "type": "subagent",
            "agent_id": "a",
            "requests": [
                TURN | {"t": 1.25, "hash_ids": [1, 9]},
                {"t": 1.5, "type": "subagent", "requests": [TURN | {"t": 3.0, "hash_ids": [1, 9, 10]}]},
            ],
        },
        TURN | {"t": 2.0, "hash_ids": [1, 2, 3, 4], "in": 256},
    ],
}


def write(path, *objects, indent=None):
    path.write_text("\n".join(json.dumps(value, indent=indent) for value in objects) + "\n")
    return path


def ids(requests):
    return [request.hash_ids.tolist() for request in requests]


@pytest.fixture(params=["one line", "indented", "array", "packed", "odd name"])
def conversation(request, tmp_path):
    path = tmp_path / ("c.json" if request.param != "odd name" else "c.txt")
    if request.param == "array":
        return write(path, [CONVERSATION])
    write(path, CONVERSATION, indent=2 if request.param == "indented" else None)
    if request.param == "packed":
        path.write_bytes(gzip.compress(path.read_bytes()))  # told by its content: the name says nothing of it
    return path


def test_a_conversation_is_flattened_in_order_of_time(conversation):
    requests = read_trace(conversation)
    assert ids(requests) == [[1, 2, 3], [1, 9], [1, 2, 3, 4], [1, 9, 10]]
    assert [request.timestamp_ms for request in requests] == [500, 1250, 2000, 3000]
    assert [(r.input_length, r.output_length, r.tokens_per_block) for r in requests[:1]] == [(130, 4, 64)]
    assert [requests[0].tokens(n) for n in range(4)] == [0, 64, 128, 130]


def test_a_sub_agent_shares_the_ids_of_its_conversation(conversation):
    first, nested, *_ = read_trace(conversation)
    assert (first.keys()[0] == nested.keys()[0]).all()
    assert (first.keys()[1] != nested.keys()[1]).any()


def test_conversations_one_a_line_share_no_key_unless_they_say_so(tmp_path):
    path = write(tmp_path / "c.jsonl", CONVERSATION, CONVERSATION)
    first, second = read_trace(path)[:2]
    assert ids([first, second]) == [[1, 2, 3]] * 2 and (first.keys() != second.keys()).any(axis=1).all()
    path = write(path, *[CONVERSATION | {"hash_id_scope": "global"}] * 2)
    first, second = read_trace(path)[:2]
    assert (first.keys() == second.keys()).all()


def test_a_request_without_ids_has_no_blocks(tmp_path):
    requests = [{"t": 0, "in": 5}, {"t": 1, "in": 6, "out": 0, "hash_ids": None}]
    found = read_trace(write(tmp_path / "c.json", {"block_size": 64, "requests": requests}))
    assert ids(found) == [[], []] and [request.input_length for request in found] == [5, 6]


def test_files_and_folders_are_merged_by_time_and_share_no_key(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path / "a.json", CONVERSATION)
    write(tmp_path / "below" / "b.json", CONVERSATION | {"requests": [TURN | {"t": 0.75, "hash_ids": [1, 2]}]})
    (tmp_path / "README.txt").write_text("not a trace")
    expected = [[1, 2, 3], [1, 2], [1, 9], [1, 2, 3, 4], [1, 9, 10]]
    seen = []
    requests = read_trace(tmp_path, progress=lambda share, text: seen.append((share, text())))
    assert ids(requests) == expected and seen == [(0.5, "reading  file 1/2"), (0.99, "reading  file 2/2")]
    assert ids(read_trace([tmp_path / "a.json", tmp_path / "below"])) == expected
    assert ids(read_trace(tmp_path, limit=2)) == expected[:2]
    assert (requests[0].keys()[:2] != requests[1].keys()).any(axis=1).all()


def test_mooncake_files_keep_the_order_of_their_lines(tmp_path):
    lines = [MOONCAKE | {"timestamp": time, "hash_ids": [time]} for time in (5, 3, 9)]
    first, second = (write(tmp_path / f"{name}.jsonl", *lines) for name in "ab")
    assert ids(read_trace(first)) == [[5], [3], [9]]
    merged = read_trace([first, second])
    assert [times for times in ids(merged) if times != [9]] == [[5], [3], [5], [3]]
    assert len({bytes(request.keys()[0]) for request in merged}) == 6


def test_a_single_mooncake_file_has_no_scope():
    keys = Request(0, 512, 1, np.array([7])).keys()
    assert (keys == Request(0, 512, 1, np.array([7]), scope=b"").keys()).all()


def test_ids_beyond_32_bits_are_told_apart_and_replayed(tmp_path):
    path = write(tmp_path / "t.jsonl", *[MOONCAKE | {"hash_ids": [2**40 + 1, value]} for value in (1, 2**32 + 1, 1)])
    result = replay(read_trace(path), ReplayOptions(block_bytes=4096, device="host", pool_blocks=16))
    assert (result.blocks_loaded, result.wrong_blocks) == (3, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "'block_size' must be a whole number of tokens, 1 to"),
        ({"block_size": None}, "'block_size' must be"),
        ({"requests": 3}, "'requests' must be a list, got int"),
        ({"requests": [7]}, r"requests\[0\]: a JSON object is expected"),
        ({"requests": [TURN, TURN | {"t": -1}]}, r"requests\[1\]: 't' must be a number of seconds"),
        ({"requests": [TURN | {"in": 1.5}]}, r"requests\[0\]: 'in' must be a whole number of tokens"),
        ({"requests": [TURN | {"out": "4"}]}, r"requests\[0\]: 'out' must be"),
        ({"requests": [{"t": 1, "hash_ids": []}]}, r"requests\[0\]: the field 'in' is missing"),
        (
            {"requests": [{"requests": [TURN | {"hash_ids": [1, "2"]}]}]},
            r"requests\[0\].requests\[0\]: 'hash_ids'\[1\]",
        ),
        ({"requests": []}, "holds no request"),
        ({"requests": [{"type": "subagent", "requests": []}]}, "holds no request"),
    ],
)
def test_a_malformed_conversation_is_refused_by_place(tmp_path, change, message):
    for indent in (None, 1):
        path = write(tmp_path / "bad.json", CONVERSATION | change, indent=indent)
        with pytest.raises(TraceError, match=rf"bad\.json.*{message}"):
            read_trace(path)


def test_a_line_that_is_no_conversation_is_refused_by_number(tmp_path):
    path = write(tmp_path / "c.jsonl", CONVERSATION, MOONCAKE)
    with pytest.raises(TraceError, match=r"c\.jsonl, line 2: an object with 'requests' is expected"):
        read_trace(path)


def test_an_object_cut_short_is_refused_by_name(tmp_path):
    path = write(tmp_path / "cut.json", CONVERSATION, indent=1)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(TraceError, match=r"cut\.json: not valid JSON"):
        read_trace(path)


def test_requests_nested_too_deeply_are_refused(tmp_path):
    path, depth = tmp_path / "deep.json", 50_000
    path.write_text('{"block_size": 64, "requests": [' + '{"requests": [' * depth + "]}" * depth + "]}")
    with pytest.raises(TraceError, match=r"deep\.json.*(nested too deeply|not valid JSON)"):
        read_trace(path)


def test_blocks_of_two_sizes_are_refused(tmp_path):
    write(tmp_path / "a.json", CONVERSATION)
    write(tmp_path / "b.jsonl", MOONCAKE)
    with pytest.raises(TraceError, match=r"b\.jsonl has blocks of 512 tokens, and .*a\.json of 64; replay them apart"):
        read_trace(tmp_path)


def test_a_folder_without_traces_is_refused(tmp_path):
    with pytest.raises(TraceError, match="holds no trace"):
        read_trace(tmp_path)
    with pytest.raises(TraceError, match="no trace was given"):
        read_trace([])


# ---- what a file says sizes no memory --------------------------------------------------------------------------------

ENDLESS = {  # what a file begins with, what comes then for ever, and what is said about it
    "spaces": (b"", b" ", "line 1 is longer than 1 MiB"),
    "a text": (b"\n\n" + json.dumps(MOONCAKE).encode() + b'\n{"chat": "', b"x", "line 4 is longer than 1 MiB"),
    "ids": (b'{"hash_ids": [1', b", 1", "line 1 is longer than 1 MiB"),
    "an object over many lines": (b'{\n"requests": [\n', b'{"requests": []},\n', "JSON text in .* longer than 1 MiB"),
    "an array over many lines": (b"[\n", b"[\n", "JSON text in .* longer than 1 MiB"),
    "blank lines": (b"", b"\n", "holds no request"),
    "blank lines with spaces": (b"\n \t", b" \r\n", "holds no request"),
    "blank lines in an object": (b"{", b"\n", "not valid JSON|holds no request"),
    "zeros": (b"", b"\0", "line 1 is longer than 1 MiB"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ENDLESS)
def test_a_file_without_an_end_is_read_in_little_memory(tmp_path, monkeypatch, name, packed):
    monkeypatch.setattr(files, "MOST_TEXT_BYTES", 1 << 20)
    begin, forever, message = ENDLESS[name]
    path = tmp_path / "t.jsonl"
    with (gzip.open if packed else open)(path, "wb") as file:
        file.write(begin + forever * ((40 << 20) // len(forever)))
    tracemalloc.start()
    try:
        with pytest.raises(TraceError, match=message):
            read_trace(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_lines_are_those_of_the_file_however_it_comes():
    rng = random.Random(5)
    for _ in range(300):
        text = b"".join(rng.choice([b"\n", b"\r\n", b" ", b"ab", b"{}", b"\n\n\n"]) for _ in range(rng.randrange(30)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
        chunks = [text[first:last] for first, last in itertools.pairwise([0, *cuts, len(text)]) if first < last]
        expected = [(n, line) for n, line in enumerate(text.split(b"\n"), 1) if line.strip()]
        assert list(files._numbered_lines(iter(chunks), "t")) == expected


def test_a_trace_from_a_pipe_is_read_up_to_its_limit():
    reading, writing = os.pipe()
    os.write(writing, 3 * (json.dumps(MOONCAKE).encode() + b"\n"))
    assert len(read_trace(f"/dev/fd/{reading}", limit=2)) == 2  # though whoever writes may go on
    os.close(writing)
    os.close(reading)


@pytest.mark.parametrize("whole", [False, True])
def test_requests_beyond_the_memory_are_refused(tmp_path, monkeypatch, whole):
    path = write(tmp_path / "t.json", *([CONVERSATION] if whole else 4 * [MOONCAKE]), indent=1 if whole else None)
    monkeypatch.setattr(files, "lacking_memory", lambda nbytes: ("available memory", 1 << 20))
    assert len(read_trace(path)) == 4  # few are not asked about
    monkeypatch.setattr(files, "STEP_BYTES", 3 * files.REQUEST_BYTES)
    message = r"t\.json.* do not fit into memory \(available memory leaves 1 MiB\); read fewer of them: --limit N"
    with pytest.raises(TraceError, match=message):
        read_trace(path)
    if not whole:
        assert len(read_trace(path, limit=2)) == 2


def test_corruptions_are_as_many_as_requests_at_the_most(tmp_path):
    path = write(tmp_path / "t.jsonl", *3 * [MOONCAKE])
    options = ReplayOptions(block_bytes=4096, device="host", pool_blocks=16, corrupt_slots=10**12)
    result = replay(read_trace(path), options)
    assert 1 <= result.corrupted_slots <= 3 and result.wrong_blocks >= 1


def test_a_file_shows_how_far_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    path, seen = write(tmp_path / "t.jsonl", *50 * [MOONCAKE]), []
    for packed in (False, True):
        if packed:
            path.write_bytes(gzip.compress(path.read_bytes()))
        read_trace(path, progress=lambda share, text: seen.append((share, text())))
        shares = [share for share, _ in seen]
        assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] == 0.99
        assert {text for _, text in seen} == {"reading"}
        seen.clear()
