"""Journey 11, docs/journeys/11-python.md: from Python. The page's own code is what runs here, on the real 22M encoder, for a few steps."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import luthier

PAGE = Path(__file__).parents[2] / "docs" / "journeys" / "11-python.md"
TOPICS = {"billing": ("invoice", "refund", "payment", "price", "charged twice"), "technical": ("crash", "login", "error", "update", "screen stays black")}


def rows(count: int) -> list[dict[str, str]]:
    rng = random.Random(0)
    made = []
    for _ in range(count):
        team = rng.choice(sorted(TOPICS))
        made.append({"body": f"{rng.choice(('Hello,', 'Please help:', 'Again'))} {rng.choice(TOPICS[team])} number {rng.randint(1, 9999)}", "team": team})
    return made


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Iterator[dict[str, Any]]:
    """What is left in the notebook after every cell of the page; `adapt` takes two steps."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "minilm").symlink_to(minilm, target_is_directory=True)
    left: dict[str, Any] = {"rows": rows(60), "printed": []}
    left["print"] = lambda *values: left["printed"].append(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(luthier, "adapt", functools.partial(luthier.adapt, max_steps=2))
        for cell in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            exec(compile(cell, str(PAGE), "exec"), left)
        yield left


def test_a_run_has_metrics_a_model_and_predictions(notebook: dict[str, Any]) -> None:
    run = notebook["run"]
    assert {"low", "value", "high"} == set(run.metrics["accuracy"])
    assert isinstance(run.model, transformers.BertForSequenceClassification)
    answers = run.predict(["my invoice is wrong", {"body": "the screen stays black"}])
    assert all(answer["predicted"] in TOPICS and 0 < answer["score"] <= 1 for answer in answers)


def test_the_loop_trains_what_the_stack_opens_and_nothing_else(notebook: dict[str, Any], minilm: Path) -> None:
    model, losses = notebook["model"], notebook["losses"]
    assert isinstance(model, transformers.BertForSequenceClassification) and sum(losses[-3:]) < sum(losses[:3])
    fitted: Any = model.luthier
    trained = set(fitted.trainable)
    assert any("luthier_adapter" in name for name in trained) and any(name.endswith("query.bias") for name in trained) and "classifier.weight" in trained
    fresh = transformers.AutoModel.from_pretrained(str(minilm)).state_dict()
    for name, tensor in model.bert.state_dict().items():
        if f"bert.{name}" not in trained and name in fresh:
            assert torch.equal(tensor, fresh[name]), name
    assert not torch.equal(model.bert.state_dict()["encoder.layer.0.attention.self.query.bias"], fresh["encoder.layer.0.attention.self.query.bias"])


def test_mistakes_are_exceptions_with_the_same_words(minilm: Path) -> None:
    with pytest.raises(luthier.UserError, match="Did you mean 'lora'"):
        luthier.adapt(minilm, rows(20), method="lroa")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(minilm))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(luthier.UserError, match="both change"):
        luthier.apply(model, "lora|lora(r=4)")
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()} and all(p.requires_grad for p in model.parameters())
