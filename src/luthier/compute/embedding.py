"""Large tables of embeddings that learn: their gradients are dense, and their memory is asked for once instead of anew in every step."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LARGE = 1 << 22  # elements: from about here on the system takes such memory back at once, and hands it out again page by page


class Table:
    """The forward function of an embedding layer, as stock torch computes it."""

    def __init__(self, module: nn.Embedding):
        self.module = module
        self.memory: np.ndarray | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        weight = self.module.weight
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return nn.functional.embedding(ids, weight)
        return _Look.apply(self, weight, ids)  # type: ignore[no-any-return]

    def zeros(self, like: Tensor) -> Tensor:
        """In the memory of the last step's gradient, unless somebody still holds it."""
        if self.memory is None or sys.getrefcount(self.memory) > 2:  # ours, and that of this call
            self.memory = np.empty(like.shape, np.float32)
        return torch.from_numpy(self.memory).zero_()


class _Look(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Table, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table, ctx.weight = table, weight
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        ids, d = ids.flatten(), d.flatten(0, -2).to(torch.float32)
        if (padding := ctx.table.module.padding_idx) is not None:
            d = d.masked_fill((ids == padding).unsqueeze(1), 0)
        return None, ctx.table.zeros(ctx.weight).index_add_(0, ids, d), None


def fits(module: nn.Module) -> bool:
    """Whether `Table` computes what this layer does, and whether that pays."""
    return (
        type(module) is nn.Embedding and module.weight.requires_grad and module.weight.dtype == torch.float32 and module.weight.numel() >= LARGE
        and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    )  # fmt: skip
