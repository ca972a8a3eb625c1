"""What `adapt` says of its rows and its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl


@pytest.fixture
def adapt(call, tmp_path: Path):
    """The command line on rows of a task, with a tiny model of its own."""

    def run(rows: list[dict], *flags: object, architecture: str = "bert", auto_class: str = "AutoModel"):
        model = tiny_folder(tmp_path / "model", architecture, auto_class)
        return call("adapt", "--model", model, "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--out", tmp_path / "run", *flags)

    return run


@pytest.mark.parametrize("lr,steps,behind", [(1e-30, 1, True), (1e-2, 60, False)])
def test_a_run_behind_its_baselines_says_so(lr: float, steps: int, behind: bool, adapt, tmp_path: Path) -> None:
    """On the screen, in the record and on the card; one that is ahead of them says nothing."""
    ended = adapt(tiny_rows("text-classification", 120), "--method", "full", "--lr", lr, "--max-steps", steps)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    value = record["metrics"]["accuracy"]["value"]
    better = [name for name, found in record["baselines"].items() if found["accuracy"]["value"] > value]
    assert record["baselines_ahead"] == better and bool(better) == behind
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert ("did better" in card) == behind == ("did better in accuracy" in ended.out + ended.err)


def test_rows_with_nothing_to_learn_are_left_out(adapt, tmp_path: Path) -> None:
    """A prompt that fills all the room leaves none for the answer, which must not end the training on its way."""
    rows = [{"prompt": "boat " * (40 if i % 4 == 0 else 2) + str(i), "completion": "the red tree"} for i in range(60)]
    ended = adapt(rows, "--task", "text-generation", "--max-length", "16", "--max-steps", "4", "--batch-size", "1", "--no-baselines", architecture="gpt2", auto_class="AutoModelForCausalLM")
    assert ended.status == 0, ended
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert "they hold nothing to learn" in ended.out + ended.err
    assert 30 <= record["data"]["rows"]["train"] < 48


def test_blocks_that_run_once_are_announced(adapt) -> None:
    rows = tiny_rows("text-classification", 60)
    line = "the first 3 of 3 blocks are frozen: run once for all passes"
    said = [adapt(rows, "--method", "head", "--dry-run", *flags) for flags in ((), ("--no-reuse",), ("--epochs", "1"))]
    assert [line in ended.out + ended.err for ended in said] == [True, False, False]


def test_all_texts_of_a_row_are_held_at_once(adapt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of a pair is that of its texts together."""
    import re

    monkeypatch.setattr("luthier.machine.resident", lambda: 0)  # of this process, whatever ran in it before
    text = "the red boat " * 12

    def estimate(rows: list[dict], *flags: str) -> float:
        said = adapt(rows, "--method", "full", "--dry-run", "--task", "sentence-similarity", "--batch-size", "64", *flags)
        return float(re.search(r"([\d.]+) MB of memory", said.out + said.err)[1])  # type: ignore[index]

    pairs = [{"query": f"{text}{i}", "document": f"{text}{i + 60}"} for i in range(120)]
    triplets = [{**row, "negative": f"{text}{i + 500}"} for i, row in enumerate(pairs)]
    two, three = estimate(pairs), estimate(triplets)
    assert three == pytest.approx(1.5 * two, rel=0.15)
