"""Vectors kept beside the run save time and never change an answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import luthier
from luthier import UserError
from luthier.contract.texts import tiny_rows, write_jsonl
from luthier.verbs.console import Console

QUESTIONS = ["red boat", "the old house"]
ROWS = tiny_rows("sentence-similarity", 40, seed=3)


@pytest.fixture
def run(made: Callable[[str], Path], tmp_path: Path) -> luthier.Run:
    """A copy, so that its store is empty."""
    return luthier.load(shutil.copytree(made("search"), tmp_path / "run"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each search encoded."""
    counts: list[int] = []
    embed = luthier.Run.embed

    def counted(self: luthier.Run, texts: list[str], part: str = "query", batch_size: int = 64) -> np.ndarray:
        if part == "document":
            counts.append(len(texts))
        return embed(self, texts, part, batch_size)

    monkeypatch.setattr(luthier.Run, "embed", counted)
    return counts


def answers(run: luthier.Run, over: object) -> list[list[tuple[str, Any]]]:
    found = luthier.search(run, over=over, words=QUESTIONS, top=3, console=Console(quiet=True))
    return [[(hit.text, pytest.approx(hit.score, abs=1e-5)) for hit in hits] for hits in found]


def test_answers_are_the_nearest_vectors(run: luthier.Run) -> None:
    documents = list(dict.fromkeys(row["document"] for row in ROWS))
    scores = run.embed(QUESTIONS) @ run.embed(documents, part="document").T
    for hits, row in zip(answers(run, ROWS), scores, strict=True):
        assert [text for text, _ in hits] == [documents[i] for i in np.argsort(-row, kind="stable")[:3]]


def test_only_what_changed_is_encoded_again(run: luthier.Run, encoded: list[int], tmp_path: Path) -> None:
    def after(rows: list[dict]) -> int:
        """Documents encoded for a search over these rows; its answers are those of a search without a store."""
        write_jsonl(tmp_path / "docs.jsonl", rows)
        encoded.clear()
        kept = answers(run, tmp_path / "docs.jsonl")
        count = sum(encoded)
        shutil.copytree(run.path / "search", tmp_path / "store")
        shutil.rmtree(run.path / "search")
        assert answers(run, tmp_path / "docs.jsonl") == kept
        shutil.rmtree(run.path / "search")
        (tmp_path / "store").rename(run.path / "search")
        return count

    different = len({row["document"] for row in ROWS})
    assert after(ROWS) == different
    assert after(ROWS) == 0
    assert after(ROWS[::-1]) == 0
    changed = [*ROWS[:-1], {"query": "x", "document": "not a red river over the house"}]
    assert after(changed) == 1
    assert after([*changed[5:], {"query": "x", "document": "old bird sings in the tree"}]) == 1
    assert after(changed[9:20]) == 0


@pytest.mark.parametrize("content", [b"", b"half a file", b"\x10\x00\x00\x00\x00\x00\x00\x00{}              "])
def test_a_broken_store_only_costs_time(content: bytes, run: luthier.Run, encoded: list[int], tmp_path: Path) -> None:
    docs = write_jsonl(tmp_path / "docs.jsonl", ROWS)
    before = answers(run, docs)
    (store,) = (run.path / "search").iterdir()
    store.write_bytes(content)
    assert answers(run, docs) == before and len(encoded) == 2
    assert answers(run, docs) == before and len(encoded) == 2


def test_a_store_that_cannot_be_written_only_costs_time(run: luthier.Run, tmp_path: Path) -> None:
    (run.path / "search").write_text("a file where the folder should be", encoding="utf-8")
    assert answers(run, write_jsonl(tmp_path / "docs.jsonl", ROWS))


def test_names_of_sources_stay_inside_the_run(run: luthier.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    docs = write_jsonl(tmp_path / "..docs;rm -rf ~.jsonl", ROWS)
    before = sorted(p for p in tmp_path.rglob("*") if run.path not in p.parents)
    answers(run, f"../{docs.name}")
    assert sorted(p for p in tmp_path.rglob("*") if run.path not in p.parents) == before
    assert len(list((run.path / "search").iterdir())) == 1


def test_the_command_line(run: luthier.Run, made, call, tmp_path: Path) -> None:
    docs = write_jsonl(tmp_path / "docs.jsonl", [{"body": row["document"], "other": row["query"]} for row in ROWS])
    found = call("search", run.path, "red", "boat", "--over", docs, "--columns", "document=body", "--top", "2")
    assert found.status == 0 and found.out.count("docs.jsonl:") == 2
    for arguments, expected in [
        ((run.path, "red", "--over", docs), "--columns document=NAME"),
        ((run.path, "red", "--over", docs, "--columns", "doc=body"), "reads no 'doc'"),
        ((run.path, " ", "--over", docs, "--columns", "document=body"), "give some words"),
        ((run.path, "red", "--over", tmp_path / "nowhere"), "There is no file or folder"),
        ((made("merged"), "red", "--over", docs), "needs an embedding run"),
    ]:
        ended = call("search", *arguments)
        assert ended.status == 2 and expected in ended.err, ended.err
    with pytest.raises(UserError, match="to search over"):
        luthier.search(run, over=[{"document": 3}], words="red")


def test_functions_are_found_without_a_docstring(run: luthier.Run, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "module.py").write_text("def red(boat):\n    return boat\n\n\ndef blue(tree):\n    return tree + 1\n", encoding="utf-8")
    (hits,) = luthier.search(run, over=f"python:{tmp_path / 'code'}", words="red boat")
    assert sorted(hit.row["name"] for hit in hits) == ["blue", "red"]
