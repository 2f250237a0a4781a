"""Traces of the kv-cache-tester: a JSON object for each conversation, with those of its sub-agents nested in it.

    {"block_size": 64, "requests": [{"t": 0.0, "in": 130, "out": 20, "hash_ids": [1, 2]},
                                    {"t": 2.5, "type": "subagent", "requests": [{"t": 2.6, "in": 70, ...}]}]}

``t`` counts seconds from the start of the conversation, in nested requests too. Ids are local to the conversation,
sub-agents included, unless ``hash_id_scope`` is ``"global"``. A request without ids, which the recorder could not look
into, counts its tokens only. Whatever else is in an object is passed over.
"""

import numpy as np

from kvortex.replay.trace import Request, count, hash_ids, number

GLOBAL_SCOPE = b"global"


def is_conversation(fields):
    """Tell whether a JSON value is an object of this format."""
    return isinstance(fields, dict) and "requests" in fields


def parse_conversation(fields, scope):
    """Return the requests of a conversation, those of its sub-agents among them, in order of time.

    Parameters
    ----------
    fields : dict
    scope : bytes
        Of ids that are local.

    Raises
    ------
    ValueError
        A field is missing or not what it should be; the message says which, and of which request.
    """
    if fields.get("hash_id_scope") == "global":
        scope = GLOBAL_SCOPE
    try:
        found = list(_requests(fields, count(fields, "block_size", least=1), scope, ""))
    except RecursionError:
        raise ValueError("requests are nested too deeply") from None
    return sorted(found, key=lambda request: request.timestamp_ms)  # stable: requests of one moment keep their order


def _requests(fields, block_size, scope, where):
    entries = fields["requests"]
    if not isinstance(entries, list):
        raise ValueError(f"{where}'requests' must be a list, got {type(entries).__name__}")
    for position, entry in enumerate(entries):
        here = f"{where}requests[{position}]"
        if is_conversation(entry):
            yield from _requests(entry, block_size, scope, here + ".")
            continue
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"a JSON object is expected, got {type(entry).__name__}")
            yield Request(
                1000 * number(entry, "t", "seconds"),
                count(entry, "in"),
                count(entry, "out") if "out" in entry else 0,
                hash_ids(entry) if entry.get("hash_ids") is not None else np.empty(0, np.int64),
                block_size,
                scope,
            )
        except ValueError as error:
            raise ValueError(f"{here}: {error}") from None
