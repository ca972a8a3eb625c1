"""Stock linear layers under bf16: what is frozen is cast once for a run, and an input that several layers read is cast once for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.methods.changes import Changed, site_weight, stock_class


class Cast:
    """x in bf16; the last x is remembered, as query, key and value read the same."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Any, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            return x
        # a result holds for these numbers (tensors count their changes in place) and for this need of a history
        state = (x.requires_grad and torch.is_grad_enabled(), None if x.is_inference() else x._version)
        if self.last is None or self.last[0] is not x or self.last[1] != state:
            self.last = (x, state, x.to(torch.bfloat16))
        return self.last[2]

    def forget(self) -> None:
        self.last = None


def frozen_linears(model: nn.Module) -> list[nn.Module]:
    """Linear layers whose own weight and bias do not learn; changes that methods made to them are not part of them."""
    return [m for m in model.modules() if stock_class(m) in (nn.Linear, Conv1D) and not any(p.requires_grad for p in (m.weight, m.bias) if p is not None)]  # type: ignore[union-attr]


def place(module: nn.Module) -> str:
    """The attribute under which a module's unchanged forward can be replaced."""
    return "unchanged" if isinstance(module, Changed) else "forward"


def in_bf16(module: nn.Module, cast: Cast) -> Callable[[Tensor], Tensor]:
    """The module's own forward with a copy of its weights in bf16."""
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    weight = site_weight(module, None).detach().to(torch.bfloat16)
    return functools.partial(_forward, weight, None if bias is None else bias.detach().to(torch.bfloat16), cast)


def _forward(weight: Tensor, bias: Tensor | None, cast: Cast, x: Tensor, *_: Any) -> Tensor:
    return nn.functional.linear(cast(x), weight, bias)
