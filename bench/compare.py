"""`make bench-baseline` and `make bench-compare`: medians of this tree beside those stored on the same machine.

    python bench/compare.py store DIR [pytest arguments]    run the benchmarks and store their medians
    python bench/compare.py check DIR [pytest arguments]    run them; exit 1 if one is more than 10 % slower

pytest-benchmark stores and compares too, but it takes all machines with the same Python for one, passes when nothing is
stored, and names what was slower without the figures from before.

A shared machine has slow moments and a process may be unlucky with its memory, but a real slowdown is there each time.
So a baseline is the best median of three runs, each in a process of its own, and what looks slower is run again, up to
four times: slower is what was slower every time. Benchmarks of other people's code (marker `peer`) are left out.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import kvortex

ROOT = Path(__file__).resolve().parents[1]
LIMIT_PERCENT = 10
BASELINE_RUNS = 3
MOST_RUNS = 5


def this_machine():
    """What must be the same for two medians to be comparable."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    with kvortex.Device.open(os.environ.get("KVORTEX_BENCH_DEVICE", "auto")) as device:
        description = f"{device.name}, {device.description}"
    return {
        "host": platform.node(),
        "processor": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "device": description,
        "python": platform.python_version(),
    }


def path_of(folder, machine):
    return Path(folder, re.sub(r"[^\w.]+", "-", "_".join(machine.values())) + ".json")


def warn_if_busy():
    load, cores = os.getloadavg()[0], os.cpu_count()
    if load > cores:
        print(f"This machine is busy (load {load:.1f} on {cores} cores): what is measured now says little.", flush=True)


def run(pytest_arguments, benchmarks=("bench",)):
    """Run benchmarks once, in a process of its own; the figure of each by name: less is better."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "raw.json")
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", "--benchmark-quiet", "-m", "not peer"]
        command += ["-p", "no:cacheprovider", f"--benchmark-json={report}", *benchmarks, *pytest_arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}\nThe benchmarks did not pass, so nothing was stored or compared.")
        found = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    return {each["fullname"]: figure_of(each) for each in found}


def figure_of(benchmark):
    """The median time, or a value of which less is better, such as bytes of an entry (see bench/table.py)."""
    extra = benchmark["extra_info"]
    if "value" in extra and not extra["unit"].endswith("/s"):
        return extra["value"]
    return benchmark["stats"]["median"]


def store(folder, pytest_arguments):
    runs = []
    for number in range(BASELINE_RUNS):
        print(f"run {number + 1} of {BASELINE_RUNS}", flush=True)
        runs.append(run(pytest_arguments))
    medians = {name: min(each[name] for each in runs) for name in runs[0]}
    machine = this_machine()
    path = path_of(folder, machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "medians": medians}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(medians)} medians stored in {path}")


def check(folder, pytest_arguments):
    machine = this_machine()
    path = path_of(folder, machine)
    if not path.exists():
        sys.exit(
            f"There is no baseline of this machine ({', '.join(machine.values())}) in {folder}, so nothing can be "
            f"compared. Check out what to compare with, run `make bench-baseline` there, come back, and try again."
        )
    before = json.loads(path.read_text(encoding="utf-8"))["medians"]
    now, suspects = {}, ["bench"]
    for number in range(MOST_RUNS):
        for name, figure in run(pytest_arguments if number == 0 else [], suspects).items():
            now[name] = min(figure, now.get(name, figure))
        suspects = [name for name in now if name in before and percent_slower(before, now, name) > LIMIT_PERCENT]
        if not suspects:
            break
        if number + 1 < MOST_RUNS:
            print(f"{len(suspects)} of {len(now)} look slower; running them again", flush=True)
    compared = now.keys() & before.keys()
    for name in sorted(now.keys() - before.keys()):
        print(f"not in the baseline, not compared: {name}")
    for name in sorted(before.keys() - now.keys()) if not pytest_arguments else ():
        print(f"in the baseline, but not run: {name}")
    for name in suspects:
        print(
            f"SLOWER: {name} took {text_of(before[name])} in the baseline and takes {text_of(now[name])} now, "
            f"{percent_slower(before, now, name):.0f} % more (limit {LIMIT_PERCENT} %)"
        )
    if not compared:
        sys.exit("None of the benchmarks that ran is in the baseline: store a new one with `make bench-baseline`.")
    if suspects:
        sys.exit(
            f"{len(suspects)} of {len(compared)} benchmarks are more than {LIMIT_PERCENT} % slower than in {path}, "
            f"in each of {MOST_RUNS} runs. If that is meant, store a new baseline with `make bench-baseline`."
        )
    print(f"None of {len(compared)} benchmarks is more than {LIMIT_PERCENT} % slower than the baseline in {path}.")


def percent_slower(before, now, name):
    return (now[name] / before[name] - 1) * 100


def text_of(figure):
    """Values, whose unit the name tells, are above 1; so are benchmarks of seconds."""
    return f"{figure * 1e6:.4g} us" if figure < 1 else f"{figure:.4g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["store", "check"])
    parser.add_argument("folder", help="where baselines lie, one file a machine")
    options, pytest_arguments = parser.parse_known_args()
    warn_if_busy()
    {"store": store, "check": check}[options.verb](options.folder, pytest_arguments)


if __name__ == "__main__":
    main()
