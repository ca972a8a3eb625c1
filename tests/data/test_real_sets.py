"""Real sets, given as they lie there: the guess is the one that a person would make, or the error says what to type."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from luthier import UserError
from luthier.data.columns import apply, assign
from luthier.data.rows import Rows
from luthier.data.sources import read
from luthier.data.splits import split
from luthier.tasks import find, infer

ENCODER = SimpleNamespace(architectures=["BertModel"], is_encoder_decoder=False)


def opened(shared: Path, name: str) -> Rows:
    return next(iter(read(shared / "data" / name).values()))


@pytest.mark.parametrize(
    ("name", "tag", "roles"),
    [
        ("glue_rte", "text-classification", {"text": "text", "text_pair": "text_pair", "label": "label"}),
        ("indonesian_sentiment", "text-classification", {"text": "text", "label": "label"}),
        ("esnli_rationales", "text-classification", {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
        ("biosses", "regression", {"text": "text", "text_pair": "text_pair", "label": "score"}),
        ("ncbi_disease", "token-classification", {"words": "tokens", "tags": "tags"}),
        ("commonsense_rationales", "sentence-similarity", {"query": "question", "document": "answer"}),
    ],
)
def test_guesses(name: str, tag: str, roles: dict[str, str], shared: Path) -> None:
    parts = read(shared / "data" / name)
    first = parts["train"]
    task, reason = infer(first, {}, ENCODER)
    mapping, reasons = assign(first, task.columns, {})
    assert (task.tag, mapping) == (tag, roles) and reason and len(reasons) == len(roles)
    found = split(parts, mapping.get("label"), None, 0, None)
    for part in (found.train, found.validation, found.test):
        typed, _ = apply(part, mapping, task.columns)
        assert len(typed) == len(part) and typed.columns == tuple(roles)


@pytest.mark.parametrize(
    ("name", "tag", "given", "roles"),
    [
        ("dolly", "text-generation", {}, {"prompt": "instruction", "text": "output"}),
        ("alpaca", "text-generation", {}, {"prompt": "instruction", "text": "output"}),
        ("dolly", "text-classification", {"text": "instruction"}, {"text": "instruction", "label": "category"}),
        ("gsm8k", "text-generation", {}, {"prompt": "question", "text": "rationale"}),
        ("natural_instructions", "text-generation", {"prompt": "input", "text": "target"}, {"prompt": "input", "text": "target"}),
        ("mbpp", "sentence-similarity", {}, {"query": "text", "document": "code"}),
        ("pubmedqa", "text-classification", {}, {"text": "question", "label": "label"}),
        ("multi30k", "sentence-similarity", {"query": "en", "document": "de"}, {"query": "en", "document": "de"}),
    ],
)
def test_columns_of_a_given_task(name: str, tag: str, given: dict[str, str], roles: dict[str, str], shared: Path) -> None:
    rows = opened(shared, name)
    columns = find(tag).columns
    mapping, _ = assign(rows, columns, given)
    assert mapping == roles
    apply(rows, mapping, columns)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpaca", "Cannot tell the task from the columns instruction, input, output, rated_high. Give --task"),
        ("natural_instructions", "Cannot tell the task from the columns task, input, target. Give --task"),
        ("bbh_tasks", "Cannot tell the task"),
        ("blood_cells", "has no train, validation or test file.*It holds: README.md, data.parquet"),
    ],
)
def test_doubtful_sets_are_asked_about(name: str, expected: str, shared: Path) -> None:
    with pytest.raises(UserError, match=expected):
        infer(opened(shared, name), {}, ENCODER)


def test_a_set_whose_text_could_be_three_columns(shared: Path) -> None:
    with pytest.raises(UserError, match=r"3 columns could be it \(instruction, input, output\)(?s:.*)--columns text=NAME"):
        assign(opened(shared, "dolly"), find("text-classification").columns, {})


def test_numbers_for_texts_in_a_real_set(shared: Path) -> None:
    with pytest.raises(UserError, match=r"train.jsonl.gz:1: column 'answer' should be text, but holds '\d+'"):
        assign(opened(shared, "gsm8k"), find("text-generation").columns, {"text": "answer"})


def test_one_language_of_three(shared: Path) -> None:
    parts = read(shared / "data" / "masakhaner2", where={"lang": "swa"})
    assert {"train", "validation", "test"} == set(parts) and {row["lang"] for row in parts["test"]} == {"swa"}
    with pytest.raises(UserError, match=r"Did you mean 'swa'.*Values of lang: hau, swa, yor"):
        read(shared / "data" / "masakhaner2" / "validation.jsonl.gz", where={"lang": "swh"})
