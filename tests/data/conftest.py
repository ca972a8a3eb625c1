"""Rows as a source gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from luthier.data.rows import Row, Rows


def _rows(values: Iterable[dict[str, Any]]) -> Rows:
    return Rows.of([Row(v, "rows.jsonl", i) for i, v in enumerate(values, start=1)], "rows.jsonl")


@pytest.fixture(scope="session")
def rows() -> Callable[[Iterable[dict[str, Any]]], Rows]:
    return _rows
