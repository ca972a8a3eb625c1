"""Which column of a source plays which role of a task: given, or guessed where that is certain."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.rows import Row, Rows
from luthier.errors import UserError, did_you_mean

FEW = 50  # different values that a column of class names has at most, unless they are names that are seen ten times on average (tags: a hundred)
NEARLY_ALL = 0.9  # share of numbers from which on a column holds numbers: a text may be "42", and a number may be missing as "n/a"
LOOK = 1000  # values of a column that are looked at


@dataclass(frozen=True)
class Column:
    """One role that a task reads.

    kind   what its values must be: `text`, `category` (a class name), `number`, `words` (a list of strings), `tags` (a list of BIO tags)
    names  column names that are taken for this role without asking, most telling first
    """

    role: str
    kind: str
    required: bool = True
    names: tuple[str, ...] = ()
    use: str = ""


def assign(rows: Rows, columns: Sequence[Column], given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Role -> column name, and for each the reason.

    A given column is taken; then one that bears a usual name; then, for required roles, the only column of the right kind.
    Raises UserError, with the columns and a sample of each, where that is not certain.
    """
    roles = {column.role: column for column in columns}
    kinds = {name: kinds_of(rows.column(name)) for name in rows.columns}
    for role, name in given.items():
        if role not in roles:
            raise UserError(f"--columns: this task reads no {role!r}.{did_you_mean(role, roles)} It reads: {', '.join(c.role for c in columns)}.")
        if name not in rows.columns:
            raise UserError(f"{rows.name} has no column {name!r} (for {role}).{did_you_mean(name, rows.columns)} It has: {', '.join(rows.columns)}.")
        if roles[role].kind == "text" and "number" in kinds[name]:
            row = next(row for row in rows if not _missing(row.get(name)))
            found = f"{row[name]!r}: nearly all its values are numbers"
            raise UserError(f"{row.where}: column {name!r} should be text, but holds {found}. Choose another with --columns.")
    mapping: dict[str, str] = dict(given)
    reasons = [f"{role} <- column {name!r}: given" for role, name in given.items()]
    for column in columns:
        if column.role in mapping:
            continue
        lower = {name.lower(): name for name in rows.columns if name not in mapping.values()}
        named = next((lower[n] for n in (column.role, *column.names) if n in lower and column.kind in kinds[lower[n]]), None)
        if named:
            mapping[column.role] = named
            reasons.append(f"{column.role} <- column {named!r}: its name")
    for column in columns:
        if column.role in mapping or not column.required:
            continue
        fitting = [name for name in rows.columns if name not in mapping.values() and column.kind in kinds[name]]
        if column.kind == "text" and len(fitting) > 1:
            fitting = [name for name in fitting if "category" not in kinds[name]] or fitting
        if len(fitting) != 1:
            named = [name for name in rows.columns if name.lower() in (column.role, *column.names)]
            if column.kind == "category" and (measured := [name for name in named if any(map(_fraction, rows.column(name)))]):
                raise UserError(
                    f"{rows.name}: column {measured[0]!r} holds numbers with fractions, but a class has a name. "
                    f"To predict numbers, use --task regression; or choose another column, --columns {column.role}=NAME."
                )
            raise UserError(_uncertain(rows, column, fitting, kinds))
        mapping[column.role] = fitting[0]
        reasons.append(f"{column.role} <- column {fitting[0]!r}: the only one of {_plural(column.kind)}{_sample(rows, fitting[0], column.kind)}")
    return {column.role: mapping[column.role] for column in columns if column.role in mapping}, reasons


def apply(rows: Rows, mapping: Mapping[str, str], columns: Sequence[Column]) -> tuple[Rows, list[str]]:
    """Rows by role, every value checked and brought to its kind, and warnings. Raises UserError with file and line of the first bad value."""
    kinds = {column.role: column for column in columns}
    trimmed: Counter[str] = Counter()
    for name in mapping.values():
        if name not in rows.columns:
            raise UserError(f"{rows.name} has no column {name!r}.{did_you_mean(name, rows.columns)} It has: {', '.join(rows.columns)}.")
    made = []
    for row in rows:
        values = {}
        for role, name in mapping.items():
            value = row.get(name)
            if _missing(value) and not kinds[role].required:
                continue
            values[role] = READ[kinds[role].kind](value, row, name)
            if kinds[role].kind == "category" and isinstance(value, str) and values[role] != value:
                trimmed[value] += 1
        made.append(Row(values, row.file, row.line))
    warnings = [f'{count} label{"s" if count > 1 else ""} "{value}" taken as "{value.strip()}" (blanks trimmed)' for value, count in trimmed.items()]
    return Rows(tuple(made), rows.name, tuple(mapping)), warnings


