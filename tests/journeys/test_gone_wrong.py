"""Journey 2, docs/journeys/02-gone-wrong.md: the same, gone wrong. What each mistake alone is answered stands in tests/test_bad_input.py; here they come together, in one file and in one run."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import Running, Said, luthier, start
from safetensors.torch import load_file

from luthier.contract.texts import tiny_folder, tiny_rows

STEPS = 36
ROWS = [(row["text"], "sales" if row["label"] == "color" else "legal") for row in tiny_rows("text-classification", 120)]
RUN = f"adapt --model model --data clean.csv --out {{out}} --method lora --max-steps {STEPS} --batch-size 8 --evaluate-every 0.5 --precision fp32"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laptop")
    tiny_folder(folder / "model")
    (folder / "clean.csv").write_text(_csv(ROWS), encoding="utf-8")
    return folder


def _csv(rows: list[tuple[str, str]]) -> str:
    return "body,team\n" + "".join(f"{text},{team}\n" for text, team in rows)


def test_a_file_with_three_flaws_is_mended_by_what_the_answers_say(place: Path) -> None:
    spoilt = [*ROWS[:50], ("a größer boat", "sales "), *ROWS[50:80], ('"a boat', "legal"), *ROWS[80:]]
    (place / "tickets.csv").write_bytes(_csv(spoilt).encode("cp1252"))
    before = sorted(place.iterdir())
    first, second = luthier("adapt --model model --data tickets.csv", place), luthier("adapt --model model --data tickets.csv --encoding cp1252", place)
    assert first.status == 2 and "tickets.csv" in first.err and "--encoding cp1252" in first.err, first.err
    assert second.status == 2 and "line 83: a quote opens here and never closes" in second.err, second.err
    assert sorted(place.iterdir()) == before
    (place / "tickets.csv").write_bytes(_csv([(text.strip('"'), team) for text, team in spoilt]).encode("cp1252"))
    third = luthier("adapt --model model --data tickets.csv --encoding cp1252 --dry-run", place)
    assert third.status == 0, third.err
    assert re.search(r'1 labels? "sales " taken as "sales" \(blanks trimmed\)', third.err), third.err
    assert sorted(place.iterdir()) == before


def test_a_run_that_was_stopped_filled_the_disk_and_was_killed_ends_as_one_left_alone(place: Path) -> None:
    whole = luthier(RUN.format(out="whole"), place)
    assert whole.status == 0, whole.err
    broken = RUN.format(out="broken")

    stopped = _until(start(broken, place), place, 4, lambda pid: os.kill(pid, signal.SIGINT))
    assert stopped.status == 130 and not (place / "broken").exists()
    assert re.search(rf"Stopped after step \d+ of {STEPS}; nothing is lost\. Go on with the same command and --resume", stopped.err), stopped.err

    again = luthier(broken, place)
    assert again.status == 2 and "broken.partial is an unfinished run. Give --resume" in again.err

    full = _until(start(broken + " --resume", place), place, 12, lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))
    assert full.status == 2 and "disk" in full.err and "is full" in full.err and "--resume" in full.err, full.err

    killed = _until(start(broken + " --resume", place), place, 24, lambda pid: os.kill(pid, signal.SIGKILL))
    assert killed.status == -signal.SIGKILL and not (place / "broken").exists()

    ended = luthier(broken + " --resume", place)
    assert ended.status == 0 and "resumed after step" in ended.err, ended.err
    assert not (place / "broken.partial").exists()
    first, second = (load_file(place / out / "model.safetensors") for out in ("whole", "broken"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (place / "whole" / "metrics.jsonl").read_text() == (place / "broken" / "metrics.jsonl").read_text()
    metrics = [json.loads((place / out / "run.json").read_text())["metrics"] for out in ("whole", "broken")]
    assert metrics[0] == metrics[1]


def _until(running: Running, place: Path, step: int, strike: Callable[[int], object]) -> Said:
    """Strikes once `step` steps are logged, and waits for the end."""
    log = place / "broken.partial" / "metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= step):
        assert not running.over(), f"it ended before step {step}: {running.end().err}"
        time.sleep(0.001)
    strike(running.pid)
    return running.end()
