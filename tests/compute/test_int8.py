"""Products of whole numbers are exact for what was rounded, each row and each token by itself; blocks and stock layers take them where nothing learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from luthier import UserError, compute
from luthier.compute import int8, linear
from luthier.compute.kernels import kernel
from luthier.compute.packing import Packing
from luthier.compute.products import Linear
from luthier.compute.tape import Given
from luthier.contract.tiny import tiny_inputs, tiny_model
from luthier.methods.engine import install
from luthier.methods.stack import parse

pytestmark = pytest.mark.skipif(not int8.exists, reason="this torch has no int8 kernels")


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of the rounded numbers, in float64."""
    (whole_x, of_x), (whole_w, of_w) = int8.rounded(x), int8.rounded(weight)
    y = (whole_x.double() * of_x) @ (whole_w.double() * of_w).T
    return y if bias is None else y + bias


BOTH = pytest.mark.parametrize("by", [lambda name, dtype: None, kernel], ids=["torch", "kernels"])


@BOTH
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows,inputs,outputs", [(1, 32, 32), (7, 33, 65), (130, 384, 1152)])
def test_a_product_is_that_of_the_rounded_numbers(rows: int, inputs: int, outputs: int, with_bias: bool, by: Any) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs) if with_bias else None
    found = int8.Product(weight, bias, by)(x)
    torch.testing.assert_close(found.double(), exact(x, weight, bias), rtol=1e-5, atol=1e-4)
    whole = x @ weight.T + (0 if bias is None else bias)
    assert 0 < float((found - whole).norm() / whole.norm()) < 0.015


def test_numbers_are_rounded_by_at_most_half_a_step() -> None:
    x = torch.randn(50, 40) * torch.logspace(-30, 30, 50)[:, None]
    whole, scales = int8.rounded(x)
    assert whole.dtype == torch.int8 and int(whole.abs().amax(1).min()) == int(whole.abs().max()) == 127
    assert float(((whole * scales - x).abs() / scales).max()) <= 0.5001


def test_many_numbers_are_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(17, 40)
    expected = int8.rounded(x)
    for piece in (1, 200):
        monkeypatch.setattr(int8, "PIECE", piece)
        assert all(torch.equal(a, b) for a, b in zip(int8.rounded(x), expected, strict=True))
    assert [part.shape for part in int8.rounded(x[:0])] == [(0, 40), (0, 1)]


@BOTH
def test_a_token_with_huge_numbers_harms_no_other_and_nor_does_a_row_of_the_weight(by: Any) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 64), torch.randn(48, 64)
    expected = int8.Product(weight, None, by)(x)
    huge_x, huge_weight = x.clone(), weight.clone()
    huge_x[2], huge_weight[5] = 1e6 * x[2], 1e4 * weight[5]
    found = int8.Product(huge_weight, None, by)(huge_x)
    tokens, rows = [0, 1, 3, 4, 5], [i for i in range(48) if i != 5]
    assert torch.equal(found[tokens][:, rows], expected[tokens][:, rows])


def test_numbers_may_lie_in_any_order() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 7), torch.randn(40, 96)
    assert torch.equal(int8.Product(weight.T, None)(x.T), int8.Product(weight.T.contiguous(), None)(x.T.contiguous()))


@BOTH
def test_tokens_are_the_same_in_any_company(by: Any) -> None:
    torch.manual_seed(0)
    x, product = torch.randn(33, 96), int8.Product(torch.randn(64, 96), torch.randn(64), by)
    together = product(x)
    assert torch.equal(torch.cat([product(x[i : i + 1]) for i in range(33)]), together)
    assert torch.equal(product(x.view(3, 11, 96)), together.view(3, 11, 64))


@BOTH
def test_zeros_stay_zero_and_what_is_not_a_number_shows(by: Any) -> None:
    product = int8.Product(torch.cat([torch.zeros(1, 32), torch.randn(31, 32)]), None, by)
    x = torch.randn(4, 32)
    x[1], x[2, 3], x[3, 4] = 0, torch.nan, torch.inf
    found = product(x)
    assert not found[1].any() and not found[0, 0] and found[0, 1:].all()
    assert not found[2:, 1:].isfinite().any()


LORA = "lora(r=3, alpha=5, sites=attention.*+mlp.*)"


@pytest.mark.parametrize("architecture,stack", [*((name, LORA) for name in ("bert", "albert", "gpt2", "llama", "t5", "vit")), ("bert", "lora(sites=mlp.up)|bitfit"), ("bert", "peft(type=ia3)"), ("bert", "adapter"), ("gpt2", "peft(type=dora)")])
def test_a_changed_model_answers_nearly_as_in_fp32(architecture: str, stack: str) -> None:
    """Fused blocks and stock ones, whatever stands in them."""
    model, inputs = install(tiny_model(architecture), parse(stack)).model.eval(), tiny_inputs(architecture, batch=5)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=rng), alpha=0.1)
        expected = model(**inputs).last_hidden_state
        with compute.running(model, "cpu", "int8"):
            found = model(**inputs).last_hidden_state
        again = model(**inputs).last_hidden_state
    keep = inputs["attention_mask"].bool() if "attention_mask" in inputs and expected.shape[:2] == inputs["attention_mask"].shape else slice(None)
    apart = float((found - expected)[keep].norm() / expected[keep].norm())
    assert 1e-5 < apart < 0.05
    assert torch.equal(again, expected), "outside the model is as it was"


def test_a_low_rank_change_is_not_rounded() -> None:
    """Of a weight that is zero, it is all that there is."""
    model = install(tiny_model("bert"), parse("lora(r=2, sites=mlp.up)")).model
    module = model.encoder.layer[0].intermediate.dense  # type: ignore[union-attr]
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        module.weight.zero_()
        (change,) = module.changes()
        for name in change.names:
            change[name].copy_(torch.randn(change[name].shape, generator=rng))
        piece, x = Linear([module], torch.int8, learning=False), torch.randn(9, 32, generator=rng)
        tensors = piece.tensors(Given(Packing.whole(9, 1)))
        assert piece.kept == (None, None), "no other copy of the weight is kept"
        found = piece.forward(x, tensors, (False,) * (1 + len(tensors)), _Keeps())  # type: ignore[arg-type]
        torch.testing.assert_close(found, module(x))


class _Keeps:
    def keep(self, *tensors: object) -> None: ...


def test_layers_in_blocks_are_rounded_and_heads_are_not() -> None:
    model = tiny_model("bert", "AutoModelForSequenceClassification", num_labels=3)
    found = linear.inner_linears(model)
    assert len(found) == 3 * 6 and not {id(m) for m in found} & {id(model.classifier), id(model.bert.pooler.dense)}
    assert linear.inner_linears(nn.ModuleList([nn.Linear(64, 8), nn.Linear(8, 64)])) == []


@pytest.mark.parametrize("device,learning", [("cpu", True), ("cuda", False)])
def test_it_is_refused_where_it_cannot_be(device: str, learning: bool) -> None:
    with pytest.raises(UserError, match="int8"), compute.prepared(tiny_model("bert"), device, "int8", learning=learning):
        pass
