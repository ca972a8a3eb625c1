"""The parts share no row and lose none, hold the classes alike, keep groups whole, and depend on the seed alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import UserError
from luthier.data.rows import Row, Rows
from luthier.data.splits import FEWEST, MOST_VALIDATION, Splits, split


def numbers(rows: Iterable[Row]) -> list[int]:
    return [row["n"] for row in rows]


def labelled(labels: Iterable[Any]) -> Rows:
    return Rows.of([Row({"n": i, "label": label}, "rows.jsonl", i + 1) for i, label in enumerate(labels)], "rows.jsonl")


def parts_of(splits: Splits) -> tuple[list[int], list[int], list[int]]:
    return numbers(splits.train), numbers(splits.validation), numbers(splits.test)


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.sampled_from(["a", "a", "a", "b", "b", "c", "d "]), min_size=4 * FEWEST, max_size=150), seed=st.integers(0, 99))
def test_three_parts_of_one_source(labels: list[str], seed: int) -> None:
    rows = labelled(labels)
    found = split({"all": rows}, "label", None, seed, None)
    train, validation, test = parts_of(found)
    assert sorted(train + validation + test) == list(range(len(labels))), "every row is in one part"
    assert all(part == sorted(part) and len(part) >= FEWEST for part in (train, validation, test)), "in its old order"
    assert {row["label"] for row in found.validation} | {row["label"] for row in found.test} <= {row["label"] for row in found.train}, "no class is unseen"
    assert parts_of(split({"all": rows}, "label", None, seed, None)) == (train, validation, test)


def test_classes_keep_their_shares() -> None:
    counts = {"a": 600, "b": 300, "c": 99, "legal": 1}
    found = split({"all": labelled([label for label, count in counts.items() for _ in range(count)])}, "label", None, 3, None)
    for part in (found.validation, found.test):
        held = Counter(row["label"] for row in part)
        assert len(part) == 100 and all(abs(held[label] - count / 10) <= 1 for label, count in counts.items()), held
    assert "legal" in found.train.column("label"), "a class of one row can only be learnt"


def test_another_seed_is_another_split() -> None:
    rows = labelled(["a", "b"] * 50)
    assert len({tuple(parts_of(split({"all": rows}, "label", None, seed, None))[2]) for seed in range(5)}) == 5


def test_numbers_are_no_classes() -> None:
    """Of numbers that mostly differ those that are seen twice are held out no more often than the others."""
    repeated = [0.0 if i % 4 == 0 else i + 0.5 for i in range(400)]
    found = split({"all": labelled(repeated)}, "label", None, 0, None)
    zeros = sum(value == 0 for value in found.test.column("label"))
    assert 6 <= zeros <= 14, zeros


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=3, max_size=30).filter(lambda sizes: sum(sizes) >= 4 * FEWEST), seed=st.integers(0, 99))
def test_no_group_is_on_two_sides(sizes: list[int], seed: int) -> None:
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    found = split({"all": labelled(groups)}, None, "label", seed, None)
    sides = [set(part.column("label")) for part in (found.train, found.validation, found.test)]
    assert all(sides) and sum(map(len, sides)) == len(sizes)
    assert parts_of(split({"all": labelled(groups)}, None, "label", seed, None)) == parts_of(found)


def test_groups_of_ordinary_size_give_parts_of_ordinary_size() -> None:
    found = split({"all": labelled(i // 5 for i in range(500))}, None, "label", 0, None)
    assert len(found.test) == len(found.validation) == 50 and "no label on two sides" in found.notes[0]


def test_a_given_validation_part_is_the_test_where_there_is_none() -> None:
    train, validation = labelled(["a", "b"] * 60), labelled(["a", "b"] * 7)
    found = split({"train": train, "validation": validation}, "label", None, 0, None)
    assert found.test is validation
    assert sorted(numbers(found.train) + numbers(found.validation)) == list(range(120)) and len(found.validation) == 12
    assert Counter(found.validation.column("label")) == {"a": 6, "b": 6}
    assert "the given validation part is the test" in found.notes[0] and "12 rows are cut from train, stratified by label" in found.notes[1]


def test_what_a_source_has_is_left_alone() -> None:
    given_parts = {name: labelled(["a", "b"] * 20) for name in ("train", "validation", "test")}
    found = split(given_parts, "label", None, 0, None)
    assert (found.train, found.validation, found.test, found.notes) == (*given_parts.values(), [])
    only_test = split({name: given_parts[name] for name in ("train", "test")}, "label", None, 0, None)
    assert only_test.test is given_parts["test"] and len(only_test.validation) == 4
    only_train = split({"train": given_parts["train"]}, "label", None, 0, None)
    assert sorted(n for part in parts_of(only_train) for n in part) == list(range(40))


def test_a_large_source_needs_no_larger_validation() -> None:
    found = split({"all": labelled(["a", "b"] * 10_000)}, "label", None, 0, None)
    assert len(found.validation) == MOST_VALIDATION and len(found.test) == 2000


@settings(max_examples=20, deadline=None)
@given(fewer=st.integers(1, 60), more=st.integers(1, 60))
def test_fewer_training_rows_are_a_subset_of_more(fewer: int, more: int) -> None:
    rows = {"all": labelled(["a", "b", "b", "c"] * 20)}
    fewer, more = sorted((fewer, more))
    small, large, whole = (split(rows, "label", None, 0, count) for count in (fewer, more, None))
    assert len(small.train) == fewer and set(numbers(small.train)) <= set(numbers(large.train)) <= set(numbers(whole.train))
    assert parts_of(small)[1:] == parts_of(whole)[1:], "what is held out stays the same"


def test_fewer_rows_keep_the_shares_of_the_classes() -> None:
    found = split({"all": labelled(["a", "a", "b"] * 100)}, "label", None, 0, 90)
    assert Counter(found.train.column("label")) == {"a": 60, "b": 30} and found.notes[-1] == "train: 90 rows of it are used"


def test_more_rows_than_there_are_is_said() -> None:
    found = split({"all": labelled(["a", "b"] * 10)}, "label", None, 0, 1000)
    assert len(found.train) == 14 and "there are only 14 training rows" in found.notes[-1]


@pytest.mark.parametrize(
    ("parts", "group", "expected"),
    [
        ({"all": labelled("ab" * 5)}, None, "has 10 rows, too few to cut a part off. Give at least 12"),
        ({"train": labelled("ab" * 5), "test": labelled("ab")}, None, "has 10 rows, too few"),
        ({"validation": labelled("ab"), "test": labelled("ab")}, None, "no train part; it has validation, test"),
        ({"all": labelled("ab" * 20)}, "lable", "no column 'lable'.*Did you mean 'label'"),
        ({"all": labelled("ab" * 20)}, "label", "label has 2 different values, too few for 3 parts"),
        ({"train": labelled("a" * 20), "test": labelled("ab")}, "label", "label has 1 different values, too few for 2 parts"),
        ({name: labelled("ab" * 20) for name in ("train", "validation", "test")}, "label", "--group label has no effect"),
    ],
)
def test_splits_that_cannot_be_made(parts: dict[str, Rows], group: str | None, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        split(parts, None, group, 0, None)


def test_the_fewest_rows_and_groups_that_are_asked_for_are_enough() -> None:
    assert [len(part) for part in parts_of(split({"all": labelled("ab" * 6)}, "label", None, 0, None))] == [6, 3, 3]
    assert all(parts_of(split({"all": labelled("abc" * 6)}, None, "label", 0, None)))
