"""`python:FOLDER`: every documented function once, its docstring out of its code, files never run and never on two sides."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest

from luthier import UserError
from luthier.data.checks import without_shared
from luthier.data.code import functions
from luthier.data.columns import apply, assign
from luthier.data.rows import Row
from luthier.data.sources import read
from luthier.data.splits import Splits, split
from luthier.tasks import find

ASYNCIO = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
DOCUMENTED = '''def {name}(n):
    """Return the number {name} times n.

    A second paragraph."""
    return {value} * n
'''


def source(folder: Path, text: str | bytes, name: str = "module.py") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"python:{folder}"


def found(folder: Path, text: str | bytes) -> dict[str, Row]:
    return {row["name"]: row for row in read(source(folder, text))["all"]}


def test_a_pair_is_the_first_paragraph_and_the_rest_of_the_function(tmp_path: Path) -> None:
    row = found(tmp_path, "import os\n\n\n" + DOCUMENTED.format(name="seven", value=7))["seven"]
    assert (row["docstring"], row["code"]) == ("Return the number seven times n.", "def seven(n):\n    return 7 * n")
    assert (row["name"], row["file"], row["line"]) == ("seven", "module.py", 4)
    assert row.where == f"{tmp_path / 'module.py'}:4"


def test_functions_in_classes_branches_and_functions(tmp_path: Path) -> None:
    inner = "\n".join("    " + line for line in DOCUMENTED.format(name="f", value=2).splitlines())
    nested = f"if True:\n{inner.replace('2', '3')}\n\ndef g(n):\n{inner.replace('2', '4')}\n    return f(n)\n"
    text = f"class A:\n{inner}\n\n{nested}\n@property\nasync {DOCUMENTED.format(name='h', value=5)}"
    rows = found(tmp_path, text)
    assert list(rows) == ["A.f", "f", "g.f", "h"]
    assert rows["A.f"]["code"] == "def f(n):\n    return 2 * n" and rows["h"]["code"].startswith("async def h(n):")


@pytest.mark.parametrize(
    "before",
    ["\f\n", "x = 'a\\x0cb\\u2028'\n", "x = 'a\x0cb\u2028c\x1dd\x85e'\n", "\ufeff# first\n", "# größer\r\n"],
    ids=["form feed", "escapes", "line ends of other standards", "byte-order mark", "Windows line ends"],
)
def test_lines_are_counted_as_python_counts_them(before: str, tmp_path: Path) -> None:
    row = found(tmp_path, before + DOCUMENTED.format(name="seven", value=7))["seven"]
    assert row["code"] == "def seven(n):\n    return 7 * n"


def test_a_declared_encoding_is_read(tmp_path: Path) -> None:
    text = "# -*- coding: latin-1 -*-\n" + DOCUMENTED.format(name="seven", value="'größer'")
    assert found(tmp_path, text.encode("latin-1"))["seven"]["code"] == "def seven(n):\n    return 'größer' * n"


def test_strings_that_reach_the_margin_keep_a_method_readable(tmp_path: Path) -> None:
    text = 'class A:\n    def page(self):\n        """Make a page of HTML text."""\n        return """\n<html>\n"""\n'
    assert ast.parse(found(tmp_path, text)["A.page"]["code"])


def test_what_says_nothing_or_cannot_be_parted_is_no_pair(tmp_path: Path) -> None:
    text = (
        'def short():\n    """Too short."""\n    return 1\n'
        'def bare():\n    """Only a docstring and nothing else."""\n'
        "def none():\n    return 1\n"
        'def line(): "A docstring beside its code."; return 1\n'
        'def beside():\n    """A docstring beside its code."""; x = 1\n    return x\n'
    )
    assert list(found(tmp_path, text + DOCUMENTED.format(name="seven", value=7))) == ["seven"]
    every = {row["name"]: row for row in functions(tmp_path, documented=False)}
    assert list(every) == ["short", "bare", "none", "line", "beside", "seven"]
    assert every["short"]["code"] == "def short():\n    return 1" and every["none"]["docstring"] == "" and every["seven"]["code"] == "def seven(n):\n    return 7 * n"
    assert all("docstring" in every[name]["code"] for name in ("bare", "line", "beside")), "what cannot be parted stays whole"


def test_broken_sources_are_skipped_and_none_is_run(tmp_path: Path) -> None:
    source(tmp_path, "def broken(:\n", "broken.py")
    source(tmp_path, b"x = '\xff\xfe'\n", "bytes.py")
    source(tmp_path, b"x = 1\x00\n", "null.py")
    source(tmp_path, "print {{ template }}\n", "template.py")
    source(tmp_path, "x = " + "-" * 100_000 + "1\n", "deep.py")
    source(tmp_path, "# -*- coding: martian -*-\n", "martian.py")
    source(tmp_path, "raise SystemExit('this was run')\n" + DOCUMENTED.format(name="seven", value=7), "runs.py")
    assert [row["name"] for row in read(f"python:{tmp_path}")["all"]] == ["seven"]


def test_warnings_of_somebody_elses_code_are_not_passed_on(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    found(tmp_path, 'x = "\\d"\n' + DOCUMENTED.format(name="seven", value=7))
    assert not list(recwarn)


def test_folders_of_tests_and_of_others_are_left_out(tmp_path: Path) -> None:
    for i, name in enumerate(("b.py", "a/z.py", "tests/t.py", ".hidden/h.py", "site-packages/s.py", ".dot.py", "notes.txt")):
        source(tmp_path, DOCUMENTED.format(name=f"f{i}", value=i), name)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [row["file"] for row in read(f"python:{tmp_path}")["all"]] == ["b.py", "a/z.py"]


def test_one_file_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(tmp_path, DOCUMENTED.format(name="seven", value=7))
    monkeypatch.setenv("HOME", str(tmp_path))
    for data in (f"python:{tmp_path / 'module.py'}", "python:~", "python:~/module.py"):
        assert [row["file"] for row in read(data)["all"]] == ["module.py"]


def test_folders_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read(f"python:{tmp_path / 'gone'}")
    with pytest.raises(UserError, match=r"has no \.py file"):
        read(f"python:{tmp_path}")
    with pytest.raises(UserError, match="no function with a docstring"):
        read(source(tmp_path, "x = 1\n"))


def test_too_few_files_to_split(tmp_path: Path) -> None:
    text = "".join(DOCUMENTED.format(name=f"f{i}", value=i) for i in range(20))
    with pytest.raises(UserError, match="file has 1 different values, too few for 3 parts"):
        split(read(source(tmp_path, text)), None, "file", 0, None)


def test_real_code() -> None:
    """Of a package that every Python carries: code that parses, without its docstring, the same every time."""
    rows = read(f"python:{ASYNCIO}")["all"]
    assert len(rows) > 200 and rows.fingerprint == read(f"python:{ASYNCIO}")["all"].fingerprint
    for row in rows:
        function = ast.parse(row["code"]).body[0]
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(function) is None, row.where
        assert function.name == row["name"].split(".")[-1] and row["docstring"] not in row["code"]


def test_real_code_has_no_file_and_no_pair_on_two_sides() -> None:
    task = find("sentence-similarity")
    rows = read(f"python:{ASYNCIO}")
    mapping, _ = assign(rows["all"], task.columns, {})
    assert mapping == {"query": "docstring", "document": "code"}
    raw = split(rows, None, "file", 0, None)
    files = [set(part.column("file")) for part in (raw.train, raw.validation, raw.test)]
    assert all(files) and not files[0] & files[1] and not (files[0] | files[1]) & files[2]
    typed = [apply(part, mapping, task.columns)[0] for part in (raw.train, raw.validation, raw.test)]
    parted = without_shared(Splits(typed[0], typed[1], typed[2], [], raw.cut), task.columns)
    pairs = [{(row["query"], row["document"]) for row in part} for part in (parted.train, parted.validation, parted.test)]
    assert not pairs[0] & (pairs[1] | pairs[2])
