"""Columns take the roles that leave no doubt; otherwise the error says what to type."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import UserError
from luthier.data.columns import LOOK, apply, assign, kinds_of
from luthier.data.rows import Rows
from luthier.tasks import find

CLASSES = find("text-classification").columns
NUMBERS = find("regression").columns
TAGS = find("token-classification").columns
PAIRS = find("sentence-similarity").columns
WORDS = [f"answer {chr(97 + i % 26)}{i}" for i in range(200)]


@pytest.mark.parametrize("count", [1, 20, 100])
def test_a_text_may_be_a_number(count: int, rows: Callable[..., Rows]) -> None:
    """An answer may be "42"; the rows are texts all the same."""
    column = [str(i) for i in range(count)] + WORDS[count:]
    assert kinds_of(column) == {"text"}
    found = rows({"body": text, "label": "ab"[i % 2]} for i, text in enumerate(column))
    assert assign(found, CLASSES, {})[0] == {"text": "body", "label": "label"}


@pytest.mark.parametrize(
    "column",
    [[str(i) for i in range(200)], [i / 7 for i in range(200)], [*WORDS[:9], *(str(i) for i in range(191))], [float("nan"), *range(200)]],
    ids=["strings", "fractions", "nearly", "nan"],
)
def test_a_column_of_numbers_is_no_text(column: list[Any], rows: Callable[..., Rows]) -> None:
    assert "number" in kinds_of(column) and "text" not in kinds_of(column)
    found = rows({"text": value, "label": "ab"[i % 2]} for i, value in enumerate(column))
    with pytest.raises(UserError, match=r"no column holds texts(?s:.*)--columns text=NAME"):
        assign(found, CLASSES, {})
    with pytest.raises(UserError, match=r"rows.jsonl:\d+: column 'text' should be text, but holds "):
        assign(found, CLASSES, {"text": "text"})


def test_a_number_that_is_missing_is_named(rows: Callable[..., Rows]) -> None:
    found = rows({"text": WORDS[i], "score": "n/a" if i == 40 else str(i / 7)} for i in range(200))
    mapping, _ = assign(found, NUMBERS, {})
    with pytest.raises(UserError, match=r"rows.jsonl:41: column 'score' should be a number, but holds 'n/a'"):
        apply(found, mapping, NUMBERS)


@pytest.mark.parametrize(
    ("column", "kinds"),
    [
        ([], set()),
        ([None, "", " ", math.nan], set()),
        (["a", "b"] * 20, {"text", "category"}),
        ([0, 1] * 20, {"number", "category"}),
        (["0", "1"] * 20, {"number", "category"}),
        ([True, False] * 20, {"category"}),
        ([0.0, 1.0] * 20, {"number"}),
        (["0.5", "1"] * 20, {"number"}),
        (WORDS, {"text"}),
        ([WORDS[i % 77] for i in range(1000)], {"text", "category"}),
        ([i % 77 for i in range(1000)], {"number"}),
        ([["a", f"b{i}"] for i in range(200)], {"words"}),
        ([["O", "B-PER"]] * 20, {"words", "tags"}),
        (['["O", "B-PER"]'] * 20, {"words", "tags", "text", "category"}),
        ([[0, 3], [1]] * 20, {"words", "tags"}),
        ([{"a": 1}, {"a": 2}], set()),
        ([["a", None]] * 20, set()),
        ([1, "a", [2]], set()),
    ],
)
def test_kinds(column: list[Any], kinds: set[str]) -> None:
    assert kinds_of(column) == kinds


ANYTHING = st.one_of(st.none(), st.text(max_size=8), st.integers(), st.floats(), st.booleans(), st.lists(st.text(max_size=2), max_size=3))


@settings(max_examples=60, deadline=None)
@given(st.lists(ANYTHING, max_size=30), st.randoms())
def test_kinds_belong_to_the_values_and_not_to_their_order(column: list[Any], rng: Any) -> None:
    shuffled = rng.sample(column, len(column))
    assert kinds_of(column) == kinds_of(shuffled)
    assert kinds_of([*column, None, "", math.nan]) == kinds_of(column)
    assert not {"text", "number"} <= kinds_of(column)


def test_a_sorted_column_is_looked_at_all_over() -> None:
    assert "category" not in kinds_of([f"task {i // 20}" for i in range(8 * LOOK)])
    assert "number" in kinds_of(WORDS + ["1"] * 8 * LOOK)


def test_names_before_kinds_and_reasons_for_both(rows: Callable[..., Rows]) -> None:
    found = rows({"Body": WORDS[i], "title": WORDS[-i], "team": "ab"[i % 2]} for i in range(50))
    mapping, reasons = assign(found, CLASSES, {})
    assert mapping == {"text": "Body", "label": "team"} and any("'Body': its name" in reason for reason in reasons)
    found = rows({"ticket": WORDS[i], "queue": "ab"[i % 2]} for i in range(50))
    mapping, reasons = assign(found, CLASSES, {})
    assert mapping == {"text": "ticket", "label": "queue"} and "the only one of class names (a, b)" in reasons[1]


def test_given_columns_go_first(rows: Callable[..., Rows]) -> None:
    found = rows({"text": WORDS[i], "title": WORDS[-i], "label": "ab"[i % 2], "other": "cd"[i % 2]} for i in range(50))
    mapping, reasons = assign(found, CLASSES, {"text": "title", "label": "other"})
    assert mapping == {"text": "title", "label": "other"} and all(reason.endswith("given") for reason in reasons)
    for given_columns, expected in (({"txt": "title"}, "Did you mean 'text'"), ({"text": "titel"}, "Did you mean 'title'")):
        with pytest.raises(UserError, match=expected):
            assign(found, CLASSES, given_columns)


def test_doubt_is_an_error_that_shows_the_columns(rows: Callable[..., Rows]) -> None:
    found = rows({"first": WORDS[i], "second": WORDS[-i], "label": "ab"[i % 2]} for i in range(50))
    with pytest.raises(UserError, match=r"2 columns could be it \(first, second\)(?s:.*)second \(text\): 'answer a0'(?s:.*)--columns text=NAME"):
        assign(found, CLASSES, {})


@pytest.mark.parametrize(("scale", "expected"), [(0.5, "fractions.*--task regression"), (1, "no column holds class names(?s:.*)--columns label=NAME")])
def test_numbers_for_classes_are_refused_by_what_they_are(scale: float, expected: str, rows: Callable[..., Rows]) -> None:
    found = rows({"text": WORDS[i], "label": i * scale} for i in range(200))
    with pytest.raises(UserError, match=expected):
        assign(found, CLASSES, {})


def test_class_names_are_trimmed_with_a_warning(rows: Callable[..., Rows]) -> None:
    found = rows({"text": "a", "label": label} for label in ("sales", "sales ", "\tsales", "sales ", "7", 7, True))
    typed, warnings = apply(found, {"text": "text", "label": "label"}, CLASSES)
    assert typed.column("label") == ["sales"] * 4 + ["7", "7", "True"]
    assert warnings == ['2 labels "sales " taken as "sales" (blanks trimmed)', '1 label "\tsales" taken as "sales" (blanks trimmed)']


@pytest.mark.parametrize("label", ["nan", "inf", "1e3", "3", "-"])
def test_names_that_look_like_numbers(label: str, rows: Callable[..., Rows]) -> None:
    assert apply(rows([{"text": "a", "label": label}]), {"text": "text", "label": "label"}, CLASSES)[0][0]["label"] == label


@pytest.mark.parametrize("empty", [None, "", "  ", math.nan])
def test_an_empty_cell_is_missing_where_it_may_be_and_named_where_not(empty: Any, rows: Callable[..., Rows]) -> None:
    found = rows([{"query": "a", "document": "b", "negative": "c", "score": 0.5}, {"query": "a", "document": "b", "negative": empty, "score": empty}])
    typed, _ = apply(found, {name: name for name in ("query", "document", "negative", "score")}, PAIRS)
    assert dict(typed[1].values) == {"query": "a", "document": "b"} and typed.columns == ("query", "document", "negative", "score")
    with pytest.raises(UserError, match=r"rows.jsonl:1: the text in column 'query' is empty"):
        apply(rows([{"query": empty, "document": "b"}]), {"query": "query", "document": "document"}, PAIRS)
    with pytest.raises(UserError, match=r"rows.jsonl:1: the label in column 'label' is missing"):
        apply(rows([{"text": "a", "label": empty}]), {"text": "text", "label": "label"}, CLASSES)


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (CLASSES, {"text": 3, "label": "a"}, "column 'text' should be text, but holds 3"),
        (CLASSES, {"text": "a", "label": 0.5}, "--task regression"),
        (CLASSES, {"text": "a", "label": "0.5"}, "--task regression"),
        (CLASSES, {"text": "a", "label": ["b"]}, "no class name"),
        (NUMBERS, {"text": "a", "label": "high"}, "should be a number, but holds 'high'"),
        (NUMBERS, {"text": "a", "label": True}, "should be a number, but holds True"),
        (NUMBERS, {"text": "a", "label": "inf"}, "should be a number, but holds 'inf'"),
        (TAGS, {"words": "a b", "tags": ["O", "O"]}, "should be a list of words such as"),
        (TAGS, {"words": [], "tags": []}, "should be a list of words such as"),
        (TAGS, {"words": "['a']", "tags": ["O"]}, "should be a list of words such as"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_row(columns: Any, row: dict[str, Any], expected: str, rows: Callable[..., Rows]) -> None:
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{expected}"):
        apply(rows([row]), {name: name for name in row}, columns)


def test_lists_of_words_are_read_from_json_too(rows: Callable[..., Rows]) -> None:
    typed, _ = apply(rows([{"words": '["a", "3"]', "tags": [0, 1]}]), {"words": "words", "tags": "tags"}, TAGS)
    assert typed[0].values == {"words": ["a", "3"], "tags": ["0", "1"]}


def test_a_part_that_lacks_the_column_is_named(rows: Callable[..., Rows]) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl has no column 'label'.*Did you mean 'labels'"):
        apply(rows([{"text": "a", "labels": "b"}]), {"text": "text", "label": "label"}, CLASSES)
