"""`luthier search`: the rows of any source that answer a question, by an embedding run."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from luthier import compute
from luthier.data.code import functions
from luthier.data.columns import assign
from luthier.data.rows import Row
from luthier.data.sources import PYTHON, read
from luthier.errors import UserError
from luthier.verbs.run import Run, load


@dataclass(frozen=True)
class Hit:
    """score: cosine similarity of question and row."""

    score: float
    row: Row
    text: str


def search(
    run: Run | str | Path,
    *,
    over: Any,
    words: str | Sequence[str],
    top: int = 5,
    columns: dict[str, str] | None = None,
    encoding: str | None = None,
    base: str | Path | None = None,
    device: str | None = None,
    console: Any = None,
) -> list[list[Hit]]:
    """The `top` rows of the source `over` for each question in `words`, best first.

    Vectors are kept beside the run (RUN/search); of a source that changed, only the new texts are encoded.
    """
    from luthier.verbs.console import Console

    console = console or Console()
    run = run if isinstance(run, Run) else load(run, base, device)
    questions = [words] if isinstance(words, str) else list(words)
    if not questions or not all(question.strip() for question in questions):
        raise UserError("There is nothing to search for: give some words.")
    if run.task.tag != "sentence-similarity":
        raise UserError(f"{run.path} is a {run.task.tag} run; searching needs an embedding run (adapt --task sentence-similarity).")
    rows, texts = _documents(run, over, columns, encoding)
    compute.ready(console.say)
    vectors = _vectors(run, str(over) if isinstance(over, (str, Path)) else f"<{type(over).__name__}>", texts, console)
    asked = run.embed(questions, part="query")
    scores = asked @ vectors.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return [[Hit(float(scores[q, i]), rows[i], texts[i]) for i in best[q]] for q in range(len(questions))]


def _documents(run: Run, over: Any, columns: dict[str, str] | None, encoding: str | None) -> tuple[list[Row], list[str]]:
    """Rows with different texts, each once."""
    # to be found a function needs no docstring
    parts = {"all": functions(Path(over.removeprefix(PYTHON)), documented=False)} if isinstance(over, str) and over.startswith(PYTHON) else read(over, encoding)
    first = next(iter(parts.values()))
    column = run.columns(columns).get("document", "")
    if column not in first.columns:
        column = assign(first, tuple(c for c in type(run.task).columns if c.role == "document"), columns or {})[0]["document"]
    seen: dict[str, Row] = {}
    for row in (row for part in parts.values() for row in part):
        text = row.get(column)
        if isinstance(text, str) and text.strip():
            seen.setdefault(text, row)
    if not seen:
        raise UserError(f"{over} has no text in its column {column!r} to search over.")
    return list(seen.values()), list(seen)


def _vectors(run: Run, source: str, texts: list[str], console: Any) -> np.ndarray:
    """(n, d) of unit length, from the store beside the run where the text was met before."""
    file = run.path / run.index / (hashlib.sha256(source.encode()).hexdigest()[:16] + ".safetensors")
    keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    stored = _stored(file)
    new = [i for i, key in enumerate(keys) if key not in stored]
    if new:
        with console.doing(f"encoding {len(new):,} texts of {source}"):
            fresh = run.embed([texts[i] for i in new], part="document")
        stored |= {keys[i]: vector for i, vector in zip(new, fresh, strict=True)}
    vectors = np.stack([stored[key] for key in keys])
    if new or len(stored) != len(keys):
        _keep(file, vectors, {"source": source, "texts": " ".join(keys)})
    return vectors


def _stored(file: Path) -> dict[str, np.ndarray]:
    """Vectors by the hash of their text; none where the file is absent or broken."""
    try:
        with safe_open(str(file), framework="np") as store:
            return dict(zip(store.metadata()["texts"].split(), store.get_tensor("vectors"), strict=True))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return {}


def _keep(file: Path, vectors: np.ndarray, record: dict[str, str]) -> None:
    """Written beside and renamed, so that a reader never meets half of it; a folder that cannot be written only costs time."""
    partial = file.with_suffix(".partial")
    with contextlib.suppress(OSError, SafetensorError):
        file.parent.mkdir(exist_ok=True)
        save_file({"vectors": torch.from_numpy(np.ascontiguousarray(vectors))}, str(partial), record)
        partial.replace(file)
