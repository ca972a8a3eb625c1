"""The optimiser against torch's own in float64: whole and half-empty tables, vectors, two groups, a scale; and each taking over from the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from luthier.compute import adamw
from luthier.compute.adamw import CAN_BE_NARROW, AdamW

ROUTED = (adamw, "adamw")
SHAPES = [(300, 48), (7, 5, 3), (33,), (1,), (20, 1000)]
LR = 1e-2


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in SHAPES]


def groups(own: list[nn.Parameter]) -> list[dict]:
    return [{"params": own[:2] + own[4:], "weight_decay": 0.1}, {"params": own[2:4], "weight_decay": 0.0}]


def gradients(step: int) -> list[Tensor | None]:
    """Few rows of the first have one, others later; the last has none at first."""
    rng = torch.Generator().manual_seed(step + 1)
    found: list[Tensor | None] = [torch.randn(shape, generator=rng) * 10.0 ** -(i % 3) for i, shape in enumerate(SHAPES)]
    assert found[0] is not None
    found[0][(step + 1) * 10 :] = 0
    if step < 2:
        found[4] = None
    return found


def give(own: list[nn.Parameter], step: int) -> None:
    for p, d in zip(own, gradients(step), strict=True):
        p.grad = None if d is None else d.to(p.dtype)


def stepped(own: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range, scale: float) -> None:
    for step in steps:
        give(own, step)
        if isinstance(optimizer, AdamW):
            optimizer.step(scale=scale)
            continue
        for p in own:
            if p.grad is not None:
                p.grad *= scale
        optimizer.step()


def reference(steps: int, scale: float) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    own = parameters(torch.float64)
    optimizer = torch.optim.AdamW(groups(own), lr=LR)
    stepped(own, optimizer, range(steps), scale)
    return own, optimizer


def same(found: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_steps_are_those_of_torch(scale: float) -> None:
    own = parameters()
    optimizer = AdamW(groups(own), lr=LR)
    stepped(own, optimizer, range(8), scale)
    expected, other = reference(8, scale)
    same(own, expected)
    for p, q in zip(own, expected, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name in optimizer.state[p]:
            torch.testing.assert_close(optimizer.state[p][name].double(), other.state[q][name].double(), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("order", [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_either_goes_on_where_the_other_stopped(order: tuple[type, type]) -> None:
    own = parameters()
    first = order[0](groups(own), lr=LR)
    stepped(own, first, range(3), 1.0)
    second = order[1](groups(own), lr=LR)
    second.load_state_dict(first.state_dict())
    stepped(own, second, range(3, 8), 1.0)
    same(own, reference(8, 1.0)[0])


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_gradients_of_some_rows_are_dense_ones_with_zeros(scale: float, tied: bool) -> None:
    """Of words that come several times, in several batches of a step, in other steps not at all; and of a table that also is the head."""
    start = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for sparse in (True, False):
        rng = torch.Generator().manual_seed(1)
        table = nn.Parameter(start.clone() if sparse else start.double())
        other = nn.Parameter(table.detach()[:6].clone())
        optimizer = AdamW([table, other], lr=LR) if sparse else torch.optim.AdamW([table, other], lr=LR)
        for step in range(6):
            for _ in range(2):
                ids = torch.randint(0, 5 + 8 * (step % 3), (3, 4), generator=rng)
                x = nn.functional.embedding(ids, table, padding_idx=3, sparse=sparse) @ other
                (x @ table.T if tied else x).sin().sum().backward()
            assert table.grad is not None and table.grad.is_sparse == (sparse and not tied)
            dense = [p.grad.to_dense() for p in (table, other) if p.grad is not None]
            if isinstance(optimizer, AdamW):
                assert optimizer.norm() == pytest.approx(float(nn.utils.get_total_norm(dense)), rel=1e-5)
                optimizer.step(scale=scale)
            else:
                table.grad, other.grad = (x * scale for x in dense)
                optimizer.step()
            optimizer.zero_grad()
        found.append([table.detach().double(), other.detach().double()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not CAN_BE_NARROW, reason="a torch without Tensor.grad_dtype")
@pytest.mark.usefixtures("route")
def test_gradients_in_bf16_are_those_numbers() -> None:
    own, expected = parameters(), parameters(torch.float64)
    optimizer, other = AdamW(groups(own), lr=LR), torch.optim.AdamW(groups(expected), lr=LR)
    for p in own[::2]:
        p.grad_dtype = torch.bfloat16  # type: ignore[attr-defined]
    for step in range(5):
        for p, q, d in zip(own, expected, gradients(step), strict=True):
            p.grad = None if d is None else d.to(p.grad_dtype)  # type: ignore[attr-defined]
            q.grad = None if p.grad is None else p.grad.double() * 0.3
        assert optimizer.norm() * 0.3 == pytest.approx(float(nn.utils.get_total_norm([q.grad for q in expected if q.grad is not None])), rel=1e-5)
        optimizer.step(scale=0.3)
        other.step()
    same(own, expected)


def test_moments_that_somebody_changes_count() -> None:
    """A row at rest is known to be so for as long as its moments stay."""
    own, expected = parameters(), parameters(torch.float64)
    both = [(own, AdamW(groups(own), lr=LR)), (expected, torch.optim.AdamW(groups(expected), lr=LR))]
    for tensors, optimizer in both:
        stepped(tensors, optimizer, range(2), 1.0)
        optimizer.state[tensors[0]]["exp_avg"][250:] += 0.5
        optimizer.state[tensors[0]]["exp_avg_sq"][250:] += 0.5
        stepped(tensors, optimizer, range(2, 4), 1.0)
    same(own, expected)


@pytest.mark.usefixtures("route")
def test_the_norm_is_that_of_all_gradients() -> None:
    own = parameters()
    optimizer = AdamW(groups(own), lr=LR)
    assert optimizer.norm() == 0
    give(own, 3)
    assert optimizer.norm() == pytest.approx(float(nn.utils.get_total_norm([p.grad.double() for p in own if p.grad is not None])), rel=1e-6)
    own[2].grad[5] = math.nan  # type: ignore[index]
    assert math.isnan(optimizer.norm())


@pytest.mark.skipif(adamw.kernel("adamw", torch.float32) is None, reason="no kernels on this machine")
def test_of_many_parameters_too() -> None:
    """More than a small array holds."""
    own = [nn.Parameter(torch.full((3,), 1.0)) for _ in range(3000)]
    for number, p in enumerate(own):
        p.grad = torch.full((3,), float(number % 7))
    optimizer = AdamW(own, lr=LR)
    expected = math.sqrt(sum(3 * (number % 7) ** 2 for number in range(3000)))
    assert all(math.isclose(optimizer.norm(), expected, rel_tol=1e-6) for _ in range(20))
    optimizer.step()
    assert len({float(p[0]) for p in own}) <= 7


def test_a_step_is_seen_by_autograd() -> None:
    """A backward pass through numbers that have changed since is an error."""
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = AdamW([weight], lr=LR)
    loss = (weight**2).sum()
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
