"""`python:FOLDER`: the docstring and the code of functions, as pairs for code search. Sources are parsed, never imported."""

from __future__ import annotations

import ast
import os
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from luthier.data.rows import Row, Rows
from luthier.errors import UserError

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "node_modules", "__pycache__", "lib2to3"}
FEWEST_WORDS = 4  # a docstring of fewer says nothing that one could search for


def functions(folder: Path, documented: bool = True) -> Rows:
    """Rows `docstring`, `code` (without the docstring), `name`, `file`, `line`. Raises UserError where there is no such function.

    documented  only functions whose docstring and code make a pair, to learn from; otherwise all, to search through
    """
    folder = folder.expanduser()  # shells leave the ~ of python:~/code alone
    if not folder.exists():
        raise UserError(f"python:{folder}: there is no such file or folder.")
    files = [folder] if folder.is_file() else list(_sources(folder))
    if not files:
        raise UserError(f"python:{folder} has no .py file (folders named {', '.join(sorted(SKIPPED)[:4])}, ... and hidden ones are left out).")
    root = folder.parent if folder.is_file() else folder
    seen: set[tuple[str, str]] = set()
    rows = []
    for file in files:
        for row in _of_file(file, root, documented):
            key = (row["docstring"], row["code"])
            if key not in seen:
                seen.add(key)
                rows.append(row)
    if not rows:
        raise UserError(f"python:{folder} has {len(files)} .py files, but no function" + (f" with a docstring of {FEWEST_WORDS} words or more." if documented else "."))
    return Rows.of(rows, f"python:{folder}")


def _sources(folder: Path) -> Iterator[Path]:
    for place, names, files in os.walk(folder):  # does not follow links out of the folder
        names[:] = sorted(name for name in names if name not in SKIPPED and not name.startswith("."))
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("."):
                yield Path(place) / file


def _of_file(file: Path, root: Path, documented: bool) -> Iterator[Row]:
    try:
        with tokenize.open(file) as stream:  # in the encoding that the file declares
            text = stream.read()
        with warnings.catch_warnings(action="ignore"):  # on the escapes of somebody else's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return  # templates and sources of another Python are no rows
    lines = text.split("\n")  # and at no form feed: lines as the parser counts them
    for name, node in _functions(tree, ""):
        said = (ast.get_docstring(node) or "").split("\n\n")[0]
        apart = bool(said) and _stands_apart(node, lines)
        if documented and not (apart and len(said.split()) >= FEWEST_WORDS):
            continue
        first = node.body[0]
        code = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno] if apart else lines[node.lineno - 1 : node.end_lineno]
        code = "\n".join(line[node.col_offset :] if line[: node.col_offset].isspace() else line for line in code)
        yield Row({"docstring": said, "code": code, "name": name, "file": str(file.relative_to(root)), "line": node.lineno}, str(file), node.lineno)


def _stands_apart(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> bool:
    """Whether the docstring can be taken out by its lines and leaves a body."""
    if len(node.body) < 2:
        return False
    first, second = node.body[:2]
    return first.end_lineno != second.lineno and not lines[first.lineno - 1].encode()[: first.col_offset].strip()


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _functions(child, prefix)
