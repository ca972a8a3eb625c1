"""Stock linear layers under bf16 and int8: what is frozen is cast or rounded once for a run; under bf16 an input that several layers read is cast once for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.compute import int8
from luthier.compute.kernels import kernel
from luthier.methods.changes import Changed, site_weight, stock_class

SMALL = 32  # rows or columns of a weight: products of fewer are no faster in whole numbers


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


def inner_linears(model: nn.Module) -> list[nn.Module]:
    """Linear layers in stacks of blocks, where the work is; heads and poolers decide more than they cost."""
    inside = dict.fromkeys(m for blocks in model.modules() if isinstance(blocks, nn.ModuleList) for m in blocks.modules())
    return [m for m in inside if stock_class(m) in (nn.Linear, Conv1D) and min(m.weight.shape) >= SMALL]  # type: ignore[arg-type, type-var]


def place(module: nn.Module) -> str:
    """The attribute under which a module's unchanged forward can be replaced."""
    return "unchanged" if isinstance(module, Changed) else "forward"


def in_bf16(module: nn.Module, cast: Cast) -> Callable[[Tensor], Tensor]:
    """The module's own forward with a copy of its weights in bf16."""
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    weight = site_weight(module, None).detach().to(torch.bfloat16)
    return functools.partial(_forward, weight, None if bias is None else bias.detach().to(torch.bfloat16), cast)


def in_int8(module: nn.Module) -> Callable[..., Tensor]:
    """The module's own forward with its weights rounded."""
    product = int8.Product(site_weight(module, None), module.bias, kernel)  # type: ignore[arg-type]
    return lambda x, *_: product(x)


def _forward(weight: Tensor, bias: Tensor | None, cast: Cast, x: Tensor, *_: Any) -> Tensor:
    return nn.functional.linear(cast(x), weight, bias)
