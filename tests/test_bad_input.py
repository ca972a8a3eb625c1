"""Every mistake of a user has a clear error, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luthier.cli import app
from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "vit", "vit")


ROWS = tiny_rows("text-classification", 60)


def luthier(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and what stands on standard error, in this process."""
    from luthier import cli

    old = sys.argv
    sys.argv = ["luthier", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0), capsys.readouterr().err
    finally:
        sys.argv = old
    return 0, capsys.readouterr().err


def jsonl(rows: list[dict]) -> Callable[[Path], Path]:
    return lambda folder: write_jsonl(folder / "rows.jsonl", rows)


def text(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return write


def folder_with(validation: list[dict]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "data").mkdir()
        write_jsonl(folder / "data" / "train.jsonl", ROWS)
        write_jsonl(folder / "data" / "validation.jsonl", validation)
        return folder / "data"

    return write


CSV = "body,team\n" + "\n".join(f"{row['text']},{row['label']}" for row in ROWS) + "\n"

BAD_DATA = {
    "a missing file": (lambda folder: folder / "nowhere.jsonl", (), "There is no file or folder"),
    "a misspelt file": (lambda folder: jsonl(ROWS)(folder).with_name("rowz.jsonl"), (), "Did you mean 'rows.jsonl'"),
    "a missing column": (jsonl(ROWS), ("--columns", "text=body"), "has no column 'body'"),
    "an unknown role": (jsonl(ROWS), ("--columns", "txt=text", "--task", "text-classification"), "Did you mean 'text'"),
    "an unknown label in validation": (folder_with([*ROWS[:9], {"text": "a boat", "label": "colour"}]), (), "validation.jsonl:10: the label 'colour' occurs in no training row. Did you mean 'color'"),
    "an empty file": (text("rows.jsonl", ""), (), "is empty"),
    "an empty csv": (text("rows.csv", "text,label\n"), (), "holds no rows"),
    "a broken line": (text("rows.jsonl", json.dumps(ROWS[0]) + '\n{"text": "a boat\n'), (), "rows.jsonl, line 2: not valid JSON"),
    "a line that is no object": (text("rows.jsonl", json.dumps(ROWS[0]) + "\n[1, 2]\n"), (), "line 2: a row must be an object"),
    "bad UTF-8": (text("rows.csv", CSV.encode() + "größer,plain\n".encode("cp1252")), (), "--encoding cp1252"),
    "an unclosed quote": (text("rows.csv", CSV + '"never closed,plain\na boat,plain\n'), (), "line 62: a quote opens here and never closes"),
    "a row with a cell too many": (text("rows.csv", CSV + "red, blue,color\n"), (), "line 62: 3 cells, but the header has 2"),
    "floats for classes": (jsonl([{"text": row["text"], "label": i / 7} for i, row in enumerate(ROWS)]), ("--task", "text-classification"), "use --task regression"),
    "numbers for texts": (jsonl([{"text": i, "label": row["label"]} for i, row in enumerate(ROWS)]), ("--task", "text-classification"), "no column holds texts"),
    "numbers for texts, named": (jsonl([{"text": i, "label": row["label"]} for i, row in enumerate(ROWS)]), ("--task", "text-classification", "--text", "text"), "rows.jsonl:1: column 'text' should be text, but holds 0"),
    "an empty text": (jsonl([*ROWS, {"text": " ", "label": "plain"}]), (), "rows.jsonl:61: the text in column 'text' is empty"),
    "a missing label": (jsonl([*ROWS, {"text": "a boat", "label": None}]), (), "rows.jsonl:61: the label in column 'label' is missing"),
    "one class only": (jsonl([{**row, "label": "plain"} for row in ROWS]), (), "All 48 training rows have one label, 'plain'"),
    "two columns that could be it": (jsonl([{"first": row["text"], "second": row["text"], "label": row["label"]} for row in ROWS]), ("--task", "text-classification"), "2 columns could be it (first, second)"),
    "a pickle": (text("rows.pkl", b"\x80\x04."), (), "is a pickle"),
    "an unknown ending": (text("rows.jsom", "{}"), (), "Did you mean '.json"),
    "a filter that keeps nothing": (jsonl(ROWS), ("--where", "label=colr"), "Did you mean 'color'"),
    "a filter on no column": (jsonl(ROWS), ("--where", "lang=swa"), "has no column 'lang'"),
    "words and tags of unequal number": (jsonl([{"tokens": ["a", str(i)], "tags": ["O"]} for i in range(30)]), (), ": 2 words, but 1 tags"),
    "one row many times": (jsonl([{**ROWS[0], "label": label} for label in ("color", "plain")] * 20), (), "so alike that every training row is in validation or test too"),
    "too few rows": (jsonl(ROWS[:4]), (), "too few to cut a part off"),
    "columns that tell no task": (jsonl([{"a": 1, "b": 2}] * 20), (), "Cannot tell the task from the columns a, b"),
}

BAD_SETTINGS = {
    "a method with a typo": (("--method", "lroa"), "Did you mean 'lora'"),
    "a field with a typo": (("--method", "lora(alhpa=3)"), "Did you mean 'alpha'"),
    "two conflicting methods": (("--method", "full|lora"), "full trains bert.encoder.layer.0.attention.self.query.weight itself"),
    "a site that the model lacks": (("--method", "lora(sites=c_attn)"), "matches no module of this bert"),
    "a save form that cannot hold it": (("--method", "adapter(reduction=8)", "--save", "merged"), "cannot be merged"),
    "an option of another task": (("--set", "query_prefix=x"), "has no such option"),
    "an unknown task": (("--task", "text-clasification"), "Did you mean 'text-classification'"),
    "a metric of another task": (("--metric", "f1"), "measures accuracy, macro_f1"),
    "a metric that is only like one": (("--metric", "accuracy/PER"), "Did you mean 'accuracy'"),
    "more tokens than the model takes": (("--max-length", "4096"), "the model takes 64 tokens"),
    "a negative rate": (("--lr", "-1"), "greater than 0"),
    "an unknown schedule": (("--schedule", "exponential"), "'linear', 'cosine' or 'constant'"),
}

PAIRS = tiny_rows("sentence-similarity", 60)
SCORED = [{**row, "score": i / 60} for i, row in enumerate(PAIRS)]
BAD_PAIRS = {
    "a batch of one": (PAIRS, ("--batch-size", "1"), "--batch-size 2 or more"),
    "a batch in pieces": (PAIRS, ("--micro-batch-size", "4"), "cannot be split"),
    "a batch in pieces of tokens": (PAIRS, ("--micro-batch-tokens", "400"), "cannot be split"),
    "a metric of other rows": (SCORED, ("--metric", "mrr"), "measures spearman on these rows"),
}


def untouched(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, flags, expected = BAD_DATA[name]
    data = make(tmp_path)
    before = untouched(tmp_path)
    status, said = luthier(capsys, "adapt", "--model", model, "--data", data, "--out", tmp_path / "run", *flags)
    assert status == 2 and expected in said, said
    assert "Traceback" not in said and untouched(tmp_path) == before


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_settings_of_pairs(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, flags, expected = BAD_PAIRS[name]
    status, said = luthier(capsys, "adapt", "--model", model, "--data", jsonl(rows)(tmp_path), "--task", "sentence-similarity", "--out", tmp_path / "run", *flags)
    assert status == 2 and expected in said and untouched(tmp_path) == ["rows.jsonl"], said


def test_tensorboard_that_is_not_there_is_met_before_the_start(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else find(name, *more))
    status, said = luthier(capsys, "adapt", "--model", model, "--data", jsonl(ROWS)(tmp_path), "--out", tmp_path / "run", "--tensorboard")
    assert status == 2 and "pip install tensorboard" in said and untouched(tmp_path) == ["rows.jsonl"], said


@pytest.mark.parametrize("tokens", ["0", "many", "2.5"])
def test_a_number_of_new_tokens_that_is_none(tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = tiny_folder(tmp_path / "gpt2", "gpt2", "AutoModelForCausalLM")
    rows = jsonl(tiny_rows("text-generation", 60))(tmp_path)
    status, said = luthier(capsys, "adapt", "--model", decoder, "--data", rows, "--out", tmp_path / "run", "--set", f"max_new_tokens={tokens}")
    assert status == 2 and "give a whole number of tokens" in said and not (tmp_path / "run.partial").exists(), said


def test_resuming_with_other_settings_is_refused_and_keeps_the_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of the unfinished run stays, so that it can still be gone on with."""
    rows, out = jsonl(ROWS)(tmp_path), tmp_path / "run"
    command = ("adapt", "--model", model, "--data", rows, "--out", out, "--epochs", "2", "--no-baselines")
    with monkeypatch.context() as broken:
        broken.setattr("luthier.verbs.adapt._measure", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert luthier(capsys, *command)[0] == 130
    partial = tmp_path / "run.partial"
    before = (partial / "recipe.yaml").read_bytes()
    for flags, changed in ((("--max-length", "12"), "max_length"), (("--no-dropout",), "dropout"), (("--method", "lora(r=2)"), "method"), (("--train-rows", "20"), "number of training rows"), (("--set", "class_weights=balanced"), "task options")):
        status, said = luthier(capsys, *command, *flags, "--resume")
        assert status == 2 and f"made with another {changed}" in said and (partial / "recipe.yaml").read_bytes() == before, said
    assert luthier(capsys, *command, "--resume")[0] == 0 and out.is_dir()


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, expected = BAD_SETTINGS[name]
    data = jsonl(ROWS)(tmp_path)
    before = untouched(tmp_path)
    status, said = luthier(capsys, "adapt", "--model", model, "--data", data, "--out", tmp_path / "run", *flags)
    assert status == 2 and expected in said, said
    assert "Traceback" not in said and untouched(tmp_path) == before


def test_an_unknown_metric_is_refused_before_anything_is_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = luthier(capsys, "adapt", "--model", model, "--data", jsonl(ROWS)(tmp_path), "--out", tmp_path / "run", "--metric", "f1")
    assert status == 2 and "accuracy, macro_f1" in said and not list(tmp_path.glob("run*"))


def test_a_task_that_the_model_cannot_do(vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = luthier(capsys, "adapt", "--model", vision, "--data", jsonl(ROWS)(tmp_path), "--out", tmp_path / "run")
    assert status == 2 and "transformers has no ForSequenceClassification head for it" in said


@pytest.mark.parametrize(
    "content,expected",
    [
        ({}, "no model folder: config.json is missing"),
        ({"config.json": "{}"}, "no weights"),
        ({"config.json": json.dumps({"model_type": "bert"}), "pytorch_model.bin": "x"}, "pytorch_model.bin, a pickle"),
        ({"config.json": "{broken", "model.safetensors": "x"}, "not valid JSON"),
        ({"config.json": json.dumps({"model_type": "wonder"}), "model.safetensors": "x"}, "does not know model_type='wonder'"),
        ({"config.json": json.dumps({"model_type": "wonder", "auto_map": {"AutoModel": "evil.Model"}}), "model.safetensors": "x"}, "asks to run code of its own"),
    ],
    ids=["empty", "no weights", "pickle", "broken config", "unknown type", "remote code"],
)
def test_a_folder_that_is_no_model(content: dict[str, str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    for name, body in content.items():
        (tmp_path / "model" / name).write_text(body, encoding="utf-8")
    status, said = luthier(capsys, "adapt", "--model", tmp_path / "model", "--data", jsonl(ROWS)(tmp_path), "--out", tmp_path / "run")
    assert status == 2 and expected in said and not list(tmp_path.glob("run*")), said


def test_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = luthier(capsys, "adapt", "--model", tmp_path / "gone", "--data", jsonl(ROWS)(tmp_path), "--out", tmp_path / "run")
    assert status == 2 and "does not download" in said


@pytest.mark.parametrize("task", ["text-classification", "sentence-similarity"])
def test_weights_that_do_not_belong_are_not_left_random(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder whose tensors have other names would train from noise without a word."""
    from safetensors.torch import load_file, save_file

    tiny_folder(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name.replace("encoder.layer.1", "encoder.layer.9"): t for name, t in tensors.items()}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    rows = jsonl(tiny_rows(task, 60))(tmp_path)
    status, said = luthier(capsys, "adapt", "--model", tmp_path / "model", "--data", rows, "--task", task, "--out", tmp_path / "run")
    assert status == 2 and "would stay random" in said and "layer.1." in said


def test_tensors_that_transformers_renames_are_there(tmp_path: Path) -> None:
    """Old BERT folders call a norm's weight gamma."""
    from safetensors.torch import load_file, save_file

    from luthier.pretrained import Pretrained

    folder = tiny_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    for auto_class in ("AutoModel", "AutoModelForSequenceClassification"):
        assert Pretrained.open(folder).meta(auto_class)[1] == Pretrained.open(folder).load(auto_class)[1]


def test_an_existing_run_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep", encoding="utf-8")
    status, said = luthier(capsys, "adapt", "--model", model, "--data", jsonl(ROWS)(tmp_path), "--out", tmp_path / "run")
    assert status == 2 and "--overwrite" in said and (tmp_path / "run" / "mine.txt").read_text() == "keep"


def test_overwrite_keeps_the_old_run_until_the_new_one_is_complete(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "run" / "mine.txt").write_text("keep", encoding="utf-8")
    flags = ("adapt", "--model", model, "--data", jsonl(ROWS)(tmp_path), "--out", tmp_path / "run", "--overwrite", "--max-steps", "2", "--precision", "fp32")
    status, said = luthier(capsys, *flags, "--lr", "1e30", "--method", "full", "--max-steps", "5")
    assert status == 2 and (tmp_path / "run" / "mine.txt").exists(), said
    status, said = luthier(capsys, *flags)
    assert status == 0 and not (tmp_path / "run" / "mine.txt").exists() and (tmp_path / "run" / "run.json").exists(), said


def test_a_read_only_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = jsonl(ROWS)(tmp_path)
    place = tmp_path / "locked"
    place.mkdir()
    if os.geteuid() == 0:  # root may write everywhere, so the answer of the system is put in its place
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place)
    else:
        place.chmod(0o500)
    status, said = luthier(capsys, "adapt", "--model", model, "--data", data, "--out", place / "run")
    assert status == 2 and "cannot be written to" in said and not list(place.iterdir())


def test_too_little_disk_is_met_before_the_start(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier import machine

    monkeypatch.setattr(machine, "free_disk", lambda path: 1000)
    status, said = luthier(capsys, "adapt", "--model", model, "--data", jsonl(ROWS)(tmp_path), "--out", tmp_path / "run")
    assert status == 2 and "Make room" in said and not list(tmp_path.glob("run*"))


def test_too_little_memory_is_met_before_the_start(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier import machine

    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(10_000, 1_000))
    status, said = luthier(capsys, "adapt", "--model", model, "--data", jsonl(ROWS)(tmp_path), "--out", tmp_path / "run")
    assert status == 2 and "--micro-batch-tokens " in said and "--gradient-checkpointing" in said and not list(tmp_path.glob("run*"))


def test_a_disk_that_fills_up_on_the_way(model: Path, tmp_path: Path) -> None:
    """A real one: a file-size limit ends the write of the first checkpoint, the run can be resumed once there is room."""
    data = jsonl(ROWS)(tmp_path)
    flags = ["adapt", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "run"), "--max-steps", "4", "--precision", "fp32", "--method", "full", "--no-baselines"]
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); from luthier.cli import main; sys.argv = ['luthier', *sys.argv[1:]]; main()"
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "run").exists(), done.stderr
    again = subprocess.run([sys.executable, "-m", "luthier", *flags, "--resume"], capture_output=True, text=True, check=False)
    assert again.returncode == 0 and (tmp_path / "run" / "model.safetensors").exists(), again.stderr


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (("predict", "{run}gone"), "There is no run"),
        (("evaluate", "{folder}"), "is no run folder"),
        (("runs", "compare", "{folder}", "{folder}"), "is no run folder"),
        (("export", "{folder}", "--out", "{folder}/x"), "is no run folder"),
        (("methods", "lroa"), "Did you mean 'lora'"),
        (("contract", "lroa"), "Did you mean 'lora'"),
        (("contract",), "--all"),
        (("adapt",), "--model and --data missing"),
        (("adapt", "{folder}/no.yaml"), "There is no recipe"),
        (("adapt", "--modle", "x"), "--model"),
    ],
)
def test_other_verbs(arguments: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = luthier(capsys, *(a.format(run=tmp_path / "run", folder=tmp_path) for a in arguments))
    assert status == 2 and expected in said, said


def test_a_recipe_with_mistakes_names_them_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("model: x\ndata: y\nlearning_rate: 1\nbatch_siez: 3\nepochs: 0\n", encoding="utf-8")
    status, said = luthier(capsys, "adapt", tmp_path / "r.yaml")
    assert status == 2 and "Did you mean 'batch_size'" in said and "'learning_rate'" in said and "epochs=0" in said


def test_every_flag_of_adapt_is_a_field_or_belongs_to_the_call() -> None:
    import typer

    from luthier.recipe import Recipe

    command = typer.main.get_command(app).commands["adapt"]  # type: ignore[attr-defined]
    flags = {p.name for p in command.params} - {"recipe", "text", "text_pair", "label", "option", "out", "overwrite", "resume", "device", "dry_run"}
    assert flags | {"options"} == set(Recipe.model_fields)
    assert torch.get_num_threads() >= 1
