"""Doubles and rare classes are counted as they are; doubles that luthier itself would put on two sides are taken out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import UserError
from luthier.data.checks import RARE, duplicates, report, without_shared
from luthier.data.rows import Row, Rows
from luthier.data.splits import Splits
from luthier.tasks import find

CLASSES, PAIRS, TAGS = (find(tag).columns for tag in ("text-classification", "sentence-similarity", "token-classification"))


def of(values: list[dict[str, Any]]) -> Rows:
    return Rows.of([Row(value, "rows.jsonl", i) for i, value in enumerate(values, start=1)], "rows.jsonl")


def splits(train: list[dict[str, Any]], validation: list[dict[str, Any]], test: list[dict[str, Any]]) -> Splits:
    return Splits(of(train), of(validation), of(test), [])


def texts(*words: str, label: str = "a") -> list[dict[str, Any]]:
    return [{"text": word, "label": label} for word in words]


def test_clean_rows_are_passed_in_silence() -> None:
    assert report(splits(texts(*"abcdef"), texts("g"), texts("h")), CLASSES) == []


def test_doubles_and_rare_classes_are_named() -> None:
    train = [*texts(*"aabcdef"), *texts("x", "y", label="legal"), *texts("z", label="art")]
    notes = report(splits(train, texts("b"), texts("h", "c", "c")), CLASSES)
    assert notes == [
        "1 validation rows are in train too (such as rows.jsonl:1): what is measured on them is too good",
        "2 test rows are in train too (such as rows.jsonl:2): what is measured on them is too good",
        "rare classes: 'legal' has 2 rows (2 in train), 'art' has 1 row (1 in train)",
    ]


def test_duplicates_are_counted_in_the_source_as_the_user_has_it() -> None:
    whole = Rows.of([Row({"body": word, "team": "a"}, "rows.csv", i) for i, word in enumerate("aabcca")])
    assert duplicates({"all": whole}, {"text": "body", "label": "team"}, CLASSES) == ["3 of 6 rows are duplicates of others"]
    assert duplicates({"train": whole, "test": whole.take([1, 2])}, {"text": "body"}, CLASSES) == ["train: 3 of 6 rows are duplicates of others"]


def test_a_class_is_rare_below_a_few_rows() -> None:
    assert not report(splits(texts(*map(str, range(RARE))), [], []), CLASSES)
    assert report(splits(texts(*map(str, range(RARE - 1))), [], []), CLASSES) == [f"rare classes: 'a' has {RARE - 1} rows ({RARE - 1} in train)"]


def test_all_inputs_make_a_double_and_labels_do_not() -> None:
    pair = {"query": "a", "document": "b"}
    assert not report(splits([pair], [{**pair, "document": "c"}], [{**pair, "query": "c"}]), PAIRS)
    assert report(splits([pair], [dict(pair)], []), PAIRS)
    assert report(splits([{"words": ["a", "b"], "tags": ["O", "O"]}], [], [{"words": ["a", "b"], "tags": ["O", "B-X"]}]), TAGS)
    assert report(splits(texts("a", label="x"), texts("a", label="y"), []), CLASSES)[0].startswith("1 validation rows")


ROWS = st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(train=ROWS, validation=ROWS, test=ROWS, cut=st.sampled_from([(), ("validation",), ("validation", "test")]))
def test_no_double_is_left_where_luthier_cuts_and_nothing_else_goes(train: list[str], validation: list[str], test: list[str], cut: tuple[str, ...]) -> None:
    before = replace(splits(texts(*train), texts(*validation), texts(*test)), cut=cut)
    held = {text for name, part in (("validation", validation), ("test", test)) if name in cut for text in part}
    if set(train) <= held:
        with pytest.raises(UserError, match="nothing is left to learn from"):
            without_shared(before, CLASSES)
        return
    after = without_shared(before, CLASSES)
    assert after.train.column("text") == [text for text in train if text not in held]
    assert (after.validation, after.test) == (before.validation, before.test)
    assert (after.notes == []) == (len(after.train) == len(before.train))
    assert not any(f"{name} rows are in train too" in note for name in cut for note in report(after, CLASSES))
