"""The pages say what is so: examples run, commands exist, links lead somewhere, figures are those that were measured.

`tests/vllm/test_examples.py` runs the examples that need torch or vLLM.
"""

import fnmatch
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pages
import pytest
from pages import PAGES, README, ROOT, name_of
from test_layers import MAY_IMPORT, TOP

import kvortex

EXAMPLES = pages.python_examples(with_torch=False)
LANGUAGES = {"python", "cython", "toml", "sh", "text"}  # each is run, built, loaded or looked at by a test
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_every_python_example_runs_as_printed(example, tmp_path):
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, f"{example}\n{done.stderr}"


def test_every_toml_example_is_loaded(tmp_path):
    examples = pages.examples("toml")
    assert examples
    for _, text in examples:
        (tmp_path / "kvortex.toml").write_text(text)
        config = kvortex.KVortexConfig.load(tmp_path / "kvortex.toml")
        assert all("kvortex.toml" in config.sources[name] for name in tomllib.loads(text))


def test_the_one_cython_example_is_that_which_is_built():
    assert [name_of(page) for page, _ in pages.examples("cython")] == ["include/README.md"]


@each_page
def test_every_fenced_block_names_a_language_that_is_tested(page):
    fences = re.findall(r"^```(.*)$", page.read_text(), re.M)[::2]
    assert set(fences) <= LANGUAGES


@each_page
def test_every_command_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in pages.commands(page):
        program, *rest = words
        if program == "make":
            assert {word for word in rest if "=" not in word} <= targets, words
        elif program in {"kvortex", "python"}:
            source = source_of(words)
            for option in (word.partition("=")[0] for word in rest if word.startswith("--") and word != "--help"):
                assert f'"{option}"' in source, f"{words}: nobody reads {option}"
        elif program == "pip":
            extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
            assert {name for names in extras for name in names.split(",")} <= set(PROJECT["optional-dependencies"]), (
                words
            )
        else:
            assert program in {"vllm", "curl", "grep", "apt"}, words  # the server's tests do what these say


@pytest.mark.parametrize("page", [page for page in PAGES if "vllm" not in page.parts], ids=name_of)
def test_every_option_is_read_by_somebody(page):
    sources = [ROOT / "kvortex/cli.py", *(ROOT / "bench").rglob("*.py")]
    text = "".join(source.read_text() for source in sources)
    for option in re.findall(r"`(--[\w-]+)", pages.prose(page)):
        assert f'"{option}"' in text or f'"{option.replace("--no-", "--")}"' in text, option


