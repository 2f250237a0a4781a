"""What a replay is shown as: a line while it runs, a table and a JSON object when it is done."""

import contextlib
import json
import os
import shutil
import sys
import time
from collections import Counter

from kvortex.slots import stride_bytes

_LATENCIES = ("lookup", "save", "load")
_LEAST_BAR = 13  # ten cells, two brackets and a space


def summary(result, options, trace_name):
    """Return the result as a dict of plain numbers and strings; ratios are 0 to 1, rates 1e9 bytes per second."""
    stats = result.stats
    fields = {
        "trace": trace_name,
        "requests": result.requests,
        "blocks_touched": result.blocks_touched,
        "blocks_saved": result.blocks_saved,
        "blocks_loaded": result.blocks_loaded,
        "blocks_evicted": result.blocks_evicted,
        "wrong_blocks": result.wrong_blocks,
        "verified": options.verify,
        "corrupted_slots": result.corrupted_slots,
        "prefix_hit_block_ratio": _ratio(result.blocks_loaded, result.blocks_touched),
        "prefix_hit_token_ratio": _ratio(result.tokens_loaded, result.tokens),
        "input_tokens": result.tokens,
        "save_gbps": _ratio(result.blocks_saved * result.block_bytes / 1e9, result.save_busy_s),
        "load_gbps": _ratio(result.blocks_loaded * result.block_bytes / 1e9, result.load_busy_s),
        "seconds": result.seconds,
        "ready_seconds": result.ready_seconds,
        "device": result.device,
        "device_description": result.device_description,
        "policy": "lru",
        "pool_blocks": result.pool_blocks,
        "pool_bytes": options.cpu_pool_size_bytes,
        "block_bytes": result.block_bytes,
        "pieces_per_block": options.num_pieces,
        "inflight": options.inflight,
        "engines": options.engines,
    }
    for name in _LATENCIES:
        for percentile in ("p50", "p99"):
            fields[f"{name}_latency_us_{percentile}"] = getattr(stats, f"{name}_latency_us_{percentile}")
    if options.has_tier:
        fields |= _tier_fields(result, "disk" if options.remote is None else "remote")
    return fields


def _tier_fields(result, name):
    """What became of blocks on the way to the tier and back, of all engines together; `name` begins the fields."""

    def total(what):
        return sum(getattr(tier, what) for tier in result.tiers)

    fields = {
        "hit_block_ratio": _ratio(result.blocks_from_tier, result.blocks_touched),
        "blocks": result.tiers[0].blocks_capacity,
        "blocks_admitted": total("blocks_admitted"),
        "blocks_not_admitted": total("blocks_not_admitted"),
        "blocks_written": total("blocks_written"),
        "blocks_written_beyond": total("blocks_written_beyond"),
        "blocks_not_written": total("blocks_not_written"),
        "blocks_promoted": total("blocks_promoted"),
        "blocks_evicted": total("blocks_evicted"),
        "bytes_written": total("bytes_written"),
        "bytes_read": total("bytes_read"),
        "misses": dict(sum((Counter(tier.misses) for tier in result.tiers), Counter())),
        "io": result.tiers[0].io,
    }
    return {
        "tier": name,
        "ram_hit_block_ratio": _ratio(result.blocks_loaded - result.blocks_from_tier, result.blocks_touched),
        "blocks_loaded_from_ram": result.blocks_loaded - result.blocks_from_tier,
        f"blocks_loaded_from_{name}": result.blocks_from_tier,
        "blocks_dropped_dirty": result.blocks_dropped,
        **{f"{name}_{what}": value for what, value in fields.items()},
    }


def json_text(fields):
    """Return `fields` as an indented JSON object."""
    return json.dumps(fields, indent=2)


