"""Whatever rows come in, the same rows are read: by path, by folder of splits, or as an object in memory."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier import UserError
from luthier.data.columns import apply, assign, kinds_of
from luthier.data.rows import Rows
from luthier.data.sources import read, stream
from luthier.tasks import find

ROWS = [{"text": f"a boat of {i}", "label": "ab"[i % 2], "n": i} for i in range(20)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def plain(rows: Rows) -> list[dict[str, Any]]:
    return [dict(row.values) for row in rows]


def test_every_way_of_giving_rows_gives_the_same_rows(tmp_path: Path) -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    frame = pandas.DataFrame(ROWS)
    frame.to_parquet(tmp_path / "rows.parquet")
    sources = [
        jsonl(tmp_path / "rows.jsonl", ROWS),
        str(jsonl(tmp_path / "rows.jsonl.gz", ROWS)),
        tmp_path / "rows.parquet",
        ROWS,
        (row for row in ROWS),
        frame,
        frame.set_index("n", drop=False),
        table,
        table.to_iterable_dataset(),
    ]
    found = [read(source)["all"] for source in sources]
    assert all(plain(rows) == ROWS for rows in found)
    assert len({rows.fingerprint for rows in found}) == 1 and found[0].columns == ("text", "label", "n")


def test_what_is_missing_in_a_data_frame_is_missing(rows: Callable[..., Rows]) -> None:
    """pandas has several kinds of nothing and turns whole numbers beside one into floats; a text column stays text, a class a class."""
    pandas, numpy = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    frame = pandas.DataFrame(
        {
            "text": ["a b", None, "c d"] * 10,
            "label": [0, 1, numpy.nan] * 10,
            "kind": pandas.Categorical(["x", None, "y"] * 10),
            "score": [0.5, 1.5, None] * 10,
            "sure": [True, None, False] * 10,
        }
    )
    found = read(frame)["all"]
    assert plain(found)[:3] == [
        {"text": "a b", "label": 0, "kind": "x", "score": 0.5, "sure": True},
        {"text": None, "label": 1, "kind": None, "score": 1.5, "sure": None},
        {"text": "c d", "label": None, "kind": "y", "score": None, "sure": False},
    ]
    assert {"text"} <= kinds_of(found.column("text")) and "category" in kinds_of(found.column("label"))
    task = find("text-classification")
    for broken, column in (("the text in column 'text' is empty", "text"), ("the label in column 'label' is missing", "label")):
        kept = read(frame.dropna(subset=[{"text": "label", "label": "text"}[column]]))["all"]
        with pytest.raises(UserError, match=f"rows:2: {broken}"):
            apply(kept, assign(kept, task.columns, {})[0], task.columns)
    apply(read(frame.dropna())["all"], {"text": "text", "label": "label"}, task.columns)


def test_values_of_numpy_become_values_of_python() -> None:
    numpy = pytest.importorskip("numpy")
    found = read([{"tokens": numpy.array(["a", "b"]), "label": numpy.int64(3), "score": numpy.float32(0.5), "text": numpy.str_("x")}])["all"][0].values
    assert found == {"tokens": ["a", "b"], "label": 3, "score": 0.5, "text": "x"} and [type(v) for v in found.values()] == [list, int, float, str]


def test_class_numbers_of_datasets_get_their_names() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"])),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    rows = [{"tokens": ["Anna", "runs"], "ner_tags": [1, 0], "label": 1}, {"tokens": ["it"], "ner_tags": [0], "label": -1}]
    found = read(datasets.DatasetDict(test=datasets.Dataset.from_list(rows, features), train=datasets.Dataset.from_list(rows, features)))
    assert list(found) == ["train", "test"], "the parts come in their usual order"
    assert found["train"].column("ner_tags") == [["B-PER", "O"], ["O"]] and found["train"].column("label") == ["yes", None]


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev", "Dev"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_folder_of_splits(validation: str, ending: str, tmp_path: Path) -> None:
    for name in ("train", validation, "test"):
        jsonl(tmp_path / (name + ending), [{**ROWS[0], "n": name}])
    (tmp_path / "README.md").write_text("about these rows")
    found = read(tmp_path)
    assert {split: rows[0]["n"] for split, rows in found.items()} == {"train": "train", "validation": validation, "test": "test"}
    as_mapping = read({"test": plain(found["test"]), validation: plain(found["validation"]), "train": plain(found["train"])})
    assert list(as_mapping) == list(found) == ["train", "validation", "test"]
    assert all(as_mapping[split].fingerprint == found[split].fingerprint for split in found)


def test_folders_that_say_too_little_or_too_much(tmp_path: Path) -> None:
    jsonl(tmp_path / "books.jsonl", ROWS)
    with pytest.raises(UserError, match=r"no train, validation or test file.*It holds: books.jsonl"):
        read(tmp_path)
    jsonl(tmp_path / "val.jsonl", ROWS)
    jsonl(tmp_path / "dev.jsonl.gz", ROWS)
    with pytest.raises(UserError, match=r"two files for validation: dev.jsonl.gz and val.jsonl"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ([], "list holds no rows"),
        ({"train": ROWS, "test": []}, "dict holds no rows in test"),
        ({"train": ROWS, "val": ROWS, "dev": ROWS}, "each once; found train, val, dev"),
        ({"text": ["a"], "label": ["b"]}, "keys train, validation and test, each once; found text, label"),
        (["a text"], "row 1: a row must be a dictionary.*found str"),
        (7, "Cannot read rows from int"),
    ],
)
def test_objects_that_are_no_rows(source: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read(source)


def test_an_error_of_a_generator_stays_its_own() -> None:
    def broken():
        yield ROWS[0]
        raise TypeError("of the user's own code")

    with pytest.raises(TypeError, match="own code"):
        read(broken())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet"])
def test_empty_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is empty"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", b"\n \n"), ("rows.jsonl.gz", gzip.compress(b"", mtime=0)), ("rows.csv", b"text,label\n"), ("rows.csv", b"\n"), ("rows.json", b"[]")],
)
def test_files_without_rows(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} holds no rows"):
        read(tmp_path / name)


def test_a_filter_keeps_what_equals_and_says_what_there_is(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    kept = read(path, where={"label": "a", "n": "4"})["all"]
    assert plain(kept) == [ROWS[4]] and kept[0].line == 5
    assert plain(Rows(tuple(stream(path, where={"label": "a", "n": "4"})))) == [ROWS[4]]
    with pytest.raises(UserError, match=r"no column 'lable'.*Did you mean 'label'"):
        read(path, where={"lable": "a"})
    with pytest.raises(UserError, match=r"--where label=a,n=99 keeps no row of .*Values of n: 0, 1,"):
        read(path, where={"label": "a", "n": "99"})
    with pytest.raises(UserError, match="keeps no row"):
        list(stream(path, where={"label": "c"}))
    with pytest.raises(UserError, match=r"keeps no row of generator.*Values of label: a, b"):
        read((row for row in ROWS), where={"label": "c"})


def test_a_part_without_a_fitting_row_is_left_out() -> None:
    assert list(read({"train": ROWS, "test": ROWS[1:2]}, where={"label": "a"})) == ["train"]


def test_a_stream_gives_the_rows_of_the_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl.gz", ROWS)
    assert [dict(row.values) for row in stream(path)] == plain(read(path)["all"])
    with pytest.raises(UserError, match=r"Did you mean 'rows.jsonl.gz'"):
        list(stream(tmp_path / "rowz.jsonl.gz"))


def test_fingerprints_tell_rows_apart_and_nothing_else(rows: Callable[..., Rows]) -> None:
    made = rows(ROWS)
    assert made.fingerprint == rows([dict(reversed(row.items())) for row in ROWS]).fingerprint == made[:].fingerprint
    assert len({made.fingerprint, made[1:].fingerprint, made.take(reversed(range(20))).fingerprint, rows([{**ROWS[0], "n": 1}, *ROWS[1:]]).fingerprint}) == 4
