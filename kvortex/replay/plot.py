"""The pictures: of a replay, hit ratio and bandwidth over time; of a sweep, hit ratio against pool size."""

import importlib.util

import numpy as np

import kvortex
from kvortex.config import bytes_text
from kvortex.slots import stride_bytes

NUM_BINS = 80
SUFFIXES = (".png", ".svg", ".pdf")


def require_suffix(path):
    """Refuse a file whose suffix names no format that is drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise kvortex.ConfigError(f"a picture is {', '.join(SUFFIXES)}, as its suffix says; got {str(path)!r}")


def require_matplotlib():
    """Raise ImportError with the next step if pictures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('drawing needs matplotlib: pip install "kvortex[plot]"')


def bins(samples, block_bytes, num_bins=NUM_BINS):
    """Cut the samples of a `ReplayResult` into spans of equal time.

    Returns
    -------
    edges_s : numpy.ndarray
        ``(m + 1,)`` seconds.
    hit_ratio, load_gbps, save_gbps : numpy.ndarray
        ``(m,)`` per span; nan where nothing was touched (moved).
    total_hit_ratio : numpy.ndarray
        ``(m,)`` from the start to the end of each span.
    """
    points = np.vstack([np.zeros((1, 6)), np.array(samples, dtype=float)])
    edges_s = np.linspace(0, points[-1, 0], min(num_bins, len(samples)) + 1)
    # Counters as they stood at each edge: those of the last request finished by then.
    at_edge = points[np.searchsorted(points[:, 0], edges_s, side="right") - 1]
    at_edge[-1] = points[-1]
    touched, loaded, saved, load_s, save_s = np.diff(at_edge[:, 1:], axis=0).T
    with np.errstate(divide="ignore", invalid="ignore"):
        hit_ratio = np.where(touched > 0, loaded / touched, np.nan)
        total_hit_ratio = np.where(at_edge[1:, 1] > 0, at_edge[1:, 2] / at_edge[1:, 1], np.nan)
        load_gbps = np.where(load_s > 0, loaded * block_bytes / 1e9 / load_s, np.nan)
        save_gbps = np.where(save_s > 0, saved * block_bytes / 1e9 / save_s, np.nan)
    return edges_s, hit_ratio, load_gbps, save_gbps, total_hit_ratio


def write_picture(path, result, fields):
    """Draw `result` into a file of the format that its suffix names; `fields` is its `report.summary`."""
    require_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: no display and no global state

    edges_s, hit_ratio, load_gbps, save_gbps, total_hit_ratio = bins(result.samples, result.block_bytes)
    figure = Figure(figsize=(10, 6.5), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    checked = f"{fields['wrong_blocks']:,} wrong blocks" if fields["verified"] else "not verified"
    figure.suptitle(
        f"{fields['trace']} on {fields['device']}: {fields['requests']:,} requests, "
        f"{fields['blocks_touched']:,} blocks touched, {checked}\n"
        f"pool of {fields['pool_blocks']:,} blocks of {fields['block_bytes'] / 1024:,.0f} KiB, "
        f"{fields['policy'].upper()}",
        fontsize=11,
        parse_math=False,  # the name of a trace may have dollars in it
    )
    middle_s = (edges_s[:-1] + edges_s[1:]) / 2
    top.stairs(100 * hit_ratio, edges_s, fill=True, color="#9ecae1", label="each moment")
    top.plot(
        edges_s[1:],
        100 * total_hit_ratio,
        color="#08519c",
        linewidth=2,
        label=f"since the start, {fields['prefix_hit_block_ratio']:.1%} at the end",
    )
    top.set_ylabel("prefix hits (% of blocks)")
    top.set_ylim(0, 100)
    bottom.plot(middle_s, load_gbps, color="#2ca25f", label=f"load, {fields['load_gbps']:.1f} GB/s overall")
    bottom.plot(middle_s, save_gbps, color="#d95f0e", label=f"save, {fields['save_gbps']:.1f} GB/s overall")
    bottom.set_ylabel("bandwidth while moving (GB/s)")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("time since the start of the replay (s)")
    bottom.set_xlim(0, edges_s[-1])
    for axes in (top, bottom):
        axes.grid(True, color="#dddddd")
        axes.set_axisbelow(True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)
    figure.savefig(path, format=path.suffix[1:].lower())


def write_sweep_picture(path, fields):
    """Draw a `report.sweep_summary` into a file of the format that its suffix names."""
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    sizes = [point["pool_blocks"] for point in fields["points"]]
    best = 100 * fields["unbounded_block_ratio"]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    figure.suptitle(
        f"{fields['trace']}: {fields['requests']:,} requests, {fields['blocks_touched']:,} blocks touched, "
        f"{fields['distinct_blocks']:,} different ones",
        fontsize=11,
        parse_math=False,  # the name of a trace may have dollars in it
    )
    axes.axhline(best, color="#999999", linestyle=":", label=f"a pool that never evicts, {best:.1f} %")
    for policy, label, color, above in (("belady", "Belady's bound", "#d95f0e", 6), ("lru", "LRU", "#08519c", -13)):
        hits = [100 * point[f"{policy}_block_ratio"] for point in fields["points"]]
        axes.plot(sizes, hits, marker="o", color=color, label=label)
        if len(sizes) <= 12:
            for size, hit in zip(sizes, hits, strict=True):
                axes.annotate(
                    f"{hit:.1f}", (size, hit), (0, above), textcoords="offset points", ha="center", fontsize=8
                )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("pool (blocks)")
    if fields["block_bytes"] is not None:
        gib = stride_bytes(fields["block_bytes"]) / (1 << 30)
        above = axes.secondary_xaxis("top", functions=(lambda blocks: blocks * gib, lambda size: size / gib))
        above.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        above.set_xlabel(f"pool (GiB, blocks of {bytes_text(fields['block_bytes'])})")
    axes.set_ylabel("prefix hits (% of blocks)")
    axes.set_ylim(0, min(100, 1.2 * best + 1))
    axes.grid(True, color="#dddddd")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(path, format=path.suffix[1:].lower())
