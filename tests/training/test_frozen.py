"""What is frozen is computed once, and training cannot tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from luthier.anatomy import Anatomy
from luthier.contract.texts import tiny_rows, tiny_tokenizer
from luthier.contract.tiny import tiny_model
from luthier.data.columns import apply, assign
from luthier.data.rows import Row, Rows
from luthier.methods.engine import install
from luthier.methods.planner import frozen_blocks
from luthier.methods.stack import parse
from luthier.tasks import find
from luthier.tasks.base import Task
from luthier.training import frozen
from luthier.training.trainer import Trainer, TrainingSettings
from luthier.verbs.job import encode

TOKENIZER = tiny_tokenizer()
ARCHITECTURES = ("bert", "roberta", "distilbert", "gpt2", "llama")
SETTINGS = TrainingSettings(epochs=3, batch_size=8, lr=1e-3, evaluate_every=1)


def prepared(architecture: str, stack: str, tag: str = "text-classification") -> tuple[nn.Module, Task, Rows, list[Any], list[nn.Module]]:
    kind = find(tag)
    raw = Rows.of([Row(v, "rows.jsonl", i + 1) for i, v in enumerate(tiny_rows(tag, 24))])
    rows = apply(raw, assign(raw, kind.columns, {})[0], kind.columns)[0]
    task = kind.learn(rows, rows, rows)
    model = tiny_model(architecture, kind.auto_class, num_labels=len(getattr(task, "labels", "1")))
    model.config.pad_token_id = 0  # type: ignore[union-attr]
    heads = tuple(name for name, _ in model.named_parameters() if name.split(".")[0] in ("classifier", "score", "pre_classifier"))
    fitted = install(model, parse(stack), new_heads=heads)
    if kind.auto_class == "AutoModel":  # mean pooling reaches no pooler
        fitted.close({name for name, _ in model.named_parameters() if name.startswith("pooler")})
    return model, task, rows, encode(task, rows, TOKENIZER, 48), frozen_blocks(fitted)


def trained(folder: Path, architecture: str, stack: str, reuse: bool, tag: str = "text-classification", settings: TrainingSettings = SETTINGS) -> tuple[dict[str, torch.Tensor], Trainer]:
    """With the dropout of what learns, and without that of what is frozen, either way."""
    model, task, rows, features, blocks = prepared(architecture, stack, tag)
    folder.mkdir(exist_ok=True)
    trainer = Trainer(model, task, features, (features, rows), TOKENIZER, settings, folder, rows=rows, frozen=blocks)
    assert (trainer.trunk is not None) == bool(blocks)
    if trainer.trunk and not reuse:
        trainer.trunk.agrees = lambda batch: False  # type: ignore[method-assign]
    trainer.fit()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, trainer


def calls(block: nn.Module) -> list[int]:
    """Rows of each call of a block's own forward."""
    seen: list[int] = []
    forward = block.forward
    block.forward = lambda hidden, *args, **kwargs: (seen.append(len(hidden)), forward(hidden, *args, **kwargs))[1]  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("stack", ["head", "freeze(bottom=1)", "lora(r=2, sites=blocks[-1:].attention.query)"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_on_kept_states_is_training(architecture: str, stack: str, tmp_path: Path) -> None:
    kept, with_states = trained(tmp_path / "kept", architecture, stack, True)
    computed, without = trained(tmp_path / "computed", architecture, stack, False)
    for name in kept:
        torch.testing.assert_close(kept[name], computed[name], rtol=0, atol=2e-5)
    losses, expected = ([h["loss"] for h in trainer.state["history"] if "loss" in h] for trainer in (with_states, without))
    assert losses == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tag", ["text-classification", "token-classification", "regression", "sentence-similarity"])
def test_every_task_reads_kept_states(tag: str, tmp_path: Path) -> None:
    stack = "freeze(bottom=2)" if tag == "sentence-similarity" else "head"  # vectors have no head to learn
    kept, _ = trained(tmp_path / "kept", "bert", stack, True, tag)
    computed, _ = trained(tmp_path / "computed", "bert", stack, False, tag)
    for name in kept:
        torch.testing.assert_close(kept[name], computed[name], rtol=0, atol=2e-5)


def test_each_text_goes_through_the_frozen_blocks_once(tmp_path: Path) -> None:
    """Three passes and three evaluations; two rows more are those of the first look."""
    model, task, rows, features, blocks = prepared("bert", "freeze(bottom=2)")
    trainer = Trainer(model, task, features, (features, rows), TOKENIZER, SETTINGS, tmp_path, rows=rows, frozen=blocks)
    below, above = calls(blocks[0]), []
    Anatomy.of(model).blocks[2].module.register_forward_hook(lambda *_: above.append(1))
    trainer.fit()
    looks = 8 * 2  # which modules lie below, whether kept and computed states agree, and what of the other blocks can be fused
    assert sum(below) <= 2 * len(rows) + looks and len(above) >= 6 * len(rows) / SETTINGS.batch_size
    assert "partial" not in str(blocks[0].forward) and "forward" not in blocks[1].__dict__, "the blocks are as they were"


def test_without_room_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = trained(tmp_path / "plain", "bert", "freeze(bottom=2)", False)
    monkeypatch.setattr(frozen, "MEMORY", 0.0)
    files: list[str] = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda file, **how: (files.append(file), from_file(file, **how))[1])
    on_disk, _ = trained(tmp_path / "disk", "bert", "freeze(bottom=2)", True)
    assert all(torch.allclose(on_disk[name], expected[name], atol=2e-5) for name in expected)
    assert files == [str(tmp_path / "disk" / "frozen.bin")] and not Path(files[0]).exists()
    monkeypatch.setattr(frozen, "DISK", 0.0)
    nowhere, _ = trained(tmp_path / "nowhere", "bert", "freeze(bottom=2)", True)
    assert all(torch.equal(nowhere[name], expected[name]) for name in expected)


def test_one_pass_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen.FrozenTrunk, "keep", lambda *given: pytest.fail("nothing is met twice"))
    trained(tmp_path / "once", "bert", "freeze(bottom=2)", True, settings=replace(SETTINGS, epochs=1))


