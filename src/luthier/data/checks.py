"""What is wrong with rows that are each valid: doubles across the sides, rare classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from luthier.data.columns import Column
from luthier.data.rows import Row, Rows
from luthier.data.splits import Splits
from luthier.errors import UserError

RARE = 5


def duplicates(parts: Mapping[str, Rows], mapping: Mapping[str, str], columns: Sequence[Column]) -> list[str]:
    """Rows of the source, as the user has it, whose inputs another row has too."""
    inputs = [mapping[column.role] for column in columns if column.kind in ("text", "words") and column.role in mapping]
    notes = []
    for name, rows in parts.items():
        twice = len(rows) - len({_key(row, inputs) for row in rows}) if inputs else 0
        if twice:
            notes.append(f"{'' if name == 'all' else name + ': '}{twice} of {len(rows):,} rows are duplicates of others")
    return notes


def report(splits: Splits, columns: Sequence[Column]) -> list[str]:
    """Warnings for the user, by role."""
    inputs = [column.role for column in columns if column.kind in ("text", "words")]
    notes = []
    train = {_key(row, inputs) for row in splits.train}
    for name, rows in (("validation", splits.validation), ("test", splits.test)):
        shared = [row for row in rows if _key(row, inputs) in train]
        if shared:
            notes.append(f"{len(shared)} {name} rows are in train too (such as {shared[0].where}): what is measured on them is too good")
    for column in columns:
        if column.kind != "category" or column.role not in splits.train.columns:
            continue
        learnt = Counter(splits.train.column(column.role))
        counts = Counter(label for rows in (splits.train, splits.validation, splits.test) for label in rows.column(column.role))
        rare = [f"{label!r} has {counts[label]} row{'s' if counts[label] > 1 else ''} ({count} in train)" for label, count in learnt.items() if count < RARE]
        if rare:
            notes.append(f"rare classes: {', '.join(rare[:6])}{', ...' if len(rare) > 6 else ''}")
    return notes


def without_shared(splits: Splits, columns: Sequence[Column]) -> Splits:
    """Train rows whose inputs are in a part that luthier cut off are taken out of train; those of a part that was given stay. Raises UserError where that leaves none."""
    inputs = [column.role for column in columns if column.kind in ("text", "words")]
    held = {_key(row, inputs) for name in splits.cut for row in getattr(splits, name)} if inputs else set()
    keep = [i for i, row in enumerate(splits.train) if _key(row, inputs) not in held]
    if len(keep) == len(splits.train):
        return splits
    if not keep:
        raise UserError(f"{splits.train.name}: the rows are so alike that every training row is in {' or '.join(splits.cut)} too, and nothing is left to learn from. Give more rows that differ.")
    note = f"{len(splits.train) - len(keep)} training rows that are also in {' or '.join(splits.cut)} are left out of train"
    return replace(splits, train=splits.train.take(keep), notes=[*splits.notes, note])


def _key(row: Row, inputs: Sequence[str]) -> tuple[str, ...]:
    return tuple(" ".join(value) if isinstance(value, list) else str(value) for value in (row.get(role) for role in inputs))


