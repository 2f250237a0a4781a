"""Print the line coverage of .pyx, .h and .c files from gcov's counts; run in a tree built with --coverage.

Cython's own line tracing takes the GIL for every line, which the threads that must never take it cannot bear. The
compiler's counters need no GIL. Cython marks the C of each statement with a comment that names the .pyx line; a
statement ran when the first counted C line after one of its marks did.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

MARK = re.compile(r' */\* "(kvortex/[^"]+\.pyx)":(\d+)$')
NOT_A_STATEMENT = re.compile(r"\s*(@|def |cp?def [^=]*\(|(cdef )?(class|enum) |cimport|from .* cimport|\"\"\"|#|$)")


def counts_by_file():
    """Return {file: {line: times run}}, summed over everything that was compiled."""
    counts = defaultdict(lambda: defaultdict(int))
    for notes in sorted(Path("build").rglob("*.gcno")):
        command = ["gcov", "--json-format", "--stdout", str(notes.with_suffix(".gcda"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for file in json.loads(done.stdout or "{}").get("files", []):
            for line in file["lines"]:
                counts[file["file"]][line["line_number"]] += line["count"]
    return counts


def statements_of_cython(c_file, counts):
    """Return {.pyx line: times run} from the counts of the C that Cython wrote."""
    ran, mark, source = defaultdict(int), None, None
    for number, text in enumerate(Path(c_file).read_text().splitlines(), 1):
        if found := MARK.match(text):
            mark, source = int(found[2]), found[1]
        elif "/* function exit code */" in text:
            mark = None
        elif mark and number in counts:
            ran[source, mark] += counts[number]
            mark = None
    return ran


def main():
    counts = counts_by_file()
    table = {}
    for name, lines in counts.items():
        if name.startswith("build/cython/"):
            by_source = defaultdict(dict)
            for (source, line), times in statements_of_cython(name, lines).items():
                if not NOT_A_STATEMENT.match(Path(source).read_text().splitlines()[line - 1]):
                    by_source[source][line] = times
            table.update(by_source)
        elif name.startswith(("include/", "kvortex/")):
            table[name] = lines

    print(f"\n{'Compiled':44} {'Lines':>6} {'Missed':>6} {'Cover':>6}  Missing")
    for name in sorted(table):
        missing = [line for line, times in sorted(table[name].items()) if not times]
        total = len(table[name])
        share = 100 * (total - len(missing)) / total
        print(f"{name:44} {total:6} {len(missing):6} {share:5.0f}%  {', '.join(map(str, missing))}")

    sources = [str(path) for path in sorted(Path("kvortex").rglob("_*.pyx"))]
    silent = [source for source in sources if not any(table.get(source, {}).values())]
    if silent or not sources:
        sys.exit("no statement was measured in: " + ", ".join(silent or ["kvortex"]))


if __name__ == "__main__":
    main()
