"""The view of a server: the names of blocks there, and which blocks it probably has.

A thread of the view asks the server, so that no other thread waits. The view may be wrong, because the server evicts
and others write. If a block is not there any more, reading it is a miss. If a block was absent and others wrote it, it
is found when the answer about it has expired.
"""

import hashlib
import threading
import time
from collections import OrderedDict, deque
from typing import NamedTuple

import numpy as np

from kvortex.index import NO_SLOT, ReserveStatus
from kvortex.keys import persistent_names
from kvortex.tiers._record import HEADER_BYTES

MOST_QUESTIONS = 256  # that wait; beyond that, the oldest are dropped, and their blocks are misses
MOST_ABSENT = 1 << 18  # keys


class Names:
    """The names of one rank's blocks on a server.

    Parameters
    ----------
    namespace : bytes
        32 bytes that name the model as loaded.
    rank : int
    name_format : str
        ``{name}`` stands for the 64 hexadecimal digits of a block.
    """

    def __init__(self, namespace, rank, name_format):
        self.namespace, self.rank, self.name_format = namespace, rank, name_format

    def of(self, keys, tag, counts=1):
        """The names of these keys, (n, 32) uint8, under a tag of weights; `counts`: records in each value."""
        names, counts = np.zeros((len(keys), 32), np.uint8), np.broadcast_to(counts, len(keys))
        for count in np.unique(counts).tolist():
            rows = counts == count
            names[rows] = persistent_names(np.ascontiguousarray(keys[rows]), self._space_of(count), self.rank, tag)
        return [self.name_format.format(name=bytes(row).hex()) for row in names]

    def _space_of(self, count):
        """The namespace of objects of `count` records: each number has its own."""
        return self.namespace if count == 1 else hashlib.sha256(self.namespace + b"%d blocks" % count).digest()


class Objects(NamedTuple):
    """For each block, a row that says in which object it is."""

    keys: np.ndarray  # (n, 32) uint8: key of the object's last block, which names the object
    places: np.ndarray  # number of the block's record in the object
    counts: np.ndarray  # records in the object


def objects_of(blocks):
    """The `Objects` of blocks (n, count, 32) uint8, of which each row makes an object."""
    n, count = blocks.shape[:2]
    return Objects(
        np.repeat(blocks[:, -1], count, axis=0), np.tile(np.arange(count, dtype=np.uint8), n),
        np.full(n * count, count, np.uint16),
    )  # fmt: skip


class Question:
    """Objects that a server is asked for, by the keys (n, count, 32) of their blocks. `is_over`: the view has the
    answer, or, if it `has_failed`, will never have it.
    """

    def __init__(self, blocks, tag, is_chain):
        self.blocks, self.tag, self.is_chain, self.is_over, self.has_failed = blocks, tag, is_chain, False, False


