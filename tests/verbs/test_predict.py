"""Rows in, the same rows with answers out: any format, any task, interrupted anywhere, nothing of the user's lost."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import luthier
from luthier import UserError
from luthier.contract.texts import tiny_rows, write_jsonl
from luthier.data.sources import read
from luthier.verbs import predict as verb
from luthier.verbs.console import Console

TEXTS = ["the red boat", 'an "old", house', "green tree in\nthe river", "not a bird"]
ROWS = [{"id": f"r{i}", "text": text, "note": "ü" if i else ""} for i, text in enumerate(TEXTS)]
QUIET = Console(quiet=True)


def write(path: Path, rows: list[dict]) -> Path:
    """By other means than luthier's writer."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines, encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def values(path: Path) -> list[dict]:
    return [dict(row.values) for row in read(path)["all"]]


FORMATS = ["csv", "tsv", "jsonl", "jsonl.gz", "parquet"]


@pytest.mark.parametrize("into,out", [*[(kind, "jsonl") for kind in FORMATS], *[("jsonl", kind) for kind in FORMATS if kind != "jsonl"]])
def test_every_format_in_and_out(into: str, out: str, made, tmp_path: Path) -> None:
    run = luthier.load(made("merged"))
    assert luthier.predict(run, write(tmp_path / f"new.{into}", ROWS), out=tmp_path / f"out.{out}", console=QUIET) == len(ROWS)
    found = values(tmp_path / f"out.{out}")
    assert [{name: row[name] for name in ROWS[0]} for row in found] == ROWS
    assert [(row["predicted"], float(row["score"])) for row in found] == [(a["predicted"], a["score"]) for a in run.predict(TEXTS)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"new.{into}", f"out.{out}"])


def test_texts_and_objects_from_standard_input(made, call) -> None:
    lines = '{"text": "der rote Bär", "id": 7, "lang": "de"}\n\nthe red boat\n'.encode()
    ended = call("predict", made("merged"), stdin=lines)
    first, second = map(json.loads, ended.out.splitlines())
    assert ended.status == 0 and first["id"] == 7 and first["text"] == "der rote Bär" and second["text"] == "the red boat"
    assert first.keys() >= {"predicted", "score"}
    assert [json.loads(line)["id"] for line in call("predict", made("merged"), "--where", "lang=de", stdin=lines).out.splitlines()] == [7]
    assert json.loads(call("predict", made("merged"), "--columns", "text=body", stdin=b"the boat\n").out)["body"] == "the boat"
    assert json.loads(call("predict", made("merged"), "--encoding", "cp1252", stdin="für".encode("cp1252")).out)["text"] == "für"


