"""Request traces in the Mooncake format: one JSON object a line, one hash id per 512 tokens of the prompt."""

import gzip
import itertools
import json
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

TOKENS_PER_ID = 512
MAX_ID = 2**63 - 1  # ids travel as int64


class TraceError(ValueError):
    """A trace cannot be read; the message names the file and, where it is one line, its number."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of a trace.

    Attributes
    ----------
    timestamp_ms : float
        When the request arrived. Replay keeps the order of the lines and does not wait for it.
    input_length, output_length : int
        Tokens.
    hash_ids : numpy.ndarray
        ``(n,)`` int64; an id names 512 tokens of the prompt and everything before them.
    """

    timestamp_ms: float
    input_length: int
    output_length: int
    hash_ids: np.ndarray

    def tokens(self, num_blocks):
        """Tokens in the first `num_blocks` blocks: the last block of a prompt may be partly filled."""
        return min(num_blocks * TOKENS_PER_ID, self.input_length)


def sample_path():
    """Path of the trace that comes with the package."""
    return files("kvortex") / "data" / "sample_trace.jsonl.gz"


def read_trace(path, limit=None):
    """Read a trace file, gzip-compressed if its name ends in ``.gz``.

    Parameters
    ----------
    path : path-like
    limit : int, optional
        Stop after so many requests; later lines are not looked at.

    Returns
    -------
    list of Request

    Raises
    ------
    TraceError
        The file cannot be read, holds no request, or a line is malformed.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as lines:
            requests = list(itertools.islice(parse_lines(lines, path), limit))
    except (OSError, EOFError) as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from error
    if not requests:
        raise TraceError(f"{path} holds no request; a trace has one JSON object a line")
    return requests


def parse_lines(lines, name="trace"):
    """Yield a `Request` per non-blank line; raise `TraceError` with name and number of the first malformed one."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _parse(line)
            except ValueError as error:
                raise TraceError(f"{name}, line {number}: {error}") from None


def _parse(line):
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object is expected, got {_shown(fields)}")
    for name in ("timestamp", "input_length", "output_length", "hash_ids"):
        if name not in fields:
            raise ValueError(f"the field {name!r} is missing")
    timestamp = fields["timestamp"]
    if isinstance(timestamp, bool) or not isinstance(timestamp, (int, float)) or not 0 <= timestamp < float("inf"):
        raise ValueError(f"'timestamp' must be a number of milliseconds, 0 or more, got {_shown(timestamp)}")
    for name in ("input_length", "output_length"):
        if not _is_int(fields[name], 2**31 - 1):
            raise ValueError(f"{name!r} must be a whole number of tokens, 0 to 2**31 - 1, got {_shown(fields[name])}")
    ids = fields["hash_ids"]
    if not isinstance(ids, list):
        raise ValueError(f"'hash_ids' must be a list, got {_shown(ids)}")
    for position, value in enumerate(ids):
        if not _is_int(value, MAX_ID):
            raise ValueError(f"'hash_ids'[{position}] must be a whole number, 0 to {MAX_ID}, got {_shown(value)}")
    if len(ids) > -(-fields["input_length"] // TOKENS_PER_ID):
        raise ValueError(
            f"'hash_ids' has {len(ids)} ids of {TOKENS_PER_ID} tokens for an 'input_length' of "
            f"{fields['input_length']}; at most {-(-fields['input_length'] // TOKENS_PER_ID)} fit"
        )
    return Request(timestamp, fields["input_length"], fields["output_length"], np.array(ids, dtype=np.int64))


def _is_int(value, most):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _shown(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
