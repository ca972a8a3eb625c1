"""What there is, shown to people: methods, tasks, runs, and two runs side by side."""

from __future__ import annotations

import pytest

from luthier.methods import registry
from luthier.tasks import tasks


def test_methods_and_their_cards(call) -> None:
    table = call("methods").out
    assert all(name in table for name in registry.methods())
    for name, cls in registry.methods().items():
        card = call("methods", name).out
        assert card.startswith(f"{name}: {cls.card.use}") and cls.card.source in card and all(example in card for example in cls.card.examples)
        assert "typing." not in card and all(promise in card for promise in cls.card.promises)
    lora = call("methods", "lora").out
    assert "r = 8" in lora and "lora_alpha = alpha" in lora and "2106.09685" in lora


def test_tasks_and_the_columns_they_read(call) -> None:
    table = call("tasks").out
    for tag, task in tasks().items():
        assert tag in table and all(f"{column.role}" in table for column in task.columns) and all(f"--set {name}=" in table for name in task.options)


def test_runs_are_listed(made, call, shop) -> None:
    for kind in ("merged", "adapter", "search"):
        made(kind)
    table = call("runs", "list", shop).out
    assert all(str(shop / kind) in table for kind in ("merged", "adapter", "search")) and "accuracy" in table
    (shop / "elsewhere").mkdir()
    (shop / "elsewhere" / "run.json").write_text("[]", encoding="utf-8")  # of another program
    assert call("runs", "list", shop).out.startswith("run")
    assert "no finished run" in call("runs", "list", shop / "elsewhere").out
    assert call("runs", "list", shop / "nowhere").status == 2


def test_two_runs_side_by_side(made, call) -> None:
    first, second = made("merged"), made("other")
    found = call("runs", "compare", first, second, "--json").json
    a, b = (call("evaluate", run, "--json").json["metrics"]["accuracy"]["value"] for run in (first, second))
    assert found["difference"]["value"] == pytest.approx(a - b) and found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"]
    assert found["metrics"]["accuracy"][0]["value"] == a and found["recipe"]["method"] == [None, "full"]
    text = call("runs", "compare", first, second).out
    assert "paired difference" in text and "trainable_parameters" in text and "recipe method" in text
    ended = call("runs", "compare", first, made("number"), "--json")
    assert ended.status == 2 and "runs of one task" in ended.err and not ended.out
