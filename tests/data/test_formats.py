"""Files are read as they were meant, or refused with the place and the way out; what is written reads back the same."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier import UserError
from luthier.data.formats import READERS, WRITERS, Writer, stream_file

# no surrogates: no file of any encoding holds one
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.one_of(st.integers(-(2**40), 2**40), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.lists(TEXT, min_size=1, max_size=3))
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def values(path: Path, encoding: str | None = None) -> list[dict[str, Any]]:
    return [dict(row.values) for row in stream_file(path, encoding)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with Writer(path) as file:
        for row in rows:
            file.write(row)
    return path


def given_file(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


@pytest.mark.parametrize("kind", WRITERS)
@quick
@given(texts=st.lists(TEXT, min_size=1, max_size=6))
def test_any_text_survives_writing_and_reading(kind: str, texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"text": text, "n": "x"} for text in texts]
        assert values(write(Path(folder) / f"out{kind}", rows)) == rows


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz"])
@quick
@given(rows=st.lists(st.dictionaries(st.sampled_from("abc"), VALUES, min_size=1), min_size=1, max_size=5))
def test_json_lines_keep_every_value(kind: str, rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert values(write(Path(folder) / f"out{kind}", rows)) == rows


def as_strings(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@quick
@given(rows=st.lists(st.dictionaries(st.sampled_from("abc"), VALUES, min_size=1), min_size=1, max_size=6))
def test_parquet_keeps_values_of_one_type_and_writes_others_as_json(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = values(write(Path(folder) / "out.parquet", rows))
    assert len(found) == len(rows)
    for name in {name for row in rows for name in row}:
        wanted = [row.get(name) for row in rows]
        got = [row[name] for row in found]
        assert got == wanted or got == [as_strings(value) for value in wanted]


def test_a_parquet_column_of_two_types_far_apart(tmp_path: Path) -> None:
    """The type of a column shows only at its end; a date stays the string that it was."""
    rows: list[dict[str, Any]] = [{"label": 1, "score": 1, "day": "2020-01-01 00:00:00"} for _ in range(1500)] + [{"label": "none", "score": 0.5, "day": None}]
    found = values(write(tmp_path / "out.parquet", rows))
    assert found[0] == {"label": "1", "score": 1.0, "day": "2020-01-01 00:00:00"} and found[-1] == {"label": "none", "score": 0.5, "day": None}


def test_rows_longer_than_a_block_of_the_parquet_writer(tmp_path: Path) -> None:
    rows = [{"text": "word " * 500_000}, {"text": "short"}]
    assert values(write(tmp_path / "out.parquet", rows)) == rows


@pytest.mark.parametrize("kind", WRITERS)
def test_an_interrupted_file_is_continued_without_a_trace(kind: str, tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "n": str(i)} for i in range(10)]
    path = tmp_path / f"out{kind}"
    with pytest.raises(KeyboardInterrupt), Writer(path) as file:
        for row in rows[:4]:
            file.write(row)
        raise KeyboardInterrupt
    assert not path.exists()
    with file.partial.open("ab") as stream:
        stream.write(b'{"text": "half a li')  # what a kill leaves
    with Writer(path) as file:
        assert file.done == 4
        for row in rows[file.done :]:
            file.write(row)
    assert values(path) == rows and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", WRITERS)
def test_no_rows_leave_no_file(kind: str, tmp_path: Path) -> None:
    write(tmp_path / f"out{kind}", [])
    with pytest.raises(UserError), Writer(tmp_path / f"out{kind}"):
        raise UserError("of the reader")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_format_is_refused_with_those_that_are_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"luthier writes .*\.parquet"):
        Writer(tmp_path / "out.xlsx")


def test_every_cell_of_a_table_that_is_hard_to_read(tmp_path: Path) -> None:
    content = '\ufeffbody,team\r\n"two\r\nlines, and a ""quote""",sales\r\n\r\n  spaced  ,support\r\n'
    path = given_file(tmp_path, "rows.csv", content)
    found = list(stream_file(path, None))
    assert [dict(row.values) for row in found] == [{"body": 'two\r\nlines, and a "quote"', "team": "sales"}, {"body": "  spaced  ", "team": "support"}]
    assert [row.line for row in found] == [2, 5], "a row begins where its first line is"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.tsv", "body\tteam\na, b\tx\n"),
        ("rows.csv", "body;team\na, b;x\n"),
        ("rows.csv", "body\tteam\na, b\tx\n"),
        ("rows.csv", 'body,team\r"a, b",x\r'),
        ("rows.json", '[{"body": "a, b", "team": "x"}]'),
        ("rows.jsonl", '\ufeff\n{"body": "a, b", "team": "x"}\n\n'),
        ("ROWS.JSONL", '{"body": "a, b", "team": "x"}'),
    ],
    ids=["tab", "semicolon", "tab in csv", "old line ends", "json", "blank lines", "capital ending"],
)
def test_spellings_of_one_table(name: str, content: str, tmp_path: Path) -> None:
    assert values(given_file(tmp_path, name, content)) == [{"body": "a, b", "team": "x"}]
    packed = given_file(tmp_path, name + ".gz", gzip.compress(content.encode()))
    assert values(packed) == [{"body": "a, b", "team": "x"}]


