"""`--precision int8`: nearly the same answers, and one line that says what it costs on the rows at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import luthier
from luthier import UserError, machine
from luthier.compute import int8
from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl
from luthier.verbs import rounding
from luthier.verbs.encoder import Encoder

pytestmark = pytest.mark.skipif(not int8.exists, reason="this torch has no int8 kernels")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which int8 is sound and fast."""
    from luthier.machine import precision

    monkeypatch.setattr(precision, "_int8", lambda device: precision.Verdict(device == "cpu", True, f"int8 is for the processor, not for {device}"))


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_vectors_and_what_they_cost(tmp_path: Path, call) -> None:
    plain, rows = tiny_folder(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", tiny_rows("text-classification", 80))
    exact = Encoder.open(plain, precision="fp32").embed(texts(rows))
    ended = call("embed", plain, "--data", rows, "--out", tmp_path / "v.npy", "--precision", "int8")
    assert ended.status == 0, ended.err
    found = np.load(tmp_path / "v.npy")
    assert 1e-4 < np.abs(found - exact).max() < 0.02
    told = re.search(r"int8: cosine with the vector in fp32 (\S+) on average, (\S+) at worst, on 64 of these texts\n", ended.err)
    assert told, ended.err
    some = (found * exact).sum(1)[rounding.sample(80)]
    assert (float(told[1]), float(told[2])) == pytest.approx((some.mean(), some.min()), abs=1e-4)


def test_texts_that_are_compared_are_counted_once(tmp_path: Path) -> None:
    encoder = Encoder.open(tiny_folder(tmp_path / "model"), precision="int8")
    encoder.max_length = 4
    assert len(encoder.likeness(["the red boat " * 3])) == 1 and encoder.truncated == 0
    encoder.embed(["the red boat " * 3])
    assert encoder.truncated == 1


@pytest.mark.parametrize("kind,said", [
    ("merged", r"int8: \d+ of 20 of these rows get the answer of fp32, numbers differ by at most \S+\n"),
    ("adapter", r"int8: \d+ of 20 of these rows get the answer of fp32, numbers differ by at most \S+\n"),
    ("tags", r"int8: \d+ of 20 of these rows get the answer of fp32\n"),
    ("number", r"int8: numbers differ by at most \S+ on 20 of these rows\n"),
    ("search", r"int8: numbers differ by at most \S+ on 20 of these rows\n"),
])  # fmt: skip
def test_answers_and_what_they_cost(kind: str, said: str, made, tmp_path: Path, call) -> None:
    run = made(kind)
    data = write_jsonl(tmp_path / "new.jsonl", tiny_rows(luthier.load(run).task.tag, 20))
    written: dict[str, list[Any]] = {}
    for precision in ("fp32", "int8"):
        ended = call("predict", run, "--data", data, "--out", tmp_path / f"{precision}.jsonl", "--precision", precision)
        assert ended.status == 0, ended.err
        assert bool(re.search(said, ended.err)) is (precision == "int8"), ended.err
        written[precision] = [json.loads(line) for line in (tmp_path / f"{precision}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written["int8"] != written["fp32"] or kind == "tags", "the numbers are other ones"
    if kind in ("merged", "adapter"):
        same = sum(a["predicted"] == b["predicted"] for a, b in zip(*written.values(), strict=True))
        apart = max(abs(a["score"] - b["score"]) for a, b in zip(*written.values(), strict=True) if a["predicted"] == b["predicted"])
        assert f"{same} of 20 " in ended.err and f"at most {apart:.4g}\n" in ended.err


def test_a_machine_that_is_slow_in_it_is_told(made, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.machine import precision

    monkeypatch.setattr(precision, "_int8", lambda device: precision.Verdict(True, False, "int8 is slow"))
    ended = call("predict", made("merged"), "--precision", "int8", stdin=b"the red boat\n")
    assert ended.status == 0 and "; int8 is slow\n" in ended.err and json.loads(ended.out)["predicted"]


def test_an_unfinished_file_is_not_continued_in_another_precision(made, tmp_path: Path, call) -> None:
    data, out = write_jsonl(tmp_path / "new.jsonl", [{"text": "the red boat"}, {"text": None}]), tmp_path / "out.jsonl"
    from luthier.verbs import predict as verb

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "CHUNK", 1)
        assert call("predict", made("merged"), "--data", data, "--out", out, "--precision", "int8").status == 2
        ended = call("predict", made("merged"), "--data", data, "--out", out, "--precision", "fp32")
    assert ended.status == 2 and "--precision" in ended.err and "--overwrite" in ended.err


def test_where_there_is_no_int8(made, tmp_path: Path, call) -> None:
    data = write_jsonl(tmp_path / "new.jsonl", tiny_rows("text-generation", 5))
    cases = [
        (["predict", made("text"), "--data", data, "--out", tmp_path / "out.jsonl"], "text-generation generates in fp32 only"),
        (["embed", made("merged"), "--data", data, "--out", tmp_path / "v.npy"], "embedding run"),
        (["adapt", "--model", made("merged"), "--data", data, "--out", tmp_path / "run"], "nothing learns in int8"),
    ]
    for arguments, said in cases:
        ended = call(*arguments, "--precision", "int8")
        assert ended.status == 2 and said in ended.err, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["new.jsonl"]
    with pytest.raises(UserError, match="not for mps"):
        machine.choose_precision("int8", "mps")


def test_a_run_in_another_precision_shares_its_model(made) -> None:
    run = luthier.load(made("merged"), precision="fp32")
    other = run.at("int8")  # type: ignore[union-attr]
    assert other.model is run.model and (run.precision, other.precision) == ("fp32", "int8")  # type: ignore[union-attr]
