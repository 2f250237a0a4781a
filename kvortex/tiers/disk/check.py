"""What lies in the folders of a disk tier, and whether it is whole: for tools, which have neither tier nor names.

Nothing is written, and nobody is locked out: a process may use a folder, or begin to, while it is looked at. Whatever
does not verify is therefore read again, and called damaged only when nobody had the folder meanwhile. Memory is bounded
by one slot. What an unknown format wrote is counted, and not read.
"""

import contextlib
import fcntl
import mmap
import os
import re
import stat
import struct
import time
from collections import Counter
from datetime import UTC, datetime

from kvortex.codec._coder import ECSQ
from kvortex.codec._ecsq import LEVELS
from kvortex.config import bytes_text
from kvortex.errors import TierError
from kvortex.slots import PAGE_BYTES
from kvortex.tiers._record import BlockStatus, check_record, payload_sums, read_header
from kvortex.tiers.disk.folder import LOCK_NAME, PART_NAME, SPACE_NAME, SUFFIX, folders_in
from kvortex.tiers.disk.manifest import NAME as MANIFEST_NAME
from kvortex.tiers.disk.segments import MAGIC, VERSION, segment_page

MOST_FINDINGS = 1000  # that are listed one by one, for each folder
LOOKS, PAUSE_S = 4, 0.02  # at a record that somebody may be writing
PATIENCE = 100  # records of a folder that are waited for so; where more do not verify, each is looked at twice only
ZEROS = bytes(PAGE_BYTES)
MOST_STRIDE_BYTES = (1 << 32) + PAGE_BYTES  # a block has less than 4 GiB
HOLDER = re.compile(r"process \d+ on [\w.-]+")
SEGMENT_NAME = re.compile(r"(\d{6,})" + re.escape(SUFFIX))
NO_BYTES = (0, 0)
EMPTY, UNKNOWN_FORMAT, IN_USE, UNREADABLE = "EMPTY", "UNKNOWN_FORMAT", "IN_USE", "UNREADABLE"
UNDAMAGED = ("OK", EMPTY, UNKNOWN_FORMAT)


def check(path, *, payloads, progress=lambda share, text: None):
    """Look at every folder of a disk tier.

    Parameters
    ----------
    path : path-like
        A path of a `DiskTier`, or one of the folders in it.
    payloads : bool
        Read and verify whole records; else their headers only.
    progress : callable, optional
        Called with the share that is done, 0 to 1, and a function that returns words for it.

    Returns
    -------
    folders : list of dict
        For each folder ``<8 hex>/dp<replica>-rank<rank>`` what JSON can carry. `records` are those whose header, or all
        of them, is as it should be; `damaged` counts records and segments that are not, `undecided` those that do not
        verify in a folder that is in use, `unreadable` those that the disk does not give, `findings` lists them.
        `garbage` lists files that no tier reads.

    Raises
    ------
    TierError
        There is no such folder in `path`.
    OSError
        A folder cannot be read.
    """
    parts = _parts_of(os.fspath(path))
    if not parts:
        raise TierError(f"{path} holds no folder of a disk tier (8 hex digits/dp0-rank0); name a path of a DiskTier")
    walk = _Walk(progress, sum(map(_bytes_of, parts)) or 1)
    folders = [_Part(part, payloads, walk).facts for part in parts]
    walk.end()
    return folders


def has_damage(folders):
    """Whether anything is damaged."""
    return any(folder["damaged"] for folder in folders)


def is_unreadable(folders):
    """Whether the disk did not give something that was asked for."""
    return any(folder["unreadable"] for folder in folders)


class _Walk:
    """How many bytes have been walked over, of how many."""

    def __init__(self, progress, total_bytes):
        self._progress, self._total, self._done, self._records = progress, total_bytes, 0, 0

    def advance(self, nbytes, is_record):
        self._done, self._records = self._done + nbytes, self._records + is_record
        self._show(min(0.99, self._done / self._total))

    def end(self):
        self._show(1)

    def _show(self, share):
        self._progress(share, lambda: f"{self._records:,} records")