def source_of(words):
    """Return the source that reads the options of `kvortex COMMAND`, `python -m MODULE` or `python FILE`."""
    program, *rest = words
    if program == "python" and rest[0] != "-m":
        file = ROOT / rest[0]
        return (
            "".join(path.read_text() for path in file.parent.glob("*.py")) if file.is_file() else pytest.fail(rest[0])
        )
    if program == "python" and rest[1] != "kvortex":
        module = importlib.util.find_spec(rest[1])
        assert module, f"there is no module {rest[1]}"
        found = Path(module.origin)
        return (found.with_name("__main__.py") if found.name == "__init__.py" else found).read_text()
    command = [*rest[2:], "--help"][0] if program == "python" else rest[0]
    source = (ROOT / "kvortex/cli.py").read_text()
    assert command.startswith("-") or f'"{command}"' in source, f"kvortex has no command {command}"
    return source


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in pages.LINK.findall(pages.prose(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in pages.anchors(file), f"{name_of(page)}: no heading for {target}"


@each_page
def test_every_public_name_exists(page):
    for code in re.findall(r"`(?:kvortex\.)?([A-Z]\w+[a-z]\w*(?:\.\w+)*)[`(]", pages.prose(page)):
        first, *rest = code.split(".")
        found = getattr(kvortex, first, None)
        for name in rest if found else ():
            assert hasattr(found, name), f"{name_of(page)}: {code}"
            found = getattr(found, name)


def test_every_page_is_shipped_with_the_sources():
    rules = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    whole = {words[1] for words in rules if words[0] == "graft"}
    whole |= {words[1] for words in rules if words[0] == "recursive-include" and "README.md" in words[2:]}
    assert {page.relative_to(ROOT).parts[0] for page in PAGES} - whole == {"README.md"}
    assert any(words[0] == "include" and "README.md" in words for words in rules)


# ---- README alone ----


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 220


def test_the_first_example_is_for_torch():
    assert "import torch" in pages.examples("python", [README])[0][1]


def test_readme_names_every_page():
    linked = {
        (ROOT / target.partition("#")[0]).resolve()
        for target in pages.LINK.findall(pages.section(README, "Map of the tree"))
    }
    assert set(PAGES) - linked == {README}


def test_the_french_part_says_which_pages_are_english_only():
    text = pages.section(README, "En français")
    linked = {(ROOT / target).resolve() for target in pages.LINK.findall(text[text.index("qu'en anglais") :])}
    assert set(PAGES) - linked == {README}


def test_six_figures_stand_on_the_pages_that_they_link_to():
    rows = pages.table(pages.section(README, "Six figures"))
    assert len(rows) == 6
    for what, ours, others, source in rows:
        (target,) = pages.LINK.findall(source)
        path, _, anchor = target.partition("#")
        text = " ".join(pages.section(ROOT / path, pages.anchors(ROOT / path)[anchor]).split())
        for figure in [*re.findall(r"\*\*(.*?)\*\*", ours), *re.findall(r"^[\d.]+(?: s)?", others)]:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", text), f"{what}: {figure} is not on {target}"
        for fact in [fact.strip() for fact in source.split(": [")[0].split(",")]:
            assert fact.strip("`") in text, f"{what}: {fact} is not on {target}"


def test_readme_counts_the_dependencies():
    assert {re.match(r"[\w-]+", name)[0] for name in PROJECT["dependencies"]} == {"numpy", "cuda-python"}
    assert "two dependencies (numpy, cuda-python)" in README.read_text()


def test_readme_names_the_oldest_python():
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer" in " ".join(README.read_text().split())


def test_readme_names_the_oldest_and_the_newest_vllm():
    versions = [path.stem.removeprefix("engine-") for path in (ROOT / "tests/vllm").glob("engine-*.txt")]
    oldest, *_, newest = (name.rpartition(".")[0] for name in sorted(versions, key=lambda name: name.split(".")))
    assert f"vLLM {oldest} to {newest}" in README.read_text()
    assert f"vLLM {oldest} à {newest}" in pages.section(README, "En français")


def test_readme_names_the_oldest_driver():
    header = (ROOT / "include/kvortex/driver.h").read_text()
    version = int(re.search(r"KV_DRIVER_MIN_VERSION (\d+)", header)[1])
    assert f"driver {version // 1000}.{version % 1000 // 10} or newer" in " ".join(README.read_text().split())


def test_make_does_what_readme_says():
    plain = {
        name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ
    }  # not what a `make test` was told
    command = ["make", "-n", "demo", "test"]
    listing = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True).stdout
    build, demo, test = listing.index("build_ext"), listing.index("kvortex replay"), listing.index("-m pytest tests")
    assert build < demo < test and ".venv/bin/python" in listing
    assert "--plot demo.png" in listing and "--no-verify" not in listing, "every block is compared, and demo.png drawn"
    assert "kvortex" in PROJECT["scripts"]


def test_the_french_part_has_the_figures_of_the_table():
    measured = re.search(r"^\* \*\*Mesuré\*\*.*?(?=^\*|\Z)", pages.section(README, "En français"), re.M | re.S)[0]
    figures = set(re.findall(r"\d+", measured))
    assert figures and figures <= set(re.findall(r"\d+", pages.section(README, "Six figures")))


def map_of_the_tree():
    """Return the paths that README's map names.

    A line is names, two or more spaces, a remark; a folder ends in a slash, and what is indented below it lies in it.
    """
    block = pages.FENCE.search(pages.section(README, "Map of the tree"))
    paths, folders = [], []  # folders: (indentation, path) of the folders that we are in
    for line in filter(str.strip, block[2].splitlines()):
        indentation = len(line) - len(line.lstrip())
        folders = [(depth, path) for depth, path in folders if depth < indentation]
        parent = folders[-1][1] if folders else Path()
        names = re.split(r"\s{2,}", line.strip())[0].replace(",", " ").split()
        paths += [parent / name for name in names]
        if names[-1].endswith("/"):
            folders.append((indentation, parent / names[-1]))
    return paths


def test_the_map_shows_the_tree_as_it_is():
    named = map_of_the_tree()
    missing = [str(path) for path in named if not list(ROOT.glob(str(path)))]
    assert not missing, f"README's map names what is not there: {missing}"
    folders = {Path(name) for name in ("include", "kvortex", "tests", "bench", ".ci")}
    folders |= {path.parent.relative_to(ROOT) for path in (ROOT / "kvortex").glob("*/__init__.py")}
    around = {parent for path in named for parent in (path, *path.parents)}
    unnamed = sorted(str(folder) for folder in folders - around)
    assert not unnamed, f"README's map leaves out: {unnamed}"


def test_the_top_level_holds_what_the_map_names():
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    found -= {name for name in found for pattern in ignored if fnmatch.fnmatch(name, pattern)}
    assert found - {path.parts[0] for path in map_of_the_tree()} == {"README.md"}


# ---- the other pages ----


def test_the_generated_tables_are_those_of_the_stored_result():
    page = (ROOT / "bench/README.md").read_text()
    shown = re.search(r"<!-- bench.gpu -->\n(.*?)<!-- end of bench.gpu -->", page, re.S)[1]
    command = [sys.executable, "-m", "bench.gpu", "--from-json", "bench/results/gpu.json"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == made, f"paste the output of {' '.join(command[1:])} between the marks"


def test_the_log_events_are_all_named():
    text = pages.section(ROOT / "kvortex/engine/README.md", "Configure and operate it")
    events = set()
    for path in (ROOT / "kvortex").rglob("*.py*"):
        if path.suffix in {".py", ".pyx"} and "integrations" not in path.parts:  # vLLM's log has sentences alone
            events |= set(re.findall(r'\b(?:log\(\s*logging\.\w+,|warn_once\()\s*"(\w+)"', path.read_text()))
    named = set(re.findall(r"`(\w+)`", text[text.index("an `event`") :]))
    assert len(events) > 5 and events <= named, events - named


HOW = ROOT / "kvortex/README.md"


def test_every_invariant_has_a_mutant_or_names_its_test():
    rules = re.split(r"^(\d+)\. ", pages.section(HOW, "Invariants"), flags=re.M)[1:]
    headers = " ".join(path.read_text().partition("# tests:")[0] for path in (ROOT / "tests/mutants").glob("*.patch"))
    taken_out = {
        number for line in re.findall(r"# invariant: ([\d, ]+)", headers) for number in re.findall(r"\d+", line)
    }
    numbers, texts = rules[::2], rules[1::2]
    assert taken_out <= set(numbers) and numbers == [str(at + 1) for at in range(len(numbers))]
    for number, text in zip(numbers, texts, strict=True):
        tests = re.findall(r"`(tests/\S+\.py)`", text)
        assert number in taken_out or tests and (ROOT / tests[0]).is_file(), f"{number}. {text}"


def test_the_table_of_layers_is_the_one_that_imports_are_held_against():
    rows = pages.table(pages.section(HOW, "Layers"))
    rank = {part: int(row[0]) for row in rows for part in re.findall(r"`(\w+)`", row[1])}
    there = {part: {other for other in others if other in rank} for part, others in MAY_IMPORT.items() if part in rank}
    assert rank.keys() == TOP | MAY_IMPORT.keys()
    assert not [(part, other) for part, others in there.items() for other in others if rank[other] > rank[part]]


def test_the_words_for_the_life_of_a_pooled_buffer_are_those_of_the_code():
    (words,) = (row[1] for row in pages.table(pages.section(HOW, "Names")) if "DevicePool" in row[0])
    declared = "".join(
        (ROOT / "kvortex" / name).read_text() for name in ("memory/_device_pool.pxd", "driver/_buffer.pxd")
    )
    assert all(re.search(rf"\b{word}\b", declared) for word in re.findall(r"`(\w+)`", words))
