"""Every saved form by every loader with equal outputs; bases that moved or changed; files that were tampered with; exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import luthier
from luthier import UserError, machine
from luthier.contract.texts import tiny_rows, tiny_tokenizer
from luthier.methods import saving
from luthier.verbs.console import Console

CLASSES = {"search": "AutoModel", "text": "AutoModelForCausalLM", "tags": "AutoModelForTokenClassification"}
Made = Callable[[str], Path]


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    inputs = tiny_tokenizer()(["the red boat", "a bird", "not in the old house"], padding=True, return_tensors="pt")
    found = model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def auto_class(kind: str) -> Any:
    return getattr(transformers, CLASSES.get(kind, "AutoModelForSequenceClassification"))


@pytest.mark.parametrize("kind", ["merged", "other", "number", "tags", "text"])
def test_a_merged_run_is_a_stock_model(kind: str, made: Made) -> None:
    stock, info = auto_class(kind).from_pretrained(made(kind), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(outputs(stock), outputs(luthier.load(made(kind)).model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["adapter", "search"])
def test_an_adapter_run_is_a_stock_adapter(kind: str, made: Made) -> None:
    settings = {"num_labels": 2} if kind == "adapter" else {}
    base = auto_class(kind).from_pretrained(made(kind).parent / "bert", **settings)
    plain = outputs(base)
    torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(base, str(made(kind)))), outputs(luthier.load(made(kind)).model), rtol=0, atol=1e-6)
    assert (outputs(luthier.load(made(kind)).model) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["inserts", "difference"])
def test_the_form_of_our_own_holds_what_was_measured(kind: str, made: Made) -> None:
    assert {p.name for p in made(kind).glob("*.safetensors")} == {"luthier.safetensors"}
    run = luthier.load(made(kind))
    assert luthier.evaluate(run)["metrics"] == run.metrics
    torch.testing.assert_close(outputs(luthier.load(made(kind)).model), outputs(run.model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["adapter", "inserts", "difference"])
def test_a_base_that_moved(kind: str, made: Made, tmp_path: Path, call) -> None:
    """The error says in one line what to do, and both ways of it work."""
    run = shutil.copytree(made(kind), tmp_path / "run")
    moved = shutil.copytree(made(kind).parent / "bert", tmp_path / "moved")
    record = json.loads((run / "luthier.json").read_text(encoding="utf-8"))
    record["base"]["path"] = str(tmp_path / "gone")
    (run / "luthier.json").write_text(json.dumps(record), encoding="utf-8")
    ended = call("evaluate", run)
    assert ended.status == 2 and ended.err.count("\n") == 1 and "--base PATH" in ended.err and str(run / "luthier.json") in ended.err
    there = outputs(luthier.load(run, base=moved).model)
    torch.testing.assert_close(there, outputs(luthier.load(made(kind)).model), rtol=0, atol=0)
    record["base"]["path"] = str(moved)
    (run / "luthier.json").write_text(json.dumps(record), encoding="utf-8")
    torch.testing.assert_close(there, outputs(luthier.load(run).model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["adapter", "inserts"])
def test_a_base_that_changed(kind: str, made: Made, tmp_path: Path) -> None:
    base = shutil.copytree(made(kind).parent / "bert", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="trained on other weights"):
        _ = luthier.load(made(kind), base=base).model


def set_(record: dict, name: str, value: Any) -> str:
    return json.dumps({**record, name: value})


TAMPERED: dict[str, tuple[str, str, Callable[[Path], bytes]]] = {
    "a broken record": ("inserts", "luthier.json", lambda p: p.read_bytes()[:40]),
    "a record of something else": ("inserts", "luthier.json", lambda p: b"{}"),
    "a list for a record": ("adapter", "luthier.json", lambda p: b"[]"),
    "an unknown method": ("inserts", "luthier.json", lambda p: set_(json.loads(p.read_text()), "stack", "adaptor(reduction=8)").encode()),
    "other settings": ("inserts", "luthier.json", lambda p: set_(json.loads(p.read_text()), "stack", "adapter(reduction=4)").encode()),
    "other sites": ("inserts", "luthier.json", lambda p: set_(json.loads(p.read_text()), "stack", "adapter(reduction=8, sites=attention.out)").encode()),
    "half the tensors of ours": ("inserts", "luthier.safetensors", lambda p: p.read_bytes()[:500]),
    "half the tensors of peft's": ("adapter", "adapter_model.safetensors", lambda p: p.read_bytes()[:500]),
    "half the tensors of a model": ("merged", "model.safetensors", lambda p: p.read_bytes()[:500]),
    "a broken run record": ("merged", "run.json", lambda p: p.read_bytes()[:99]),
    "a run record of something else": ("merged", "run.json", lambda p: b'{"loss": 1}'),
    "a broken recipe": ("merged", "recipe.yaml", lambda p: b"model: [\n"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_files_that_were_tampered_with(name: str, made: Made, call, tmp_path: Path) -> None:
    kind, file, change = TAMPERED[name]
    run = shutil.copytree(made(kind), tmp_path / "run")
    (run / file).write_bytes(change(run / file))
    ended = call("evaluate", run)
    expected = "Did you mean 'adapter'" if name == "an unknown method" else str(run)
    assert ended.status == 2 and expected in ended.err and "Traceback" not in ended.err, ended.err


@pytest.mark.parametrize("kind,file", [("inserts", "luthier.safetensors"), ("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")])
def test_a_file_that_is_missing(kind: str, file: str, made: Made, call, tmp_path: Path) -> None:
    run = shutil.copytree(made(kind), tmp_path / "run")
    (run / file).unlink()
    ended = call("predict", run, stdin=b"a boat")
    assert ended.status == 2 and str(run) in ended.err and "Traceback" not in ended.err, ended.err


@pytest.mark.parametrize("kind", ["adapter", "search", "merged"])
def test_an_export_is_a_stock_model_with_equal_outputs(kind: str, made: Made, call, tmp_path: Path) -> None:
    ended = call("export", made(kind), "--out", tmp_path / "model")
    assert ended.status == 0 and [p.name for p in tmp_path.iterdir()] == ["model"], ended.err
    assert not list((tmp_path / "model").glob("*adapter*")) and not (tmp_path / "model" / "luthier.json").exists()
    torch.testing.assert_close(outputs(auto_class(kind).from_pretrained(tmp_path / "model")), outputs(luthier.load(made(kind)).model), rtol=0, atol=1e-5)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "model")("a boat")["input_ids"]) == 4


def test_exports_that_are_refused(made: Made, call, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "keep.txt").touch()
    run = shutil.copytree(made("adapter"), tmp_path / "run")
    for arguments, expected in [
        ((made("inserts"), "--out", tmp_path / "model"), "adapter cannot be merged: it is a module of its own"),
        ((run, "--out", tmp_path / "model", "--save", "adapter"), "can be exported as 'merged'"),
        ((run, "--out", mine), "--overwrite"),
        ((run, "--out", run, "--overwrite"), "from which it would be made"),
        ((run, "--out", tmp_path, "--overwrite"), "from which it would be made"),
        ((run, "--out", made("adapter").parent / "bert", "--overwrite"), "from which it would be made"),
        ((run, "--out", mine / "keep.txt", "--overwrite"), "is a file"),
    ]:
        ended = call("export", *arguments)
        assert ended.status == 2 and expected in ended.err and not ended.out, ended.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "run"] and (mine / "keep.txt").exists()
    refused = call("export", run, "--out", mine, "--overwrite")
    assert refused.status == 2 and "no run or model folder" in refused.err
    (mine / "config.json").write_text("{}", encoding="utf-8")
    assert call("export", run, "--out", mine, "--overwrite").status == 0 and not (mine / "keep.txt").exists() and (mine / "model.safetensors").exists()


def no_code_in(folder: Path) -> None:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "lock"]
    assert files and {p.suffix for p in files} <= {".json", ".jsonl", ".yaml", ".md", ".png", ".safetensors"}
    for file in files:
        assert not file.read_bytes()[:2].startswith((b"\x80", b"PK")), f"{file} begins like a pickle"


def test_nothing_in_a_run_folder_can_run_code(made: Made) -> None:
    for kind in ("merged", "adapter", "inserts", "search"):
        no_code_in(made(kind))


def test_names_from_the_data_stay_inside_the_run_and_checkpoints_are_no_pickles(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = {"color": "../../evil", "plain": str(tmp_path / "evil")}
    rows = [{"../text": row["text"], "/label": evil[row["label"]]} for row in tiny_rows("text-classification")]
    settings = {"max_steps": 2, "precision": "fp32", "baselines": False, "columns": {"text": "../text", "label": "/label"}, "console": Console(quiet=True)}
    out = tmp_path / "deep" / "er" / "run"
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save", lambda *given, **more: (_ for _ in ()).throw(UserError("the power failed")))
        with pytest.raises(UserError, match="power"):
            luthier.adapt(made("merged").parent / "bert", rows, out=out, **settings)
    assert list(out.with_name("run.partial").glob("checkpoints/*/*.safetensors"))
    no_code_in(out.with_name("run.partial"))
    luthier.adapt(made("merged").parent / "bert", rows, out=out, resume=True, **settings)
    no_code_in(out)
    assert [p for p in tmp_path.rglob("*") if out not in p.parents] == [tmp_path / "deep", tmp_path / "deep" / "er", out]


@pytest.mark.parametrize("asked", ["auto", "fp32"])
def test_a_machine_that_chooses_otherwise_goes_on_in_the_precision_of_the_checkpoint(asked: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless another one is asked for, which is refused."""
    model, rows, out = made("merged").parent / "bert", tiny_rows("text-classification"), tmp_path / "run"
    settings = {"max_steps": 2, "baselines": False, "console": Console(quiet=True), "out": out}
    with monkeypatch.context() as patch:
        patch.setattr(machine, "choose_precision", lambda asked, device: ("bf16", "it is chosen here"))
        patch.setattr(saving, "save", lambda *given, **more: (_ for _ in ()).throw(UserError("the power failed")))
        with pytest.raises(UserError, match="power"):
            luthier.adapt(model, rows, **settings)
    monkeypatch.setattr(machine, "choose_precision", lambda asked, device: ("fp32" if asked == "auto" else asked, "it is chosen there"))
    if asked != "auto":
        with pytest.raises(UserError, match="made with another precision"):
            luthier.adapt(model, rows, resume=True, precision=asked, **settings)
        return
    run = luthier.adapt(model, rows, resume=True, **settings)
    assert run.record.content["training"]["precision"] == "bf16"


@pytest.mark.parametrize("kind", ["merged", "other", "adapter", "inserts", "difference"])
def test_a_run_records_how_many_numbers_it_trained(kind: str, made) -> None:
    record = luthier.load(made(kind)).record.content
    planned = next(line for line in record["training"]["plan"] if line.startswith("  trains "))
    assert f"trains {record['resources']['trainable_parameters']:,} of" in planned
