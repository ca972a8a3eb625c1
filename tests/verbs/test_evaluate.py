"""What `evaluate` measures is what the run recorded, on the rows that it says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import luthier
from luthier import UserError
from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl
from luthier.verbs.console import Console


@pytest.mark.parametrize("kind", ["merged", "adapter", "inserts", "number", "tags", "text", "search"])
def test_the_recorded_metrics_come_out_again(kind: str, made, call, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder, as exactly one JSON object."""
    run = made(kind)
    monkeypatch.chdir(run.parent.parent)
    found = call("evaluate", os.path.relpath(run), "--json")
    recorded = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert found.status == 0 and found.out.count("\n") == 1
    assert found.json["metrics"] == recorded["metrics"] and found.json["rows"] == recorded["data"]["rows"]["test"] and found.json["split"] == "test"


def test_the_same_source_by_another_name_is_the_runs_own(made, call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its training rows would be measured as if they were new."""
    run = made("merged")
    monkeypatch.chdir(run.parent)
    expected = call("evaluate", run, "--json").json["metrics"]
    for name in (run.parent / "text-classification.jsonl", "text-classification.jsonl", "./merged/../text-classification.jsonl"):
        assert call("evaluate", run, "--data", name, "--json").json["metrics"] == expected


def test_other_rows(made, call, tmp_path: Path) -> None:
    rows = tiny_rows("text-classification", 30, seed=5)
    named = [{"body": row["text"], "team": row["label"], "lang": "swa" if i % 3 else "eng"} for i, row in enumerate(rows)]
    new = write_jsonl(tmp_path / "new.jsonl", named)
    found = call("evaluate", made("merged"), "--data", new, "--columns", "text=body,label=team", "--where", "lang=eng", "--json").json
    plain = luthier.evaluate(made("merged"), [row for i, row in enumerate(rows) if not i % 3])
    assert found["metrics"] == plain["metrics"] and found["rows"] == plain["rows"] == 10
    text = call("evaluate", made("merged"), "--data", new, "--columns", "text=body,label=team").out
    assert "30 rows" in text and "accuracy" in text and "[" in text


def test_a_filter_picks_from_the_runs_own_part(made) -> None:
    run = made("merged")
    whole, part = luthier.evaluate(run), luthier.evaluate(run, where={"label": "plain"})
    assert 0 < part["rows"] < whole["rows"]
    other = luthier.evaluate(run, where={"label": "color"})
    assert whole["metrics"]["accuracy"]["value"] * whole["rows"] == pytest.approx(sum(p["metrics"]["accuracy"]["value"] * p["rows"] for p in (part, other)))


def test_a_source_that_changed_is_not_measured_as_if_it_were_unseen(made, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows("text-classification"))
    settings = {"max_steps": 2, "precision": "fp32", "baselines": False, "console": Console(quiet=True)}
    luthier.adapt(made("merged").parent / "bert", rows, out=tmp_path / "run", **settings)
    write_jsonl(rows, tiny_rows("text-classification", 80))
    with pytest.raises(UserError, match="has changed since the run"):
        luthier.evaluate(tmp_path / "run")
    luthier.adapt(made("merged").parent / "bert", tiny_rows("text-classification"), out=tmp_path / "listed", **settings)
    with pytest.raises(UserError, match="given in Python"):
        luthier.evaluate(tmp_path / "listed")


@pytest.mark.parametrize(
    "flags,expected",
    [
        (("--split", "tset"), "none of train, validation, test"),
        (("--columns", "lable=x"), "Did you mean 'label'"),
        (("--where", "lang=swa"), "has no column 'lang'"),
        (("--data", "{rows}", "--columns", "label=nothing"), "lacks the column 'nothing' (for label)"),
        (("--data", "{labels}"), "the label 'colour' occurs in no training row. Did you mean 'color'"),
        (("--data", "nowhere.csv"), "There is no file or folder"),
    ],
)
def test_mistakes(flags: tuple[str, ...], expected: str, made, call, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows("text-classification", 5))
    labels = write_jsonl(tmp_path / "labels.jsonl", [{"text": "a boat", "label": "colour"}])
    ended = call("evaluate", made("merged"), *(flag.format(rows=rows, labels=labels) for flag in flags), "--json")
    assert ended.status == 2 and expected in ended.err and not ended.out, ended.err


@pytest.mark.parametrize(
    "row,expected",
    [
        ({"tokens": ["a", "boat"], "tags": ["O"]}, "2 words, but 1 tags"),
        ({"tokens": ["a", "boat"], "tags": ["O", "B-SHIP"]}, "the tag 'B-SHIP' occurs in no training row"),
    ],
)
def test_rows_that_the_task_cannot_measure(row: dict, expected: str, made, call, tmp_path: Path) -> None:
    ended = call("evaluate", made("tags"), "--data", write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert ended.status == 2 and f"rows.jsonl:1: {expected}" in ended.err, ended.err


def test_a_column_that_only_some_sets_have_may_be_missing(tmp_path: Path) -> None:
    """A second text is optional in training, so it is optional later too; one that is asked for is not."""
    rows = [row | ({"text_pair": "a tree"} if i % 2 else {}) for i, row in enumerate(tiny_rows("text-classification", 80))]
    model = tiny_folder(tmp_path / "model")
    run = luthier.adapt(model, write_jsonl(tmp_path / "rows.jsonl", rows), out=tmp_path / "run", columns={"text_pair": "text_pair"}, max_steps=2, baselines=False, console=Console(quiet=True))
    single = write_jsonl(tmp_path / "single.jsonl", tiny_rows("text-classification", 5))
    assert luthier.evaluate(run, single)["rows"] == 5 and len(run.predict(["a boat"])) == 1
    with pytest.raises(UserError, match="lacks the column 'text_pair'"):
        luthier.evaluate(run, single, columns={"text_pair": "text_pair"})