@pytest.mark.parametrize("stack", ["full", "bitfit", "lora(r=2)", "adapter(reduction=8)"])
def test_nothing_is_kept_where_the_first_block_learns(stack: str) -> None:
    assert not prepared("bert", stack)[4]


def test_shared_blocks_and_two_stacks_keep_nothing() -> None:
    assert not prepared("albert", "head")[4] and not prepared("t5", "head")[4]


def test_what_lies_below_has_no_dropout(tmp_path: Path) -> None:
    model, task, rows, features, blocks = prepared("bert", "freeze(bottom=2)")
    trainer = Trainer(model, task, features, None, TOKENIZER, SETTINGS, tmp_path, rows=rows, frozen=blocks)
    trainer.fit()
    trainer._training_mode()
    still = {name for name, module in model.named_modules() if not module.training}
    assert {"bert.embeddings.dropout", "bert.encoder.layer.1.output.dropout"} <= still and not [name for name in still if "layer.2" in name or "classifier" in name or name == ""]


def test_a_resumed_run_reads_the_same_states(tmp_path: Path) -> None:
    expected, _ = trained(tmp_path / "whole", "bert", "freeze(bottom=2)", True)
    model, task, rows, features, blocks = prepared("bert", "freeze(bottom=2)")
    (tmp_path / "broken").mkdir()
    trainer = Trainer(model, task, features, (features, rows), TOKENIZER, replace(SETTINGS, checkpoint_every=0.0), tmp_path / "broken", rows=rows, frozen=blocks)
    step = trainer._step

    def killed(batch: list[int], number: int) -> dict[str, Any]:
        if number == 4:
            raise KeyboardInterrupt
        return step(batch, number)

    trainer._step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    model, task, rows, features, blocks = prepared("bert", "freeze(bottom=2)")
    Trainer(model, task, features, (features, rows), TOKENIZER, SETTINGS, tmp_path / "broken", rows=rows, frozen=blocks).fit(resume=True)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters() if p.requires_grad)
