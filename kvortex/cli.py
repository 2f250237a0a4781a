"""The command line: ``kvortex replay``, ``info``, ...; ``python -m kvortex`` where it is not installed."""

import argparse
import contextlib
import json
import os
import re
import sys
import traceback
from pathlib import Path

import kvortex
from kvortex import info
from kvortex.arguments import printable, shown
from kvortex.config import bytes_text, parse_bytes, parse_device
from kvortex.replay import ReplayOptions, TraceError, plot, read_trace, replay, report, sample_path, sweep
from kvortex.replay.files import trace_files
from kvortex.replay.run import MOST_PIECES
from kvortex.slots import stride_bytes
from kvortex.tiers.disk import check

OK, WRONG_BLOCKS, DAMAGED, BAD_INPUT, UNFORESEEN, INTERRUPTED = 0, 1, 1, 2, 70, 130
MOST_SIZES = 1000  # of a sweep
STDOUT = Path("-")

_EXAMPLES = """\
examples:
  kvortex info                          what is in force on this machine
  kvortex replay --plot demo.png        the bundled trace, on the GPU if there is one
  kvortex verify /data/kv               read and verify all that a disk tier holds
  kvortex replay --help                 every option, and more examples

exit status: 0 all right, 1 wrong or damaged blocks, 2 bad input or nothing to run on, 70 an error in KVortex itself
(run again with --debug, and report what it prints), 130 interrupted
"""

_REPLAY_DESCRIPTION = """\
Replay a request trace through a real engine: for each request check, load the
leading run, save the rest, touch. Every loaded block is compared byte by byte
where it was loaded to. Requests follow one another as fast as they go; time
stamps are not waited for.

Traces are read in the Mooncake format (a request a line) and in that of the
kv-cache-tester (a conversation a file, or a line), gzip-compressed or not.
Several files, or a folder of them, are merged by their time stamps.

With --disk there is a disk tier below the pool: what it has of a prefix is
brought into the pool before the load, and the table says where hits came from.
With --remote it is a server or a folder, which --engines can share.

With --sweep no byte is moved: it asks the index alone what pools of several
sizes would hit, and shows Belady's bound, what the best policy could hit, too.
"""

_REPLAY_EXAMPLES = """\
examples:
  python -m kvortex replay                                  the bundled sample trace, on the GPU if there is one
  python -m kvortex replay --plot demo.png --json demo.json the same, with a picture and the numbers
  python -m kvortex replay trace.jsonl --pool-blocks 10000 --block-bytes 64KiB --device host
  python -m kvortex replay trace.jsonl --pool-bytes 32GiB --block-bytes 2MiB --device cuda:0
  python -m kvortex replay trace.jsonl --pool-blocks 1000 --disk /mnt/nvme --disk-blocks 30000 --write-bytes-per-s 0
                                                            RAM, and below it a disk that is written without a limit
  python -m kvortex replay trace.jsonl --pool-blocks 1000 --block-bytes 4KiB --remote redis://127.0.0.1:6379 \\
      --engines 2 --flush --remote-option negative_ttl_s=0  two engines find in Redis what the other one wrote
  python -m kvortex replay --inject corrupt=3               prove that a wrong byte is seen (exits 1)
  python -m kvortex replay traces/ --sweep 1000,3000,10000 --plot sweep.png   how large should the pool be?
  python -m kvortex replay traces/ --sweep 8GiB,32GiB --block-bytes 2MiB --json -
                                                            the same in bytes, as a JSON object on stdout

exit status: 0 all loaded blocks right, 1 wrong blocks, 2 bad input or nothing to run on
"""


_INFO_DESCRIPTION = """\
Show what KVortex would run with here and why: driver, device, limits of this
process, the pool that would be made, and every setting with its source
(command line over environment over file over default). Makes no pool.
"""

_INFO_EXAMPLES = """\
examples:
  python -m kvortex info                                    this machine, this environment
  python -m kvortex info --pool-bytes 64GiB --block-bytes 2MiB
                                                            would this pool fit, and how many blocks does it hold?
  python -m kvortex info --config /etc/kvortex.toml --json  for machines; KVORTEX_MAX_JOBS=64 and the like still win
  python -m kvortex info --probe --device cuda:1            how 64 pieces of 32 KiB move there, and codecs
  python -m kvortex info --disk /data/kv                    what a disk tier would find there

exit status: 0 all right, 2 a bad option or setting, no such device, a pool that does not fit, or a disk that cannot be
written
"""

