"""Two pictures of a result of `python -m bench.gpu`: rate against piece size, and what a transfer costs the compute."""

import os

COLOURS = {
    "KVortex, one allocation": "#08519c",
    "KVortex, separate allocations": "#3182bd",
    "KVortex, separate, gather 4 CTAs": "#6baed6",
    "one batch call": "#d95f0e",
    "piece loop": "#636363",
}
DIRECTIONS = (("save", "GPU to host"), ("load", "host to GPU"))


def rates(result, path):
    from matplotlib.figure import Figure  # no pyplot: no display and no global state

    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    figure.suptitle(f"Scattered blocks between GPU and pinned host memory: {result['device']}")
    for panel, (direction, title) in zip(panels, DIRECTIONS, strict=True):
        limit = max(point[f"{direction}_limit_gbps"] for point in result["sweep"])
        panel.axhline(limit, color="black", linestyle="--", linewidth=1, label="one contiguous copy")
        for name, colour in COLOURS.items():
            points = [point for point in result["sweep"] if point["way"] == name]
            sizes = [point["piece_bytes"] / 1024 for point in points]
            panel.plot(sizes, [point[f"{direction}_gbps"] for point in points], "o-", color=colour, label=name)
        panel.set_xscale("log", base=2)
        ticks = sorted({point["piece_bytes"] // 1024 for point in result["sweep"]})
        panel.set_xticks(ticks, ticks)
        panel.set_xlabel("piece, KiB")
        panel.set_title(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("GB/s")
    panels[1].legend(loc="lower right", fontsize=8)
    figure.savefig(path)


def slowdown(result, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    figure.suptitle(f"What a transfer costs the kernel beside it: {result['device']}")
    titles = {"gemm": "8192³ bf16 GEMM", "memory": "addition bound by device memory"}
    styles = {"contiguous": ("black", "x"), "strided": ("#08519c", "o"), "batch": ("#3182bd", "s")}
    for row, kernel in zip(panels, titles, strict=True):
        for panel, (direction, arrow) in zip(row, DIRECTIONS, strict=True):
            drawn = set()
            for point in result["compute"]:
                if (point["kernel"], point["direction"]) != (kernel, direction):
                    continue
                for way, prefix in ((point["way"], ""), ("contiguous", "contiguous_")):
                    kind = "contiguous copies" if prefix else f"KVortex, {way}"
                    colour, marker = styles.get(way, ("#d95f0e", "^" if " 4 " in way else "v"))
                    label = None if kind in drawn else kind
                    drawn.add(kind)
                    place = point[f"{prefix}gbps"], point[f"{prefix}slowdown_percent"]
                    panel.plot(*place, marker, color=colour, label=label)
            panel.axhline(0, color="grey", linewidth=0.8)
            panel.set_title(f"{titles[kernel]}, {arrow}", fontsize=10)
            panel.grid(alpha=0.3)
            panel.set_xlim(0, 58)
    for panel in panels[1]:
        panel.set_xlabel("GB/s of the transfer")
    for row in panels:
        row[0].set_ylabel("slowdown, %")
    panels[0][1].legend(fontsize=8)
    figure.savefig(path)


def draw(result, folder):
    """Write what the result has the numbers for; returns the files."""
    os.makedirs(folder, exist_ok=True)
    files = []
    for key, name, write in (("sweep", "rate.png", rates), ("compute", "slowdown.png", slowdown)):
        if result.get(key):
            files.append(os.path.join(folder, name))
            write(result, files[-1])
    return files