class _Part:
    """One folder: the part of a tier that one process has."""

    def __init__(self, path, payloads, walk):
        self._path, self._payloads, self._walk = path, payloads, walk
        space, name = os.path.split(os.path.realpath(path))
        space, placed = os.path.basename(space), PART_NAME.fullmatch(name)
        self._space = space if SPACE_NAME.fullmatch(space) and placed else None
        self._rank = int(placed["rank"]) if placed else None
        holder, opened_ns = lock_state(path)
        self.facts = {
            "folder": path,
            "namespace": self._space,
            "replica": int(placed["replica"]) if placed else None,
            "rank": self._rank,
            "in_use_by": holder,
            "last_opened": opened_ns and datetime.fromtimestamp(opened_ns // 10**9, UTC).isoformat(),
            "manifest_bytes": None,
            "bytes": 0,
            "disk_bytes": 0,
            "slots": 0,
            "records": 0,
            "record_bytes": 0,
            "block_bytes": 0,
            "unknown_records": 0,
            "damaged": 0,
            "undecided": 0,
            "unreadable": 0,
            "segments": [],
            "garbage": [],
            "findings": [],
        }
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            with contextlib.suppress(FileNotFoundError):  # gone since: the folder is in use
                self._take(entry)

    def _take(self, entry):
        sizes, number = entry.stat(follow_symlinks=False), SEGMENT_NAME.fullmatch(entry.name)
        self.facts["bytes"] += sizes.st_size
        self.facts["disk_bytes"] += sizes.st_blocks * 512
        if number and stat.S_ISREG(sizes.st_mode):
            try:
                self._take_segment(entry.path, int(number[1]))
            except PermissionError:
                raise
            except OSError as error:
                self._find(entry.name, None, UNREADABLE, os.strerror(error.errno))
        elif entry.name == MANIFEST_NAME:
            self.facts["manifest_bytes"] = sizes.st_size
        elif entry.name != LOCK_NAME:
            self._throw(entry.name, sizes.st_size, "no file of a disk tier")

    def _take_segment(self, path, number):
        name = os.path.basename(path)
        with contextlib.closing(_Segment(path)) as segment:
            status, why = self._settled(segment.read_page)
            if status == "OK":
                status, why = self._placement(segment, number)
            if status != "OK":
                self._find(name, None, status, why)
                if status in (EMPTY, UNKNOWN_FORMAT):
                    self._throw(name, segment.size, why)
                self._walk.advance(segment.size, False)
                return
            self.facts["namespace"] = segment.namespace.hex()
            counts = self._count_records(segment, name)
        self.facts["segments"].append(
            {
                "name": name,
                "bytes": segment.size,
                "version": VERSION,
                "codec": _codec_name(segment.codec),
                "stride_bytes": segment.stride,
                "slots": segment.num_slots,
                "records": counts["OK"],
            }
        )
        self.facts["slots"] += segment.num_slots
        self.facts["records"] += counts["OK"]
        self.facts["unknown_records"] += counts[UNKNOWN_FORMAT]

    def _placement(self, segment, number):
        """Whether a segment lies where its page says; a tier would make it anew, and read nothing of it."""
        is_here = segment.number == number and self._rank in (None, segment.rank)
        if is_here and self._space in (None, segment.namespace[:4].hex()):
            return "OK", ""
        return UNKNOWN_FORMAT, f"segment {segment.number} of rank {segment.rank} and {segment.namespace[:4].hex()}"

    def _count_records(self, segment, name):
        counts = Counter()
        for slot in range(segment.num_slots):
            try:
                status, sizes = self._settled(lambda at=slot: segment.read_record(at, self._payloads))
            except OSError as error:
                status, sizes = UNREADABLE, NO_BYTES
                self._find(name, slot, status, os.strerror(error.errno))
            else:
                self._find(name, slot, status, "")
            counts[status] += 1
            for name_of_size, nbytes in zip(("record_bytes", "block_bytes"), sizes, strict=True):
                self.facts[name_of_size] += nbytes if status == "OK" else 0
            self._walk.advance(segment.stride, status == "OK")
        if (segment.size - PAGE_BYTES) % segment.stride:
            self._find(name, segment.num_slots, "SHORT", "the file ends within a slot")
        return counts

    def _settled(self, look):
        """Look until what is found is whole, or damaged while nobody had the folder."""
        answer = look()
        for attempt in range(LOOKS if self.facts["undecided"] < PATIENCE else 1):
            if answer[0] in UNDAMAGED:
                break
            time.sleep(PAUSE_S if attempt else 0)
            before = lock_state(self._path)
            answer = look()
            if before[0] is None and lock_state(self._path) == before:
                return answer
        return answer if answer[0] in UNDAMAGED else (IN_USE, NO_BYTES)

    def _find(self, name, slot, status, why):
        """Count and list what is not whole."""
        if status in UNDAMAGED:
            return
        self.facts[{IN_USE: "undecided", UNREADABLE: "unreadable"}.get(status, "damaged")] += 1
        if len(self.facts["findings"]) < MOST_FINDINGS:
            self.facts["findings"].append({"file": name, "slot": slot, "status": status, "why": why or ""})

    def _throw(self, name, nbytes, why):
        self.facts["garbage"].append({"name": name, "bytes": nbytes, "why": why})


class _Segment:
    """A segment, opened for reading, past the page cache where the file system can."""

    def __init__(self, path):
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._buffer = mmap.mmap(-1, PAGE_BYTES)  # pages, as direct I/O wants them
        self._file = os.open(path, flags)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | os.O_DIRECT)
            try:
                self._read(PAGE_BYTES, 0)
            except OSError:
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags)
        self.size = os.fstat(self._file).st_size

    def _read(self, nbytes, offset):
        """Read into the buffer; return how much came, to the end of the file at the most."""
        with memoryview(self._buffer) as view:
            return os.preadv(self._file, [view[:nbytes]], offset)

    def read_page(self):
        """Read the segment's page; return what it is, and why nothing of the segment is read where that is not OK."""
        self.size = os.fstat(self._file).st_size
        if self._read(PAGE_BYTES, 0) < PAGE_BYTES:
            return (EMPTY, "an empty file") if self.size == 0 else ("SHORT", "the file ends within its first page")
        page = bytes(self._buffer[:PAGE_BYTES])
        fields = struct.unpack_from("<8sIIIIQ32s", page)
        magic, version, self.codec, self.rank, self.number, self.stride, self.namespace = fields
        expected = segment_page(self.namespace, self.rank, self.number, self.stride, self.codec)
        # A page may tell any stride, under a sum that is right, and a sparse file be larger than memory.
        if page == expected and PAGE_BYTES < self.stride <= MOST_STRIDE_BYTES and self.stride % PAGE_BYTES == 0:
            self.num_slots = max(0, self.size - PAGE_BYTES) // self.stride
            if self.num_slots and len(self._buffer) < self.stride:
                self._buffer = mmap.mmap(-1, self.stride)
            return "OK", ""
        if page == ZEROS:
            return EMPTY, "a segment that was never begun"
        if (magic, version) == (MAGIC, VERSION) or page[12:] == expected[12:]:
            return "HEADER_DAMAGED", "its first page is damaged"
        return UNKNOWN_FORMAT, f"format {version}" if magic == MAGIC else "no segment of a disk tier"

    def read_record(self, slot, payloads):
        """Read a slot; return what its record is, and bytes: of its payload, and of the block that was coded in it."""
        offset = PAGE_BYTES + slot * self.stride
        if self._read(PAGE_BYTES, offset) < PAGE_BYTES:
            return "SHORT", NO_BYTES
        with memoryview(self._buffer) as view:
            status, header = read_header(view[:PAGE_BYTES])
            if status != BlockStatus.OK:
                return _name_of_page(bytes(view[:PAGE_BYTES]), status), NO_BYTES
            if header.codec != self.codec:
                return UNKNOWN_FORMAT, NO_BYTES
            nbytes = header.stored_bytes
            if not 0 < nbytes <= self.stride - PAGE_BYTES:
                return "LENGTH_DIFFERS", NO_BYTES
            whole = PAGE_BYTES * (1 + -(-nbytes // PAGE_BYTES))
            if payloads and self._read(whole, offset) < PAGE_BYTES + nbytes:
                return "SHORT", NO_BYTES
            if not payloads:
                is_ours = (header.namespace, header.rank) == (self.namespace, self.rank)
                status = BlockStatus.OK if is_ours else BlockStatus.NAMESPACE_DIFFERS
            else:
                status = check_record(view, header.key, namespace=self.namespace, rank=self.rank, tag=header.tag,
                                      stored_bytes=nbytes, codec=self.codec,
                                      block_bytes=header.block_bytes)  # fmt: skip
                if not status and payload_sums(view[PAGE_BYTES : PAGE_BYTES + nbytes])[1] != header.payload_weighted:
                    status = BlockStatus.PAYLOAD_DAMAGED
            return BlockStatus(status).name, (nbytes, header.block_bytes)

    def close(self):
        os.close(self._file)


def _name_of_page(page, status):
    """What a page is that is no header of this format: nothing, another format's, or a damaged one."""
    if page == ZEROS:
        return EMPTY
    if status == BlockStatus.VERSION_DIFFERS:
        version = struct.pack("<I", 1)
        is_ours = read_header(page[:8] + version + page[12:])[0] == BlockStatus.OK
        return BlockStatus.HEADER_DAMAGED.name if is_ours else UNKNOWN_FORMAT
    return BlockStatus.HEADER_DAMAGED.name


def lock_state(part):
    """Who has a folder, None where nobody does, and when its lock was last taken, in ns."""
    try:
        file = os.open(os.path.join(part, LOCK_NAME), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None, None
    try:
        opened_ns = os.fstat(file).st_mtime_ns
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment: whoever wants it then tries twice
        except BlockingIOError:
            holder = HOLDER.fullmatch(os.pread(file, 512, 0).decode(errors="replace"))
            return holder[0] if holder else "another process", opened_ns
        return None, opened_ns
    finally:
        os.close(file)


def _parts_of(path):
    is_part = PART_NAME.fullmatch(os.path.basename(os.path.realpath(path)))
    if is_part or any(SEGMENT_NAME.fullmatch(name) for name in os.listdir(path)):
        return [path]
    return sorted(folders_in(path, PART_NAME)) or sorted(
        part for space in folders_in(path, SPACE_NAME) for part in folders_in(space, PART_NAME)
    )


def _bytes_of(part):
    """What the segments of a folder have to be read."""
    nbytes = 0
    for entry in os.scandir(part):
        with contextlib.suppress(FileNotFoundError):
            nbytes += entry.stat(follow_symlinks=False).st_size if SEGMENT_NAME.fullmatch(entry.name) else 0
    return nbytes


# ---- text ------------------------------------------------------------------------------------------------------------


def table(folders):
    """Return what `check` found as text for people."""
    return "\n\n".join(_text(facts) for facts in folders)


def _text(facts):
    strides = sorted({segment["stride_bytes"] for segment in facts["segments"]})
    sizes = ", ".join(bytes_text(stride) for stride in strides) or "no size"
    manifest = facts["manifest_bytes"]
    garbage, shown = facts["garbage"], facts["garbage"][:5]
    names = ", ".join(f"{_plain(file['name'])} ({file['why']})" for file in shown) + (", ..." * (shown != garbage))
    rows = [
        ("namespace", facts["namespace"] or "unknown"),
        ("rank", f"{_or_unknown(facts['rank'])} of replica {_or_unknown(facts['replica'])}"),
        ("in use", f"by {facts['in_use_by']}" if facts["in_use_by"] else "no"),
        ("last opened", facts["last_opened"] or "unknown"),
        ("segments", f"{len(facts['segments'])} of format {VERSION}, {facts['slots']} slots of {sizes}"),
        ("codec", ", ".join(sorted({segment["codec"] for segment in facts["segments"]}))),
        (
            "records",
            f"{facts['records']}, {bytes_text(facts['record_bytes'])} for blocks of "
            f"{bytes_text(facts['block_bytes'])} ({facts['block_bytes'] / (facts['record_bytes'] or 1):.2f}x)",
        ),
        ("size", f"{bytes_text(facts['bytes'])}, {bytes_text(facts['disk_bytes'])} on the disk"),
        ("manifest", "none: the next start scans all headers" if manifest is None else bytes_text(manifest)),
        ("garbage", f"{len(garbage)} files, {bytes_text(sum(file['bytes'] for file in garbage))}: {names}"),
        ("unknown", f"{facts['unknown_records']} records of another format"),
        ("undecided", f"{facts['undecided']} records do not verify, but the folder is in use: look again later"),
        ("unreadable", f"{facts['unreadable']}"),
        ("damaged", f"{facts['damaged']}"),
    ]
    given = {"garbage": garbage, "unknown": facts["unknown_records"], "undecided": facts["undecided"],
             "unreadable": facts["unreadable"], "damaged": facts["damaged"],
             "codec": facts["segments"]}  # fmt: skip
    lines = [_plain(facts["folder"])]
    lines += [f"  {name:<12}{value}" for name, value in rows if given.get(name, True)]
    for finding in facts["findings"]:
        slot = "" if finding["slot"] is None else f" slot {finding['slot']}"
        why = f" ({finding['why']})" if finding["why"] else ""
        lines.append(f"    {finding['file']}{slot}: {finding['status']}{why}")
    left = facts["damaged"] + facts["undecided"] + facts["unreadable"] - len(facts["findings"])
    return "\n".join(lines + [f"    and {left} more"] * (left > 0))


def _codec_name(codec):
    """Of records, as their headers have it."""
    kind, level = codec & 0xFF, codec >> 8
    if codec == 0:
        return "exact"
    return f"ecsq, level {level}" if kind == ECSQ and level in LEVELS else f"unknown ({codec})"


def _or_unknown(number):
    return "unknown" if number is None else number


def _plain(text):
    """A name that somebody else gave, without what a terminal would obey."""
    return text if text.isprintable() else ascii(text)
