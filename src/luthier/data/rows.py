"""Typed rows that remember where they came from, so that an error can name the file and the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload


@dataclass(frozen=True, slots=True)
class Row:
    """One record: its values by column (or, once columns are assigned, by role), and its origin."""

    values: Mapping[str, Any]
    file: str = "rows"
    line: int = 0  # 1-based line of a text file, 1-based record number elsewhere

    def __getitem__(self, column: str) -> Any:
        return self.values[column]

    def get(self, column: str, default: Any = None) -> Any:
        return self.values.get(column, default)

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """An immutable sequence of rows of one source."""

    rows: tuple[Row, ...]
    name: str = "rows"
    columns: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, rows: Iterable[Row], name: str = "rows") -> Rows:
        rows = tuple(rows)
        columns: dict[str, None] = {}
        for row in rows:
            columns.update(dict.fromkeys(row.values))
        return cls(rows, name, tuple(columns))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        return Rows(self.rows[index], self.name, self.columns) if isinstance(index, slice) else self.rows[index]

    def take(self, indices: Iterable[int]) -> Rows:
        return Rows(tuple(self.rows[i] for i in indices), self.name, self.columns)

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self.rows]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all values in order; equal rows have equal fingerprints, whatever file they lie in."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(dict(row.values), sort_keys=True, default=str, ensure_ascii=False).encode())
        return digest.hexdigest()
