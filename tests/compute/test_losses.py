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
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("overwrite", [False, True])
def test_rows_without_a_label_count_for_nothing(overwrite: bool, factor: float, dtype: torch.dtype) -> None:
    """Whether or not the gradient takes the memory of the logits, and whatever was in it."""
    x, labels = logits(7, 37, dtype), torch.tensor([3, 0, 36, 36])
    x[5] = math.nan
    own = x.clone().requires_grad_()
    answer = own * 1
    found = cross_entropy(answer, labels, overwrite)
    (found.sum() * factor).backward()
    expected = x[:4].double().requires_grad_()
    reference = nn.functional.cross_entropy(expected, labels, reduction="none")
    (reference.sum() * factor).backward()
    torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-5)
    assert own.grad is not None and expected.grad is not None and not own.grad[4:].any()
    torch.testing.assert_close(own.grad[:4].double(), expected.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.skipif(losses.kernel("cross_entropy", torch.float32) is None, reason="no kernels on this machine")
def test_overwritten_logits_cannot_be_read_by_a_backward_pass() -> None:
    x = logits(3, 20, torch.float32).requires_grad_()
    answer = x.tanh()  # whose gradient needs what it answered
    cross_entropy(answer, torch.tensor([0, 1, 2]), overwrite=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        answer.sum().backward()


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