def kinds_of(values: Sequence[Any]) -> set[str]:
    """Kinds that the values of a column fit, by a look at a thousand of them."""
    present = [value for value in values if not _missing(value)]
    if len(present) > LOOK:  # from all over the column: files are often sorted
        present = random.Random(0).sample(present, LOOK)
    if not present:
        return set()
    found = set()
    if sum(_number(v) is not None for v in present) >= NEARLY_ALL * len(present):
        found.add("number")
    elif all(isinstance(v, str) for v in present):
        found.add("text")
    if all(_strings(v) is not None for v in present):
        found.add("words")
        parts = [part for v in present for part in _strings(v) or ()]
        if _few(parts, max(FEW, len(parts) // 100)):
            found.add("tags")
    # a number with a fraction measures something and names nothing
    names = all(isinstance(v, (str, bool, int)) for v in present) and not any("." in v and _number(v) is not None for v in present if isinstance(v, str))
    if names and _few([str(v).strip() for v in present], FEW if "number" in found else max(FEW, len(present) // 10)):
        found.add("category")
    return found


def _few(values: Sequence[str], most: int) -> bool:
    """Whether most of the values are seen again, and no more than `most` are different."""
    return len(set(values)) <= max(2, min(most, len(values) // 2))


def _missing(value: Any) -> bool:
    """Whether a cell is empty: of blanks only, null, or the NaN that tables put in the place of nothing."""
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value))


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _fraction(value: Any) -> bool:
    number = _number(value)
    return number is not None and math.isfinite(number) and not number.is_integer()


def _strings(value: Any) -> list[str] | None:
    """A list of strings, as such or written as JSON (the cell of a csv file); None for everything else."""
    if isinstance(value, str):
        if not value.startswith("["):
            return None
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, (list, tuple)) and all(isinstance(v, (str, int)) and not isinstance(v, bool) for v in value):
        return [str(v) for v in value]
    return None


def _text(value: Any, row: Row, column: str) -> str:
    if _missing(value):
        raise UserError(f"{row.where}: the text in column {column!r} is empty. Fill it in, or leave the row out.")
    if not isinstance(value, str):
        raise UserError(f"{row.where}: column {column!r} should be text, but holds {value!r}. Choose another with --columns.")
    return value


def _category(value: Any, row: Row, column: str) -> str:
    if _missing(value):
        raise UserError(f"{row.where}: the label in column {column!r} is missing. Fill it in, or leave the row out.")
    if isinstance(value, float) or _fraction(value):
        raise UserError(f"{row.where}: column {column!r} holds the number {value}, but a class has a name. To predict numbers, use --task regression.")
    if not isinstance(value, (str, int)):
        raise UserError(f"{row.where}: column {column!r} holds {value!r}, which is no class name.")
    return str(value).strip()


def _to_number(value: Any, row: Row, column: str) -> float:
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise UserError(f"{row.where}: column {column!r} should be a number, but holds {value!r}.")
    return number


def _words(value: Any, row: Row, column: str) -> list[str]:
    words = _strings(value)
    if not words:
        raise UserError(f'{row.where}: column {column!r} should be a list of words such as ["Anna", "lives", "here"], but holds {str(value)[:60]!r}.')
    return words


READ: dict[str, Callable[[Any, Row, str], Any]] = {"text": _text, "category": _category, "number": _to_number, "words": _words, "tags": _words}


def _plural(kind: str) -> str:
    return {"text": "texts", "category": "class names", "number": "numbers", "words": "lists of words", "tags": "lists of tags"}[kind]


def _sample(rows: Rows, name: str, kind: str) -> str:
    values = [v for v in rows.column(name)[:LOOK] if not _missing(v)]
    if kind == "text":
        return f" (mean {sum(len(str(v)) for v in values) / len(values):.0f} characters)"
    if kind == "category":
        counts = Counter(str(v).strip() for v in values)
        return f" ({', '.join(v for v, _ in counts.most_common(5))}{', ...' if len(counts) > 5 else ''})"
    return ""


def _uncertain(rows: Rows, column: Column, fitting: list[str], kinds: Mapping[str, set[str]]) -> str:
    samples = {name: str(next((v for v in rows.column(name) if not _missing(v)), ""))[:60] for name in rows.columns}
    lines = [f"    {name} ({', '.join(sorted(kinds[name])) or 'empty or mixed'}): {samples[name]!r}" for name in rows.columns]
    problem = f"{len(fitting)} columns could be it ({', '.join(fitting)})" if fitting else f"no column holds {_plural(column.kind)}"
    return f"{rows.name}: cannot tell which column is the {column.role}: {problem}.\n" + "\n".join(lines) + f"\n  Name it: --columns {column.role}=NAME"