class View:
    """Keep a catalogue of what a server probably has, and ask the server about what is not known.

    No method waits for the server.

    Parameters
    ----------
    client : Client
    names : Names
        Names of the rank that is asked about in place of all ranks.
    payload_bytes : int
        Length of the longest block.
    catalogue : BlockIndex
        Of the blocks that are probably there; the least recently used one is forgotten first.
    tag : bytes
    negative_ttl_s : float
        How long a block that was not there counts as missing before it is asked for again.
    answered : callable, optional
        Called after each answer, by the thread of the view.
    alike : bool, default False
        Whether all blocks count as `payload_bytes` long, whatever their length in this rank.
    noted : callable, optional
        Called with slots of the catalogue and the `Objects` of their blocks, before lookups find these blocks.
    """

    def __init__(self, client, names, payload_bytes, catalogue, tag, negative_ttl_s, answered=None, alike=False,
                 noted=None):  # fmt: skip
        self._noted = noted
        self.client, self.names, self.catalogue, self.tag = client, names, catalogue, tag
        self._payload_bytes, self._ttl_s, self._answered, self._alike = payload_bytes, negative_ttl_s, answered, alike
        self.num_scanned = self.num_adopted = 0  # blocks that were asked for; blocks that were there
        self.last_error = None
        self._lock = threading.Condition()
        self._absent = OrderedDict()  # key -> until when it counts as missing
        self._questions, self._is_closed = deque(), False
        self.thread = threading.Thread(target=self._run, name="kvortex-remote-view", daemon=True)
        self.thread.start()

    is_over = True  # as of a scan: a server is never scanned

    def ask(self, keys, *, is_chain=True, count=1):
        """Ask about the unknown ones of these keys; None if all are known, or the view is closed.

        Of a chain, a block is of use only if the one before it is there. `count` keys are an object, named by the last.
        """
        now_s, blocks = time.monotonic(), keys.reshape(-1, count, 32)
        unknown = (self.catalogue.slots_of(keys) == NO_SLOT).reshape(-1, count).any(axis=1)
        with self._lock:
            for i in np.flatnonzero(unknown):
                if self._absent.get(blocks[i, -1].tobytes(), 0) > now_s:
                    unknown[i:] &= not is_chain
                    unknown[i] = False
                if is_chain:
                    break  # of the blocks behind it nothing is known, either
            if not unknown.any() or self._is_closed:
                return None
            question = Question(blocks[unknown], self.tag, is_chain)
            self._questions.append(question)
            if len(self._questions) > MOST_QUESTIONS:
                self._questions.popleft().is_over = True
            self._lock.notify()
        return question

    def forget(self, keys):
        """Note that the server does not have these."""
        with self._lock:
            self._mark_absent(keys)
        self.catalogue.discard(keys)

    def clear(self, tag):
        """Forget all answers, and ask under another tag from now on."""
        with self._lock:
            self.tag = tag
            self._absent.clear()

    def stop(self):
        """Ask nothing more. Does not wait for a server."""
        with self._lock:
            self._is_closed = True
            for question in self._questions:
                question.is_over = True
            self._questions.clear()
            self._lock.notify()

    def wait_forgotten(self, timeout_ms=None):
        """Whether discarded blocks are removed: here that begins at once."""
        return True

    def _run(self):
        while True:
            with self._lock:
                while not self._questions and not self._is_closed:
                    self._lock.wait()
                if self._is_closed:
                    return
                question = self._questions.pop()  # the newest: earlier readers may not wait any more
            try:
                self._answer(question)
            except Exception as error:  # any error of the client: the next question asks again
                self.last_error, question.has_failed = f"{type(error).__name__}: {error}"[:500], True
            question.is_over = True
            if self._answered is not None:
                self._answered()

    def _answer(self, question):
        blocks, count = question.blocks, question.blocks.shape[1]
        keys = np.ascontiguousarray(blocks[:, -1])
        sizes = np.array(self.client.sizes(self.names.of(keys, question.tag, count), question.is_chain), np.int64)
        lengths = sizes // count - HEADER_BYTES
        is_there = (lengths > 0) & (lengths <= self._payload_bytes) & (sizes % count == 0)
        if self._alike:
            lengths[is_there] = self._payload_bytes
        self.num_scanned += len(keys) * count
        self.num_adopted += int(is_there.sum()) * count
        with self._lock:
            if question.tag != self.tag:
                return
            self._mark_absent(keys[~is_there])
            self._note(blocks[is_there], lengths[is_there].astype(np.uint32))

    def _note(self, blocks, lengths):
        """Note that the server has these. The head of the chain gets room first, and is forgotten last."""
        if not len(blocks):
            return
        keys = np.ascontiguousarray(blocks).reshape(-1, 32)
        slots, statuses = self.catalogue.reserve(keys, np.repeat(lengths, blocks.shape[1]))
        is_new = statuses == ReserveStatus.NEW
        if self._noted is not None:
            self._noted(slots[is_new], Objects(*(each[is_new] for each in objects_of(blocks))))
        self.catalogue.commit(slots[is_new])
        self.catalogue.touch(keys)

    def _mark_absent(self, keys):
        until_s = time.monotonic() + self._ttl_s
        for key in keys if self._ttl_s else ():
            self._absent[key.tobytes()] = until_s
        while len(self._absent) > MOST_ABSENT:
            self._absent.popitem(last=False)
