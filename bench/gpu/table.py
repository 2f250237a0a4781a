"""The result of `python -m bench.gpu` as text."""

from bench.gpu.link import GIB, KIB, MIB

MOST_POINTS = 1.0  # that a transfer may slow a kernel more than contiguous copies of as many bytes a second do


def size(nbytes):
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes // KIB} KiB"


def describe(line):
    name = {"separate": "separate allocations", "even": "one allocation", "apart": "one allocation, K and V apart"}
    gather = f", gathered by {line['gather_ctas']} CTAs" if line["gather_ctas"] else ""
    return f"{name.get(line['shape'], line['shape'])}{gather}"


def pair(values, digits=1):
    return " / ".join(f"{value:.{digits}f}" for value in values)


def verdict(found, reach):
    """Ratios beside what they are to reach; an exclamation mark where they do not."""
    return " / ".join(
        f"{ratio:.2f}{'!' if ratio < wanted else ''}" for ratio, wanted in zip(found, reach or (0, 0), strict=True)
    )


def show(result):
    """Print it as Markdown, to be pasted as it is."""
    print(f"{result['device']}, {result['driver']}, {result['date']}, `{result['command']}`; `!`: a target missed.\n")
    print("| cache | pieces of a block | save / load GB/s | limit | of the limit | target | over one batch call |")
    print("|---|---|---|---|---|---|---|")
    for line in result["rows"]:
        pairs = {key: [line[f"{direction}_{key}"] for direction in ("save", "load")] for key in
                 ("gbps", "limit_gbps", "to_limit", "to_batch")}  # fmt: skip
        cells = [describe(line), f"{line['pieces']} x {size(line['piece_bytes'])}"]
        cells += [pair(pairs["gbps"]), pair(pairs["limit_gbps"])]
        cells += [verdict(pairs["to_limit"], line["reach"]), pair(line["reach"], 2)]
        cells += ["" if None in pairs["to_batch"] else " / ".join(f"{value:.1f}x" for value in pairs["to_batch"])]
        print(f"| {' | '.join(cells)} |")
    print()
    show_latency(result["latency"])
    for line in result["host_cost"]:
        show_host_cost(line)
    probe_s = max(line.get("probe_seconds", 0) for line in result["rows"])
    print(f"* Probe of the planner: at most {probe_s:.3f} s a layout.")
    show_pinning(result["pinning"])
    if result["compute"]:
        show_compute(result["compute"])


def show_latency(times):
    texts = [
        f"{name.replace('_', ' ')} {times[f'{name}_us_p50']:.0f} / {times[f'{name}_us_p99']:.0f}"
        for name in ("save", "load", "contiguous_save", "contiguous_load")
    ]
    print(f"* One 2 MiB block of 64 pieces in one allocation, call to done, us p50 / p99: {', '.join(texts)}.")


def show_host_cost(line):
    """Ours, then what the driver's own calls take; its batches last, as they are what a strided block does without."""
    theirs = []
    for name, what in (("strided", "one cuMemcpy2DAsync a block"), ("batches", "batch calls")):
        pair_of_them = [line.get(f"{direction} {name}_us_a_block") for direction in ("save", "load")]
        if None not in pair_of_them:
            theirs.append(f"{what} {pair(pair_of_them, 2)}")
    print(
        f"* Host time a block, in batches of {line['blocks']}, {describe(line)}, {line['pieces']} x "
        f"{size(line['piece_bytes'])}, us save / load: {pair([line['save_us_a_block'], line['load_us_a_block']], 2)}; "
        f"the driver alone: {', '.join(theirs)}."
    )


def show_pinning(pool):
    for name, what in (
        ("cold_", "huge pages, memory that may never have been used"),
        ("warm_", "huge pages, memory used before"),
        ("small_pages_", "4 KiB pages, memory used before"),
    ):
        if f"{name}ready_seconds" not in pool:
            continue
        print(
            f"* Pinned pool of {size(pool['bytes'])}, {what}: first slot after "
            f"{pool[name + 'first_slot_seconds']:.3f} s, whole after {pool[name + 'ready_seconds']:.2f} s, longest "
            f"driver call {pool[name + 'longest_call_seconds']:.3f} s; "
            f"{pool['driver_seconds'] / pool[name + 'ready_seconds']:.1f}x faster than one cuMemHostAlloc "
            f"({pool['driver_seconds']:.2f} s, memory used before)."
        )


def show_compute(points):
    """A line for each save and the load after it: slowdowns of the kernel, and what ours adds to contiguous copies."""
    print("\n| kernel beside it | moved by | save / load GB/s | slowdown, % | by contiguous copies, % |", end="")
    print(" difference, points (quartiles) |\n|---|---|---|---|---|---|")
    for points_of_line in zip(points[::2], points[1::2], strict=True):
        cells = [points_of_line[0]["kernel"], points_of_line[0]["way"]]
        cells += [
            pair([point[key] for point in points_of_line])
            for key in ("gbps", "slowdown_percent", "contiguous_slowdown_percent")
        ]
        differences = []
        for point in points_of_line:
            first, third = point["difference_quartiles"]
            missed = "!" if point["difference_points"] > MOST_POINTS else ""
            differences.append(f"{point['difference_points']:.1f}{missed} ({first:.1f} to {third:.1f})")
        print(f"| {' | '.join([*cells, ' / '.join(differences)])} |")
