"""What a replay is shown as: a line while it runs, a table and a JSON object when it is done."""

import json
import shutil
import sys
import time

_LATENCIES = ("lookup", "save", "load")


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
    }
    for name in _LATENCIES:
        for percentile in ("p50", "p99"):
            fields[f"{name}_latency_us_{percentile}"] = getattr(stats, f"{name}_latency_us_{percentile}")
    return fields


def write_json(path, fields):
    """Write `fields` as an indented JSON object."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(fields, file, indent=2)
        file.write("\n")


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
            f"{fields['policy'].upper()}",
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


class Progress:
    """A bar that redraws itself on a terminal; a plain line every ten seconds elsewhere."""

    def __init__(self, num_requests, out=None):
        self._num_requests = num_requests
        self._out = out if out is not None else sys.stderr
        self._is_terminal = self._out.isatty()
        self._interval_s = 0.1 if self._is_terminal else 10.0
        self._next_s = time.monotonic() + self._interval_s

    def __call__(self, result):
        """Show `result` if it is time to."""
        now = time.monotonic()
        done = result.requests
        if now < self._next_s and not (self._is_terminal and done == self._num_requests):
            return
        self._next_s = now + self._interval_s
        share = done / self._num_requests
        left_s = result.seconds / done * (self._num_requests - done)
        text = (
            f"{share:4.0%} {done:,}/{self._num_requests:,} requests  {done / result.seconds:,.0f}/s  "
            f"{left_s:.0f} s left  hits {_ratio(result.blocks_loaded, result.blocks_touched):.1%}  "
            f"wrong {result.wrong_blocks:,}"
        )
        if self._is_terminal:
            width = max(10, min(40, shutil.get_terminal_size().columns - len(text) - 4))
            bar = ("#" * round(width * share)).ljust(width, ".")
            text = f"\r[{bar}] {text}\x1b[K" + ("\n" if done == self._num_requests else "")
        else:
            text += "\n"
        self._out.write(text)
        self._out.flush()


def _ratio(part, whole):
    return part / whole if whole else 0.0


def _bytes(count):
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"
