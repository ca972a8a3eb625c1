"""Journey 1, docs/journeys/01-spreadsheet.md: a spreadsheet and a laptop. The real 22M encoder on 900 real requests, a few steps."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from commandline import Said, luthier
from tickets import TWICE, new_tickets, tickets, write

NUMBER = r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, shared: Path, minilm: Path) -> Path:
    """The user's folder: tickets.csv, new.csv and the model."""
    if not (shared / "data" / "dolly").is_dir():
        pytest.skip(f"{shared}/data/dolly is not there: the tickets are made from it")
    folder = tmp_path_factory.mktemp("laptop")
    write(folder / "tickets.csv", tickets(shared))
    write(folder / "new.csv", [(text,) for text in new_tickets(shared)], ("body",))
    (folder / "minilm").symlink_to(minilm, target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def said(place: Path) -> str:
    """What `adapt` says. Two steps instead of the chosen number; nothing else is given."""
    done = luthier("adapt --data tickets.csv --model ./minilm --out run --max-steps 2", place)
    assert done.status == 0, done.err
    return done.err


@pytest.fixture(scope="module")
def typed(said: str, place: Path) -> dict[str, Said]:
    """The two commands that it ends with, typed as they stand there."""
    commands = [line.removeprefix("  luthier ") for line in said.splitlines()[-2:]]
    return {command: luthier(command, place) for command in commands}


def test_it_says_what_it_takes_and_why(said: str) -> None:
    assert "task text-classification: column 'team' holds class names" in said
    assert "text <- column 'body': its name" in said and "label <- column 'team': its name" in said
    assert re.search(r"method lora: default: .+", said)
    for setting in ("lr", "epochs", "warmup"):
        assert re.search(rf"^  {setting} \S+ \(.+\)$", said, re.MULTILINE), setting


def test_it_splits_by_class_and_warns(said: str) -> None:
    assert "split: 720 train, 90 validation, 90 test rows, stratified by team, seed 0" in said
    left_out = re.search(r"(\d+) training rows that are also in validation or test are left out of train", said)
    assert left_out and 0 < int(left_out[1]) <= TWICE
    assert f"{TWICE} of 900 rows are duplicates of others" in said
    assert re.search(r"rare classes: 'legal' has 3 rows \(\d in train\)", said)


def test_it_estimates_and_shows_progress(said: str) -> None:
    assert re.search(r"estimate 2 steps, about .+ (seconds|minutes), .+ of memory \(.+ free\), .+ of disk", said)
    assert "training 2/2" in said and "testing 90/90" in said


def test_it_ends_with_a_proof_a_picture_and_two_commands(said: str, place: Path) -> None:
    ending = said[said.index("on the test rows, after saving and reloading") :].splitlines()
    assert re.split(r" {2,}", ending[1].strip()) == ["majority class", "frozen embeddings", "this run"]
    for line, name in zip(ending[2:4], ("accuracy", "macro_f1"), strict=True):
        assert re.fullmatch(rf"{name} +{NUMBER} +{NUMBER} +{NUMBER}", line.strip()), line
    rest = ending[4:] if not ending[4].startswith("note: ") else ending[5:]  # a baseline may be ahead
    assert "picture run/picture.png" in rest[0] and (place / "run" / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert rest[1] == "next:" and len(rest) == 4 and all(line.startswith("  luthier ") for line in rest[2:])


def test_the_record_says_the_same(said: str, place: Path) -> None:
    record = json.loads((place / "run" / "run.json").read_text())
    assert record["data"]["columns"] == {"text": "body", "label": "team"} and record["data"]["rows"]["test"] == 90
    majority, frozen = (record["baselines"][name]["accuracy"]["value"] for name in ("majority class", "frozen embeddings"))
    assert frozen > majority + 0.2
    low, value, high = (record["metrics"]["macro_f1"][name] for name in ("low", "value", "high"))
    assert low <= value <= high


def test_the_first_command_adds_two_columns(typed: dict[str, Said], place: Path) -> None:
    command, done = next(iter(typed.items()))
    assert command.startswith("predict run --data new.csv --out ") and done.status == 0, done.err
    with (place / "new.csv").open(newline="", encoding="utf-8") as before, (place / command.split()[-1]).open(newline="", encoding="utf-8") as after:
        asked, answered = list(csv.DictReader(before)), list(csv.DictReader(after))
    assert list(answered[0]) == ["body", "predicted", "score"] and [row["body"] for row in answered] == [row["body"] for row in asked]
    teams = set(json.loads((place / "run" / "config.json").read_text())["label2id"])
    assert all(row["predicted"] in teams and 0 < float(row["score"]) <= 1 for row in answered)


def test_the_second_command_measures_the_same_again(typed: dict[str, Said], place: Path) -> None:
    command, done = list(typed.items())[1]
    assert command.startswith("evaluate run") and done.status == 0, done.err
    measured, record = json.loads(done.out), json.loads((place / "run" / "run.json").read_text())
    assert measured["rows"] == 90 and measured["metrics"]["accuracy"] == pytest.approx(record["metrics"]["accuracy"])