def table(fields):
    """Return the final table as text."""
    checked = f"{fields['wrong_blocks']:,}" if fields["verified"] else "not checked (--no-verify)"
    if fields["corrupted_slots"]:
        checked += f"  ({fields['corrupted_slots']:,} slots corrupted on purpose)"
    pool_bytes = fields["pool_blocks"] * fields["block_bytes"]
    rows = [
        ("trace", fields["trace"]),
        ("device", f"{fields['device']} ({fields['device_description']})"),
        (
            "pool",
            f"{fields['pool_blocks']:,} blocks of {_bytes(fields['block_bytes'])} = {_bytes(pool_bytes)}, "
            f"{fields['policy'].upper()}"
            + (f", in each of {fields['engines']} engines" if fields["engines"] > 1 else ""),
        ),
        ("requests", f"{fields['requests']:,} in {fields['seconds']:.1f} s"),
        ("blocks touched", f"{fields['blocks_touched']:,}"),
        ("blocks loaded", f"{fields['blocks_loaded']:,}"),
        ("blocks saved", f"{fields['blocks_saved']:,}"),
        ("blocks evicted", f"{fields['blocks_evicted']:,}"),
        (
            "hit ratio",
            f"{fields['prefix_hit_block_ratio']:.2%} of blocks, {fields['prefix_hit_token_ratio']:.2%} of tokens",
        ),
        *_tier_rows(fields),
        ("save / load rate", f"{fields['save_gbps']:.2f} / {fields['load_gbps']:.2f} GB/s"),
        *(
            (
                f"{name} latency",
                f"p50 {fields[f'{name}_latency_us_p50']:,.1f} us, p99 {fields[f'{name}_latency_us_p99']:,.1f} us",
            )
            for name in _LATENCIES
        ),
        ("wrong blocks", checked),
    ]
    return "\n".join(f"  {name:<18}{value}" for name, value in rows)


def _tier_rows(fields):
    if "tier" not in fields:
        return []
    name = fields["tier"]
    of = {what.removeprefix(f"{name}_"): value for what, value in fields.items() if what.startswith(f"{name}_")}
    causes = [f"{count:,} {cause.lower().replace('_', ' ')}" for cause, count in sorted(of["misses"].items())]
    if name == "disk":
        hits, size = "hits on disk", f"{of['blocks']:,} blocks, I/O {of['io']}"
    else:
        hits, size = "hits in remote", f"{of['io']}, {of['blocks']:,} blocks may be known to be there"
    return [
        ("hits in RAM", f"{fields['ram_hit_block_ratio']:.2%} of blocks: {fields['blocks_loaded_from_ram']:,}"),
        (hits, f"{of['hit_block_ratio']:.2%} of blocks: {fields[f'blocks_loaded_from_{name}']:,}"),
        (name, size),
        (
            "written",
            f"{of['blocks_written']:,}, {of['blocks_written_beyond']:,} by an idle engine or flush; "
            f"{of['blocks_not_admitted']:,} not, for the budget",
        ),
        ("dropped dirty", f"{fields['blocks_dropped_dirty']:,} evicted before the {name} had them"),
        ("promoted", f"{of['blocks_promoted']:,}; not brought: {', '.join(causes) or 'none'}"),
    ]


