"""Takes out one protection at a time and demands that the tests named for it notice.

A mutant is a file NAME.patch beside this one: a unified diff (paths from the root, after a/ and b/) under a header

    # removes: the wait for the caller's stream before a save
    # invariant: 5
    # tests: tests/engine/test_order.py::test_save_waits_for_the_stream tests/...

    # vllm: 0.32.0

The last line is for tests that need vLLM: they run in the environment that `make test-vllm` has made for this version.

Every test named must pass without the patch and turn red with it, by an assertion or by taking five times as long. An
import error, a build that fails, another exception, a crash or a test that does not exist is no kill: the mutant is
broken and somebody must look. Hunks may have moved in the file but must match it exactly, in one place.

All work happens in build/mutants: `clean` is the unchanged tree, built; each mutant gets a copy of it, so only what its
patch touches is compiled again.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASELINE_LIMIT_S = 600


class Broken(Exception):
    """The mutant could not be judged."""


@dataclass
class Mutant:
    name: str
    removes: str
    invariant: str
    tests: list
    hunks: list  # (path, line, old text, new text)
    vllm: str = ""  # version
    verdict: str = ""
    why: list = field(default_factory=list)
    seconds: float = 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="run just these")
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="the tree to take protections out of")
    parser.add_argument("--min-limit-s", type=float, default=20, help="least time that a test may take (20)")
    parser.add_argument("--vllm-venvs", type=Path, default=Path(".venv-vllm"), help="environments of vLLM, by version")
    options = parser.parse_args()
    root = options.root.resolve()
    work = root / "build" / "mutants"

    patches = sorted((root / "tests" / "mutants").glob("*.patch"))
    wanted = set(filter(None, options.only.split(",")))
    if unknown := wanted - {patch.stem for patch in patches}:
        sys.exit(f"no such mutant: {', '.join(sorted(unknown))}; there are: {', '.join(p.stem for p in patches)}")
    mutants = [read_mutant(patch) for patch in patches if not wanted or patch.stem in wanted]
    if not mutants:
        sys.exit(f"no mutants in {root / 'tests' / 'mutants'}")

    clean = make_clean_tree(root, work)
    pythons = {mutant.vllm: python_of(mutant.vllm, options.vllm_venvs) for mutant in mutants}
    tests = sorted({(mutant.vllm, test) for mutant in mutants for test in mutant.tests})
    limits = {(vllm, test): max(options.min_limit_s, 5 * baseline_s(clean, test, work, pythons[vllm]))
              for vllm, test in tests}  # fmt: skip
    for mutant in mutants:
        of_mutant = {test: limits[mutant.vllm, test] for test in mutant.tests}
        judge(mutant, clean, work, of_mutant, pythons[mutant.vllm])
        told = f"{mutant.verdict:9} {mutant.name:36} invariant {mutant.invariant:6} {mutant.seconds:4.0f} s  "
        print(told + "; ".join(mutant.why), flush=True)

    counts = {verdict: sum(m.verdict == verdict for m in mutants) for verdict in ("killed", "survived", "broken")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return counts["killed"] != len(mutants)


def read_mutant(patch):
    header, _, diff = patch.read_text().partition("\n--- ")
    fields = {"removes": [], "invariant": [], "tests": [], "vllm": []}
    for name, value in re.findall(r"^# (\w+): (.*)$", header, re.M):
        if name in fields:
            fields[name].append(value.strip())
    tests = " ".join(fields["tests"]).split()
    if not (fields["removes"] and fields["invariant"] and tests and diff):
        sys.exit(f"{patch}: needs the lines '# removes:', '# invariant:', '# tests:' and a unified diff")
    text = [" ".join(fields[name]) for name in ("removes", "invariant")]
    return Mutant(patch.stem, *text, tests, read_hunks("--- " + diff), *fields["vllm"])


def python_of(vllm, venvs):
    """The interpreter for tests that need this version of vLLM, or none."""
    if not vllm:
        return sys.executable
    python = (venvs / vllm / "bin" / "python").absolute()  # not resolved: the link is what makes the environment
    if not python.exists():
        sys.exit(f"there is no {python}; `make test-vllm` makes it")
    return str(python)


def read_hunks(diff):
    hunks, path = [], None
    for line in diff.splitlines(keepends=True):
        if line.startswith("+++ "):
            path = line[4:].split("\t")[0].strip().removeprefix("b/")
        elif line.startswith("@@ "):
            hunks.append([path, int(re.match(r"@@ -(\d+)", line)[1]), "", ""])
        elif hunks and not line.startswith(("--- ", "diff ", "index ", "\\")):
            hunks[-1][2] += line[1:] if line[0] in " -" else "" if line[0] == "+" else "\n"
            hunks[-1][3] += line[1:] if line[0] in " +" else "" if line[0] == "-" else "\n"
    return hunks


def apply(hunks, tree):
    """Apply all hunks or raise Broken; text is matched exactly, at its line or at the only other place."""
    for path, line, old, new in reversed(hunks):  # from the end, so that line numbers above stay true
        file = tree / path
        text = file.read_text() if file.exists() else ""
        start = sum(map(len, text.splitlines(keepends=True)[: line - 1]))
        if not text.startswith(old, start):
            if text.count(old) != 1:
                raise Broken(f"the patch does not apply: {path}:{line} matches {text.count(old)} places")
            start = text.index(old)
        file.write_text(text[:start] + new + text[start + len(old) :])


def make_clean_tree(root, work):
    """Mirror the sources into work/clean and build them there, starting from what is built in `root`."""
    spec = importlib.util.spec_from_file_location("tree", HERE.parents[1] / ".ci" / "tree.py")
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)
    clean = work / "clean"
    is_new = not clean.exists()
    tree.mirror(clean, root)
    if is_new:
        ours = shutil.ignore_patterns("mutants", "sanitize", "coverage", "annotate")
        if (root / "build").exists():
            shutil.copytree(root / "build", clean / "build", ignore=ours, dirs_exist_ok=True)
        for module in (root / "kvortex").rglob("*.so"):
            shutil.copy2(module, clean / module.relative_to(root))
    if (log := build(clean)) is not None:
        sys.exit(f"the unchanged tree does not build:\n{log}")
    return clean


def build(tree):
    """Build in place; return the log if that fails."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    # A variable that nothing uses any more is no reason to stop, and what runs for a second is not worth optimising.
    flags = f"{os.environ.get('KVORTEX_CFLAGS', '')} -O0"
    lenient = {**os.environ, "KVORTEX_WERROR": "0", "KVORTEX_CFLAGS": flags}
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=lenient)
    return None if done.returncode == 0 else done.stdout + done.stderr


