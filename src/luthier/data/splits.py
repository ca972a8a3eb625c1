"""Train, validation and test from whatever parts a source has."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.data.columns import kinds_of
from luthier.data.rows import Rows
from luthier.errors import UserError, did_you_mean

HELD_OUT = 0.1  # share of rows for each part that has to be cut off
MOST_VALIDATION = 500
FEWEST = 3  # rows of each part


@dataclass(frozen=True)
class Splits:
    """cut: the parts that luthier cut off, where the source lacked them."""

    train: Rows
    validation: Rows
    test: Rows
    notes: list[str]
    cut: tuple[str, ...] = ()


def split(parts: dict[str, Rows], stratify: str | None, group: str | None, seed: int, train_rows: int | None) -> Splits:
    """The three parts. What a source lacks is cut from its train part (or from the whole), stratified by one column, or with no group on two sides.

    Where a source has train and validation but no test part, the given validation part is the test. `train_rows` then keeps
    that many rows of train; fewer rows are always a subset of more.
    """
    notes: list[str] = []
    parts = dict(parts)
    whole = parts.pop("all", None)
    lacking = ("validation", "test")
    if whole is not None:
        _enough(whole, 2, group)
        train, test = cut(whole, HELD_OUT, stratify, group, seed, cuts=2)
        train, validation = cut(train, HELD_OUT / (1 - HELD_OUT), stratify, group, seed + 1, MOST_VALIDATION)
        notes.append(f"split: {len(train)} train, {len(validation)} validation, {len(test)} test rows{_how(whole, stratify, group)}, seed {seed}")
    else:
        if "train" not in parts:
            raise UserError(f"The source has no train part; it has {', '.join(parts)}. Give one file, to be split, or a folder with a train file too.")
        train, test, validation = parts["train"], parts.get("test"), parts.get("validation")
        if test is None and validation is not None:
            test, validation = validation, None
            notes.append("there is no test part: the given validation part is the test, and a validation part is cut from train")
        lacking = tuple(name for name, part in (("validation", validation), ("test", test)) if part is None)
        if missing := len(lacking):
            _enough(train, missing, group)
        elif group:
            raise UserError(f"--group {group} has no effect, since the source has train, validation and test parts of its own. Leave it out.")
        if test is None:
            train, test = cut(train, HELD_OUT, stratify, group, seed, cuts=missing)
            notes.append(f"there is no test part: {len(test)} rows are cut from train{_how(train, stratify, group)}")
        if validation is None:
            train, validation = cut(train, HELD_OUT, stratify, group, seed + 1, MOST_VALIDATION)
            notes.append(f"there is no validation part: {len(validation)} rows are cut from train{_how(train, stratify, group)}")
    if train_rows is not None:
        if train_rows > len(train):
            notes.append(f"train_rows={train_rows}, but there are only {len(train)} training rows")
        elif train_rows < len(train):
            train = train.take(sorted(_order(len(train), _labels(train, stratify), seed)[:train_rows]))
            notes.append(f"train: {train_rows} rows of it are used")
    return Splits(train, validation, test, notes, lacking)


def cut(rows: Rows, share: float, stratify: str | None, group: str | None, seed: int, most: int | None = None, cuts: int = 1) -> tuple[Rows, Rows]:
    """(kept, cut off), each in its old order. This cut is the first of `cuts`: a group is left for each part to come."""
    count = max(FEWEST, round(share * len(rows)))
    count = min(count, most) if most else count
    if group:
        off = _whole_groups(rows, group, count, seed, cuts)
    else:
        off = set(_order(len(rows), _labels(rows, stratify), seed)[:count])
    return rows.take(i for i in range(len(rows)) if i not in off), rows.take(i for i in range(len(rows)) if i in off)


def _enough(rows: Rows, cuts: int, group: str | None) -> None:
    """Raises UserError where there are too few rows or groups to cut off that many parts."""
    if len(rows) < 4 * FEWEST:
        raise UserError(
            f"{rows.name} has {len(rows)} rows, too few to cut a part off. Give at least {4 * FEWEST}, or files of your own for train, validation and test."
        )
    if group and group not in rows.columns:
        raise UserError(f"--group: {rows.name} has no column {group!r}.{did_you_mean(group, rows.columns)} It has: {', '.join(rows.columns)}.")
    if group and (different := len(set(map(str, rows.column(group))))) <= cuts:
        raise UserError(f"{rows.name}: {group} has {different} different values, too few for {cuts + 1} parts. Choose another with --group.")


def _labels(rows: Rows, stratify: str | None) -> Sequence[str]:
    if not stratify or stratify not in rows.columns:
        return [""] * len(rows)
    labels = [str(value).strip() for value in rows.column(stratify)]
    if kinds_of(rows.column(stratify)) == {"number"}:  # no classes: those that occur once are one stratum, or none would ever be held out
        counts = Counter(labels)
        labels = [label if counts[label] > 1 else "" for label in labels]
    return labels


def _order(count: int, labels: Sequence[str], seed: int) -> list[int]:
    """A seeded order of which every beginning has the classes in about their proportions; single rows of a class come last."""
    rng = random.Random(seed)
    by_label: dict[str, list[int]] = defaultdict(list)
    for i in rng.sample(range(count), count):
        by_label[labels[i]].append(i)
    places = []
    for label in sorted(by_label):
        members = by_label[label]
        shift = rng.random()
        places += [((k + shift) / len(members) if len(members) > 1 else 1.0, rng.random(), i) for k, i in enumerate(members)]
    return [i for _, _, i in sorted(places)]


def _whole_groups(rows: Rows, group: str, count: int, seed: int, cuts: int) -> set[int]:
    members: dict[str, list[int]] = defaultdict(list)
    for i, value in enumerate(rows.column(group)):
        members[str(value)].append(i)
    names = sorted(members)
    random.Random(seed).shuffle(names)
    off: set[int] = set()
    taken = 0
    for name in names:
        # a group that would overshoot by more than it helps stays
        if len(off) < count and len(off) + len(members[name]) <= max(1.5 * count, count + 1) and taken < len(names) - cuts:
            off |= set(members[name])
            taken += 1
    return off or set(members[min(names, key=lambda name: len(members[name]))])


def _how(rows: Rows, stratify: str | None, group: str | None) -> str:
    if group:
        return f", no {group} on two sides"
    return f", stratified by {stratify}" if stratify and stratify in rows.columns else ""
