from __future__ import annotations

import pytest
import torch

from luthier.compute.dropout import dropout, multipliers


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_wherever_they_lie(p: float) -> None:
    """One draw serves four elements; each of the four places must be dropped alike, and independently of its neighbours."""
    torch.manual_seed(0)
    found = multipliers(torch.empty(400_000), p)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-4)
    dropped = (found == 0).double().view(-1, 4)
    spread = (p * (1 - p) / len(dropped)) ** 0.5
    assert ((dropped.mean(0) - p).abs() < 5 * spread).all()
    together = torch.corrcoef(dropped.T) - torch.eye(4)
    assert (together.abs() < 5 * len(dropped) ** -0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_where_the_value_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 13, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.3)
    y.sum().backward()
    assert x.grad is not None and torch.equal(y, x * x.grad) and 0 < int((y == 0).sum()) < y.numel()


def test_the_ends_of_the_scale() -> None:
    x = torch.randn(50)
    assert dropout(x, 0.0) is x
    assert torch.equal(dropout(x, 1.0), torch.zeros(50))
    assert torch.equal(multipliers(x, 1e-9), torch.ones(50))


def test_the_seed_decides() -> None:
    x = torch.randn(1001)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.4))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
