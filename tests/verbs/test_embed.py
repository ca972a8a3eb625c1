from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

import luthier
from luthier import UserError
from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl
from luthier.verbs import embed as verb
from luthier.verbs.encoder import Encoder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A stock encoder that pools by its first token, with a prefix for documents."""
    folder = tiny_folder(tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}), encoding="utf-8")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"document": "the old "}}), encoding="utf-8")
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    found = [{"text": row["text"], "number": i, "tags": ["a"] * (i % 3)} for i, row in enumerate(tiny_rows("text-classification", 50))]
    return write_jsonl(tmp_path / "rows.jsonl", found)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def expected(folder: Path, given: list[str], pooling: str = "first") -> np.ndarray:
    """One text after the other, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for text in given:
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            found.append(torch.nn.functional.normalize(states[0] if pooling == "first" else states.mean(0), dim=0))
    return torch.stack(found).numpy()


@pytest.mark.parametrize("kind", [".npy", ".parquet"])
def test_the_vectors_of_a_plain_encoder(kind: str, plain: Path, rows: Path, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the file, by the pooling and the prefix that the folder asks for, over several chunks."""
    monkeypatch.setattr(verb, "CHUNK", 16)
    out = tmp_path / f"vectors{kind}"
    ended = call("embed", plain, "--data", rows, "--out", out, "--precision", "fp32", "--batch-size", "8")
    assert ended.status == 0, ended.err
    wanted = expected(plain, ["the old " + text for text in texts(rows)])
    if kind == ".npy":
        found = np.load(out)
        assert found.dtype == np.float32
    else:
        table = parquet.read_table(out)
        assert table.column_names == ["text", "number", "tags", "embedding"] and table["number"].to_pylist() == list(range(50)) and table["tags"].to_pylist()[2] == ["a", "a"]
        found = np.array(table["embedding"].to_pylist())
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["model", "rows.jsonl", out.name]), "nothing else is left"
    np.testing.assert_allclose(luthier.load(plain).embed(["red boat"], part="query"), expected(plain, ["red boat"]), atol=0.02)


def test_a_run_of_another_task_has_no_vectors(made, rows: Path, tmp_path: Path, call) -> None:
    ended = call("embed", made("merged"), "--data", rows, "--out", tmp_path / "v.npy")
    assert ended.status == 2 and "embedding run" in ended.err and not (tmp_path / "v.npy.parts").exists()


def test_a_run_gives_what_it_gives_in_python(made, rows: Path, tmp_path: Path) -> None:
    run = luthier.load(made("search"))
    assert luthier.embed(run.path, rows, out=tmp_path / "v.npy", part="query") == 50
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), run.embed(texts(rows)), atol=1e-6)  # type: ignore[union-attr]


def test_an_interrupted_one_goes_on_where_it_stopped(plain: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished chunks are not computed again, unless their texts or what decides their vectors have changed."""
    monkeypatch.setattr(verb, "CHUNK", 10)
    embedded: list[int] = []
    whole = Encoder.embed

    def watched(self: Encoder, given: list[str], *rest: Any) -> np.ndarray:
        if len(embedded) == 3:
            raise KeyboardInterrupt
        embedded.append(len(given))
        return whole(self, given, *rest)

    monkeypatch.setattr(Encoder, "embed", watched)
    with pytest.raises(KeyboardInterrupt):
        luthier.embed(plain, rows, out=tmp_path / "v.npy", precision="fp32")
    assert not (tmp_path / "v.npy").exists() and len(list((tmp_path / "v.npy.parts").iterdir())) == 3
    lines = rows.read_text(encoding="utf-8").splitlines()
    lines[12] = json.dumps({"text": "another river"})
    rows.write_text("\n".join(lines), encoding="utf-8")
    embedded.clear()
    luthier.embed(plain, rows, out=tmp_path / "v.npy", precision="fp32")
    assert embedded == [10, 10, 10], "the second chunk, whose texts have changed, and the last two"
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected(plain, ["the old " + text for text in texts(rows)]), atol=1e-5)


def test_wrong_calls_are_refused_and_write_nothing(plain: Path, rows: Path, tmp_path: Path, call) -> None:
    cases: list[tuple[list[Any], str]] = [
        (["--out", tmp_path / "v.csv"], "npy or .parquet"),
        (["--out", tmp_path / "v.npy", "--part", "doc"], "document"),
        (["--out", tmp_path / "v.npy", "--column", "txt"], "'text'"),
        (["--out", tmp_path / "v.npy", "--column", "number"], "numbers"),
        (["--out", tmp_path / "v.npy", "--precision", "fp17"], "bf16"),
        (["--out", rows], "npy or .parquet"),
    ]
    before = rows.read_bytes()
    for flags, said in cases:
        ended = call("embed", plain, "--data", rows, *flags)
        assert ended.status == 2 and said in ended.err, (flags, ended.err)
    assert rows.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]
    ended = call("embed", tmp_path, "--data", rows, "--out", tmp_path / "v.npy")
    assert ended.status == 2 and "config.json" in ended.err


def test_a_row_without_a_text_is_named_and_what_was_done_is_kept(plain: Path, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "CHUNK", 2)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "red boat"}, {"text": "a tree"}, {"text": "the river"}, {"text": None}])
    ended = call("embed", plain, "--data", data, "--out", tmp_path / "v.npy")
    assert ended.status == 2 and "rows.jsonl:4" in ended.err and "None" in ended.err
    assert len(list((tmp_path / "v.npy.parts").iterdir())) == 1 and not (tmp_path / "v.npy").exists()


def test_one_text_is_not_taken_for_many(plain: Path) -> None:
    with pytest.raises(UserError, match="brackets"):
        luthier.load(plain).embed("red boat")  # type: ignore[union-attr]


def test_long_texts_are_cut_as_the_tokenizer_cuts_them(plain: Path) -> None:
    """Beside short ones, and counted."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "boat", "the", "old"]
    (plain / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(plain / "vocab.txt")).save_pretrained(plain)  # one that gives token types
    encoder = Encoder.open(plain, precision="fp32")
    encoder.max_length = 8
    found = encoder.embed(["red boat " * 20, "boat"])
    np.testing.assert_allclose(found[0], encoder.embed(["red boat " * 3])[0], atol=1e-6)
    assert encoder.truncated == 2
