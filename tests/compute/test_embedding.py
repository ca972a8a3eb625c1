"""Gradients of large tables: those of stock torch, in memory that is used again only when nobody holds it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luthier.compute import embedding
from luthier.compute.embedding import Table, fits


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "LARGE", 0)


def grown(table: Table | nn.Embedding, weight: nn.Parameter, steps: int, held: bool) -> list[torch.Tensor]:
    """The gradients of some steps; held: by somebody, beyond the end of their step"""
    kept, found, rng = [], [], torch.Generator().manual_seed(0)
    for _ in range(steps):
        for _ in range(2):  # batches of a step
            ids = torch.randint(0, 7, (3, 5), generator=rng)
            (table(ids) * torch.randn(3, 5, 4, generator=rng)).sum().backward()
        assert weight.grad is not None
        weight.grad.mul_(0.5)  # as clipping does
        found.append(weight.grad.clone())
        kept += [weight.grad] if held else []
        weight.grad = None
    return kept or found


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
def test_gradients_are_those_of_stock_torch(padding: int | None, held: bool) -> None:
    module = nn.Embedding(50, 4, padding_idx=padding)
    assert fits(module)
    expected = grown(module, module.weight, 4, held)
    table = Table(module)
    torch.testing.assert_close(grown(table, module.weight, 4, held), expected)


def test_memory_is_used_again() -> None:
    module = nn.Embedding(50, 4)
    table, places = Table(module), set()
    for _ in range(3):
        table(torch.tensor([1, 2])).sum().backward()
        assert module.weight.grad is not None
        places.add(module.weight.grad.data_ptr())
        module.weight.grad = None
    assert len(places) == 1


def test_a_tied_table_gets_both_gradients() -> None:
    module, ids = nn.Embedding(9, 4), torch.tensor([[1, 2, 2]])
    found = []
    for look in (module, Table(module)):
        for _ in range(2):
            module.weight.grad = None
            (look(ids) @ module.weight.T).pow(2).sum().backward()
        assert module.weight.grad is not None
        found.append(module.weight.grad)
    torch.testing.assert_close(found[1], found[0])


def test_what_is_otherwise_stays_as_it_is() -> None:
    assert not fits(nn.Embedding(9, 4, sparse=True)) and not fits(nn.Embedding(9, 4, max_norm=1.0)) and not fits(nn.Embedding(9, 4).double())
    assert not fits(nn.Embedding(9, 4).requires_grad_(False)) and not fits(nn.Linear(4, 9))
