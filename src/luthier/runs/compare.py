"""Two runs on the same test rows, compared in pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.runs.folder import RunRecord, read_run

RESAMPLES = 10_000


def outcomes(run: RunRecord) -> tuple[str, list[float]]:
    """The fingerprint of the test rows, and one outcome for each (larger is better)."""
    path = run.path / "test_outcomes.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["rows"], stored["outcomes"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is missing or broken, so {run.path} cannot be compared row by row.") from None


def paired_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean of `first` minus `second` with a bootstrap 95 % interval over rows. Each side is one list of outcomes per seed, averaged over seeds first."""
    import numpy as np

    difference = np.mean(np.asarray(first, dtype=float), axis=0) - np.mean(np.asarray(second, dtype=float), axis=0)
    rng = np.random.default_rng(0)
    draws = np.array([difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(RESAMPLES)])
    low, high = np.percentile(draws, (2.5, 97.5))
    return {"value": float(difference.mean()), "low": float(low), "high": float(high)}


def compare(first: str | Path, second: str | Path) -> dict[str, Any]:
    """Metrics and resources side by side, the paired difference per test row, and what differs in the recipes. Raises UserError where the test rows differ."""
    a, b = read_run(first), read_run(second)
    (rows_a, found_a), (rows_b, found_b) = outcomes(a), outcomes(b)
    if a.task["tag"] != b.task["tag"]:
        raise UserError(f"{first} is a {a.task['tag']} run and {second} a {b.task['tag']} run; runs of one task can be compared.")
    if rows_a != rows_b:
        raise UserError(f"{first} ({len(found_a)} test rows) and {second} ({len(found_b)}) were not tested on the same rows, so they cannot be compared in pairs. Train both with the same --data and --seed, or with a test file.")
    settings_a, settings_b = a.recipe.model_dump(), b.recipe.model_dump()
    return {
        "runs": [str(first), str(second)],
        "metrics": {name: [a.metrics[name], b.metrics[name]] for name in a.metrics if name in b.metrics},
        "difference": paired_difference([found_a], [found_b]),
        "resources": {name: [a.resources[name], b.resources.get(name)] for name in a.resources},
        "recipe": {name: [settings_a[name], settings_b[name]] for name in settings_a if settings_a[name] != settings_b[name]},
    }
