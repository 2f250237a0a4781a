"""The pages of the project, every README.md of the tree: their fenced examples, their commands, headings and links."""

import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDERS = ("include", "kvortex", "tests", "bench")
PAGES = [README, *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("README.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def name_of(page):
    """Return the page's path from the root."""
    return str(page.relative_to(ROOT))


def examples(language, pages=PAGES):
    """Return (page, text) of every fenced block of a language."""
    return [(page, text) for page in pages for known, text in FENCE.findall(page.read_text()) if known == language]


def python_examples(*, with_torch):
    """Return the Python examples of all pages that import torch, or those that do not, for pytest to run one by one."""
    chosen = [(page, text) for page, text in examples("python") if ("import torch" in text) == with_torch]
    return {f"{name_of(page)}:{number}": text for number, (page, text) in enumerate(chosen)}


def prose(page):
    """Return the page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def section(page, title):
    """Return what stands under a heading, up to the next one of the same level or above."""
    text, level = page.read_text(), re.search(rf"^(#+) {re.escape(title)}$", page.read_text(), re.M)
    assert level, f"{name_of(page)} has no heading {title!r}"
    rest = text[level.end() :]
    end = re.search(rf"^#{{1,{len(level[1])}}} ", FENCE.sub(lambda block: " " * len(block[0]), rest), re.M)
    return rest[: end.start()] if end else rest


def table(text):
    """Return the rows of the first table in the text, without its head: a list of cells each."""
    rows = re.search(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)[1]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def anchors(page):
    """Return the page's headings by their anchors, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): heading for heading in headings}


def commands(page):
    """Return every command that the page names, as a list of words: in shell examples, and between backquotes."""
    found = [words for known, text in examples("sh", [page]) for words in split(text)]
    for code in re.findall(r"`([^`]+)`", prose(page)):
        code = " ".join(code.split())
        if re.match(r"(make|kvortex|python -m|python|pip|curl|apt) \S", code):
            found += split(code)
    return found


def transfer_config():
    """Return the configuration that README gives to `vllm serve`."""
    (serve,) = (words for words in commands(README) if words[:2] == ["vllm", "serve"])
    return json.loads(serve[serve.index("--kv-transfer-config") + 1])


def split(text):
    """Return the words of each command of a shell text; what is quoted may go over several lines."""
    parts = re.findall(r"'[^']*'|\n|[^'\n]+", text)
    lexer = shlex.shlex("".join("\n;\n" if part == "\n" else part for part in parts), punctuation_chars=True)
    lexer.whitespace_split = True
    found = [[]]
    for word in lexer:
        if word in {"|", ";", "&&"}:
            found.append([])
        elif found[-1] or not re.match(r"\w+=", word):  # a variable of the environment before the command
            found[-1].append(word.strip("'"))
    return [words for words in found if words]