def test_a_cell_longer_than_the_usual_limit(tmp_path: Path) -> None:
    long = "word " * 100_000
    assert values(given_file(tmp_path, "rows.csv", f'text,label\n"{long}",a\n')) == [{"text": long, "label": "a"}]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-16-le", "utf-8-sig"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    path = given_file(tmp_path, "rows.csv", "text,label\ngrößer,é\n".encode(encoding))
    assert values(path, encoding) == [{"text": "größer", "label": "é"}]


GOOD = "text,label\n" + "a b,x\n" * 3
BROKEN = {
    "a broken line": ("rows.jsonl", '{"a": 1}\n\n{"a": \n', None, r"rows\.jsonl, line 3: not valid JSON.*begins '\{\"a\":'"),
    "a packed broken line": ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": \n'), None, r"rows\.jsonl\.gz, line 2: not valid JSON"),
    "no object": ("rows.jsonl", '{"a": 1}\n"b"\n', None, "line 2: a row must be an object"),
    "no object in json": ("rows.json", '[{"a": 1}, 2]', None, "row 2: a row must be an object"),
    "no list": ("rows.json", '{"a": 1}', None, "holds dict, not a list"),
    "lines named json": ("rows.json", '{"a": 1}\n{"a": 2}\n', None, r"name it \.jsonl"),
    "an open quote": ("rows.csv", GOOD + '"open,x\na,x\n', None, r"rows\.csv, line 5: a quote opens here and never closes"),
    "an open quote before much text": ("rows.csv", GOOD + '"open,x\n' + "a,x\n" * 50_000, None, "line 5: a quote opens here and never closes"),
    "an open quote that another one meets": ("rows.csv", GOOD + '"open,x\na,"x"\n', None, r"line 5: a cell that a quote opens here goes on .*\(line 6\)"),
    "a comma too many": ("rows.csv", GOOD + "a,b,c\n", None, r"line 5: 3 cells, but the header has 2 \(text, label\)"),
    "a row too short": ("rows.tsv", "text\tlabel\na\n", None, "line 2: 1 cells"),
    "two columns of one name": ("rows.csv", "text,text\n", None, "line 1: two columns have the same name"),
    "Windows bytes": ("rows.csv", GOOD.encode() + "größer,x\n".encode("cp1252"), None, "line 5: byte 0xf6 is not UTF-8.*'größer,x'.*--encoding cp1252"),
    "bytes of another encoding": ("rows.csv", GOOD.encode() + b"\xff,x\n", "ascii", "line 5: byte 0xff is not ascii.*--encoding"),
    "UTF-16": ("rows.csv", GOOD.encode("utf-16"), None, "--encoding utf-16"),
    "no UTF-16": ("rows.csv", GOOD.encode() + b"x", "utf-16", "is not utf-16.*--encoding"),
    "an unknown encoding": ("rows.csv", GOOD, "utf-9", "no encoding 'utf-9'"),
    "half a gzip file": ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9)[:-9], None, "gzip file is broken or incomplete"),
    "damaged gzip": ("rows.jsonl.gz", gzip.compress(bytes(range(256)) * 9)[:10] + b"\xff" * 40, None, "gzip file is broken or incomplete"),
    "no gzip file": ("rows.jsonl.gz", '{"a": 1}\n', None, "gzip file is broken or incomplete"),
    "no parquet file": ("rows.parquet", "PAR1 not really", None, "not a readable parquet file"),
    "a pickle": ("rows.pkl", "x", None, "does not open"),
    "an unknown ending": ("rows.cvs", "x", None, "Did you mean '.csv'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named_with_its_place(name: str, tmp_path: Path) -> None:
    file, content, encoding, expected = BROKEN[name]
    with pytest.raises(UserError, match=f"(?s){expected}"):
        values(given_file(tmp_path, file, content), encoding)


def test_a_damaged_parquet_page(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [{"text": f"some text {i}"} for i in range(500)])
    content = bytearray(path.read_bytes())
    content[30:200] = b"\xff" * 170
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable parquet file"):
        values(path)


def test_every_format_is_read_under_its_ending(tmp_path: Path) -> None:
    """A reader that is announced reads: its ending in the table is all that a caller knows."""
    for kind in READERS:
        if kind in WRITERS:
            write(tmp_path / f"rows{kind}", [{"text": "a", "label": "b"}])
        else:
            content = '[{"text": "a", "label": "b"}]' if "json" in kind else "text,label\na,b\n".replace(",", "\t" if "tsv" in kind else ",")
            given_file(tmp_path, f"rows{kind}", gzip.compress(content.encode()) if kind.endswith(".gz") else content)
        assert values(tmp_path / f"rows{kind}") == [{"text": "a", "label": "b"}], kind
