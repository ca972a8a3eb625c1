from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from luthier.compute import attention


def heads(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    batch, query, key, length, keys, width = shape
    return [torch.randn(batch, h, t, width, generator=rng, dtype=torch.float64).requires_grad_() for h, t in ((query, length), (key, keys), (key, keys))]


@pytest.mark.parametrize("bias", [None, (1, 1, 4, 5), (2, 1, 4, 5), (2, 3, 4, 5), (1, 3, 1, 5)], ids=str)
def test_against_torch_in_float64(bias: tuple[int, ...] | None) -> None:
    q, k, v = heads(2, 3, 3, 4, 5, 8)
    added = None if bias is None else torch.randn(bias, dtype=torch.float64, requires_grad=True)
    inputs = [x for x in (q, k, v, added) if x is not None]
    found = attention.plain(q, k, v, added, 0.3)
    expected = functional.scaled_dot_product_attention(q, k, v, None if added is None else added.expand(2, 3, 4, 5), scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    seed = torch.randn_like(found)
    for got, want in zip(torch.autograd.grad(found, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True):
        torch.testing.assert_close(got, want)


def test_the_gradient_with_dropout() -> None:
    """Against differences, with the same numbers drawn each time."""
    q, k, v = heads(1, 2, 2, 3, 3, 4)

    def drawn(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return attention.plain(*inputs, None, 0.5, 0.4)  # type: ignore[arg-type]

    assert not torch.equal(drawn(q, k, v), attention.plain(q, k, v, None, 0.5))
    assert torch.autograd.gradcheck(drawn, (q, k, v))


class Module(torch.nn.Module):
    def __init__(self, groups: int, is_causal: bool):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal


MASK = torch.tensor([[True] * 5, [True, True, True, False, False]])[:, None, None, :]
CASES = {
    "no mask": {},
    "padding": {"attention_mask": MASK},
    "padding, added": {"attention_mask": torch.zeros(MASK.shape, dtype=torch.float64).masked_fill(~MASK, -1e9)},
    "causal by itself": {"causal": True},
    "causal by a mask": {"causal": True, "attention_mask": torch.ones(5, 5, dtype=torch.bool).tril() & MASK},
    "causal, said by the caller": {"is_causal": True},
    "a bias of positions": {"position_bias": torch.randn(1, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), "attention_mask": MASK.expand(2, 1, 5, 5)},
    "a bias of positions, causal": {"position_bias": torch.randn(1, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), "causal": True},
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_as_transformers_computes_it(case: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict(CASES[case])
    module = Module(groups, bool(given.pop("causal", False)))
    q, k, v = heads(2, 4, 4 // groups, 5, 5, 8)
    expected = sdpa_attention_forward(module, q, k, v, **{"attention_mask": None, **given})[0]  # type: ignore[arg-type]
    monkeypatch.setattr(attention, "plain_is_faster", lambda *_: True)
    found = attention.attention(module, q, k, v, **{"attention_mask": None, **given})[0]  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)


def test_a_row_that_sees_nothing_is_no_nan() -> None:
    q, k, v = heads(1, 1, 1, 3, 3, 4)
    found = attention.plain(q, k, v, attention._added(torch.zeros(1, 1, 3, 3, dtype=torch.bool), torch.float64), 1.0)
    torch.testing.assert_close(found[0, 0, 0], v.mean(2)[0, 0])