_INSPECT_DESCRIPTION = """\
Show what lies in a path of a disk tier: for each folder the model it is of
(a digest), rank, segments and slots, how many hold a record, sizes, and who has
it. Reads the records' headers only, writes nothing, and needs neither a GPU nor
the namespace. A folder in use may be inspected; what is shown may then change.
"""

_INSPECT_EXAMPLES = """\
examples:
  kvortex inspect /data/kv                            every folder of the tier
  kvortex inspect /data/kv/0a1b2c3d/dp0-rank0 --json  one of them, for machines

exit status: 0 all right, 2 no such folder, or one that cannot be read
"""

_VERIFY_DESCRIPTION = """\
Read every record in a path of a disk tier in full, and verify the sums of its
header and payload. Writes nothing, and needs neither a GPU nor the namespace. A
folder in use may be verified, and nobody waits for it: a record that does not
verify there may be one that is being written, and is told apart ("undecided").
No damaged record is ever served: an engine that meets one computes the block
anew. A process that was killed may leave records half written, and these are
found damaged, too.
"""

_VERIFY_EXAMPLES = """\
examples:
  kvortex verify /data/kv                             every folder of the tier
  kvortex verify /data/kv/0a1b2c3d/dp0-rank0 --json   one of them, for machines

exit status: 0 nothing damaged, 1 damaged records, 2 no such folder, or one that cannot be read
"""


_SWEEP_DESCRIPTION = """\
Bound what an object tier keeps: remove blocks, the oldest first, and the files
that killed writers left. Engines may go on meanwhile: a block that is gone is a
miss. Nothing but what is named as a block is removed. Run it by cron, say.

A folder's blocks become young again when they are read. On S3 that takes the
tier's setting refresh_s, best half of --older-than. Redis and Valkey bound
themselves (maxmemory).
"""

_SWEEP_EXAMPLES = """\
examples:
  kvortex sweep file:///mnt/shared/kv --max-bytes 2TiB       what was read longest ago goes first
  kvortex sweep s3://bucket/kv --older-than 7d --dry-run     what would go?
  kvortex sweep s3://bucket/kv --max-bytes 10TiB --endpoint https://rgw:8080 --region default --ca-file ca.pem

exit status: 0 all right, 2 bad input, or a store that cannot be reached
"""


def main(argv=None):
    """Run the command line and return its exit status."""
    _make_streams_safe()
    try:
        args = _parser().parse_args(argv)
        return _run(args)
    finally:
        _flush_streams()


def _run(args):
    """Run one command; whatever ends it is one line on stderr, and a status."""
    try:
        return args.command(args)
    except KeyboardInterrupt:
        _complain(f"\nkvortex {args.name}: interrupted")
        return INTERRUPTED
    except Exception as error:
        status, text = _told(error)
        if args.debug:
            _complain(traceback.format_exc().rstrip())
        _complain(f"kvortex {args.name}: error: {printable(text)}")
        return status


def _told(error):
    """Exit status and message for what ended a command."""
    if isinstance(error, BrokenPipeError):
        return BAD_INPUT, "nobody reads what is written"
    if isinstance(error, TraceError | kvortex.KVortexError | ImportError | OSError):
        return BAD_INPUT, str(error)
    if isinstance(error, MemoryError):
        return BAD_INPUT, f"there is not enough memory{f': {error}' if str(error) else ''}"
    return UNFORESEEN, f"unforeseen {type(error).__name__}: {error}; --debug shows where, please report it"


def _make_streams_safe():
    """Let no name that is no Unicode, and no stream that was closed before the start, break what is printed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 it stays open
        with contextlib.suppress(AttributeError):  # what a test put there
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _flush_streams():
    """Write out what is left; a stream that takes no more goes nowhere from now on, or the interpreter complains."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print(text):
    """Print a result. That nobody reads it to the end (`| head`) is no error, and the status stays what it is."""
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)