def test_what_is_piped_in_is_answered_at_once(made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answered: list[int] = []

    class Pipe(list):
        def __iter__(self):
            for line in ("a boat\n", "the house\n", "a tree\n"):
                answered.append(capsys.readouterr().out.count("\n"))
                yield line

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", Pipe())
    assert luthier.predict(made("merged"), batch_size=1) == 3
    assert answered == [0, 1, 1]  # each line before the next one is read


def test_top_labels_with_their_scores(made, call, tmp_path: Path) -> None:
    row = json.loads(call("predict", made("merged"), "--top", "5", stdin=b"the red boat").out)
    scores = [entry["score"] for entry in row["top"]]
    assert {entry["label"] for entry in row["top"]} == {"color", "plain"}
    assert sum(scores) == pytest.approx(1, abs=1e-5) and scores == sorted(scores, reverse=True)
    assert row["top"][0] == {"label": row["predicted"], "score": row["score"]}


def test_answers_of_the_other_tasks(made, tmp_path: Path) -> None:
    def answers(kind: str, rows: list[dict]) -> list[dict]:
        luthier.predict(made(kind), write_jsonl(tmp_path / f"{kind}.jsonl", rows), out=tmp_path / f"{kind}-out.jsonl", console=QUIET)
        return values(tmp_path / f"{kind}-out.jsonl")

    words = [["the", "red", "boat"], ["not"]]
    assert [len(row["predicted"]) for row in answers("tags", [{"tokens": w} for w in words])] == [3, 1]
    assert all(isinstance(row["predicted"], float) for row in answers("number", ROWS))
    vectors = np.array([row["embedding"] for row in answers("search", [{"query": t} for t in TEXTS])])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(vectors, luthier.load(made("search")).embed(TEXTS), atol=1e-5)
    assert all(isinstance(row["predicted"], str) for row in answers("text", ROWS))


def test_columns_that_bear_the_name_of_an_answer_are_kept(made, tmp_path: Path) -> None:
    """A label beside the prediction, and the answers of one run as the rows of the next."""
    rows = [{"text": text, "label": "mine", "score": 5} for text in TEXTS]
    luthier.predict(made("merged"), write_jsonl(tmp_path / "a.jsonl", rows), out=tmp_path / "b.jsonl", console=QUIET)
    luthier.predict(made("number"), tmp_path / "b.jsonl", out=tmp_path / "c.jsonl", console=QUIET)
    for row, before in zip(values(tmp_path / "c.jsonl"), rows, strict=True):
        assert list(row) == ["text", "label", "score", "predicted_2", "score_2", "predicted"] and before.items() <= row.items()
    write_jsonl(tmp_path / "late.jsonl", [{"text": "a boat"}, {"text": "a tree", "score": 3}])
    with pytest.raises(UserError, match=r"late\.jsonl:2 has a column 'score'"):
        luthier.predict(made("merged"), tmp_path / "late.jsonl", out=tmp_path / "d.jsonl", console=QUIET)
    assert not (tmp_path / "d.jsonl").exists()


def test_killed_and_given_again(made, tmp_path: Path) -> None:
    """kill -9 somewhere in the middle: the file is the one that an undisturbed call writes, byte for byte."""
    rows = [{"n": i, **row} for i, row in enumerate(tiny_rows("text-generation", 3_000))]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"
    partial = tmp_path / "broken.csv.partial"
    child = subprocess.Popen([sys.executable, "-m", "luthier", "predict", str(made("merged")), "--data", str(data), "--out", str(broken)], stderr=subprocess.DEVNULL)
    while child.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.001)
    assert child.poll() is None, "it ended before it could be killed"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with partial.open("ab") as stream:  # and half a row, as a kill in the middle of a write leaves it
        stream.write(b'{"n": 99')
    assert not broken.exists() and partial.read_bytes().count(b"\n") < len(rows)
    for out in (broken, whole):
        assert luthier.predict(made("merged"), data, out=out, console=QUIET) == len(rows)
    assert broken.read_bytes() == whole.read_bytes() and len(values(whole)) == len(rows)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.asked"))


