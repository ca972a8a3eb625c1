"""`luthier predict`: a file in, the same file with answers out, in constant memory and resumable."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from luthier import compute
from luthier.data.formats import plain
from luthier.data.rows import Row, Rows
from luthier.data.sources import stream, writer
from luthier.errors import UserError
from luthier.verbs.run import Run, load

CHUNK = 1024  # rows that are read, predicted and written together
INPUT = "standard input"


def predict(
    run: Run | str | Path,
    data: str | Path = "-",
    *,
    out: str | Path | None = None,
    top: int = 1,
    columns: dict[str, str] | None = None,
    where: dict[str, str] | None = None,
    encoding: str | None = None,
    precision: str | None = None,
    batch_size: int = 64,
    base: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    console: Any = None,
) -> int:
    """Add the predictions of `run` to every row of `data`; all other columns pass through. Returns the number of rows.

    data       a file, or "-" for standard input: one JSON object or one plain text a line
    out        csv, tsv, jsonl(.gz) or parquet; without it, JSON lines on standard output. An unfinished OUT is continued.
    precision  auto, fp32, bf16 or int8 (what it costs is measured on some of the rows, and said); by default that of the run
    """
    from luthier.verbs import rounding
    from luthier.verbs.console import Console

    console = console or Console()
    if not isinstance(run, Run):
        run = load(run, base, device, precision)
    elif precision:
        run = run.at(precision)
    roles = run.columns(columns)
    file = None
    if out is not None:
        file = writer(out, None if str(data) == "-" else data)
        if file.path.exists() and not overwrite:
            raise UserError(f"{out} exists. Give --overwrite, or another --out.")
    piped = str(data) == "-"
    if piped and sys.stdin.isatty():
        console.say("reading standard input: a text or a JSON object a line")
    rows = _standard_input(next(iter(roles.values())), where, encoding) if piped else stream(data, encoding, where)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{INPUT if piped else data} holds no rows to predict.")
    rows = itertools.chain((first,), rows)
    before = run.truncated
    compute.ready(console.say)
    size = batch_size if piped else CHUNK  # what is typed or piped in is answered as soon as there is a batch of it

    if run.precision == "int8":
        head = list(itertools.islice(rows, size))
        console.say(rounding.of_answers(run, run.typed(Rows.of(head, first.file), supervised=False, columns=columns), batch_size))
        rows = itertools.chain(head, rows)

    def answered(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        return _answered(run, rows, first.values, top, columns, batch_size, size)

    if file is None:
        count = 0
        for values in answered(rows):
            count += 1
            print(json.dumps(values, ensure_ascii=False, default=plain), flush=True)
        _tell_truncated(run, before, console)
        return count

    asked = file.path.with_name(file.path.name + ".asked")
    _begin(file.partial, asked, {"run": str(run.path.absolute()), "made": run.record.content["created"], "columns": roles, "where": where or {}, "top": top, "precision": run.precision}, overwrite)
    count = 0
    try:
        with file, console.progress("predicting") as advance:
            count = file.done
            # a chunk that was cut is computed as a whole again: rounding depends on who else is in a batch
            for values in itertools.islice(answered(_past(rows, file.partial, count - count % size)), count % size, None):
                file.write(values)
                count += 1
                advance(1)
    except UserError as error:
        kept = f"\nThe first {count:,} rows are kept: give the same command again to go on." if count else ""
        raise UserError(f"{error}{kept}") from error
    finally:
        if not file.partial.exists():
            asked.unlink(missing_ok=True)
    _tell_truncated(run, before, console)
    return count


def _tell_truncated(run: Run, before: int, console: Any) -> None:
    if cut := run.truncated - before:
        console.say(f"{cut:,} rows are longer than the {run.record.data['max_length']} tokens that the run reads; their rest was left out")


def _begin(partial: Path, asked: Path, call: dict[str, Any], overwrite: bool) -> None:
    """Note what is asked beside the unfinished file, so that the answers of two runs never end in one. Raises UserError where it was begun by another call."""
    if partial.exists() and not (asked.is_file() and json.loads(asked.read_text(encoding="utf-8")) == call):
        if not overwrite:
            raise UserError(f"{partial} was begun with another run, --top, --columns, --where or --precision. Give --overwrite to start anew, or another --out.")
        partial.unlink()
    asked.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(call), encoding="utf-8")


def _past(rows: Iterator[Row], partial: Path, done: int) -> Iterator[Row]:
    """The rows after those that are answered already. Raises UserError where the unfinished file holds others."""
    with partial.open(encoding="utf-8") as lines:
        for line in itertools.islice(lines, done):
            row, stored = next(rows, None), json.loads(line)
            if row is None or _written(row.values) != _written({name: stored.get(name) for name in row.values}):
                raise UserError(f"{partial} holds the answers to other rows than {row.where if row else 'these'}: the data has changed since. Give --out another name, or remove it to start anew.")
    return rows


def _answered(run: Run, rows: Iterable[Row], taken: Collection[str], top: int, columns: Mapping[str, str] | None, batch_size: int, chunk_size: int) -> Iterator[dict[str, Any]]:
    """Each row with its answers. `taken`: columns of the first row; an answer of the same name gets a number, so that nothing of the file is lost."""
    iterator = iter(rows)
    names: dict[str, str] = {}
    while chunk := list(itertools.islice(iterator, chunk_size)):
        typed = run.typed(Rows.of(chunk, chunk[0].file), supervised=False, columns=columns)
        for row, answer in zip(chunk, run.answers(typed, top, batch_size), strict=True):
            names = names or _free(answer, taken)
            named = {names[name]: value for name, value in answer.items()}
            if clash := sorted(named.keys() & row.values.keys()):
                raise UserError(f"{row.where} has a column {clash[0]!r}, which the rows before had not, and an answer has that name too. Rename the column.")
            yield {**row.values, **named}


def _free(answer: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """Names for the answers of one run, all with the same number: predicted_2, score_2."""
    for number in itertools.count(1):
        names = {name: name if number == 1 else f"{name}_{number}" for name in answer}
        if not set(names.values()) & set(taken):
            return names
    raise AssertionError


def _standard_input(column: str, where: Mapping[str, str] | None, encoding: str | None) -> Iterator[Row]:
    """`column` takes the lines that are plain texts."""
    for number, text in enumerate(_lines(sys.stdin, encoding), start=1):
        if not text.strip():
            continue
        values: Any = text
        if text.lstrip().startswith("{"):
            try:
                values = json.loads(text)
            except ValueError as error:
                raise UserError(f"{INPUT}, line {number}: not valid JSON ({error}).") from None
        row = Row(values if isinstance(values, dict) else {column: text}, INPUT, number)
        if all(str(row.get(name)) == value for name, value in (where or {}).items()):
            yield row


def _lines(source: TextIO, encoding: str | None) -> Iterator[str]:
    if hasattr(source, "reconfigure"):  # whatever the locale is
        try:
            source.reconfigure(encoding=encoding or "utf-8", errors="strict")  # type: ignore[attr-defined]
        except LookupError:
            raise UserError(f"There is no encoding {encoding!r}. Common ones: utf-8, cp1252, latin-1, utf-16.") from None
    try:
        for line in source:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{INPUT}: byte 0x{error.object[error.start]:02x} is not {encoding or 'UTF-8'}. Give the right one with --encoding.") from None


def _written(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), default=plain)