class Bar:
    """One line that redraws itself on a terminal and never is longer than it; a line every ten seconds elsewhere."""

    def __init__(self, out=None):
        self._out = out if out is not None else sys.stderr
        self._is_terminal = self._out.isatty()
        self._interval_s = 0.1 if self._is_terminal else 10.0
        self._next_s = time.monotonic() + self._interval_s
        self._is_open = False  # whether the terminal's cursor stands in the line

    def show(self, share, text):
        """Show that `share`, 0 to 1, is done, if it is time to; `text` is called for the words behind it.

        Words that are set apart by two spaces are left out, from the last on, where the terminal is narrow.
        """
        now = time.monotonic()
        if now < self._next_s and not (self._is_terminal and share == 1):
            return
        self._next_s = now + self._interval_s
        words = [f"{share:4.0%} ", *text().split("  ")]
        if not self._is_terminal:
            self._write(words[0] + "  ".join(words[1:]) + "\n")
            return
        room = self._columns() - 1  # a terminal wraps when its last column is written
        while len(words) > 2 and _width(words) + _LEAST_BAR > room:
            words.pop()
        line, num_cells = words[0] + "  ".join(words[1:]), min(40, room - _width(words) - 3)
        if num_cells + 3 >= _LEAST_BAR:
            line = f"[{('#' * round(num_cells * share)).ljust(num_cells, '.')}] {line}"
        self._write(f"\r{line[:room]}\x1b[K")
        self._is_open = True

    def clear(self):
        """Take the line away: what follows is something else."""
        if self._is_open:
            self._write("\r\x1b[K")
            self._is_open = False

    def end(self):
        """Leave the line as it is, and go to the next."""
        if self._is_open:
            self._write("\n")
            self._is_open = False

    def _columns(self):
        """How wide the terminal is now: it may be resized at any time."""
        try:
            columns = os.get_terminal_size(self._out.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return columns or shutil.get_terminal_size().columns

    def _write(self, text):
        with contextlib.suppress(OSError):  # whoever read it is gone; the work goes on
            self._out.write(text)
            self._out.flush()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.end()


def _width(words):
    """Columns of a line without its bar."""
    return len(words[0]) + len("  ".join(words[1:]))


class Progress:
    """The bar of a replay."""

    def __init__(self, num_requests, bar):
        self._num_requests = num_requests
        self._bar = bar

    def pinning(self, share):
        """Show how much of the pool is pinned."""
        self._bar.show(min(0.99, share), lambda: "pinning the pool")

    def __call__(self, result):
        """Show `result` if it is time to."""
        done, total = result.requests, self._num_requests
        self._bar.show(
            done / total,
            lambda: (
                f"{done:,}/{total:,} requests  {done / result.seconds:,.0f}/s  "
                f"{result.seconds / done * (total - done):.0f} s left  "
                f"hits {_ratio(result.blocks_loaded, result.blocks_touched):.1%}  wrong {result.wrong_blocks:,}"
            ),
        )


def sweep_summary(result, trace_name, block_bytes=None):
    """Return a `SweepResult` as a dict of plain numbers; ratios are 0 to 1, bytes None without `block_bytes`."""

    def ratios(prefix, blocks, tokens):
        return {
            f"{prefix}_block_ratio": _ratio(blocks, result.blocks_touched),
            f"{prefix}_token_ratio": _ratio(tokens, result.tokens),
        }

    return {
        "trace": trace_name,
        "requests": result.requests,
        "blocks_touched": result.blocks_touched,
        "distinct_blocks": result.distinct_blocks,
        "input_tokens": result.tokens,
        "block_bytes": block_bytes,
        **ratios("unbounded", result.unbounded_blocks, result.unbounded_tokens),
        "points": [
            {
                "pool_blocks": point.pool_blocks,
                "pool_bytes": None if block_bytes is None else point.pool_blocks * stride_bytes(block_bytes),
                **ratios("lru", point.lru_blocks, point.lru_tokens),
                **ratios("belady", point.belady_blocks, point.belady_tokens),
            }
            for point in result.points
        ],
    }


def sweep_table(fields):
    """Return a `sweep_summary` as text."""
    pool_bytes = "" if fields["block_bytes"] is None else "pool"
    lines = [
        f"  {'trace':<18}{fields['trace']}",
        f"  {'requests':<18}{fields['requests']:,}, {fields['input_tokens']:,} tokens",
        f"  {'blocks touched':<18}{fields['blocks_touched']:,}, {fields['distinct_blocks']:,} different ones",
        "",
        f"  {'':>12}  {'hits, % of blocks':^19}  {'hits, % of tokens':^19}  {pool_bytes:>12}".rstrip(),
        f"  {'pool blocks':>12}  {'LRU':>8}  {'Belady':>9}  {'LRU':>8}  {'Belady':>9}",
    ]
    for point in fields["points"]:
        hits = [point[f"{policy}_{unit}_ratio"] for unit in ("block", "token") for policy in ("lru", "belady")]
        lines.append(f"  {point['pool_blocks']:>12,}  " + "  ".join(
            f"{100 * hit:>{width}.2f}" for hit, width in zip(hits, (8, 9, 8, 9), strict=True)
        ) + (f"  {_bytes(point['pool_bytes']):>12}" if pool_bytes else ""))  # fmt: skip
    blocks, tokens = (100 * fields[f"unbounded_{unit}_ratio"] for unit in ("block", "token"))
    lines.append(f"  {'unbounded':>12}  {blocks:>8.2f}  {blocks:>9.2f}  {tokens:>8.2f}  {tokens:>9.2f}")
    return "\n".join(lines)


def _ratio(part, whole):
    return part / whole if whole else 0.0


def _bytes(count):
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"
