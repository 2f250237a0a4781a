"""A request, and the lines of a trace in the Mooncake format: one JSON object each, one hash id per 512 tokens."""

import json
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from kvortex import block_keys

TOKENS_PER_ID = 512
MAX_ID = 2**63 - 1  # ids travel as int64


class TraceError(ValueError):
    """A trace cannot be read; the message names the file and, where it is one line, its number."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace.

    Attributes
    ----------
    timestamp_ms : float
        When the request arrived. Replay does not wait for it.
    input_length, output_length : int
        Tokens.
    hash_ids : numpy.ndarray
        ``(n,)`` int64; an id names one block of the prompt.
    tokens_per_block : int
    scope : bytes
        What the ids are local to: equal ids of different scopes are different blocks.
    """

    timestamp_ms: float
    input_length: int
    output_length: int
    hash_ids: np.ndarray
    tokens_per_block: int = TOKENS_PER_ID
    scope: bytes = b""

    def tokens(self, num_blocks):
        """Tokens in the first `num_blocks` blocks: the last block of a prompt may be partly filled."""
        return min(num_blocks * self.tokens_per_block, self.input_length)

    def keys(self):
        """Keys of the blocks, ``(n, 32)`` uint8, each made of its id, all ids before it, and the scope."""
        halves = np.ascontiguousarray(self.hash_ids).view(np.uint32)  # an id may be larger than a token id
        return block_keys(halves, block_size=2, salt=self.scope)


def sample_path():
    """Path of the trace that comes with the package."""
    return files("kvortex") / "data" / "sample_trace.jsonl.gz"


def parse_lines(lines, name="trace", scope=b""):
    """Yield a `Request` per non-blank line; raise `TraceError` with name and number of the first malformed one."""
    return parse_numbered(((number, line) for number, line in enumerate(lines, 1) if line.strip()), name, scope)


def parse_numbered(lines, name, scope):
    """The same for pairs of number and line, none of them blank."""
    for number, line in lines:
        try:
            yield _parse(line, scope)
        except ValueError as error:
            raise TraceError(f"{name}, line {number}: {error}") from None


def _parse(line, scope):
    fields = loads(line)
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object is expected, got {_shown(fields)}")
    timestamp = number(fields, "timestamp", "milliseconds")
    for name in ("input_length", "output_length"):
        count(fields, name)
    ids = hash_ids(fields)
    if len(ids) > -(-fields["input_length"] // TOKENS_PER_ID):
        raise ValueError(
            f"'hash_ids' has {len(ids)} ids of {TOKENS_PER_ID} tokens for an 'input_length' of "
            f"{fields['input_length']}; at most {-(-fields['input_length'] // TOKENS_PER_ID)} fit"
        )
    return Request(timestamp, fields["input_length"], fields["output_length"], ids, scope=scope)


# --- Checked fields of an object; all raise ValueError ----------------------------------------------------------------


def loads(text):
    """Parse JSON; Ctrl-C ends it, however long the text."""
    try:
        return json.loads(text, object_hook=_same)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _same(fields):
    """Python code for each object, since the parser itself hears no signal."""
    return fields


def number(fields, name, unit):
    """A number that is not negative."""
    value = _field(fields, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name!r} must be a number of {unit}, 0 or more, got {_shown(value)}")
    return value


def count(fields, name, least=0):
    """A number of tokens."""
    value = _field(fields, name)
    if not _is_int(value, 2**31 - 1) or value < least:
        raise ValueError(f"{name!r} must be a whole number of tokens, {least} to 2**31 - 1, got {_shown(value)}")
    return value


def hash_ids(fields):
    """The ids as an int64 array."""
    ids = _field(fields, "hash_ids")
    if not isinstance(ids, list):
        raise ValueError(f"'hash_ids' must be a list, got {_shown(ids)}")
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) <= MAX_ID)):
        return np.array(ids, dtype=np.int64)
    position, value = next((position, value) for position, value in enumerate(ids) if not _is_int(value, MAX_ID))
    raise ValueError(f"'hash_ids'[{position}] must be a whole number, 0 to {MAX_ID}, got {_shown(value)}")


def _field(fields, name):
    if name not in fields:
        raise ValueError(f"the field {name!r} is missing")
    return fields[name]


def _is_int(value, most):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _shown(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
