"""Traces from files: which format a file has is read from its content, and several files become one trace."""

import gzip
import heapq
import itertools
import os
from pathlib import Path

from kvortex.replay.conversation import is_conversation, parse_conversation
from kvortex.replay.trace import TraceError, loads, parse_lines

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


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
        Called with the number of files read and the number of all, after each of several.

    Returns
    -------
    list of Request

    Raises
    ------
    TraceError
        A file cannot be read, holds no request, or is malformed; or the blocks of two files differ in size.
    """
    files = _files([paths] if isinstance(paths, (str, os.PathLike)) else list(paths))
    traces, block_size = [], None
    for number, path in enumerate(files):
        scope = str(number).encode() if len(files) > 1 else b""
        found = _read_file(path, scope, limit)
        for trace in found:
            if block_size is None:
                block_size = trace[0].tokens_per_block, path
            if block_size[0] != trace[0].tokens_per_block:
                raise TraceError(
                    f"{path} has blocks of {trace[0].tokens_per_block} tokens, and {block_size[1]} of {block_size[0]}; "
                    "replay them apart"
                )
        traces += found
        if progress is not None and len(files) > 1:
            progress(number + 1, len(files))
    merged = traces[0] if len(traces) == 1 else heapq.merge(*traces, key=lambda request: request.timestamp_ms)
    return list(itertools.islice(merged, limit))


def _files(paths):
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


def _read_file(path, scope, limit):
    """Return the traces of a file, none of them empty: one, or as many as it has conversations."""
    try:
        with open(path, "rb") as raw:
            packed = path.name.endswith(".gz") or raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(raw) if packed else raw as lines:
                found = _parse(lines, path, scope, limit)
    except (OSError, EOFError) as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from error
    found = [trace for trace in found if trace]
    if not found:
        raise TraceError(
            f"{path} holds no request; a trace has one JSON object a line (Mooncake), or is an object with 'requests' "
            "(kv-cache-tester)"
        )
    return found


def _parse(lines, path, scope, limit):
    head = []  # up to the first line that is not blank, by which the formats are told apart
    for line in lines:
        head.append(line)
        if line.strip():
            break
    else:
        return []
    try:
        first = loads(head[-1])
    except ValueError:  # one object over many lines, or nothing that we know
        if head[-1].strip() in (b"{", b"[") or head[-1].rstrip().endswith((b",", b"[", b"{")):
            return _parse_whole(b"".join([*head, *lines]), path, scope)
        first = None
    lines = itertools.chain(head, lines)
    if is_conversation(first):
        return [
            _conversation(_loaded(line, f"{path}, line {number}"), f"{path}, line {number}", scope + b".%d" % number)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    if isinstance(first, list) and all(map(is_conversation, first)):
        return _parse_whole(b"".join(lines), path, scope)
    requests = itertools.islice(parse_lines(lines, path, scope), limit)
    return [list(requests)]


def _parse_whole(text, path, scope):
    whole = _loaded(text, path)
    if not isinstance(whole, list):
        return [_conversation(whole, path, scope)]
    return [_conversation(fields, f"{path}, [{n}]", scope + b".%d" % n) for n, fields in enumerate(whole)]


def _loaded(text, where):
    try:
        return loads(text)
    except ValueError as error:
        raise TraceError(f"{where}: {error}") from None


def _conversation(fields, where, scope):
    if not is_conversation(fields):
        raise TraceError(f"{where}: an object with 'requests' is expected (kv-cache-tester), or one request a line")
    try:
        return parse_conversation(fields, scope)
    except ValueError as error:
        raise TraceError(f"{where}: {error}") from None
