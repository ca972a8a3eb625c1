"""`luthier embed`: a file of texts in, their vectors out, in constant memory and resumable."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from luthier import compute
from luthier.data.columns import Column, assign
from luthier.data.formats import plain
from luthier.data.rows import Row, Rows
from luthier.data.sources import stream
from luthier.errors import UserError, did_you_mean
from luthier.verbs.encoder import Encoder

CHUNK = 4096  # texts that are encoded and kept together
PARTS = ("document", "query")
KINDS = (".npy", ".parquet")


def embed(
    model: Encoder | str | Path,
    data: str | Path,
    *,
    out: str | Path,
    part: str = "document",
    column: str | None = None,
    where: dict[str, str] | None = None,
    encoding: str | None = None,
    precision: str | None = None,
    batch_size: int = 64,
    base: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    console: Any = None,
) -> int:
    """Write the vector of every text of `data`, in their order. Returns how many.

    model      a run folder of sentence-similarity, a stock model folder, or an opened Encoder
    out        .npy: float32 (n, d); .parquet: the rows of `data` with a column `embedding` more. An unfinished OUT is continued.
    part       document or query: which of the model's prefixes the texts get
    column     the column of texts; by default the one of the run, or the only one that holds texts
    precision  auto, fp32, bf16 or int8 (what it costs is measured on some of the texts, and said); by default that of the run, or auto
    """
    from luthier.verbs import rounding
    from luthier.verbs.console import Console

    console = console or Console()
    target = Path(out)
    if target.suffix not in KINDS:
        raise UserError(f"--out {out}: vectors are written as {' or '.join(KINDS)}.")
    if target.exists() and not overwrite:
        raise UserError(f"{out} exists. Give --overwrite, or another --out.")
    if part not in PARTS:
        raise UserError(f"--part {part}: there is no such part.{did_you_mean(part, PARTS)} Choose document or query.")
    rows = stream(data, encoding, where)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{data} holds no rows.")
    name = _column(first, column, part)
    encoder = model if isinstance(model, Encoder) else Encoder.open(model, base, device, precision)
    compute.ready(console.say)
    parts = Parts(target, (encoder.name, encoder.sha256, encoder.precision, encoder.max_length, encoder.task.prefix(part), name))
    rows = itertools.chain((first,), rows)
    if encoder.precision == "int8":
        head = list(itertools.islice(rows, CHUNK))
        console.say(rounding.of_vectors(encoder, [_text(row, name) for row in head], part))
        rows = itertools.chain(head, rows)
    count = 0
    with encoder.ready(), console.progress("embedding") as advance:
        for chunk in _chunks(rows):
            texts = [_text(row, name) for row in chunk]
            if parts.lacks(texts):
                vectors = encoder.embed(texts, part, batch_size, advance)
                parts.keep(vectors if target.suffix == ".npy" else _table(chunk, vectors))
            else:
                advance(len(chunk))
            count += len(chunk)
    parts.publish()
    if encoder.truncated:
        console.say(f"{encoder.truncated:,} texts are longer than the {encoder.max_length} tokens that are read; their rest was left out")
    return count


class Parts:
    """The finished chunks of one call, each a file beside OUT that is known by its texts and by all that decides their vectors; in the end they become OUT."""

    def __init__(self, target: Path, decides: tuple[Any, ...]):
        self.target, self.decides = target, repr(decides)
        self.folder = target.with_name(target.name + ".parts")
        self.files: list[Path] = []

    def lacks(self, texts: list[str]) -> bool:
        """Whether the next chunk still has to be computed."""
        digest = hashlib.sha256(self.decides.encode())
        for text in texts:
            digest.update(f"{len(text)}:{text}".encode())
        self.files.append(self.folder / f"{len(self.files):08}-{digest.hexdigest()[:24]}{self.target.suffix}")
        return not self.files[-1].exists()

    def keep(self, content: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "partial"
        _write(partial, self.target.suffix, iter([content]), lambda: [content])
        partial.replace(self.files[-1])

    def publish(self) -> None:
        ready = self.target.with_name(self.target.name + ".ready")
        _write(ready, self.target.suffix, map(_read, self.files), lambda: map(_read, self.files))
        ready.replace(self.target)
        shutil.rmtree(self.folder)


def _read(file: Path) -> Any:
    if file.suffix == ".npy":
        return np.load(file, mmap_mode="r", allow_pickle=False)
    import pyarrow.parquet as parquet

    return parquet.read_table(file)


def _write(path: Path, kind: str, contents: Iterator[Any], again: Callable[[], Any]) -> None:
    """One file of all `contents`. `again` gives them once more, as a header tells what is to come."""
    if kind == ".npy":
        shapes = [content.shape for content in contents]
        with path.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (sum(n for n, _ in shapes), shapes[0][1])})
            for content in again():
                stream.write(np.ascontiguousarray(content, dtype="<f4").data)
        return
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    schema = arrow.unify_schemas([content.schema for content in contents], promote_options="permissive")
    with parquet.ParquetWriter(path, schema) as file:
        for content in again():
            missing = [field.name for field in schema if field.name not in content.column_names]
            for column in missing:
                content = content.append_column(column, arrow.nulls(len(content), schema.field(column).type))
            file.write_table(content.select(schema.names).cast(schema))


def _table(rows: list[Row], vectors: np.ndarray) -> Any:
    import json

    import pyarrow as arrow

    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row.values):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = arrow.array(values)
        except (arrow.ArrowException, TypeError):
            columns[name] = arrow.array([value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=plain) for value in values])
    names = itertools.chain(("embedding",), map("embedding_{}".format, itertools.count(2)))
    free = next(name for name in names if name not in columns)
    columns[free] = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.ravel()), vectors.shape[1])
    return arrow.table(columns)


def _column(first: Row, given: str | None, part: str) -> str:
    role = Column(part, "text", names=("text", "sentence", "document", "abstract", "content", "body", "query", "question"))
    return assign(Rows.of([first], first.file), (role,), {part: given} if given else {})[0][part]


def _text(row: Row, column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        raise UserError(f"{row.where}: column {column!r} holds {text!r}, not a text. Fill it in, or leave the row out.")
    return text


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk
