"""A store on a server: the value of a block is its record, the header page and the payload.

A block is found by its name, which follows from the model, the rank, the weights and the key. A tier slot is a place in
the catalogue only: nothing on the server belongs to it. Several blocks may share a value, an object: their records lie
there one after the other, and each is verified for itself.
"""

import contextlib
import logging
import os
import threading
import time
from collections import Counter, deque

import numpy as np

from kvortex.arguments import whole_number
from kvortex.errors import ConfigError, EngineClosed
from kvortex.log import log, warn_once
from kvortex.tiers._record import HEADER_BYTES, check_record, read_header, write_record
from kvortex.tiers.base import BlockStatus
from kvortex.tiers.remote.view import Names

MOST_UNERASED = 1 << 16  # names
VERBS = ("put", "get", "erase", "scan")
OK, MISSING, LATE, DROPPED, IO_ERROR, PENDING = map(int, (  # numpy takes microseconds to compare with the enum's
    BlockStatus.OK, BlockStatus.MISSING, BlockStatus.LATE, BlockStatus.DROPPED, BlockStatus.IO_ERROR,
    BlockStatus.PENDING,
))  # fmt: skip
# After a read: it is not there, was not read, or is another's of another length; what lies there may be right.
NOT_TO_BE_ERASED = (MISSING, LATE, IO_ERROR, BlockStatus.LENGTH_DIFFERS)


class RemoteBatch:
    """Blocks that were given in one call; the contract is `kvortex.tiers.base.Batch`."""

    def __init__(self, verb, n, timeout_ms, changed):
        self.verb, self._changed = verb, changed  # a condition, of the store
        self.begun_s = time.monotonic()
        self.deadline_s = float("inf") if timeout_ms is None else self.begun_s + timeout_ms / 1000
        self._statuses, self._num_out, self._ended_s = np.full(n, PENDING, np.uint8), n, self.begun_s
        self.keys = np.zeros((n, 32), np.uint8)
        self.lengths, self.groups = np.zeros(n, np.uint32), np.zeros(n, np.uint32)

    @property
    def statuses(self):
        with self._changed:
            self._settle()
            return self._statuses.copy()

    @property
    def seconds(self):
        return self._ended_s - self.begun_s if self.done() else None

    def wait(self, timeout_ms=None):
        until_s = float("inf") if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        with self._changed:
            while (self._statuses == PENDING).any():
                now_s = time.monotonic()
                self._settle()
                if now_s >= min(until_s, self.deadline_s):
                    break
                self._changed.wait(min(until_s, self.deadline_s, now_s + 1) - now_s)
        return self.statuses

    def done(self):
        return not self._num_out

    def drop(self):
        """Nothing of it will be done, and nobody else knows of it."""
        self._changed, self._num_out = threading.Condition(), 0
        self._statuses[:] = DROPPED

    def _settle(self):
        """What has no status by its deadline is late. The lock is held."""
        if time.monotonic() >= self.deadline_s:
            self._statuses[self._statuses == PENDING] = LATE

    def _answer(self, i, status):
        """The I/O of a block is over, if it was begun at all; return the status that counts. The lock is held."""
        self._settle()
        if self._statuses[i] == PENDING:
            self._statuses[i] = status
        self._num_out -= 1
        self._ended_s = time.monotonic()
        return self._statuses[i]


class Operation:
    """One value on its way, with one block of a batch, or several."""

    __slots__ = ("batch", "numbers", "name", "slot", "pool_slots", "keys", "length", "tag", "group", "places", "count")

    def __init__(self, batch, numbers, name, slot, pool_slots=(), keys=(), length=0, tag=None, group=0, places=(0,),
                 count=1):  # fmt: skip
        self.batch, self.numbers, self.name, self.slot = batch, numbers, name, slot  # no slot where blocks share a name
        self.pool_slots, self.keys, self.length, self.tag, self.group = pool_slots, keys, length, tag, group
        self.places, self.count = places, count


