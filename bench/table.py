"""One table of a benchmark run: `python bench/table.py RAW.json [--json FILE]`, RAW.json being from `--benchmark-json`.

A benchmark says in its `extra_info` what the table shows of it (fixture `row` of bench/conftest.py); one that says
nothing gets a line with its name and its median time. All keys may be left out:

row         what was done
side        "KVortex..." (default: "KVortex"), or who or what else did the same: a peer, a limit
group       KVortex's benchmarks are compared with every other side of the same group
operations  done in one round: the figure is then operations / median, in `unit`s a second ("bytes" gives GB/s)
value       a figure that is not the benchmark's time, in `unit`s; more is better if that is per second, else less
unit        "keys", "tokens", "bytes", ...; for a value also "keys/s", "B", ...
against     the `row` of another benchmark of KVortex to compare with; or, if there is a
ratio       measured by the benchmark itself, the words for what it is to, such as "1 thread"
batch       keys in one call: the smallest batch from which on KVortex is faster stands below the table
target      "> 1x" or ">= 10x" of the other side, ">= 20 M" operations a second, "<= 60 us", "<= 80 B"
in_table    False: only in the JSON, and in the lines below the table
"""

import argparse
import json
import operator
import re
from pathlib import Path

OURS = "KVortex"
SCALES = {"k": 1e3, "M": 1e6, "G": 1e9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "B": 1.0, "": 1.0}
TARGET = re.compile(r"(>=|>|<=) ([\d.]+)(x| ?[a-zA-Z]*)")
HOLDS = {">=": operator.ge, ">": operator.gt, "<=": operator.le}


def is_ours(benchmark):
    return benchmark["extra_info"].get("side", OURS).startswith(OURS)


def figure_of(benchmark):
    """Figure and kind ("rate", "seconds" or "value") of one benchmark."""
    extra = benchmark["extra_info"]
    if "value" in extra:
        return extra["value"], "rate" if extra["unit"].endswith("/s") else "value"
    median = benchmark["stats"]["median"]
    return (extra["operations"] / median, "rate") if "operations" in extra else (median, "seconds")


def text_of(figure, kind, unit):
    if kind == "value":
        return f"{figure:.0f} {unit}"
    if kind == "seconds":
        scale = next((name for name in ("s", "ms") if figure >= SCALES[name]), "us")
        return f"{figure / SCALES[scale]:.3g} {scale}"
    if unit == "bytes":
        return f"{figure / 1e9:.3g} GB/s"
    scale = next((name for name in ("G", "M", "k") if figure >= SCALES[name]), "")
    return f"{figure / SCALES[scale]:.3g} {scale} {unit}/s".replace("  ", " ")


def ratio_text(ratio):
    return "" if ratio is None else f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def is_met(target, figure, ratio):
    """Whether the target is reached; None when it is one against a side that was not run."""
    how, number, unit = TARGET.fullmatch(target).groups()
    if unit == "x":
        return None if ratio is None else HOLDS[how](ratio, float(number))
    return HOLDS[how](figure, float(number) * SCALES[unit.strip()])


def rows_of(benchmarks):
    """A row for each pair of a KVortex benchmark and another side of its group."""
    rows = []
    for benchmark in benchmarks:
        extra = benchmark["extra_info"]
        if not is_ours(benchmark):
            continue
        figure, kind = figure_of(benchmark)
        unit = extra.get("unit", "calls").removesuffix("/s")
        others = []
        for other in benchmarks:
            info = other["extra_info"]
            same_group = not is_ours(other) and info["group"] == extra.get("group")
            if same_group or "row" in info and "ratio" not in extra and info["row"] == extra.get("against"):
                theirs, _ = figure_of(other)
                ratio = figure / theirs if kind == "rate" else theirs / figure
                others.append((info["side"] if same_group else info["row"], theirs, ratio))
        for side, theirs, ratio in others or [(extra.get("against"), None, extra.get("ratio"))]:
            target = extra.get("target")
            rows.append(
                {
                    "what": extra.get("row", benchmark["name"].removeprefix("test_").replace("_", " ")),
                    "group": extra.get("group"),
                    "batch": extra.get("batch"),
                    "kind": kind,
                    "unit": unit,
                    "side": extra.get("side", OURS),
                    "kvortex": figure,
                    "other_side": side,
                    "other": theirs,
                    "ratio": ratio,
                    "target": target,
                    "met": target and is_met(target, figure, ratio),
                    "in_table": extra.get("in_table", True),
                }
            )
    # What is compared stands together, in the order of the first row of each group.
    groups = list(dict.fromkeys(row["group"] for row in rows))
    return sorted(rows, key=lambda row: groups.index(row["group"]))


def crossovers_of(rows):
    """For each comparison over several batch sizes, the smallest batch from which on KVortex is faster."""
    series = {}
    for row in rows:
        if row["batch"] and row["ratio"]:
            series.setdefault((row["group"], row["side"], row["other_side"]), []).append((row["batch"], row["ratio"]))
    found = []
    for (group, side, other_side), points in series.items():
        first = None
        for batch, ratio in sorted(points, reverse=True):
            if ratio <= 1:
                break
            first = batch
        ratios = dict(sorted(points))
        found.append({"group": group, "side": side, "other_side": other_side, "batch": first, "ratios": ratios})
    return found


def print_table(rows):
    lines = [["what", OURS, "peer or limit", "ratio", "target"]]
    for row in rows:
        if not row["in_table"]:
            continue
        met = {True: ", met", False: ", MISSED", None: ""}[row["met"]]
        other = row["other_side"]
        if row["other"] is not None:
            other += f": {text_of(row['other'], row['kind'], row['unit'])}"
        lines.append(
            [
                row["what"],
                text_of(row["kvortex"], row["kind"], row["unit"]),
                other or "",
                ratio_text(row["ratio"]),
                f"{row['target']}{met}" if row["target"] else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def print_crossovers(crossovers):
    for found in crossovers:
        where = f"from a batch of {found['batch']} up" if found["batch"] else "at no batch size measured"
        ratios = ", ".join(f"{batch}: {ratio_text(ratio)}" for batch, ratio in found["ratios"].items())
        print(f"{found['group']}: {found['side']} is faster than {found['other_side']} {where} ({ratios})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("raw", type=Path, help="what pytest's --benchmark-json wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args()
    if options.json and options.json.exists() and options.json.samefile(options.raw):
        parser.error(f"--json {options.json} is what is read, and would be overwritten: give another file")
    raw = json.loads(options.raw.read_text(encoding="utf-8"))
    machine = raw["machine_info"]
    rows = rows_of(raw["benchmarks"])
    crossovers = crossovers_of(rows)
    cpu = f"{machine['cpu'].get('count', '?')} x {machine['cpu'].get('brand_raw', 'unknown processor')}"
    print(f"\n{machine['device']}; {cpu}; Python {machine['python_version']}; {raw['datetime'][:10]}; medians\n")
    print_table(rows)
    print()
    print_crossovers(crossovers)
    judged = [row for row in rows if row["met"] is not None]
    print(f"{sum(row['met'] for row in judged)} of {len(judged)} targets met")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine, "datetime": raw["datetime"], "rows": rows, "crossovers": crossovers}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