def baseline_s(clean, test, work, python):
    """Demand that `test` passes without a mutant; return the seconds it took."""
    start = time.monotonic()
    verdict, why, log = run_test(clean, test, BASELINE_LIMIT_S, work, python)
    if verdict != "green":
        sys.exit(f"{test} must pass without a mutant, but {why or verdict}\n{log}")
    return time.monotonic() - start


def judge(mutant, clean, work, limits, python):
    """Fill in the mutant's verdict: killed when every test named turns red."""
    start = time.monotonic()
    tree = work / mutant.name
    shutil.rmtree(tree, ignore_errors=True)
    try:
        shutil.copytree(clean, tree)  # keeps time stamps, so only patched files look new
        apply(mutant.hunks, tree)
        if (log := build(tree)) is not None:
            raise Broken("it does not build: " + "; ".join(log.strip().splitlines()[-3:]))
        verdicts = set()
        for test in mutant.tests:
            verdict, why, _ = run_test(tree, test, limits[test], work, python)
            verdicts.add(verdict)
            mutant.why.append(f"{test.partition('::')[2]}: {why or 'passed all the same'}")
        order = ("broken", "green", "red")
        worst = next(verdict for verdict in order if verdict in verdicts)
        mutant.verdict = {"broken": "broken", "green": "survived", "red": "killed"}[worst]
    except Broken as error:
        mutant.verdict, mutant.why = "broken", [str(error)]
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        mutant.seconds = time.monotonic() - start


def run_test(tree, test, limit_s, work, python):
    """Run one test by its id; return "green", "red" or "broken", the reason and the log."""
    verdicts = work / "verdicts.jsonl"
    verdicts.unlink(missing_ok=True)
    verdicts.touch()
    environment = {
        "KVORTEX_SEED": "1",
        **os.environ,
        "KVORTEX_MUTANT": "1",
        "KVORTEX_VERDICTS": str(verdicts),
        "PYTHONPATH": f"{tree}{os.pathsep}{HERE}",
    }
    options = ["-x", "-q", "-p", "verdict", "-p", "no:cacheprovider", "-o", "timeout=0"]
    process = subprocess.Popen(
        [python, "-m", "pytest", *options, test],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(timeout=limit_s)
        late = False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        late = True

    lines = [json.loads(line) for line in verdicts.read_text().splitlines()]
    failed = [line for line in lines if line.get("outcome") == "failed"]
    if failed:
        if failed[0]["phase"] == "call" and failed[0]["assertion"]:
            return "red", failed[0]["error"].partition("\n")[0][:100] or "assertion", log
        return "broken", f"ended in {failed[0]['phase']} with {failed[0]['error'][:200]}", log
    if late:
        if lines and lines[-1]["phase"] == "start":
            return "red", f"time-out after {limit_s:.0f} s", log
        return "broken", f"took over {limit_s:.0f} s before any test started", log
    if process.returncode < 0:
        return "broken", f"died of {signal.Signals(-process.returncode).name}", log
    if process.returncode or not any(line.get("outcome") == "passed" and line["phase"] == "call" for line in lines):
        return "broken", f"pytest answered {process.returncode} and ran no test to its end", log
    return "green", "", log


if __name__ == "__main__":
    sys.exit(main())