class RemoteStore:
    """Blocks of one rank on a server, moved by threads.

    The contract is `kvortex.tiers.base.Store`, but for two things: a slot holds what this store put into it or got from
    it, so `scan` finds nothing of an earlier process; and a block that another slot was asked for is MISSING.

    With `objects`, blocks of one length share values. Then their slots stand for nothing, and `delete` removes them. A
    put needs every block of its objects, a get any of them; a record that is not right is the block's alone.

    Parameters
    ----------
    pool : PinnedPool
        With a header page before each payload.
    client : Client
        Closed with this.
    namespace : bytes
        32 bytes that name the model as loaded.
    num_slots : int
        Blocks that can be known at once.
    rank : int, default 0
    name_format : str
        What blocks are called on the server, with ``{name}`` for 64 hexadecimal digits of their own.
    num_threads, queue_blocks : int
        Blocks in flight, 1 to 256; blocks that may wait: what comes beyond is DROPPED.
    """

    def __init__(
        self, pool, client, *, namespace, num_slots, rank=0, name_format="{name}", num_threads=8, queue_blocks=4096
    ):
        if pool.header_bytes != HEADER_BYTES:
            raise ConfigError(f"a pool above a tier needs header_bytes={HEADER_BYTES}, got {pool.header_bytes}")
        self.pool, self.client, self.num_slots, self.payload_bytes = pool, client, num_slots, pool.payload_bytes
        self.names, self._queue_blocks = Names(namespace, rank, name_format), queue_blocks
        self._memory, self._pid = memoryview(pool), os.getpid()  # it keeps the mapping while a client may write to it
        lock = threading.Lock()
        self._changed, self._given = threading.Condition(lock), threading.Condition(lock)  # for callers; for threads
        self._waiting = deque()  # operations that a thread may take
        self._behind = {}  # by name: operations that wait for the one before them
        self._lying = {}  # by slot: the name of what may lie there
        self._unerased = {}  # names of what the server did not remove: not read, and removed with the next flush
        self._num_waiting = self._num_running = self._most_waiting = 0
        self._is_closed, self._event_fd = False, None
        self._counts = {verb: Counter() for verb in VERBS}
        self._bytes = Counter()
        self._last_error = None
        self.threads = [  # who uses the client: it is closed when all have ended
            threading.Thread(target=self._work, name=f"kvortex-remote-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self.threads:
            thread.start()

    # ---- verbs ------------------------------------------------------------------------------------------------------

    def put(self, slots, pool_slots, keys, lengths, *, tag, group=0, timeout_ms, objects=None):
        return self._begin("put", slots, pool_slots, keys, lengths, tag, timeout_ms, group, objects)

    def get(self, slots, pool_slots, keys, lengths, *, tag, timeout_ms, objects=None):
        return self._begin("get", slots, pool_slots, keys, lengths, tag, timeout_ms, objects=objects)

    def erase(self, slots, *, timeout_ms):
        """Remove what was put into these slots, or got from them, from the server."""
        slots = self._slots_of(slots)
        with self._changed:
            names = [self._lying.pop(slot, None) for slot in slots]
        return self._begin_named("erase", slots, names, timeout_ms)

    def delete(self, keys, tag, *, timeout_ms, counts=1):
        """Remove blocks from the server, or objects of so many records, whether or not a slot has them."""
        return self._begin_named("erase", [None] * len(keys), self.names.of(keys, tag, counts), timeout_ms)

    def disown(self, slots=None):
        """These slots, or all, stand for nothing on the server any more: what it has stays there."""
        with self._changed:
            for slot in list(self._lying) if slots is None else self._slots_of(slots):
                self._lying.pop(slot, None)

    def scan(self, slots, *, tag, timeout_ms):
        slots = self._slots_of(slots)
        with self._changed:
            names = [self._lying.get(slot) for slot in slots]
        return self._begin_named("scan", slots, names, timeout_ms, tag)

    def flush(self, timeout_ms, *, durable=True):
        self._require_open()
        until_s = float("inf") if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        with self._changed:
            again = [name for name in self._unerased if name not in self._behind]
        self._begin_named("erase", [None] * len(again), again, None)
        with self._changed:
            while left := self._num_waiting + self._num_running:
                now_s = time.monotonic()
                if now_s >= until_s or self._is_closed:
                    break
                self._changed.wait(min(until_s, now_s + 1) - now_s)
            return left + len(self._unerased)

    def notify(self, event_fd):
        with self._changed:
            self._event_fd = event_fd

    def signal(self):
        """Write to the eventfd, if there is one."""
        with self._changed:
            if self._event_fd is not None:
                os.eventfd_write(self._event_fd, 1)

    def stats(self):
        """A dict: per verb how many blocks were answered what; waiting, running, bytes, and the last error."""
        with self._changed:
            counts = {verb: {BlockStatus(status).name: n for status, n in self._counts[verb].items()} for verb in VERBS}
            return counts | {
                "waiting": self._num_waiting,
                "running": self._num_running,
                "most_waiting": self._most_waiting,
                "bytes_written": self._bytes["put"],
                "bytes_read": self._bytes["get"],
                "read_only": None,
                "last_error": self._last_error,
                "io": type(self.client).__name__,
                "io_reason": None,
            }

    def close(self, timeout_ms=5000):
        if os.getpid() != self._pid:
            return
        until_s = time.monotonic() + timeout_ms / 1000
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            for operation in [*self._waiting, *(each for row in self._behind.values() for each in row)]:
                for number in operation.numbers:
                    self._counts[operation.batch.verb][operation.batch._answer(number, DROPPED)] += 1
            self._num_waiting = 0
            self._waiting.clear()
            self._behind.clear()
            self._given.notify_all()
            self._changed.notify_all()
        for thread in self.threads:
            thread.join(max(0, until_s - time.monotonic()))
        if any(thread.is_alive() for thread in self.threads):
            log(logging.WARNING, "remote_hangs", "a server does not answer; its client stays open", tier=repr(self))
            return  # it may still write into the pool, whose memory it keeps
        self.client.close()
        with contextlib.suppress(BufferError):  # a client still has a view
            self._memory.release()

    def __repr__(self):
        return f"{type(self).__name__}({type(self.client).__name__}, {self.num_slots} slots)"

    # ---- beginning --------------------------------------------------------------------------------------------------

    def _require_open(self):
        if self._is_closed:
            raise EngineClosed("the store is closed")

    def _slots_of(self, slots, num_slots=None, name="slots"):
        num_slots = self.num_slots if num_slots is None else num_slots
        slots = [whole_number(slot, name) for slot in np.asarray(slots).tolist()]
        for slot in slots:
            if not 0 <= slot < num_slots:
                raise ValueError(f"{name} must be 0 to {num_slots - 1}, got {slot}")
        return slots

    def _begin(self, verb, slots, pool_slots, keys, lengths, tag, timeout_ms, group=0, objects=None):
        self._require_open()
        slots = self._slots_of(slots)
        pool_slots = self._slots_of(pool_slots, self.pool.num_slots, "pool_slots")
        n = len(slots)
        lengths = np.full(n, lengths) if np.ndim(lengths) == 0 else np.asarray(lengths)
        lengths = [whole_number(length, "lengths") for length in lengths.tolist()]
        if not len(pool_slots) == len(keys) == len(lengths) == n:
            raise ValueError(f"{n} slots with {len(pool_slots)} pool_slots, {len(keys)} keys, {len(lengths)} lengths")
        for length in lengths:
            if not 0 < length <= self.payload_bytes:
                raise ValueError(f"lengths must be 1 to {self.payload_bytes}, got {length}")
        keys = np.array(keys, np.uint8).reshape(n, 32)
        batch = RemoteBatch(verb, n, timeout_ms, self._changed)
        if objects is not None:
            operations = self._of_objects(batch, pool_slots, keys, lengths, tag, group, objects)
        else:
            rows = enumerate(zip(self.names.of(keys, tag), slots, pool_slots, map(bytes, keys), lengths, strict=True))
            operations = [
                Operation(batch, [i], name, slot, [pool_slot], [key], length, tag, group)
                for i, (name, slot, pool_slot, key, length) in rows
            ]
        self._submit(operations)
        return batch

    def _of_objects(self, batch, pool_slots, keys, lengths, tag, group, objects):
        """An operation for each object."""
        rows = {}
        for i, name in enumerate(self.names.of(objects.keys, tag, objects.counts)):
            rows.setdefault(name, []).append(i)
        operations = []
        for name, numbers in rows.items():
            places, count = objects.places[numbers].tolist(), int(objects.counts[numbers[0]])
            needed = count if batch.verb == "put" else len(numbers)
            if len(numbers) != needed or len({*places}) != needed or not 0 <= min(places) <= max(places) < count:
                raise ValueError(f"{batch.verb}: an object of {count} records was given those at {places}")
            if len({lengths[i] for i in numbers}) > 1:
                raise ValueError("the blocks of an object must be of one length")
            pools, of = [pool_slots[i] for i in numbers], [bytes(keys[i]) for i in numbers]
            operations.append(
                Operation(batch, numbers, name, None, pools, of, lengths[numbers[0]], tag, group, places, count)
            )
        return operations

    def _begin_named(self, verb, slots, names, timeout_ms, tag=None):
        self._require_open()
        batch = RemoteBatch(verb, len(names), timeout_ms, self._changed)
        rows = enumerate(zip(names, slots, strict=True))
        self._submit([Operation(batch, [i], name, slot, tag=tag) for i, (name, slot) in rows])
        return batch

    def _submit(self, operations):
        if os.getpid() != self._pid:  # somebody may hold the lock here for ever
            warn_once("remote_in_child", "a forked process has no use of its parent's client; this tier is off in it")
            for operation in operations:
                operation.batch.drop()
            return
        with self._changed:
            for operation in operations:
                if operation.batch.verb == "put":  # what lay there is another block's, whatever becomes of this one
                    self._lying.pop(operation.slot, None)
                if operation.batch.deadline_s <= operation.batch.begun_s:
                    self._end(operation, LATE)
                elif operation.name is None:  # nothing is known to lie there
                    self._end(operation, OK if operation.batch.verb == "erase" else MISSING)
                elif self._num_waiting >= self._queue_blocks and operation.batch.verb != "erase":
                    self._end(operation, DROPPED)
                else:
                    self._num_waiting += len(operation.numbers)
                    # Whoever erases the slot from now on means this.
                    if operation.batch.verb == "put" and operation.slot is not None:
                        self._lying[operation.slot] = operation.name
                    if operation.name in self._behind:
                        self._behind[operation.name].append(operation)
                    else:
                        self._behind[operation.name] = deque()
                        self._waiting.append(operation)
            self._most_waiting = max(self._most_waiting, self._num_waiting)
            self._given.notify(len(self._waiting))
            self._changed.notify_all()

    # ---- the threads ------------------------------------------------------------------------------------------------

    def _work(self):
        while True:
            with self._changed:
                while not self._waiting:
                    if self._is_closed:
                        return
                    self._given.wait()
                operation = self._waiting.popleft()
                self._num_waiting -= len(operation.numbers)
                self._num_running += len(operation.numbers)
                status = LATE if time.monotonic() >= operation.batch.deadline_s else None
                if status is None and operation.batch.verb == "get" and operation.name in self._unerased:
                    status = MISSING
            status = self._do(operation) if status is None else status
            with self._changed:
                self._num_running -= len(operation.numbers)
                self._note_lying(operation, status)
                behind = self._behind.get(operation.name)
                if behind:
                    self._waiting.append(behind.popleft())
                else:
                    self._behind.pop(operation.name, None)
                self._end(operation, status)
                if operation.batch.done() or not self._num_waiting + self._num_running:
                    self._changed.notify_all()  # nobody waits for less, and who is woken delays the next block

    def _note_lying(self, operation, status):
        """Note what its slot stands for now. The lock is held.

        A put that failed has changed nothing of a value that others may have under this name, so it is not to be
        erased; a value that was read and is wrong is.
        """
        slot, name, verb = operation.slot, operation.name, operation.batch.verb
        if verb == "get" and slot is not None and status not in NOT_TO_BE_ERASED:
            self._lying[slot] = name
        elif verb == "put" and status != OK and self._lying.get(slot) == name:
            del self._lying[slot]
        if verb in ("put", "erase") and status == OK:
            self._unerased.pop(name, None)
        elif verb == "erase" and status == IO_ERROR:
            self._unerased[name] = None
            if len(self._unerased) > MOST_UNERASED:
                del self._unerased[next(iter(self._unerased))]

    def _end(self, operation, status):
        """Tell a batch: of each block, or of all. The lock is held."""
        batch = operation.batch
        statuses = status if isinstance(status, list) else [status] * len(operation.numbers)
        for number, its_status in zip(operation.numbers, statuses, strict=True):
            its_status = batch._answer(number, its_status)
            self._counts[batch.verb][its_status] += 1
            if its_status == OK:
                self._bytes[batch.verb] += HEADER_BYTES + operation.length
        if batch.done() and self._event_fd is not None:
            os.eventfd_write(self._event_fd, 1)

    def _do(self, operation):
        """Let the client do it; return the status."""
        try:
            return getattr(self, f"_{operation.batch.verb}")(operation)
        except Exception as error:  # of the client: whatever it was, this block is not there
            self._last_error = f"{type(error).__name__}: {error}"[:500]
            return IO_ERROR

    def _records(self, operation):
        """The records of its blocks, in the pool."""
        starts = [slot * self.pool.stride_bytes for slot in operation.pool_slots]
        return [self._memory[start : start + HEADER_BYTES + operation.length] for start in starts]

    def _names_in(self, operation):
        names = self.names
        return {
            "namespace": names.namespace, "rank": names.rank, "tag": operation.tag, "stored_bytes": operation.length
        }  # fmt: skip

    def _put(self, operation):
        records = self._records(operation)
        for record, key in zip(records, operation.keys, strict=True):
            write_record(record, key, **self._names_in(operation), group=operation.group)
        self.client.put(operation.name, self._value(operation, records))
        return OK

    def _get(self, operation):
        records = self._records(operation)
        value = self._value(operation, records)
        found = self.client.get(operation.name, value)
        if found is None:
            return MISSING
        if found.nbytes != operation.count * (HEADER_BYTES + operation.length):
            return BlockStatus.LENGTH_DIFFERS
        names = self._names_in(operation)
        statuses = [check_record(*block, **names) for block in zip(records, operation.keys, strict=True)]
        if all(status == OK for status in statuses):
            try:
                self.client.refresh(operation.name, value, found.age_s)
            except Exception as error:  # the blocks are there all the same
                self._last_error = f"{type(error).__name__}: {error}"[:500]
        return statuses if operation.slot is None else statuses[0]

    def _value(self, operation, records):
        """What the client is to write or to read: the record, or all records of an object, in their places.

        For those that nobody asked for there is memory besides: whoever refreshes the value may write all of it.
        """
        if operation.count == 1:
            return records[0]
        parts, num_bytes = dict(zip(operation.places, records, strict=True)), HEADER_BYTES + operation.length
        rest = memoryview(bytearray((operation.count - len(parts)) * num_bytes))
        others = (rest[start : start + num_bytes] for start in range(0, len(rest), num_bytes))
        return [parts[place] if place in parts else next(others) for place in range(operation.count)]

    def _erase(self, operation):
        self.client.delete(operation.name)
        return OK

    def _scan(self, operation):
        (size,) = self.client.sizes([operation.name], True)
        record = bytearray(max(size, HEADER_BYTES))
        found = self.client.get(operation.name, memoryview(record)) if size else None
        if found is None:
            return MISSING
        status, header = read_header(record)
        if status == OK and header.tag != operation.tag:
            return BlockStatus.TAG_DIFFERS
        if status == OK:
            batch, (i,) = operation.batch, operation.numbers
            batch.keys[i] = np.frombuffer(header.key, np.uint8)
            batch.lengths[i], batch.groups[i] = header.stored_bytes, header.group
        return status
