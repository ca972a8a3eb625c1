"""Our LoRA against peft's on the same weights: outputs, gradients, and the saved folder."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import luthier
from luthier.contract.checks import Subject
from luthier.contract.tiny import CONFIGS
from luthier.methods import loading, saving, stock_adapter


@pytest.mark.parametrize("architecture", list(CONFIGS))
@pytest.mark.parametrize("sites", ["attention.query+attention.value", "mlp.up+attention.output"])
def test_outputs_and_gradients_are_those_of_peft(architecture: str, sites: str, tmp_path: Path) -> None:
    """Our model with its tensors put into peft's layers: equal outputs, and equal gradients of B A as a whole."""
    subject = Subject(f"lora(r=3, alpha=5, sites={sites})", architecture)
    ours = subject.fitted(moved=True)
    config, tensors = stock_adapter.low_rank(ours.model, None)  # type: ignore[misc]
    folder = tmp_path / "adapter"
    stock_adapter.write(folder, config, tensors, {name: ours.model.get_parameter(name) for name in ours.new_heads}, "base")
    theirs = peft.PeftModel.from_pretrained(subject.base(), str(folder), is_trainable=True)  # type: ignore[arg-type]
    torch.testing.assert_close(subject.logits(theirs), subject.logits(ours.model), rtol=0, atol=1e-6)

    for model in (ours.model, theirs):
        model.eval()
        model(**subject.inputs()).logits.pow(2).sum().backward()
    if architecture == "gpt2":
        return  # two changes of one fused weight are one of summed rank there: their gradients are not matched one to one
    mine = {name.replace(".luthier_lora", "").rpartition(".")[0].rpartition(".")[0]: p for name, p in ours.model.named_parameters() if name.endswith(".a")}
    for name, parameter in mine.items():
        other = theirs.get_parameter(f"base_model.model.{name}.lora_A.default.weight")
        assert parameter.grad is not None and other.grad is not None
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stack", ["lora", "lora(sites=word_embeddings+attention.query)", "lora(r=2)|lora(r=4, sites=mlp.up)"])
def test_a_stack_of_low_ranks_is_one_stock_adapter(stack: str, tmp_path: Path) -> None:
    subject = Subject(stack, "bert")
    fitted = subject.fitted(moved=True)
    base = tmp_path / "base"
    subject.base().save_pretrained(str(base))  # type: ignore[operator]
    (tmp_path / "run").mkdir()
    saved = saving.save(fitted, tmp_path / "run", saving.Base(str(base), loading.sha256(base), subject.auto_class), "adapter")
    assert saved.form == "adapter"
    theirs = peft.PeftModel.from_pretrained(subject.base(), str(tmp_path / "run"))  # type: ignore[arg-type]
    torch.testing.assert_close(subject.logits(theirs), subject.logits(fitted.model), rtol=0, atol=1e-6)


def test_dropout_acts_on_the_low_rank_path_in_training_only() -> None:
    model = Subject("lora(dropout=0.5)", "distilbert").fitted(moved=True).model
    inputs = Subject("lora", "distilbert").inputs()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.eval()
    quiet = model(**inputs).logits
    model.train()
    first, second = model(**inputs).logits, model(**inputs).logits
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(**inputs).logits, quiet)


def test_methods_alone_in_a_loop_of_ones_own() -> None:
    model = luthier.apply(Subject("lora", "bert").base(), "adapter(reduction=16)|bitfit")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, labels = Subject("lora", "bert").inputs(), torch.tensor([0, 1, 2])
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("adapter" in name or name.endswith("bias") or name.startswith("classifier") for name in learnt)