@pytest.fixture
def unfinished(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output that ended at a bad row after two chunks of two."""
    monkeypatch.setattr(verb, "CHUNK", 2)
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"id": "r4", "text": " "}])
    with pytest.raises(UserError, match=r"rows\.jsonl:5: the text in column 'text' is empty(.|\n)*first 4 rows are kept"):
        luthier.predict(made("merged"), tmp_path / "rows.jsonl", out=tmp_path / "out.jsonl", console=QUIET)
    return tmp_path


def test_a_bad_row_is_mended_and_the_rest_goes_on(unfinished: Path, made, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    answers = luthier.Run.answers
    monkeypatch.setattr(luthier.Run, "answers", lambda self, typed, *rest: seen.append(len(typed)) or answers(self, typed, *rest))
    write_jsonl(unfinished / "rows.jsonl", [*ROWS, {"id": "r4", "text": "a boat"}])
    assert luthier.predict(made("merged"), unfinished / "rows.jsonl", out=unfinished / "out.jsonl", console=QUIET) == 5
    assert seen == [1] and [row["id"] for row in values(unfinished / "out.jsonl")] == ["r0", "r1", "r2", "r3", "r4"]


@pytest.mark.parametrize("other", [{"top": 2}, {"columns": {"text": "id"}}, {"where": {"note": "ü"}}, {"run": "other"}], ids=["top", "columns", "where", "run"])
def test_answers_of_two_calls_never_end_in_one_file(other: dict, unfinished: Path, made, tmp_path: Path) -> None:
    run = made(other.pop("run", "merged"))
    with pytest.raises(UserError, match="begun with another run"):
        luthier.predict(run, unfinished / "rows.jsonl", out=unfinished / "out.jsonl", console=QUIET, **other)
    write_jsonl(unfinished / "rows.jsonl", ROWS)
    luthier.predict(run, unfinished / "rows.jsonl", out=unfinished / "out.jsonl", console=QUIET, overwrite=True, **other)
    luthier.predict(run, unfinished / "rows.jsonl", out=unfinished / "fresh.jsonl", console=QUIET, **other)
    assert (unfinished / "out.jsonl").read_bytes() == (unfinished / "fresh.jsonl").read_bytes()


def test_rows_that_changed_under_an_unfinished_file(unfinished: Path, made) -> None:
    write_jsonl(unfinished / "rows.jsonl", [{**ROWS[0], "text": "other"}, *ROWS[1:], ROWS[0]])
    with pytest.raises(UserError, match="holds the answers to other rows than"):
        luthier.predict(made("merged"), unfinished / "rows.jsonl", out=unfinished / "out.jsonl", console=QUIET)


BAD = {
    "a missing column": (ROWS, ("--columns", "text=body"), "lacks the column 'body' (for text). It has: id, text, note"),
    "a file without the column": ([{"body": "a"}], (), "lacks the column 'text' (for text). It has: body"),
    "an unknown role": (ROWS, ("--columns", "txt=note"), "reads no 'txt'. Did you mean 'text'"),
    "an empty text": ([*ROWS, {"id": "x", "text": "", "note": ""}], (), "new.csv:7: the text in column 'text' is empty"),
    "a filter that keeps nothing": (ROWS, ("--where", "id=nobody"), "keeps no row"),
    "no label at all": (ROWS, ("--top", "0"), "--top"),
    "a base that is nowhere": (ROWS, ("--base", "nowhere"), "--base nowhere: there is no such folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_leave_nothing_behind(name: str, made, call, tmp_path: Path) -> None:
    rows, flags, expected = BAD[name]
    ended = call("predict", made("merged"), "--data", write(tmp_path / "new.csv", rows), "--out", tmp_path / "out.csv", *flags)
    assert ended.status == 2 and expected in ended.err and not ended.out, ended.err
    assert [p.name for p in tmp_path.iterdir()] == ["new.csv"]


@pytest.mark.parametrize(
    "stdin,expected",
    [(b"", "holds no rows"), (b"\n\n", "holds no rows"), (b'a boat\n{"text": \n', "line 2: not valid JSON"), (b"a \xff\n", "byte 0xff is not UTF-8"), (b'{"body": "a"}', "lacks the column 'text'")],
)
def test_bad_standard_input(stdin: bytes, expected: str, made, call) -> None:
    ended = call("predict", made("merged"), stdin=stdin)
    assert ended.status == 2 and expected in ended.err, ended.err


def test_an_existing_file_is_kept_unless_told(made, call, tmp_path: Path) -> None:
    data, out = write(tmp_path / "new.csv", ROWS), tmp_path / "out.csv"
    out.write_text("mine", encoding="utf-8")
    ended = call("predict", made("merged"), "--data", data, "--out", out)
    assert ended.status == 2 and "--overwrite" in ended.err and out.read_text(encoding="utf-8") == "mine"
    assert call("predict", made("merged"), "--data", data, "--out", out, "--overwrite").status == 0 and len(values(out)) == len(ROWS)
    assert call("predict", made("merged"), "--data", data, "--out", tmp_path / "out.xls").status == 2


def test_parquet_columns_that_pass_through_keep_their_types(made, tmp_path: Path) -> None:
    """Also where the file was half written before."""
    import datetime
    import decimal

    import pyarrow as arrow
    import pyarrow.parquet as parquet

    count = 40
    moment = datetime.datetime(2024, 2, 29, 12, 30, 1, 5)
    table = arrow.table({
        "text": [row["text"] for row in tiny_rows("text-classification", count)],
        "when": arrow.array([moment] * count, arrow.timestamp("us")),
        "there": arrow.array([moment.replace(tzinfo=datetime.UTC)] * count, arrow.timestamp("ms", "UTC")),
        "day": arrow.array([moment.date(), None] * (count // 2)),
        "price": arrow.array([decimal.Decimal("3.10")] * count, arrow.decimal128(6, 2)),
        "raw": arrow.array([b"\x00ab\xff"] * count),
        "small": arrow.array([3] * count, arrow.int8()),
        "parts": arrow.array([[1.5, None]] * count, arrow.list_(arrow.float32())),
    })
    parquet.write_table(table, tmp_path / "in.parquet")
    luthier.predict(made("merged"), tmp_path / "in.parquet", out=tmp_path / "half.parquet", console=Console(quiet=True))
    whole = parquet.read_table(tmp_path / "half.parquet")
    assert whole.select(table.column_names).equals(table) and {"predicted", "score"} <= set(whole.column_names)
    run = luthier.load(made("merged"))
    answer, seen = run.answers, []

    def broken(typed, *given):
        seen.append(1)
        if len(seen) == 2:
            raise UserError("the power failed")
        return answer(typed, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "answers", broken)
        patch.setattr("luthier.verbs.predict.CHUNK", 16)
        with pytest.raises(UserError, match="first 16 rows are kept"):
            luthier.predict(run, tmp_path / "in.parquet", out=tmp_path / "again.parquet", console=Console(quiet=True))
    luthier.predict(made("merged"), tmp_path / "in.parquet", out=tmp_path / "again.parquet", console=Console(quiet=True))
    assert parquet.read_table(tmp_path / "again.parquet").select(table.column_names).equals(table)
