"""The result of `python -m bench.gpu` as text."""

from bench.gpu.link import GIB, KIB, MIB


def size(nbytes):
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes // KIB} KiB"


def describe(line):
    name = {"separate": "separate allocations", "even": "one allocation", "apart": "one allocation, K and V apart"}
    gather = f", gathered by {line['gather_ctas']} CTAs" if line["gather_ctas"] else ""
    return f"{name.get(line['shape'], line['shape'])}{gather}"


def verdict(found, reach):
    """Ratios beside what they are to reach; an exclamation mark where they do not."""
    return " / ".join(
        f"{ratio:.2f}{'!' if ratio < wanted else ''}" for ratio, wanted in zip(found, reach or (0, 0), strict=True)
    )


def show(result):
    print(f"{result['device']}, {result['driver']}, {result['date']}, `{result['command']}`\n")
    print("| cache | pieces | save / load GB/s | limit | ratio | to reach | to one batch call | to batches of 128 |")
    print("|---|---|---|---|---|---|---|---|")
    for line in result["rows"]:
        pairs = {key: [line[f"{direction}_{key}"] for direction in ("save", "load")] for key in
                 ("gbps", "limit_gbps", "to_limit", "to_batch", "to_batches")}  # fmt: skip
        cells = [describe(line), f"{line['pieces']} x {size(line['piece_bytes'])}"]
        cells += [" / ".join(f"{value:.1f}" for value in pairs[key]) for key in ("gbps", "limit_gbps")]
        cells += [verdict(pairs["to_limit"], line["reach"]), " / ".join(f"{value:.2f}" for value in line["reach"])]
        cells += [" / ".join(f"{value:.2f}" for value in pairs[key]) if None not in pairs[key] else "" for key in
                  ("to_batch", "to_batches")]  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    print(
        f"\nProbe of the planner: at most {max(line.get('probe_seconds', 0) for line in result['rows']):.3f} s a layout"
    )
    times = result["latency"]
    print(
        "One 2 MiB block of 64 pieces, call to done, us p50 / p99: "
        + ", ".join(
            f"{name.replace('_', ' ')} {times[f'{name}_us_p50']:.0f} / {times[f'{name}_us_p99']:.0f}"
            for name in ("save", "load", "contiguous_save", "contiguous_load")
        )
    )
    for line in result["host_cost"]:
        print(
            f"Host time a block, batches of {line['blocks']}, {describe(line)}, {line['pieces']} x "
            f"{size(line['piece_bytes'])}: save {line['save_us_a_block']:.2f}, load {line['load_us_a_block']:.2f} us; "
            f"batch calls alone {line['save batches_us_a_block']:.2f}, {line['load batches_us_a_block']:.2f} us"
        )
    pool = result["pinning"]
    for name, what in (("", "huge pages"), ("small_pages_", "4 KiB pages")):
        print(
            f"Pinned pool of {size(pool['bytes'])}, {what}: first slot after "
            f"{pool[name + 'first_slot_seconds']:.3f} s, whole after {pool[name + 'ready_seconds']:.2f} s, "
            f"longest driver call {pool[name + 'longest_call_seconds']:.3f} s; "
            f"one cuMemHostAlloc {pool['driver_seconds']:.2f} s: "
            f"{pool['driver_seconds'] / pool[name + 'ready_seconds']:.1f}x"
        )
    if result["compute"]:
        print("\n| kernel | direction | way | GB/s | slowdown % | noise % |\n|---|---|---|---|---|---|")
    for point in result["compute"]:
        cells = [point["kernel"], point["direction"], point["way"], f"{point['gbps']:.1f}"]
        print(f"| {' | '.join(cells)} | {point['slowdown_percent']:.1f} | {point['noise_percent']:.1f} |")
