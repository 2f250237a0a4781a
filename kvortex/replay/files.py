"""Traces from files: which format a file has is read from its content, and several files become one trace."""

import gzip
import heapq
import itertools
import os
import sys
import zlib
from pathlib import Path

from kvortex.arguments import whole_number
from kvortex.config import bytes_text
from kvortex.memory.limits import lacking_memory
from kvortex.replay.conversation import is_conversation, parse_conversation
from kvortex.replay.trace import TraceError, loads, parse_numbered

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
CHUNK_BYTES = 1 << 20
MOST_TEXT_BYTES = 128 << 20  # of one JSON text: a megabyte of gzip may hold a gigabyte of it
REQUEST_BYTES = 512  # a `Request` without its ids
STEP_BYTES = 64 << 20  # how much more of a trace is kept before the machine is asked for memory again


def read_trace(paths, limit=None, progress=None):
    """Read a trace from one or more files, in the Mooncake or the kv-cache-tester format, gzip-compressed or not.

    The requests of a Mooncake file keep the order of its lines. Several files, or conversations, are merged by their
    time stamps, as if all began at the same moment, and their ids do not meet.

    Parameters
    ----------
    paths : path-like or sequence of path-like
        A folder stands for every ``.json``, ``.jsonl``, ``.json.gz`` and ``.jsonl.gz`` file in and below it.
    limit : int, optional
        Stop after so many requests; later lines of a Mooncake file are not looked at.
    progress : callable, optional
        Called with the share that is read, 0 to 1, and a function that returns words for it; at each file, and each
        megabyte of a file whose length is known.

    Returns
    -------
    list of Request

    Raises
    ------
    TraceError
        A file cannot be read, holds no request, or is malformed; a JSON text in it is longer than 128 MiB, or its
        requests do not fit into memory; or the blocks of two files differ in size.
    """
    if limit is not None:
        limit = min(whole_number(limit, "limit"), sys.maxsize)
    files = trace_files([paths] if isinstance(paths, (str, os.PathLike)) else list(paths))
    traces, block_size, room = [], None, _Room()
    for number, path in enumerate(files):
        scope = str(number).encode() if len(files) > 1 else b""
        found = _read_file(path, scope, limit, room, _shares(progress, number, len(files)))
        for trace in found:
            if block_size is None:
                block_size = trace[0].tokens_per_block, path
            if block_size[0] != trace[0].tokens_per_block:
                raise TraceError(
                    f"{path} has blocks of {trace[0].tokens_per_block} tokens, and {block_size[1]} of {block_size[0]}; "
                    "replay them apart"
                )
        traces += found
    merged = traces[0] if len(traces) == 1 else heapq.merge(*traces, key=lambda request: request.timestamp_ms)
    return list(itertools.islice(merged, limit))


def trace_files(paths):
    """Return the files that paths name, folders searched; raise `TraceError` where there is none."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            if not below:
                raise TraceError(f"the folder {path} holds no trace: no {', '.join(SUFFIXES)} file in or below it")
            files += below
        else:
            files.append(path)
    if not files:
        raise TraceError("no trace was given")
    return files


def _shares(progress, number, count):
    """What tells how far the file `number` of so many is read."""

    def tell(share):
        if progress is not None:
            which = f"  file {number + 1:,}/{count:,}" if count > 1 else ""
            progress(min(0.99, (number + share) / count), lambda: f"reading{which}")

    return tell


class _Room:
    """Whether there is memory for what is kept of a trace."""

    def __init__(self):
        self._left = STEP_BYTES

    def take(self, request, path):
        """Return a request that is kept; raise `TraceError` where memory ends."""
        self._left -= REQUEST_BYTES + request.hash_ids.nbytes
        if self._left < 0:
            self._left = STEP_BYTES
            lacking = lacking_memory(2 * STEP_BYTES)
            if lacking is not None:
                what, free = lacking
                raise TraceError(
                    f"the requests of {path} do not fit into memory ({what} leaves {bytes_text(free)}); read fewer of "
                    "them: --limit N"
                )
        return request


def _read_file(path, scope, limit, room, tell):
    """Return the traces of a file, none of them empty: one, or as many as it has conversations."""
    try:
        with open(path, "rb") as raw:
            packed = path.name.endswith(".gz") or raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(raw) if packed else raw as file:
                found = _parse(_numbered_lines(_chunks(file, raw, tell), path), path, scope, limit, room)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from error
    found = [trace for trace in found if trace]
    if not found:
        raise TraceError(
            f"{path} holds no request; a trace has one JSON object a line (Mooncake), or is an object with 'requests' "
            "(kv-cache-tester)"
        )
    return found


def _chunks(file, raw, tell):
    size = os.fstat(raw.fileno()).st_size  # 0 for a pipe
    while chunk := file.read1(CHUNK_BYTES):
        tell(raw.tell() / size if size else 0)
        yield chunk


def _numbered_lines(chunks, path):
    """Yield number and text of each line that is not blank; blank lines are kept nowhere, and none is too long."""
    number, rest = 1, bytearray()
    for chunk in chunks:
        lines, newline, tail = chunk.rpartition(b"\n")
        if newline:
            if not lines.strip() and not rest.strip():  # at once: there may be billions
                number += lines.count(b"\n") + 1
            else:
                for line in (bytes(rest) + lines).split(b"\n"):
                    if line.strip():
                        yield number, line
                    number += 1
            rest.clear()
        rest += tail
        _require_length(rest, f"{path}, line {number}")
    if rest.strip():
        yield number, bytes(rest)


def _require_length(text, where):
    if len(text) > MOST_TEXT_BYTES:
        raise TraceError(
            f"{where} is longer than {bytes_text(MOST_TEXT_BYTES)}; write one request (Mooncake) or one conversation "
            "(kv-cache-tester) a line"
        )


def _parse(lines, path, scope, limit, room):
    head = next(lines, None)  # the first line that is not blank tells the formats apart
    if head is None:
        return []
    lines, text = itertools.chain([head], lines), head[1].strip()
    try:
        first = loads(text)
    except ValueError:  # one object over many lines, or nothing that we know
        if text in (b"{", b"[") or text.endswith((b",", b"[", b"{")):
            return _parse_whole(lines, path, scope, room)
        first = None
    if is_conversation(first):
        places = ((number, line, f"{path}, line {number}") for number, line in lines)
        return [_conversation(_loaded(line, at), at, scope + b".%d" % number, room) for number, line, at in places]
    if isinstance(first, list) and all(map(is_conversation, first)):
        return _parse_whole(lines, path, scope, room)
    return [[room.take(request, path) for request in itertools.islice(parse_numbered(lines, path, scope), limit)]]


def _parse_whole(lines, path, scope, room):
    text = bytearray()
    for _, line in lines:
        text += line
        text += b"\n"
        _require_length(text, f"the JSON text in {path}")
    whole = _loaded(text, path)
    if not isinstance(whole, list):
        return [_conversation(whole, path, scope, room)]
    return [_conversation(fields, f"{path}, [{n}]", scope + b".%d" % n, room) for n, fields in enumerate(whole)]


def _loaded(text, where):
    try:
        return loads(text)
    except ValueError as error:
        raise TraceError(f"{where}: {error}") from None


def _conversation(fields, where, scope, room):
    if not is_conversation(fields):
        raise TraceError(f"{where}: an object with 'requests' is expected (kv-cache-tester), or one request a line")
    try:
        return [room.take(request, where) for request in parse_conversation(fields, scope)]
    except TraceError:
        raise
    except ValueError as error:
        raise TraceError(f"{where}: {error}") from None
