"""The record of stored runs holds what the pages and the cards say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from luthier.methods import registry
from luthier.methods.stack import parse

EVIDENCE = Path(__file__).parent.parent / "evidence"
sys.path.insert(0, str(EVIDENCE))

import report  # noqa: E402
import run  # noqa: E402

RECORD = [json.loads(line) for line in (EVIDENCE / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_line_is_a_cell_that_ended_well_and_stands_once() -> None:
    known = {name for cells in run.KINDS.values() for name, _ in cells()}
    names = [entry["cell"] for entry in RECORD]
    assert set(names) <= known and len(names) == len(set(names))
    assert all(entry["status"] == 0 and entry["metrics"] for entry in RECORD)


def test_the_page_is_what_the_record_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    committed = report.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(report, "PAGE", tmp_path / "evidence.md")
    report.write(run.done())
    assert (tmp_path / "evidence.md").read_text(encoding="utf-8") == committed, "python evidence/run.py report"


def test_runs_of_a_set_were_tested_on_the_same_rows() -> None:
    for data in run.TABLE:
        assert len({len(entry["outcomes"]) for entry in RECORD if entry["cell"].startswith(f"table/{data}/")}) <= 1


@pytest.mark.parametrize("method", sorted(name for name, cls in registry.methods().items() if cls.card.lr and cls.__module__.startswith("luthier.")))
def test_a_default_rate_comes_from_a_stored_run_that_beat_its_start(method: str) -> None:
    """With the rate that the card has now, far enough above the majority class that chance does not explain it."""
    majority = next(entry["baselines"]["majority class"]["accuracy"] for entry in RECORD if entry["cell"] == "table/glue_sst2/lora/0")
    rate = registry.find(method).card.lr
    stored = []
    for entry in RECORD:
        group, data, stack, *rest = entry["cell"].split("/")
        if data == "glue_sst2" and (group == "cards" or rest[-1] == "default") and [m.card.name for m in parse(stack)] == [method]:
            stored.append(entry)
    assert stored, f"no stored run of {method} with its defaults: python evidence/run.py cards"
    for entry in stored:
        assert entry["settings"]["lr"] == pytest.approx(rate, rel=0.05)  # of 22.7 M parameters
        assert entry["metrics"]["accuracy"]["low"] > majority["high"]
