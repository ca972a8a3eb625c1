"""The trial finds wrong numbers, and counts its products rightly."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from luthier.machine import trial


def test_right_numbers_pass() -> None:
    assert trial.wrong_products(torch.float32) == "" and trial.wrong_training(torch.float32) == ""


def test_wrong_products_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, w: right(x, w) * (1.001 if x.dtype == torch.float32 else 1))
    assert "a product is wrong" in trial.wrong_products(torch.float32)
    assert "encoder block is wrong" in trial.wrong_training(torch.float32)


def test_numbers_that_are_not_finite_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda q, k, v, attn_mask: right(q, k, v, attn_mask) * (torch.nan if q.dtype == torch.float32 else 1))
    assert "encoder block is wrong" in trial.wrong_training(torch.float32)


def test_int8_passes_and_sums_that_overflow_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = trial._int8()
    assert int8.exists and trial.wrong_whole_products(int8) == ""
    right = int8.Product.__call__
    monkeypatch.setattr(int8.Product, "__call__", lambda self, x: right(self, x).clamp(max=1000))
    assert "a product is wrong" in trial.wrong_whole_products(int8)


def test_padding_changes_no_gradient() -> None:
    """The work that is timed is training as it is: what stands behind a row's end has no part in it."""
    torch.manual_seed(0)
    x, weights = torch.randn(2, 9, 64, dtype=torch.float64), [w.double() for w in trial.block_weights(64)]
    keep = torch.arange(9) < torch.tensor([[9], [4]])
    other = torch.where(keep[:, :, None], x, 7.0)
    for got, want in zip(trial.training_step(other, weights, keep, torch.float32), trial.training_step(x, weights, keep, torch.float32), strict=True):
        torch.testing.assert_close(got, want)


def test_the_counted_products_are_those_that_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of one second a round, FLOP per second is FLOP: equal to torch's counter but for the input's gradient in the first block, which training has when more lies below."""
    counted = {}

    def count(work, clock=None) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        counted[len(counted)] = counter.get_total_flops()
        return 1.0

    threads = torch.get_num_threads()
    monkeypatch.setattr(trial, "fastest", count)
    found = trial.speeds(torch.float32)
    torch.set_num_threads(threads)
    assert found["linear"] == counted[0]
    assert 0.85 * found["training"] < counted[len(counted) - 1] <= found["training"]
