"""What `adapt` says of its result."""

from __future__ import annotations

from pathlib import Path

import pytest

import luthier
from luthier.contract.texts import tiny_folder, tiny_rows
from luthier.verbs.console import Console


class Heard(Console):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("lr,steps,behind", [(1e-30, 1, True), (1e-2, 60, False)])
def test_a_run_behind_its_baselines_says_so(lr: float, steps: int, behind: bool, tmp_path: Path) -> None:
    """On the screen, in the record and on the card; one that is ahead of them says nothing."""
    heard = Heard()
    run = luthier.adapt(tiny_folder(tmp_path / "model"), tiny_rows("text-classification", 120), out=tmp_path / "run", method="full", lr=lr, max_steps=steps, console=heard)
    assert isinstance(run, luthier.Run)
    value = run.metrics["accuracy"]["value"]
    better = [name for name, found in run.record.content["baselines"].items() if found["accuracy"]["value"] > value]
    assert run.record.content["baselines_ahead"] == better and bool(better) == behind
    card = (run.path / "README.md").read_text(encoding="utf-8")
    assert ("did better" in card) == behind == any("did better in accuracy" in line for line in heard.lines)