def _complain(text):
    """Print a line on stderr, if that takes one: the status says the same."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def run_replay(args):
    """Replay a trace, print the table, write what was asked for."""
    if args.sweep:
        return _run_sweep(args)
    options = ReplayOptions(
        block_bytes=ReplayOptions.block_bytes if args.block_bytes is None else args.block_bytes,
        num_pieces=args.pieces,
        pool_blocks=args.pool_blocks,
        pool_bytes=args.pool_bytes,
        device=args.device,
        inflight=args.inflight,
        verify=args.verify,
        corrupt_slots=args.inject,
        disk=args.disk,
        disk_blocks=args.disk_blocks,
        disk_bytes=args.disk_bytes,
        remote=_remote_of(args),
        engines=args.engines,
        flush=args.flush,
        write_bytes_per_s=args.write_bytes_per_s,
        write_share=args.write_share,
    )
    _require_writable(args)
    with report.Bar() as bar:
        requests, name = _read_trace(args, bar)
        progress = report.Progress(len(requests), bar)
        result = replay(requests, options, progress, progress.pinning)
    fields = report.summary(result, options, name)
    _show(args, fields, report.table)
    if args.plot:
        plot.write_picture(args.plot, result, fields)

    if args.inject and not result.corrupted_slots:
        raise TraceError("no request of this trace found a block in the pool, so nothing could be corrupted")
    if result.corrupted_slots and not result.wrong_blocks:
        _complain("kvortex replay: error: corrupted blocks were loaded and not noticed")
        return WRONG_BLOCKS
    return WRONG_BLOCKS if result.wrong_blocks else OK


def _remote_of(args):
    """The tier on a server that was asked for."""
    if args.remote is None:
        if args.remote_option:
            raise kvortex.ConfigError("--remote-option needs --remote: name the server, or the folder")
        return None
    from kvortex.tiers.remote import tier_at

    return tier_at(args.remote, dict(args.remote_option))


def _run_sweep(args):
    """Show what pools of several sizes would hit."""
    if args.inject or args.inflight != 1 or args.disk or args.remote:
        raise kvortex.ConfigError("--sweep moves no data: leave --inject, --inflight, --disk and --remote out")
    sizes = [_blocks_of(size, args.block_bytes) for size in args.sweep]
    _require_writable(args)
    with report.Bar() as bar:
        requests, name = _read_trace(args, bar)
        result = sweep(requests, sizes, lambda share, what: bar.show(share, lambda: what))
    fields = report.sweep_summary(result, name, args.block_bytes)
    _show(args, fields, report.sweep_table)
    if args.plot:
        plot.write_sweep_picture(args.plot, fields)
    return OK


def _blocks_of(size, block_bytes):
    """How many blocks a pool has that was given in blocks, or as a text in bytes."""
    if isinstance(size, int):
        return size
    if block_bytes is None:
        raise kvortex.ConfigError(f"--sweep {size} is a size in bytes: say with --block-bytes how large a block is")
    num_blocks = parse_bytes(size) // stride_bytes(block_bytes)
    if num_blocks == 0:
        raise kvortex.ConfigError(f"--sweep {size} holds no block of {stride_bytes(block_bytes)} bytes")
    return num_blocks


def _show(args, fields, table):
    """Print the table, or the JSON object in its place, or write that into a file."""
    _print(report.json_text(fields) if args.json == STDOUT else table(fields))
    if args.json not in (None, STDOUT):
        args.json.write_text(report.json_text(fields) + "\n", encoding="utf-8")


def _require_writable(args):
    """Refuse files that cannot be written, or are a trace, now: not after minutes of replay."""
    if args.plot:
        plot.require_suffix(args.plot)
        plot.require_matplotlib()
    targets = [path for path in (args.json, args.plot) if path not in (None, STDOUT)]
    for path in targets:
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OSError(f"cannot write {path}: give a file in a directory that exists and is writable")
    if len(targets) == 2 and _is_same(*targets):
        raise OSError(f"--json and --plot would write the same file {args.plot}: give two")
    traces = [Path(path) for path in trace_files(args.trace or [sample_path()])]
    for path in targets:
        if any(_is_same(path, trace) for trace in traces):
            raise OSError(f"{path} is a trace that is read, and would be overwritten: give another file")


def _is_same(path, other):
    """Whether two paths lead to one file, by links of any kind; a device keeps nothing, and is never one."""
    if path.exists() and other.exists():
        return path.samefile(other) and path.is_file()
    return os.path.realpath(path) == os.path.realpath(other)


def _read_trace(args, bar):
    """Return the requests of the traces that were named, and a name for them."""
    paths = args.trace or [sample_path()]
    requests = read_trace(paths, args.limit, bar.show)
    bar.clear()
    name = printable(os.path.basename(os.path.realpath(paths[0])))
    return requests, name if len(paths) == 1 else f"{name} and {len(paths) - 1} more"


def run_info(args):
    """Print what is in force here and why."""
    given = {"device": args.device, "cpu_pool_size_bytes": args.pool_bytes, "block_bytes": args.block_bytes}
    given = {name: value for name, value in given.items() if value is not None}
    settings = kvortex.KVortexConfig.find_settings(args.config, **given)
    for name in given:
        settings[name] = settings[name]._replace(source="command line")
    facts = info.collect(settings, probe=args.probe, num_pieces=args.pieces, disk_paths=args.disk)
    _print(json.dumps(facts, indent=2) if args.json else info.table(facts))
    problems = list(filter(None, (facts[pool]["problem"] for pool in ("pool", "device_pool"))))
    problems += [f"{disk['path']}: {disk['io_reason']}" for disk in facts["disks"] if disk["io"] is None]
    for problem in problems:
        _complain(f"kvortex info: error: {printable(problem)}")
    return BAD_INPUT if problems else OK


def run_check(args):
    """Print what lies in a path of a disk tier; verify whole records where that was asked for."""
    payloads = args.name == "verify"
    with report.Bar() as bar:
        folders = check.check(args.path, payloads=payloads, progress=bar.show)
    _print(json.dumps({"folders": folders}, indent=2) if args.json else check.table(folders))
    if payloads and not args.json:
        records, damaged = (sum(folder[what] for folder in folders) for what in ("records", "damaged"))
        _print(f"\nverified header and payload of {records + damaged} records: {damaged} damaged")
    if payloads and check.has_damage(folders):
        return DAMAGED
    return BAD_INPUT if check.is_unreadable(folders) else OK


def run_sweep(args):
    """Remove from an object tier what is too old or too much."""
    from kvortex.tiers.remote import ObjectTier
    from kvortex.tiers.remote.sweep import sweep as sweep_objects

    tier = ObjectTier(args.url, endpoint=args.endpoint, region=args.region, ca_file=args.ca_file,
                      virtual_hosted=args.virtual_hosted)  # fmt: skip
    limits = {"max_bytes": args.max_bytes, "older_than_s": args.older_than}
    with report.Bar() as bar:
        swept = sweep_objects(tier, **limits, dry_run=args.dry_run, progress=bar.show)
    if args.json:
        _print(json.dumps(vars(swept), indent=2))
        return OK
    verb = "would be removed" if args.dry_run else "removed"
    _print(
        f"{swept.blocks} blocks, {bytes_text(swept.bytes)} found; {verb}: {swept.removed_blocks} blocks, "
        f"{bytes_text(swept.removed_bytes)}, and {swept.removed_temp_files} files of killed writers"
    )
    return OK


def _parser():
    parser = argparse.ArgumentParser(
        prog="kvortex",
        description="KVortex keeps KV-cache blocks in pinned host memory.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvortex {kvortex.__version__}")
    help_of_debug = "show the traceback of whatever ends the command"
    parser.add_argument("--debug", action="store_true", help=help_of_debug)
    everywhere = argparse.ArgumentParser(add_help=False)  # here too, and then the default is the one above
    everywhere.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=help_of_debug)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "replay",
        help="replay a request trace through a real engine and check every loaded byte",
        description=_REPLAY_DESCRIPTION,
        epilog=_REPLAY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[everywhere],
    )
    command.set_defaults(command=run_replay, name="replay")
    command.add_argument(
        "trace", nargs="*", type=Path, metavar="TRACE", help="file or folder; default: the bundled sample"
    )
    size = command.add_mutually_exclusive_group()
    size.add_argument("--pool-blocks", type=_count, metavar="N", help="size of the pool in blocks (default 1024)")
    size.add_argument("--pool-bytes", type=_bytes, metavar="B", help="or in bytes; 512MiB, 32GiB")
    size.add_argument(
        "--sweep",
        type=_sizes,
        metavar="N,N,...",
        help="instead of replaying: the hit ratios of pools of N blocks; or of sizes such as 32GiB, with --block-bytes",
    )
    command.add_argument(
        "--block-bytes",
        type=_bytes,
        metavar="B",
        help="bytes of one block (default 256KiB)",
    )
    command.add_argument(
        "--pieces",
        type=_pieces,
        metavar="N",
        help="pieces a block lies in on the device (default: of 64 KiB, at least 8)",
    )
    command.add_argument("--device", type=_device, default="auto", metavar="auto|host|cuda[:i]", help="default auto")
    command.add_argument("--limit", type=_count, metavar="N", help="replay only the first N requests")
    command.add_argument(
        "--inflight",
        type=_count,
        default=1,
        metavar="N",
        help="let N requests overlap, 256 at most (default 1); rates then include the replay's own work",
    )
    command.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fill saved blocks with a pattern and compare loaded ones",
    )
    command.add_argument(
        "--inject",
        type=_fault,
        default=0,
        metavar="corrupt=N",
        help="flip a byte in N slots, each just before it is loaded: the replay must exit 1; at most a slot a request",
    )
    command.add_argument(
        "--disk",
        type=_folder,
        metavar="PATH",
        help="a disk tier in a new folder in this one, deleted at the end; with --disk-blocks or --disk-bytes",
    )
    size = command.add_mutually_exclusive_group()
    size.add_argument("--disk-blocks", type=_count, metavar="N", help="size of the disk tier in blocks")
    size.add_argument("--disk-bytes", type=_bytes, metavar="B", help="or in bytes; 1TiB")
    command.add_argument(
        "--remote",
        metavar="URL",
        help="a tier on a server, or in a folder, instead: redis://host, s3://bucket/prefix, file:///folder; what is "
        "written there is removed at the end",
    )
    command.add_argument(
        "--remote-option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of RedisTier or ObjectTier: negative_ttl_s=0, password_env=REDIS_PASSWORD; repeatable",
    )
    command.add_argument(
        "--engines",
        type=_count,
        default=1,
        metavar="N",
        help="N engines, each with a pool, share the remote and take the requests in turn (default 1, 64 at most)",
    )
    command.add_argument("--flush", action="store_true", help="write all that RAM has to the tier after each request")
    budget = command.add_mutually_exclusive_group()
    budget.add_argument(
        "--write-bytes-per-s",
        type=_rate,
        metavar="B",
        help="what may be written to the tier while blocks are saved (default: 256MiB to a disk; 0: no limit)",
    )
    budget.add_argument(
        "--write-share",
        type=_share,
        metavar="F",
        help="or as a share of what is saved, 0 to 1, however fast the trace goes: 0.25",
    )
    command.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the numbers as a JSON object; - prints it instead of the table",
    )
    command.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw hit ratio and bandwidth over time, with --sweep hit ratio against pool size; .png, .svg or .pdf",
    )

    command = commands.add_parser(
        "info",
        help="show what is in force on this machine and why",
        description=_INFO_DESCRIPTION,
        epilog=_INFO_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[everywhere],
    )
    command.set_defaults(command=run_info, name="info")
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a TOML file of settings (default: the one that KVORTEX_CONFIG names)",
    )
    command.add_argument("--device", type=_device, metavar="auto|host|cuda[:i]", help="override the setting device")
    command.add_argument("--pool-bytes", type=_bytes, metavar="B", help="override cpu_pool_size_bytes; 512MiB, 32GiB")
    command.add_argument("--block-bytes", type=_bytes, metavar="B", help="override block_bytes, to count the slots")
    command.add_argument(
        "--disk",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a folder for a disk tier: its file system, room, and whether I/O goes past the page cache; repeatable",
    )
    command.add_argument(
        "--probe",
        action="store_true",
        help="measure how the pieces of a cache in one allocation move, and what each codec reaches",
    )
    command.add_argument(
        "--pieces", type=_pieces, default=64, metavar="N", help="pieces a block of the probe (default 64)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of the table")

    for name, what, description, examples in (
        ("inspect", "show what lies in a path of a disk tier", _INSPECT_DESCRIPTION, _INSPECT_EXAMPLES),
        ("verify", "read and verify all that a disk tier holds", _VERIFY_DESCRIPTION, _VERIFY_EXAMPLES),
    ):
        command = commands.add_parser(
            name,
            help=what,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[everywhere],
        )
        command.set_defaults(command=run_check, name=name)
        command.add_argument("path", type=Path, metavar="DIR", help="a path of a DiskTier, or one of the folders in it")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of the table")

    command = commands.add_parser(
        "sweep",
        help="bound what an object tier keeps",
        description=_SWEEP_DESCRIPTION,
        epilog=_SWEEP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[everywhere],
    )
    command.set_defaults(command=run_sweep, name="sweep")
    command.add_argument(
        "url", metavar="URL", help="of the ObjectTier: s3://bucket/prefix, gs://, az://, file:///folder"
    )
    command.add_argument("--max-bytes", type=_bytes, metavar="B", help="what may stay, all models together; 2TiB")
    command.add_argument(
        "--older-than", type=_duration, metavar="T", help="what was written longer ago goes; 90s, 12h, 7d"
    )
    command.add_argument("--endpoint", metavar="URL", help="of an S3 server that is not Amazon's")
    command.add_argument("--region", metavar="NAME", help="of the bucket")
    command.add_argument("--virtual-hosted", action="store_true", help="the bucket is a part of the host's name")
    command.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="certificates (PEM) to trust besides the system's"
    )
    command.add_argument("--dry-run", action="store_true", help="remove nothing, and tell what would be")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of the sentence")
    return parser


def _count(text, most=sys.maxsize):
    if not re.fullmatch(r"\d{1,20}", text, re.ASCII) or not 1 <= int(text) <= most:
        limits = "1 or more" if most == sys.maxsize else f"1 to {most}"
        raise argparse.ArgumentTypeError(f"a whole number, {limits}, is expected, got {shown(text)}")
    return int(text)


def _pieces(text):
    return _count(text, MOST_PIECES)


def _sizes(text):
    """Numbers of blocks as ints; sizes in bytes as the texts they are, checked."""
    parts = text.split(",")
    if len(parts) > MOST_SIZES:
        raise argparse.ArgumentTypeError(f"{MOST_SIZES} sizes at most are expected, got {len(parts)}")
    return [_count(part) if part.isdigit() else _size(part) for part in parts]


def _size(text):
    try:
        if parse_bytes(text):
            return text
    except kvortex.ConfigError:
        pass
    raise argparse.ArgumentTypeError(
        f"a whole number of blocks, 1 or more, or a size such as 32GiB is expected, got {shown(text)}"
    )


def _bytes(text):
    try:
        nbytes = parse_bytes(text)
    except kvortex.ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if nbytes == 0:
        raise argparse.ArgumentTypeError(f"1 byte or more is expected, got {shown(text)}")
    return nbytes


def _option(text):
    """A setting and its value: a number, true, false, or else a text."""
    name, is_there, value = text.partition("=")
    if not is_there:
        raise argparse.ArgumentTypeError(f"NAME=VALUE is expected, got {shown(text)}")
    with contextlib.suppress(ValueError):
        value = json.loads(value)
    return name, value


def _duration(text):
    found = re.fullmatch(r"(\d{1,9})([smhd])", text, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"a time such as 90s, 30m, 12h or 7d is expected, got {shown(text)}")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


def _rate(text):
    return 0 if text == "0" else _bytes(text)


def _share(text):
    try:
        share = float(text)
    except ValueError:
        share = -1
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is expected, got {shown(text)}")
    return share


def _folder(text):
    if not os.path.isdir(text) or not os.access(text, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"a folder that exists and is writable is expected, got {text!r}")
    return Path(text)


def _device(text):
    try:
        return parse_device(text)
    except kvortex.ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _fault(text):
    name, _, number = text.partition("=")
    if name != "corrupt":
        raise argparse.ArgumentTypeError(f"corrupt=N is expected, got {shown(text)}")
    return _count(number)
