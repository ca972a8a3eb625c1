"""One reader and one writer a file format. Readers yield rows with file and line; writers are resumable and appear when they are complete."""

from __future__ import annotations

import base64
import codecs
import contextlib
import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.data.rows import Row
from luthier.errors import UserError, did_you_mean

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz")


def stream_file(path: Path, encoding: str | None) -> Iterator[Row]:
    """Rows of one file, one after the other."""
    return reader_of(path)(path, encoding)


def reader_of(path: Path) -> Callable[[Path, str | None], Iterator[Row]]:
    """Raises UserError for a format that luthier does not read."""
    kind = suffix(path)
    if kind in READERS:
        return READERS[kind]
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{path} is a pickle or a binary array, which luthier does not open. Write the rows as jsonl, csv or parquet.")
    raise UserError(f"{path}: luthier does not read {kind or 'files without an ending'!r}.{did_you_mean(kind, READERS)} It reads {', '.join(READERS)}.")


def suffix(path: Path) -> str:
    name = path.name.lower()
    return next((kind for kind in sorted(READERS, key=len, reverse=True) if name.endswith(kind)), path.suffix.lower())


def _open(path: Path, mode: str, **options: Any) -> Any:
    return gzip.open(path, mode, **options) if path.name.lower().endswith(".gz") else path.open(mode, **options)


