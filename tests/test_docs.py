"""The pages say what is so: the generated one is what the generator makes now, links and files exist, command lines parse."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from luthier.cli import app
from luthier.errors import UserError
from luthier.methods import registry
from luthier.methods.stack import divide, parse

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", *(ROOT / "examples").glob("*/README.md")])
SOURCES = ("", "src/luthier/")  # what a path in the text may start from, beside the page's own folder
OUTSIDE = ("modeling_x.py",)  # names that pages give to other people's files


def test_the_generated_page_is_what_the_code_makes_now() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    made = generate.page()
    assert made == generate.page() and made == generate.PAGE.read_text(encoding="utf-8"), "docs/capabilities.md is not what the code says now: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page: Path) -> None:
    missing = [link for link in _links(page) if not _link_exists(page, link)]
    missing += [name for name in _files(page) if not _file_exists(page, name)]
    assert not missing, f"{page.relative_to(ROOT)} names what is not there: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_parse(page: Path) -> None:
    wrong = [f"{line}: {problem}" for line in _commands(page) if (problem := _parse(line))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line,problem",
    [
        ("luthier adapt --modle x", "--modle"),
        ("luthier adopt --model x", "adopt"),
        ("luthier predict", "'run'"),
        ("luthier adapt --method 'lroa'", "lora"),
        ("luthier adapt --lr fast", "--lr"),
        ("luthier runs compare one", "'second'"),
        ("luthier adapt --method 'lora|bitfit' --epochs 3", ""),
    ],
)
def test_a_wrong_line_is_found(line: str, problem: str) -> None:
    found = _parse(line)
    assert problem in (found or "") and bool(found) == bool(problem), found


def test_the_pages_have_lines_to_check() -> None:
    assert sum(1 for page in PAGES for _ in _commands(page)) >= 20


# ---- what a page names


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _blocks(page: Path) -> list[str]:
    """Fenced code; text that is indented under a list is unindented by `_commands`."""
    return re.findall(r"^ *```\w*\n(.*?)^ *```", _text(page), re.MULTILINE | re.DOTALL)


def _prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", _text(page), flags=re.MULTILINE | re.DOTALL)


def _links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)) if not re.match(r"\w+:", link)]


def _link_exists(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or target.suffix != ".md" or anchor in _anchors(target))


@functools.cache
def _anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)}


def _files(page: Path) -> Iterator[str]:
    """Files of this repository that the text names in backticks: `src/...`, `tests/...`, `lora.py`, `methods/kinds.py`."""
    top = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "demo"))
    for span in re.findall(r"`([^`\n]+)`", _prose(page)):
        for word in re.findall(rf"(?<![\w./-])((?:{top})/[\w./-]+|[\w./-]+\.py)(?![\w*<{{-])", span):
            if word not in OUTSIDE:
                yield word.rstrip("./")


def _file_exists(page: Path, name: str) -> bool:
    if any((ROOT / start / name).exists() for start in SOURCES) or (page.parent / name).exists():
        return True
    return name in _names() if "/" not in name else any(path.endswith("/" + name) for path in _names())


@functools.cache
def _names() -> set[str]:
    """Every file below the folders that are shipped, by path and by bare name."""
    found = [path for top in ("src", "tests", "docs", "evidence", "examples") for path in (ROOT / top).rglob("*") if path.is_file()]
    return {path.name for path in found} | {str(path.relative_to(ROOT)) for path in found}


# ---- command lines


def _commands(page: Path) -> Iterator[str]:
    for block in _blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ").strip()
            if line.startswith("luthier ") and not line.startswith("luthier: "):
                yield line


def _parse(line: str) -> str | None:
    """What is wrong with a command line, or None; nothing is run."""
    try:
        words = _words(line)
    except ValueError as error:
        return str(error)
    command, name = typer.main.get_command(app), "luthier"
    while isinstance(commands := getattr(command, "commands", None), dict):
        if not words or words[0] == "--help":
            return None
        name, *words = [word for word in words if word != "--debug"]
        if name not in commands:
            return f"there is no verb {name!r}"
        command = commands[name]
    try:
        given = command.make_context(name, words).params
    except typer.Exit:
        return None  # --help
    except Exception as error:  # click's own errors, which typer carries a copy of
        say = getattr(error, "format_message", None)
        return (say() if say else str(error)) or type(error).__name__
    return _method_problem(given)


def _words(line: str) -> list[str]:
    """The arguments of `luthier`, up to a comment, a pipe or a redirection."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>&;")
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if set(word) <= set("|>&;"):
            break
        words.append(word)
    return words[1:]


def _method_problem(given: dict) -> str | None:
    """Stacks on the page must be ones that luthier reads; a method of an example package is taken on trust."""
    stack = given.get("method")
    if not isinstance(stack, str) or stack.isupper():
        return None
    examples = {path.name.removeprefix("luthier-") for path in (ROOT / "examples").iterdir()} - set(registry.methods())
    known = [step for step in divide(stack, "|") if step.partition("(")[0].strip() not in examples]
    try:
        for step in known:
            parse(step)
    except UserError as error:
        return str(error)
    return None
