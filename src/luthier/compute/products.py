"""Linear layers in the type of the products: frozen weights are cast once for a run, layers that read the same input are one product, and a low-rank change is never multiplied out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd

from luthier.methods.changes import Changed, site_weight


class Linear:
    """x (N, in) -> (N, out): the outputs of `modules`, which read the same input, side by side.

    dtype     of the products; None: that of x
    learning  whether what is open for training changes from one call to the next
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype | None, learning: bool):
        self.modules, self.dtype, self.learning = list(modules), dtype, learning
        self.sizes = [len(site_weight(module, None)) for module in self.modules]
        own = [p for module in self.modules for p in (module.weight, module.bias) if p is not None]
        whole = [p for _, change in self._changes() if not change.is_low_rank for p in change.parameters()]
        self.changing = learning and any(p.requires_grad for p in (*own, *whole))  # type: ignore[union-attr]
        self.kept: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        dtype = self.dtype or x.dtype
        if self.kept is None and not self.changing:
            with torch.inference_mode(False), torch.no_grad():
                self.kept = self._weights(dtype)
        weight, bias = self.kept or self._weights(dtype)
        down, up = self._factors(dtype)
        return _Product.apply(x, weight, bias, down, up)  # type: ignore[no-any-return]

    def apart(self, count: int) -> tuple[Linear, Linear]:
        """The first `count` modules and the others, each for itself; both all of them where they cannot be parted."""
        first, others = self.modules[:count], self.modules[count:]
        return Linear(first, self.dtype, self.learning), Linear(others or first, self.dtype, self.learning)

    def _changes(self) -> list[tuple[int, Any]]:
        """(first row among all outputs, change)"""
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        return [(start + (change.rows.start if change.rows else 0), change) for start, module in zip(starts, self.modules, strict=True) if isinstance(module, Changed) for change in module.changes()]

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        weights = []
        for module in self.modules:
            weight = site_weight(module, None)
            for change in module.changes() if isinstance(module, Changed) else ():
                if not change.is_low_rank:
                    rows = change.rows or slice(0, len(weight))
                    changed = change.method.effective(weight[rows], change.cast(weight))
                    weight = torch.cat([weight[: rows.start], changed, weight[rows.stop :]]) if change.rows else changed
            weights.append(weight.to(dtype))
        biases = [module.bias for module in self.modules]
        if all(bias is None for bias in biases):
            bias = None
        else:
            bias = _joined([weight.new_zeros(len(weight)) if bias is None else bias.to(dtype) for weight, bias in zip(weights, biases, strict=True)])  # type: ignore[union-attr]
        return _joined(weights), bias

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """(R, in) and (out, R) of all low-rank changes together: x @ down^T @ up^T is their sum."""
        found = [(start, *change.method.factors(change)) for start, change in self._changes() if change.is_low_rank]
        if not found:
            return None, None
        total = sum(self.sizes)
        exact = torch.promote_types(dtype, torch.float32)
        columns = [nn.functional.pad(b.to(exact) * scale, (0, 0, start, total - start - len(b))) for start, _, b, scale in found]
        return _joined([a for _, a, _, _ in found]).to(dtype), torch.cat(columns, dim=1).to(dtype)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class _Product(torch.autograd.Function):
    """x @ weight^T + bias + (x @ down^T) @ up^T in the type of `weight`; only what learns gets a gradient product."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None) -> Tensor:
        read = x.to(weight.dtype)
        y = nn.functional.linear(read, weight, bias)
        low = None
        if down is not None and up is not None:
            low = nn.functional.linear(read, down)
            y.addmm_(low, up.T)
        wants = ctx.needs_input_grad
        ctx.save_for_backward(read if wants[1] or wants[3] else None, weight if wants[0] else None, low if wants[4] else None, down if wants[0] else None, up)
        ctx.type = x.dtype
        return y

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        read, weight, low, down, up = ctx.saved_tensors
        wants = ctx.needs_input_grad
        d_low = gradient @ up if wants[3] or (wants[0] and down is not None) else None
        d_x = None
        if wants[0]:
            d_x = gradient @ weight
            if d_low is not None:
                d_x.addmm_(d_low, down)
            d_x = d_x.to(ctx.type)
        d_weight = gradient.T @ read if wants[1] else None
        d_bias = gradient.sum(0) if wants[2] else None
        d_down = d_low.T @ read if wants[3] else None  # type: ignore[union-attr]
        d_up = gradient.T @ low if wants[4] else None
        return d_x, d_weight, d_bias, d_down, d_up