def _lines(path: Path, encoding: str | None) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers, line ends kept."""
    number = 0
    try:
        with _open(path, "rt", encoding=encoding or "utf-8", newline="") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeError as error:
        raise _undecodable(path, encoding, error) from None
    except LookupError:
        raise UserError(f"There is no encoding {encoding!r}. Common ones: utf-8, cp1252, latin-1, utf-16.") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}, after line {number}: the gzip file is broken or incomplete ({error}).") from None


def _undecodable(path: Path, encoding: str | None, error: UnicodeError) -> UserError:
    """Names the line and, where no encoding was given, a likely one."""
    with _open(path, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not encoding and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return UserError(f"{path} is not UTF-8, but begins as UTF-16 does. Give --encoding utf-16.")
            try:
                raw.decode(encoding or "utf-8")
            except UnicodeDecodeError as found:
                byte = f"{path}, line {number}: byte 0x{raw[found.start]:02x}"
                if encoding:
                    return UserError(f"{byte} is not {encoding}. Give the right one with --encoding.")
                guess = raw.decode("cp1252", errors="replace").strip()
                return UserError(f"{byte} is not UTF-8. As Windows-1252 the line reads {guess[:80]!r}; if that is right, give --encoding cp1252.")
            except UnicodeError:
                break
    return UserError(f"{path} is not {encoding} ({error}). Give the right one with --encoding.")


def _jsonl(path: Path, encoding: str | None) -> Iterator[Row]:
    for number, line in _lines(path, encoding):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not valid JSON: {error}. The line begins {line.strip()[:60]!r}.") from None
        yield Row(_record(value, f"{path}, line {number}"), str(path), number)


def _json(path: Path, encoding: str | None) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path, encoding))
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}. If every line is an object of its own, name it .jsonl.") from None
    if not isinstance(values, list):
        raise UserError(f"{path} holds {type(values).__name__}, not a list of objects.")
    for number, value in enumerate(values, start=1):
        yield Row(_record(value, f"{path}, row {number}"), str(path), number)


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row must be an object such as {{\"text\": ..., \"label\": ...}}; found {type(value).__name__}.")
    return value


def _delimited(delimiter: str) -> Callable[[Path, str | None], Iterator[Row]]:
    def read(path: Path, encoding: str | None) -> Iterator[Row]:
        last = [0]

        def counted() -> Iterator[str]:
            for number, line in _lines(path, encoding):
                last[0] = number
                yield line

        csv.field_size_limit(2**31 - 1)  # of the whole process; its default, 128 kB, is less than a long document
        lines = counted()
        first = next(lines, "")
        # spreadsheets of many countries write ; between the cells, since their numbers have commas
        between = next((mark for mark in (delimiter, ";", "\t") if mark in first), delimiter)
        reader = csv.reader(itertools.chain([first], lines), delimiter=between, strict=True)
        header: list[str] | None = None
        start = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if "unexpected end" in str(error):
                    raise UserError(
                        f"{path}, line {start}: a quote opens here and never closes, so everything to the end of the file ({last[0]} lines) would be one cell. "
                        "Close it, or double it where it is part of the text."
                    ) from None
                if "expected after" in str(error):
                    raise UserError(
                        f"{path}, line {start}: a cell that a quote opens here goes on after the next quote (line {last[0]}). "
                        "Close it before, or double the quotes that are part of the text."
                    ) from None
                raise UserError(f"{path}, line {start}: not readable as a table: {error}.") from None
            if cells is None:
                return
            line, start = start, last[0] + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header):
                    raise UserError(f"{path}, line {line}: two columns have the same name: {', '.join(header)}.")
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, line {line}: {len(cells)} cells, but the header has {len(header)} ({', '.join(header)}). "
                    f"A text that holds {between!r} must stand in double quotes."
                )
            yield Row(dict(zip(header, cells, strict=True)), str(path), line)

    return read


def _parquet(path: Path, encoding: str | None) -> Iterator[Row]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=4096):
            for value in batch.to_pylist():
                number += 1
                yield Row(value, str(path), number)
    except (arrow.ArrowException, OSError) as error:  # pages that do not decompress are an OSError
        raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".json.gz": _json,
    ".csv": _delimited(","),
    ".csv.gz": _delimited(","),
    ".tsv": _delimited("\t"),
    ".tsv.gz": _delimited("\t"),
    ".parquet": _parquet,
}
WRITERS = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")


class Writer:
    """Rows to `path`, by way of `path.partial`; what an interrupted run has written is continued.

    like  a parquet file whose columns keep their types where they are passed on to another
    done  rows that are already there when it opens
    """

    def __init__(self, path: Path, like: Path | None = None):
        self.path, self.kind, self.like = path, suffix(path), like
        if self.kind not in WRITERS:
            raise UserError(f"{path}: luthier writes {', '.join(WRITERS)}.")
        self.partial = path.with_name(path.name + ".partial")  # always JSON lines, turned into the format at the end
        self.done = 0

    def __enter__(self) -> Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if self.partial.exists():
            with self.partial.open("rb") as stream:
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
                    self.done += 1
        self._stream = self.partial.open("r+b" if self.partial.exists() else "wb")
        self._stream.truncate(whole)
        self._stream.seek(whole)
        return self

    def write(self, values: dict[str, Any]) -> None:
        self._stream.write((json.dumps(values, ensure_ascii=False, default=plain) + "\n").encode())

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stream.close()
        if not self.partial.stat().st_size:  # nothing to publish, and nothing to go on from
            self.partial.unlink()
        elif kind is None:
            self._publish()

    def _publish(self) -> None:
        if self.kind == ".jsonl":
            self.partial.replace(self.path)
            return
        ready = self.path.with_name(self.path.name + ".ready")
        {".jsonl.gz": self._to_gzip, ".parquet": self._to_parquet}.get(self.kind, self._to_delimited)(ready)
        ready.replace(self.path)
        self.partial.unlink()

    def _rows(self) -> Iterator[dict[str, Any]]:
        with self.partial.open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)

    def _to_gzip(self, target: Path) -> None:
        with self.partial.open("rb") as source, gzip.open(target, "wb") as stream:
            while block := source.read(1 << 20):
                stream.write(block)

    def _to_delimited(self, target: Path) -> None:
        columns = list(dict.fromkeys(name for row in self._rows() for name in row))
        with target.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, delimiter="\t" if self.kind == ".tsv" else ",")
            writer.writeheader()
            for row in self._rows():
                writer.writerow({name: json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value for name, value in row.items()})

    def _to_parquet(self, target: Path) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        schema = arrow.schema([])
        known = {field.name: field.type for field in parquet.read_schema(self.like)} if self.like and suffix(self.like) == ".parquet" else {}
        for table in self._tables(known):
            schema = _united(schema, table.schema)
        with parquet.ParquetWriter(target, schema) as file:
            for table in self._tables({field.name: field.type for field in schema}, schema.names):
                file.write_table(table)

    def _tables(self, kinds: Mapping[str, Any], columns: Sequence[str] = ()) -> Iterator[Any]:
        """The rows as arrow tables of a thousand, with `columns` or their own, of these kinds where they can be."""
        import pyarrow as arrow

        rows = self._rows()
        while chunk := list(itertools.islice(rows, 1000)):
            names = columns or dict.fromkeys(name for row in chunk for name in row)
            yield arrow.table({name: _array([row.get(name) for row in chunk], kinds.get(name)) for name in names})


def _array(values: Sequence[Any], kind: Any) -> Any:
    """A column as arrow has it; values of no common type are strings, and what is no string is written as JSON."""
    import pyarrow as arrow

    with contextlib.suppress(arrow.ArrowException, TypeError, ValueError):
        if kind is not None and (arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)):
            return arrow.array([value if value is None else base64.b64decode(value) for value in values], kind)
        return arrow.array(values, kind)
    try:
        return arrow.array(values, arrow.string()).cast(kind)  # times and decimal numbers, which JSON has as text
    except (arrow.ArrowException, TypeError):
        return arrow.array([value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values], arrow.string())


def _united(first: Any, second: Any) -> Any:
    """A schema with the columns of both; where the two have no common type for a column, it is string."""
    import pyarrow as arrow

    fields = {field.name: field for field in first}
    for field in second:
        both = [arrow.schema([fields.get(field.name, field)]), arrow.schema([field])]
        try:
            fields[field.name] = arrow.unify_schemas(both, promote_options="permissive").field(0)
        except arrow.ArrowException:
            fields[field.name] = arrow.field(field.name, arrow.string())
    return arrow.schema(list(fields.values()))


def plain(value: Any) -> Any:
    """What JSON lacks, as JSON."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.tolist() if hasattr(value, "tolist") else str(value)
