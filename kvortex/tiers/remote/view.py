"""The view of a server: which blocks it is believed to have. A thread of its own asks, so that nobody waits for that.

What the view says may be wrong: the server evicts, and others write. A block that is not there any more is a miss when
it is read; one that came meanwhile is found when what was said of it has aged.
"""

import threading
import time
from collections import OrderedDict, deque

import numpy as np

from kvortex.index import NO_SLOT, ReserveStatus
from kvortex.tiers._record import HEADER_BYTES

MOST_QUESTIONS = 256  # that wait: beyond, nothing is asked, and what is not known is a miss
MOST_ABSENT = 1 << 18  # keys


class Question:
    """Keys that a server is asked for; `is_over` once the view has the answer, or never will: then it `has_failed`."""

    def __init__(self, keys, tag):
        self.keys, self.tag, self.is_over, self.has_failed = keys, tag, False, False


class View:
    """Parameters
    ----------
    store : RemoteStore
        Whose client is asked.
    catalogue : BlockIndex
        Of what is believed to be there; the least recently used is forgotten first.
    tag : bytes
    negative_ttl_s : float
        How long a block that was not there counts as missing before it is asked for again.
    """

    def __init__(self, store, catalogue, tag, negative_ttl_s):
        self.store, self.catalogue, self.tag, self._ttl_s = store, catalogue, tag, negative_ttl_s
        self.num_scanned = self.num_adopted = 0  # blocks that were asked for, that were there
        self.last_error = None
        self._lock = threading.Condition()
        self._absent = OrderedDict()  # key: until when it counts as missing
        self._questions, self._is_closed = deque(), False
        self._thread = threading.Thread(target=self._run, name="kvortex-remote-view", daemon=True)
        self._thread.start()

    is_over = True  # there is no scan after which everything would be known

    def ask(self, keys):
        """Ask for what is not known of these keys, which are a chain; None where all is, or nobody can be asked."""
        now_s = time.monotonic()
        known = self.catalogue.slots_of(keys) != NO_SLOT
        with self._lock:
            first = int(np.argmin(np.append(known, False)))
            if first == len(keys) or self._absent.get(keys[first].tobytes(), 0) > now_s:
                return None  # what comes behind a missing block is of no use
            if self._is_closed or len(self._questions) >= MOST_QUESTIONS:
                return None
            question = Question(keys[first:][~known[first:]], self.tag)
            self._questions.append(question)
            self._lock.notify()
        return question

    def forget(self, keys):
        """The server does not have these."""
        with self._lock:
            self._mark_absent(keys)
        self.catalogue.discard(keys)

    def clear(self, tag):
        """Believe nothing any more; what is asked for from now on has another tag."""
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
        """Whether what was discarded is being removed: at once, here."""
        return True

    def _run(self):
        while True:
            with self._lock:
                while not self._questions and not self._is_closed:
                    self._lock.wait()
                if self._is_closed:
                    return
                question = self._questions.popleft()
            try:
                self._answer(question)
            except Exception as error:  # of the client, whatever it was: nothing is known, and the next one asks again
                self.last_error, question.has_failed = f"{type(error).__name__}: {error}"[:500], True
            question.is_over = True
            self.store.signal()

    def _answer(self, question):
        keys = question.keys
        sizes = self.store.client.sizes(self.store.names_of(keys, question.tag))
        lengths = np.array(sizes, np.int64) - HEADER_BYTES
        is_there = (lengths > 0) & (lengths <= self.store.payload_bytes)
        self.num_scanned += len(keys)
        self.num_adopted += int(is_there.sum())
        with self._lock:
            if question.tag != self.tag:
                return
            self._mark_absent(keys[~is_there])
            self._note(keys[is_there], lengths[is_there].astype(np.uint32))

    def _note(self, keys, lengths):
        """The server has these; the head of the chain is to be forgotten last."""
        if not len(keys):
            return
        slots, statuses = self.catalogue.reserve(np.ascontiguousarray(keys[::-1]), lengths[::-1])
        self.catalogue.commit(slots[statuses == ReserveStatus.NEW])

    def _mark_absent(self, keys):
        until_s = time.monotonic() + self._ttl_s
        for key in keys if self._ttl_s else ():
            self._absent[key.tobytes()] = until_s
        while len(self._absent) > MOST_ABSENT:
            self._absent.popitem(last=False)
