"""Cross entropy with its gradient against torch's in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from luthier.compute import losses
from luthier.compute.losses import cross_entropy

ROUTED = (losses, "cross_entropy")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def logits(rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weights", ["sum", "weighted"])
@pytest.mark.parametrize("rows,classes", [(1, 2), (5, 16), (7, 50), (40, 1003)])
def test_losses_and_gradients_are_those_of_torch(rows: int, classes: int, weights: str, dtype: torch.dtype) -> None:
    x = logits(rows, classes, dtype)
    labels = torch.arange(rows) * 7 % classes
    labels[-1] = classes - 1
    own, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    factors = torch.ones(rows) if weights == "sum" else torch.linspace(-1, 2, rows)
    found, reference = cross_entropy(own, labels), nn.functional.cross_entropy(expected, labels, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-5)
    (found * factors).sum().backward()
    (reference * factors).sum().backward()
    assert own.grad is not None and own.grad.dtype == dtype and expected.grad is not None
    torch.testing.assert_close(own.grad.double(), expected.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [3, 49])
def test_what_is_not_a_number_is_not_hidden(bad: float, place: int) -> None:
    x = logits(3, 50, torch.float32)
    x[1, place] = bad
    assert cross_entropy(x, torch.tensor([0, 1, 2])).isfinite().tolist() == [True, False, True]


@pytest.mark.usefixtures("route")
def test_classes_that_cannot_be_are_excluded() -> None:
    x = logits(2, 40, torch.float32)
    x[:, 5:] = -math.inf
    labels = torch.tensor([0, 4])
    torch.testing.assert_close(cross_entropy(x, labels), nn.functional.cross_entropy(x, labels, reduction="none"))


@pytest.mark.usefixtures("route")
def test_a_label_out_of_range_is_an_error() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy(logits(2, 10, torch.float32), torch.tensor([1, 10]))


@pytest.mark.usefixtures("route")
def test_nothing_to_foresee_costs_nothing() -> None:
    assert cross_entropy(logits(0, 10, torch.float32), torch.zeros(0, dtype=torch.int64)).shape == (0,)
