"""`luthier evaluate`: a finished run on rows, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier import compute
from luthier.data.rows import Rows
from luthier.data.sources import read
from luthier.data.splits import split as make_splits
from luthier.errors import UserError
from luthier.recipe import absolute
from luthier.verbs import record
from luthier.verbs.job import split_settings
from luthier.verbs.run import Run, load


def evaluate(
    run: Run | str | Path,
    data: Any = None,
    *,
    split: str = "test",
    columns: dict[str, str] | None = None,
    where: dict[str, str] | None = None,
    encoding: str | None = None,
    batch_size: int = 64,
    base: str | Path | None = None,
    device: str | None = None,
    console: Any = None,
) -> dict[str, Any]:
    """`{"run", "data", "split", "rows", "truncated", "metrics": {name: {value, low, high}}}`; truncated: rows that were longer than the model reads.

    data   a source; without it, the run's own, divided as it was for the run
    split  train, validation or test; a source in one piece is taken whole
    """
    from luthier.verbs.console import Console

    run = run if isinstance(run, Run) else load(run, base, device)
    typed = _rows(run, data, split, columns, where, encoding)
    run.task.check(typed)
    compute.ready((console or Console()).say)
    before = run.truncated
    outputs = run.outputs(typed, batch_size)
    return {
        "run": str(run.path),
        "data": str(data) if isinstance(data, (str, Path)) else (run.record.recipe.data if data is None else f"<{type(data).__name__}>"),
        "split": split,
        "rows": len(typed),
        "truncated": run.truncated - before,
        "metrics": record.plain(run.task.measure(outputs, typed)),
    }


def _rows(run: Run, data: Any, split: str, columns: dict[str, str] | None, where: dict[str, str] | None, encoding: str | None) -> Rows:
    """By role. `where` picks from the part that was asked for, so that the run's own parts stay those of the run."""
    recipe = run.record.recipe
    if split not in ("train", "validation", "test"):
        raise UserError(f"split={split!r} is none of train, validation, test.")
    if data is None and recipe.data.startswith("<"):
        raise UserError(f"{run.path} was trained on rows given in Python ({recipe.data}), which are not stored. Give --data.")
    if data is None or (isinstance(data, (str, Path)) and absolute(str(data)) == absolute(recipe.data)):
        parts = read(recipe.data, encoding or recipe.encoding, recipe.where or None)
        rows = getattr(make_splits(parts, *split_settings(recipe, run.record.data["columns"])), split)
        if split != "train" and run.typed(rows).fingerprint != run.record.data["sha256"][split]:
            raise UserError(f"{recipe.data} has changed since the run: its {split} rows are others now, and the run may have been trained on some. Give rows of their own with --data.")
    else:
        parts = read(data, encoding)
        rows = parts.get(split) or parts.get("all")
        if rows is None:
            raise UserError(f"{data} has no {split} part; it has {', '.join(parts)}. Choose one with --split.")
    return run.typed(read(rows, where=where)["all"] if where else rows, columns=columns)
