"""Conflicts are refused before anything is touched, with both names and the remedy."""

from __future__ import annotations

import copy

import pytest
import torch

import luthier
from luthier import Anatomy, UserError, Workload
from luthier.contract.tiny import tiny_model
from luthier.methods.planner import plan
from luthier.methods.stack import parse


def meta(architecture: str = "bert", auto_class: str = "AutoModelForSequenceClassification") -> torch.nn.Module:
    with torch.device("meta"):
        return type(tiny_model(architecture, auto_class))(tiny_model(architecture, auto_class).config)


@pytest.mark.parametrize(
    "stack,expected",
    [
        ("full|lora", ("full", "lora", "sites that full leaves frozen")),
        ("lora|lora(r=4)", ("both change blocks[0].attention.query", "different sites")),
        ("lora|peft(type=vera)", ("peft", "lora", "two runs")),
        ("reinit(top=1)", ("Nothing", "reinit(top=1)|full")),
        ("reinit(top=1)|lora", ("throws away", "reinit(top=1)|full")),
        ("full|reinit(top=1)", ("stands right of full", "reinit(top=1)|full")),
        ("freeze(bottom=3)", ("3 blocks", "0 to 2")),
        ("lora(r=500)", ("outside 1..32", "Try r=8")),
        ("lora(sites=mlp.sideways)", ("matches no module", "roles here")),
        ("adapter(sites=mlp.up)", ("not a point", "attention.out")),
        ("adapter(reduction=1000)", ("leaves no neuron",)),
    ],
)
def test_conflicts(stack: str, expected: tuple[str, ...]) -> None:
    model = meta()
    before = copy.deepcopy([name for name, _ in model.named_modules()])
    with pytest.raises(UserError) as error:
        plan(model, parse(stack), ("classifier.weight", "classifier.bias"))
    for piece in expected:
        assert piece in str(error.value)
    assert [name for name, _ in model.named_modules()] == before


def test_a_weight_change_beside_what_is_frozen_is_welcome() -> None:
    found = plan(meta(), parse("bitfit|lora|adapter(reduction=8)|lora(sites=mlp.up)"), ("classifier.weight", "classifier.bias"))
    assert [step.parameters for step in found.steps][1] == 3 * 2 * 8 * 64 and found.trainable < found.total


def test_uneven_cover_is_told() -> None:
    found = plan(meta(), parse("lora(sites=blocks[1:].attention.query)"))
    assert any("2 of 3 blocks" in note for note in found.notes)


def test_tied_weights() -> None:
    model = meta("gpt2", "AutoModelForCausalLM")
    with pytest.raises(UserError, match="tied"):
        plan(model, parse("lora(sites=wte)"))
    assert any("tied" in note for note in plan(model, parse("full")).notes)


def test_apply_touches_nothing_when_it_refuses() -> None:
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError):
        luthier.apply(model, "lora|lora")
    assert state.keys() == model.state_dict().keys() and all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "stack,reached",
    [("full", 3), ("lora", 3), ("lora(sites=blocks[1:].mlp.up)", 2), ("head", 0), ("freeze(bottom=2)", 1), ("adapter(sites=blocks[-1:].mlp.out)", 1)],
)
def test_gradients_reach_down_to_the_lowest_block_that_learns(stack: str, reached: int) -> None:
    """Memory and time of a step follow: what lies below keeps nothing."""
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    heads = tuple(name for name, _ in model.named_parameters() if name.startswith("classifier"))
    found = plan(model.to("meta"), parse(stack), heads)
    assert found.reached == reached
    full = Anatomy.of(model).memory(Workload(4, 16), 0)
    assert (Anatomy.of(model).memory(Workload(4, 16), 0, found.reached) < full) == (reached < 3)


def test_apply_refuses_what_would_leave_random_weights_before_it_makes_them() -> None:
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match="throws away the trained values"):
        luthier.apply(model, "reinit(top=1)|lora")
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert luthier.apply(model, "reinit(top=1)|full") is model
