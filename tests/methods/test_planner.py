"""Conflicts are refused before anything is touched, with both names and the remedy."""

from __future__ import annotations

import copy

import pytest
import torch

import luthier
from luthier import Anatomy, UserError, Workload
from luthier.contract.tiny import tiny_inputs, tiny_model
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
    assert (found.reached, found.frozen) == (reached, 3 - reached)
    full = Anatomy.of(model).memory(Workload(4, 16), 0)
    assert (Anatomy.of(model).memory(Workload(4, 16), 0, found.reached) < full) == (reached < 3)


def test_apply_refuses_what_would_leave_random_weights_before_it_makes_them() -> None:
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match="throws away the trained values"):
        luthier.apply(model, "reinit(top=1)|lora")
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert luthier.apply(model, "reinit(top=1)|full") is model


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5", "dinov2"])
def test_what_is_reinitialised_starts_as_a_new_model_does(architecture: str) -> None:
    """By the model's own rule: T5 scales each weight by its width, GPT-2 its residual projections by its depth."""
    fresh = {name: p.detach() for name, p in tiny_model(architecture, seed=1).named_parameters()}
    model = tiny_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    again = dict(luthier.apply(model, "reinit(top=1)|full").named_parameters())
    changed = [name for name, p in again.items() if not bool((p == 7.0).all())]
    assert changed
    for name in changed:
        torch.testing.assert_close(again[name].std(correction=0), fresh[name].std(correction=0), rtol=0.35, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("stack", ["lora(r=2)", "lora(r=2, sites=word_embeddings+attention.query)", "adapter(reduction=8)", "he_parallel(reduction=4)", "lora(r=2)|adapter(reduction=8)"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_what_learns_stays_in_float32_on_a_model_stored_otherwise(architecture: str, stack: str) -> None:
    """float64 stands for bfloat16, whose products not every processor computes."""
    if architecture == "gpt2":
        stack = stack.replace("word_embeddings", "wpe")
    model = tiny_model(architecture).double()
    inputs = tiny_inputs(architecture)
    before = model(**inputs).last_hidden_state
    fitted = luthier.apply(model, stack).luthier
    after = fitted.model(**inputs).last_hidden_state
    torch.testing.assert_close(after, before)
    after.sum().backward()
    assert after.dtype is torch.float64 and {fitted.trainable[name].dtype for name in fitted.added} == {torch.float32}


def test_an_embedding_that_does_more_than_look_up_takes_no_change() -> None:
    class Scaled(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 3

    model = tiny_model("bert")
    model.embeddings.word_embeddings.__class__ = Scaled
    with pytest.raises(UserError, match="may scale them"):
        luthier.apply(model, "lora(sites=word_embeddings)")
