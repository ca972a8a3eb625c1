"""Reads any source: a file, a folder of splits, `python:FOLDER`, or an object in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier.data import code
from luthier.data.formats import READERS, Writer, reader_of, stream_file, suffix
from luthier.data.rows import Row, Rows
from luthier.errors import UserError, did_you_mean

SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
PYTHON = "python:"


def read(source: Any, encoding: str | None = None, where: Mapping[str, str] | None = None) -> dict[str, Rows]:
    """`{"train": Rows, ...}` of a source with splits, `{"all": Rows}` of one in a single piece.

    source  path of a file or folder; `python:FOLDER`; a list of dictionaries; a pandas DataFrame; a `datasets` Dataset or DatasetDict
    where   keeps only rows whose columns equal these values
    Raises UserError, with file and line, for what cannot be read.
    """
    parts = _read(source, encoding)
    name = source if isinstance(source, (str, Path)) else type(source).__name__
    empty = [split for split, rows in parts.items() if not len(rows)]
    if empty or not parts:
        raise UserError(f"{name} holds no rows" + (f" in {', '.join(e for e in empty if e != 'all')}." if empty != ["all"] and empty else "."))
    return _kept(parts, where, name) if where else parts


def stream(source: str | Path, encoding: str | None = None, where: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Rows of one file in constant memory; every other source is read whole."""
    path = Path(source)
    if str(source).startswith(PYTHON) or not path.is_file():
        rows: Iterable[Row] = [row for part in read(source, encoding).values() for row in part]
    else:
        rows = stream_file(path, encoding)
    kept = False
    for row in rows:
        if _fits(row, where or {}):
            kept = True
            yield row
    if where and not kept:
        raise UserError(f"--where {_written(where)} keeps no row of {source}.")


def writer(path: str | Path, like: str | Path | None = None) -> Writer:
    return Writer(Path(path), Path(like) if like else None)


def _read(source: Any, encoding: str | None) -> dict[str, Rows]:
    if isinstance(source, str) and source.startswith(PYTHON):
        return {"all": code.functions(Path(source.removeprefix(PYTHON)))}
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return _folder(path, encoding)
        if not path.exists():
            raise UserError(f"There is no file or folder {source}.{_similar(path)}")
        return {"all": _file(path, encoding)}
    if isinstance(source, Rows):
        return {"all": source}
    if isinstance(source, Mapping):  # a DatasetDict too
        return _mapping(source)
    return {"all": _objects(source, "rows")}


def _file(path: Path, encoding: str | None) -> Rows:
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty.")
    rows = Rows.of(reader_of(path)(path, encoding), str(path))
    if not len(rows):
        raise UserError(f"{path} holds no rows.")
    return rows


def _folder(folder: Path, encoding: str | None) -> dict[str, Rows]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        kind = suffix(path)
        split = _split_of(path.name[: -len(kind)] if kind else path.name)
        if kind in READERS and split is not None:
            if split in files:
                raise UserError(f"{folder} has two files for {split}: {files[split].name} and {path.name}. Keep one.")
            files[split] = path
    if "train" not in files and "test" not in files and "validation" not in files:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} has no train, validation or test file ({', '.join(READERS)}). It holds: {found}. Give one file, or name them so.")
    return {split: _file(files[split], encoding) for split in SPLITS if split in files}


def _split_of(stem: str) -> str | None:
    return next((split for split, names in SPLITS.items() if stem.lower() in names), None)


def _mapping(source: Mapping[Any, Any]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for key, part in source.items():
        split = _split_of(str(key))
        if split is None or split in found:
            raise UserError(f"A mapping of splits has the keys train, validation and test, each once; found {', '.join(map(str, source))}.")
        found[split] = _objects(part, str(key))
    return {split: found[split] for split in SPLITS if split in found}


def _objects(source: Any, name: str) -> Rows:
    names = _class_names(source)
    if hasattr(source, "convert_dtypes") and hasattr(source, "columns"):  # a pandas DataFrame
        # pandas makes floats of whole numbers as soon as one is missing, and has its own kinds of nothing
        source = source.convert_dtypes().astype(object)
        source = source.where(source.notna(), None).to_dict("records")
    try:
        values = iter(source)
    except TypeError:
        known = "a path, a list of dictionaries, a pandas DataFrame or a datasets object"
        raise UserError(f"Cannot read rows from {type(source).__name__}. Give {known}.") from None
    rows = []
    for number, value in enumerate(values, start=1):
        if isinstance(value, Row):
            rows.append(value)
            continue
        if not isinstance(value, Mapping):
            raise UserError(f"{name}, row {number}: a row must be a dictionary such as {{'text': ..., 'label': ...}}; found {type(value).__name__}.")
        rows.append(Row({str(column): _plain(cell, names.get(column)) for column, cell in value.items()}, name, number))
    return Rows.of(rows, name)


def _class_names(source: Any) -> dict[str, list[str]]:
    """Column -> names, where the rows of a `datasets` object hold the numbers of classes."""
    features = getattr(source, "features", None)
    found = {}
    for column, feature in features.items() if isinstance(features, Mapping) else ():
        names = getattr(getattr(feature, "feature", feature), "names", None)  # of a class, or of a list of classes
        if names:
            found[column] = list(names)
    return found


def _plain(cell: Any, names: list[str] | None) -> Any:
    """A cell without the types of numpy or torch, and with the name of its class instead of the number (-1: unknown)."""
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    if names and isinstance(cell, list):
        return [_plain(part, names) for part in cell]
    if names and isinstance(cell, int):
        return names[cell] if cell >= 0 else None
    return cell


def _fits(row: Row, where: Mapping[str, str]) -> bool:
    return all(str(row.get(column)) == value for column, value in where.items())


def _written(where: Mapping[str, str]) -> str:
    return ",".join(f"{column}={value}" for column, value in where.items())


def _kept(parts: Mapping[str, Rows], where: Mapping[str, str], name: Any) -> dict[str, Rows]:
    """The rows that fit, without the parts that have none."""
    for rows in parts.values():
        for column in where:
            if column not in rows.columns:
                raise UserError(f"--where: {rows.name} has no column {column!r}.{did_you_mean(column, rows.columns)} It has: {', '.join(rows.columns)}.")
    kept = {split: rows.take(i for i, row in enumerate(rows) if _fits(row, where)) for split, rows in parts.items()}
    kept = {split: rows for split, rows in kept.items() if len(rows)}
    if not kept:
        values = {column: sorted({str(value) for rows in parts.values() for value in rows.column(column)}) for column in where}
        column = next((column for column in where if where[column] not in values[column]), next(iter(where)))
        shown = ", ".join(values[column][:12]) + (", ..." if len(values[column]) > 12 else "")
        raise UserError(f"--where {_written(where)} keeps no row of {name}.{did_you_mean(where[column], values[column])} Values of {column}: {shown}.")
    return kept


def _similar(path: Path) -> str:
    try:
        return did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return ""
