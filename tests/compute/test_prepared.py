"""A model inside `prepared` answers and learns as outside of it, and is untouched afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from luthier import compute
from luthier.compute import attention, kernels
from luthier.compute.adamw import CAN_BE_NARROW
from luthier.compute.linear import Cast
from luthier.contract.tiny import CONFIGS, tiny_inputs, tiny_model
from luthier.methods.engine import install
from luthier.methods.stack import parse


def answers(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**inputs).last_hidden_state
    if "attention_mask" in inputs and out.shape[:2] == inputs["attention_mask"].shape:
        out = out * inputs["attention_mask"].unsqueeze(-1)  # what a model makes of padding is its own affair
    # the square of what a norm has just made would hardly depend on anything
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_plain_products_change_no_answer_and_no_gradient(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(attention, "plain_is_faster", lambda *_: True)
    monkeypatch.setattr(attention, "plain", lambda *args, f=attention.plain: calls.append(1) or f(*args))
    model, inputs = tiny_model(architecture).double(), tiny_inputs(architecture)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = answers(model, inputs)
    with compute.prepared(model, "cpu", "fp32"):
        found = answers(model, inputs)
    assert calls, "the model never asked for it"
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_bf16_differs_no_more_than_bf16_does(architecture: str) -> None:
    """Against float32, the error is that of torch's own bf16 or less (with some room for chance)."""
    fitted = install(tiny_model(architecture), parse("lora"))
    model, inputs = fitted.model, tiny_inputs(architecture)
    for name, parameter in fitted.trainable.items():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    exact = answers(model, inputs)
    with compute.autocast("cpu", "bf16"):
        stock = answers(model, inputs)
    with compute.prepared(model, "cpu", "bf16"), compute.autocast("cpu", "bf16"):
        ours = answers(model, inputs)

    def errors(found: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> torch.Tensor:
        return torch.stack([(found[0] - exact[0]).float().norm() / exact[0].norm(), *((found[1][name] - g).norm() / g.norm() for name, g in exact[1].items())])

    assert set(ours[1]) == set(exact[1])
    assert (errors(ours) < 2 * errors(stock) + 0.02).all()


def test_everything_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = install(tiny_model("bert"), parse("lora")).model
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    with pytest.raises(RuntimeError, match="midway"), compute.prepared(model, "cpu", "bf16"), compute.running(model, "cpu", "bf16"):
        assert model.config._attn_implementation == attention.NAME
        raise RuntimeError("midway")
    assert model.config._attn_implementation == "sdpa" and model.config.to_dict() == config
    for name, module in model.named_modules():
        assert set(module.__dict__) == set(before[name])
    with compute.running(model, "cpu", "bf16"):
        assert model.config._attn_implementation == attention.NAME  # and it can be had again


def test_another_choice_of_attention_is_respected() -> None:
    model = tiny_model("bert")
    model.set_attn_implementation("eager")
    with compute.prepared(model, "cpu", "fp32"):
        assert model.config._attn_implementation == "eager"


def test_dropout_is_that_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert").train()
    with compute.prepared(model, "cpu", "fp32"):
        drop, x = model.embeddings.dropout, torch.ones(1000)
        assert 0 < int((drop(x) == 0).sum()) < 250
        drop.p = 1.0
        assert not drop(x).any()
        drop.eval()
        assert torch.equal(drop(x), x)


def test_weights_that_learn_are_never_copied() -> None:
    """A step must be seen by the next forward pass, in float32's full precision of the master weights."""
    model = install(tiny_model("bert"), parse("freeze(bottom=2)")).model
    inputs = tiny_inputs("bert")
    with compute.prepared(model, "cpu", "bf16"):
        with torch.no_grad(), compute.autocast("cpu", "bf16"):
            before = model(**inputs).last_hidden_state
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        with torch.no_grad(), compute.autocast("cpu", "bf16"):
            after = model(**inputs).last_hidden_state
    with torch.no_grad(), compute.running(model, "cpu", "bf16"):
        expected = model(**inputs).last_hidden_state
    assert not torch.allclose(before, after) and torch.equal(after, expected)


def test_one_cast_for_all_that_read_it() -> None:
    cast, x = Cast(), torch.randn(3, 4, requires_grad=True)
    once = cast(x)
    assert cast(x) is once and once.requires_grad
    with torch.no_grad():
        assert not cast(x).requires_grad
        x.add_(1)
    assert cast(x).requires_grad and torch.equal(cast(x), x.bfloat16())
    assert cast(once) is once
    with torch.inference_mode():
        y = torch.randn(2)
        assert cast(y) is cast(y)


def test_gradients_of_large_tables_are_sparse_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "LARGE", 0)
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    expected = answers(model, inputs)
    table = model.get_input_embeddings().weight  # type: ignore[union-attr]
    with compute.prepared(model, "cpu", "fp32"):
        answers(model, inputs)
        assert not table.grad.is_sparse  # type: ignore[union-attr]
    with compute.prepared(model, "cpu", "fp32", sparse=True):
        out, gradients = answers(model, inputs)
        assert table.grad.is_sparse  # type: ignore[union-attr]
    torch.testing.assert_close((out, {name: g.to_dense() for name, g in gradients.items()}), expected, rtol=1e-3, atol=1e-4)
    answers(model, inputs)
    assert not table.grad.is_sparse, "the model is as it was"  # type: ignore[union-attr]


@pytest.mark.parametrize("module", [nn.Embedding(9, 4, max_norm=1.0), nn.Embedding(9, 4, scale_grad_by_freq=True), nn.Embedding(9, 4).requires_grad_(False)], ids=["max_norm", "scaled", "frozen"])
def test_tables_that_compute_otherwise_stay_dense(module: nn.Embedding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "LARGE", 0)
    with compute.prepared(nn.ModuleList([module]), "cpu", "fp32", sparse=True):
        assert not module.sparse


@pytest.mark.skipif(kernels.library() is None or not CAN_BE_NARROW, reason="no kernels on this machine, or a torch without Tensor.grad_dtype")
@pytest.mark.parametrize("architecture,narrowed", [("bert", 6), ("llama", 7), ("t5", 21), ("albert", 0)])  # of t5, half of 2 times 6 and 3 times 10
def test_narrow_gradients_are_the_same_numbers(architecture: str, narrowed: int) -> None:
    """Of each weight in a block that a pass reads once, which of a shared block is none."""
    model, inputs = tiny_model(architecture), tiny_inputs(architecture)
    found = []
    for narrow in (False, True):
        with compute.prepared(model, "cpu", "bf16", narrow=narrow):
            for _ in range(2):
                model.zero_grad()
                with compute.autocast("cpu", "bf16"):
                    out = model(**inputs).last_hidden_state
                (out.float() ** 2).sum().backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, narrow = found
    bf16 = {name for name, d in narrow.items() if d.dtype == torch.bfloat16}
    assert len(bf16) == narrowed * model.config.num_hidden_layers and all(d.dtype == torch.float32 for d in plain.values())
    assert all(torch.equal(d, narrow[name].float()) for name, d in plain.items())
    assert all(p.grad is None or p.grad.dtype == p.grad_dtype == torch.float32 for p in model.parameters()), "the model is as it was"  # type: ignore[attr-defined]
