"""What `make bench-compare` answers, and what the table of `make bench` says, for figures given by the test."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def tool(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Compare:
    """compare.py on a machine where each run of the benchmarks gives the next of `runs`."""

    def __init__(self, monkeypatch, folder):
        self.module, self.folder, self.monkeypatch = tool("compare"), folder, monkeypatch

    def __call__(self, verb, *runs, arguments=()):
        self.asked, runs = [], list(runs)

        def run(pytest_arguments, benchmarks=("bench",)):
            self.asked.append((list(benchmarks), list(pytest_arguments)))
            figures = runs.pop(0) if len(runs) > 1 else runs[0]
            return {
                name: figures[name] for name in figures if benchmarks in (("bench",), ["bench"]) or name in benchmarks
            }

        self.monkeypatch.setattr(self.module, "run", run)
        self.monkeypatch.setattr(sys, "argv", ["compare.py", verb, str(self.folder), *arguments])
        self.module.main()


@pytest.fixture
def compare(monkeypatch, tmp_path):
    return Compare(monkeypatch, tmp_path / "baselines")


def test_an_equal_run_passes_and_says_how_many_were_compared(compare, capsys):
    compare("store", {"a": 1e-6, "b": 2e-3})
    compare("check", {"a": 1e-6, "b": 2e-3})
    assert "None of 2 benchmarks is more than 10 % slower" in capsys.readouterr().out


def test_a_baseline_is_the_best_of_three_runs(compare):
    compare("store", {"a": 3e-6}, {"a": 2e-6}, {"a": 4e-6})
    (file,) = compare.folder.iterdir()
    assert json.loads(file.read_text())["medians"] == {"a": 2e-6}
    assert len(compare.asked) == 3


@pytest.mark.parametrize(("now", "fails"), [(1.09e-6, False), (1.11e-6, True)])
def test_more_than_ten_percent_slower_in_every_run_fails_in_words(compare, capsys, now, fails):
    compare("store", {"a": 1e-6, "b": 2e-3})
    slower = {"a": now, "b": 2e-3}
    if not fails:
        compare("check", slower)
        return
    with pytest.raises(SystemExit, match=r"1 of 2 benchmarks are more than 10 % slower .* `make bench-baseline`"):
        compare("check", slower)
    assert "SLOWER: a took 1 us in the baseline and takes 1.11 us now, 11 % more" in capsys.readouterr().out
    assert [names for names, _ in compare.asked] == [["bench"], ["a"], ["a"], ["a"], ["a"]]


def test_a_slow_moment_is_no_slowdown(compare):
    compare("store", {"a": 1e-6, "b": 2e-3})
    compare("check", {"a": 2e-6, "b": 2e-3}, {"a": 1.3e-6}, {"a": 1.05e-6})
    assert len(compare.asked) == 3


def test_no_baseline_of_this_machine_fails_and_names_the_next_step(compare):
    with pytest.raises(SystemExit, match=r"no baseline of this machine \(.*run `make bench-baseline`"):
        compare("check", {"a": 1e-6})
    assert compare.asked == []


def test_another_machine_has_no_baseline(compare, monkeypatch):
    compare("store", {"a": 1e-6})
    monkeypatch.setattr(compare.module.platform, "node", lambda: "elsewhere")
    with pytest.raises(SystemExit, match="no baseline of this machine"):
        compare("check", {"a": 1e-6})


def test_benchmarks_that_only_one_side_has_are_named(compare, capsys):
    compare("store", {"gone": 1e-6, "both": 1e-6})
    compare("check", {"both": 1e-6, "new": 1e-6})
    said = capsys.readouterr().out
    assert "not in the baseline, not compared: new" in said and "in the baseline, but not run: gone" in said
    with pytest.raises(SystemExit, match="None of the benchmarks that ran is in the baseline"):
        compare("check", {"new": 1e-6})


def test_a_selection_is_passed_on_to_pytest(compare, capsys):
    compare("store", {"a": 1e-6, "b": 1e-6})
    compare("check", {"a": 1e-6}, arguments=["-k", "a"])
    assert compare.asked == [(["bench"], ["-k", "a"])]
    assert "not run" not in capsys.readouterr().out


def test_real_benchmarks_give_figures_by_name(compare):
    """The one test that runs pytest: the figures of a benchmark of a few milliseconds, by its node id."""
    figures = tool("compare").run(["-k", "test_view"])
    assert list(figures) == ["bench/bench_pool.py::test_view"] and 0 < figures["bench/bench_pool.py::test_view"] < 1


def benchmark_of(median, **extra):
    return {"name": "test_some_name", "stats": {"median": median}, "extra_info": extra}


def table_of(tmp_path, monkeypatch, capsys, benchmarks):
    machine = {"device": "host:0", "cpu": {}, "python_version": "3.11"}
    raw = {"machine_info": machine, "datetime": "2026-11-24T00:00:00", "benchmarks": benchmarks}
    (tmp_path / "raw.json").write_text(json.dumps(raw))
    out = tmp_path / "made" / "out.json"
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "raw.json"), "--json", str(out)])
    tool("table").main()
    printed = [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()]
    return printed, json.loads(out.read_text())


def test_the_table_pairs_sides_and_judges_targets(tmp_path, monkeypatch, capsys):
    printed, made = table_of(
        tmp_path,
        monkeypatch,
        capsys,
        [
            benchmark_of(1e-3, row="put", group="put", operations=4000, unit="keys", batch=8, target=">= 10x"),
            benchmark_of(8e-3, side="Other", group="put", operations=4000, unit="keys"),
            benchmark_of(55e-6, target="<= 60 us"),
            benchmark_of(1.0, row="memory", group="memory", value=80, unit="B", target="> 1x"),
            benchmark_of(1.0, side="Other", group="memory", value=1600, unit="B"),
            benchmark_of(1e-3, row="lookups", operations=2000, unit="keys", target=">= 20 M"),
            benchmark_of(1e-3, row="pinned", operations=1900, unit="keys", against="lookups", target=">= 0.9x"),
            benchmark_of(1.0, row="threads", value=6e7, unit="keys/s", against="one", ratio=5.5, target=">= 5x"),
        ],
    )
    assert "| put | 4 M keys/s | Other: 500 k keys/s | 8x | >= 10x, MISSED |" in printed
    assert "| some name | 55 us | | | <= 60 us, met |" in printed
    assert "| memory | 80 B | Other: 1600 B | 20x | > 1x, met |" in printed
    assert "| lookups | 2 M keys/s | | | >= 20 M, MISSED |" in printed
    assert "| threads | 60 M keys/s | one | 5.5x | >= 5x, met |" in printed
    assert "| pinned | 1.9 M keys/s | lookups: 2 M keys/s | 0.95x | >= 0.9x, met |" in printed
    assert printed[-1] == "4 of 6 targets met"
    assert [row["what"] for row in made["rows"]] == ["put", "some name", "lookups", "pinned", "threads", "memory"]


def test_the_crossover_is_the_batch_from_which_on_kvortex_is_always_faster(tmp_path, monkeypatch, capsys):
    medians = {1: 4.0, 2: 0.9, 4: 1.1, 8: 0.5, 16: 0.25}
    series = [
        benchmark_of(median, row="get", group="get", operations=100, unit="keys", batch=batch, in_table=batch != 2)
        for batch, median in medians.items()
    ]
    peer = benchmark_of(1.0, side="Other", group="get", operations=100, unit="keys")
    printed, made = table_of(tmp_path, monkeypatch, capsys, [*series, peer])
    assert made["crossovers"][0]["batch"] == 8
    assert (
        "get: KVortex is faster than Other from a batch of 8 up (1: 0.25x, 2: 1.11x, 4: 0.909x, 8: 2x, 16: 4x)"
        in printed
    )
    assert sum(line.startswith("| get") for line in printed) == 4


def test_the_table_does_not_overwrite_what_it_reads(tmp_path, monkeypatch, capsys):
    raw, link = tmp_path / "raw.json", tmp_path / "link.json"
    raw.write_text("{}")
    link.symlink_to(raw)
    monkeypatch.setattr(sys, "argv", ["table.py", str(raw), "--json", str(link)])
    with pytest.raises(SystemExit):
        tool("table").main()
    assert "would be overwritten" in capsys.readouterr().err and raw.read_text() == "{}"
