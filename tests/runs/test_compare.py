"""Paired comparisons on made-up outcomes, against the textbook."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier import Recipe, UserError
from luthier.runs import RunFolder
from luthier.runs.compare import compare, paired_difference


def run(path: Path, outcomes: list[float], rows: str = "rows", tag: str = "text-classification", **settings: object) -> Path:
    folder = RunFolder(path)
    folder.start()
    folder.write_recipe(Recipe.build(model="/m", data="/d", **settings))
    metric = {"value": float(np.mean(outcomes)), "low": 0.0, "high": 1.0}
    folder.write_json("run.json", {"task": {"tag": tag}, "method": "lora", "data": {}, "metrics": {"accuracy": metric}, "resources": {"seconds": 1.0}})
    folder.write_outcomes(rows, outcomes)
    return folder.finish()


def test_the_interval_is_that_of_the_mean_of_paired_differences() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(size=400)
    first, second = hard + 0.3 + 0.2 * rng.normal(size=400), hard
    found = paired_difference([first.tolist()], [second.tolist()])
    error = 1.96 * (first - second).std() / 20
    assert found["value"] == pytest.approx((first - second).mean())
    assert (found["low"], found["high"]) == pytest.approx((found["value"] - error, found["value"] + error), abs=0.005)
    turned = paired_difference([second.tolist()], [first.tolist()])
    assert turned["low"] == pytest.approx(-found["high"]) and turned["value"] == pytest.approx(-found["value"])


def test_seeds_are_averaged_before_rows_are_drawn() -> None:
    assert paired_difference([[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5]]) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_side_by_side(tmp_path: Path) -> None:
    found = compare(run(tmp_path / "a", [1, 1, 0, 1], lr=1e-3), run(tmp_path / "b", [1, 0, 0, 1], lr=1e-4, method="full"))
    assert found["difference"]["value"] == 0.25 and found["metrics"]["accuracy"][0]["value"] == 0.75
    assert found["recipe"] == {"method": [None, "full"], "lr": [1e-3, 1e-4]} and json.loads(json.dumps(found)) == found


def test_other_rows_and_other_tasks_are_refused(tmp_path: Path) -> None:
    first = run(tmp_path / "a", [1, 0])
    with pytest.raises(UserError, match=r"not tested on the same rows.*--seed"):
        compare(first, run(tmp_path / "b", [1, 0], rows="others"))
    with pytest.raises(UserError, match="runs of one task"):
        compare(first, run(tmp_path / "c", [1, 0], tag="regression"))
    (first / "test_outcomes.json").unlink()
    with pytest.raises(UserError, match="missing or broken"):
        compare(first, first)
