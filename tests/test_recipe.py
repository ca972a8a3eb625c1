"""One object in three spellings; mistakes are named all at once with the nearest right name."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import luthier.verbs.adapt
from luthier import Recipe, UserError, cli
from luthier.methods.stack import parse

EVERYTHING: dict[str, Any] = {
    "model": "./m",
    "data": "rows.csv",
    "task": "text-classification",
    "columns": {"text": "body", "label": "team"},
    "where": {"lang": "swa", "year": "2020"},
    "encoding": "cp1252",
    "group": "author",
    "train_rows": 100,
    "method": "reinit(top=1)|lora(r=4)",
    "epochs": 2.5,
    "max_steps": 7,
    "batch_size": 16,
    "micro_batch_size": 4,
    "micro_batch_tokens": 500,
    "gradient_checkpointing": True,
    "lr": 1e-3,
    "warmup": 0.2,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "clip": 0.5,
    "dropout": False,
    "reuse": False,
    "max_length": 64,
    "options": {"class_weights": "balanced"},
    "evaluate_every": 0.5,
    "patience": 3,
    "metric": "macro_f1",
    "save": "adapter",
    "precision": "fp32",
    "baselines": False,
    "seed": 5,
    "tensorboard": True,
}
FLAGS = """--model ./m --data rows.csv --task text-classification --columns label=team --text body --where lang=swa,year=2020 --encoding cp1252
--group author --train-rows 100 --method 'reinit(top=1) | lora(rank=4)' --epochs 2.5 --max-steps 7 --batch-size 16 --micro-batch-size 4 --micro-batch-tokens 500 --gradient-checkpointing --lr 1e-3 --warmup 0.2
--schedule cosine --weight-decay 0.1 --clip 0.5 --no-dropout --no-reuse --max-length 64 --set class_weights=balanced --evaluate-every 0.5 --patience 3 --metric macro_f1
--save adapter --precision fp32 --no-baselines --seed 5 --tensorboard"""


def by_flags(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Recipe:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(luthier.verbs.adapt, "adapt", lambda **given: seen.update(given))
    cli.app(["adapt", *arguments], standalone_mode=False)
    return seen["recipe"]


def test_flags_keywords_and_yaml_are_one_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EVERYTHING.keys() == Recipe.model_fields.keys(), "the test knows every field"
    by_keywords = Recipe.build(**EVERYTHING)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**EVERYTHING, "where": {"lang": "swa", "year": 2020}}), encoding="utf-8")
    assert by_keywords == by_flags(monkeypatch, *shlex.split(FLAGS)) == Recipe.load(tmp_path / "r.yaml") == by_flags(monkeypatch, str(tmp_path / "r.yaml"))
    assert by_flags(monkeypatch, str(tmp_path / "r.yaml"), "--set", "query_prefix=query: ", "--set", "symmetric=true").options == {"query_prefix": "query: ", "symmetric": True}
    assert by_flags(monkeypatch, str(tmp_path / "r.yaml"), "--lr", "3e-4", "--dropout") == by_keywords.merged(lr=3e-4, dropout=True)


def test_keywords_of_python_are_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: value for name, value in EVERYTHING.items() if name not in ("model", "data")}
    recipe, rows = luthier.verbs.adapt._recipe(None, Path("m"), "rows.csv", given)
    assert recipe == Recipe.build(**{**EVERYTHING, "model": "m"}) and rows is None
    call = set(inspect.signature(luthier.verbs.adapt.adapt).parameters) - {"model", "data", "recipe", "settings"}
    assert not call & set(Recipe.model_fields)


@pytest.mark.parametrize("settings", [EVERYTHING, {"model": "m", "data": "ü.csv"}], ids=["everything", "least"])
def test_what_is_dumped_runs_again(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.build(**settings)
    (tmp_path / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe and Recipe.load(tmp_path / "recipe.yaml").dump() == recipe.dump()
    assert yaml.safe_load(recipe.dump()).keys() == settings.keys()


@pytest.mark.parametrize(
    "spelling",
    [
        "reinit(top=1)|lora(rank=4,lora_alpha=16,sites=attention.query+attention.value)",
        ["reinit(top=1)", "lora(r=4)"],
        [{"reinit": {"top": 1}}, {"lora": {"r": 4, "target_modules": ["attention.query", "attention.value"]}}],
        {"reinit": {"top": 1}, "lora": {"r": 4}},
        yaml.safe_load("- reinit: {top: 1}\n- lora:\n    r: 4\n"),
        parse("reinit(top=1)|lora(r=4)"),
        parse("reinit(top=1)|lora(r=4)").plain(),
    ],
)
def test_every_spelling_of_a_stack_is_kept_canonically(spelling: Any) -> None:
    assert Recipe.build(model="m", data="d", method=spelling).method == "reinit(top=1)|lora(r=4)"


@pytest.mark.parametrize(
    "settings,expected",
    [
        ({"modle": "x", "epochs": 0, "save": "all"}, ["Did you mean 'model'", "model is missing", "epochs=0", "save='all'"]),
        ({"model": "m", "data": "d", "batch_siez": 3}, ["Did you mean 'batch_size'"]),
        ({"model": "m", "data": "d", "lr": "fast"}, ["lr='fast'"]),
        ({"model": "m", "data": "d", "method": "lroa"}, ["Did you mean 'lora'"]),
        ({"model": "m", "data": "d", "columns": "text"}, ["columns='text'"]),
    ],
)
def test_mistakes_are_named_all_at_once(settings: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Recipe.build(**settings)
    assert not [piece for piece in expected if piece not in str(error.value)], str(error.value)


@pytest.mark.parametrize(
    "text,expected",
    [
        ('model: !!python/object/apply:os.system ["touch {mark}"]\ndata: d\n', "not readable YAML"),
        ('!!python/object/apply:subprocess.check_call [["touch", "{mark}"]]\n', "not readable YAML"),
        ("model: [m\n", "not readable YAML"),
        ("- model\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("model: m\ndata: d\n3: x\n", "no setting '3'"),
    ],
)
def test_files_that_are_no_recipe(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text.format(mark=tmp_path / "mark") if "mark" in text else text, encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        Recipe.load(tmp_path / "r.yaml")
    assert not (tmp_path / "mark").exists()


def test_a_recipe_cannot_be_changed_and_keeps_rows_that_are_no_path() -> None:
    recipe = Recipe.build(model="m", data="<list>")
    with pytest.raises(ValueError, match="frozen"):
        recipe.lr = 1.0  # type: ignore[misc]
    assert recipe.anchored().data == "<list>" and recipe.anchored().model == str(Path("m").absolute())
