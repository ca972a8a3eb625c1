"""AdamW as torch computes it, on the processor by a kernel that goes through memory once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.compute.kernels import kernel, memory

CAN_BE_NARROW = hasattr(torch.Tensor, "grad_dtype")  # whether this torch lets gradients be of another type than what they are of


class AdamW(torch.optim.AdamW):
    """Its state is torch's own, so that either can go on where the other stopped; a step's numbers differ in their last bits.

    A gradient of a matrix may be a sparse tensor of some of its rows, as those of embeddings can be. The step is that of the
    dense one with zeros elsewhere: all rows are decayed, and go on by their moments. Rows that never had a gradient have none,
    and those are not gone through. Dense gradients may be bfloat16.
    """

    def __init__(self, params: Iterable[Any], lr: float):
        super().__init__(params, lr=lr, fused=True)
        self._rows: dict[Tensor, tuple[Tensor, int, np.ndarray]] = {}  # what is known of the rows of a parameter, as long as its moments are these
        self._dense: dict[Tensor, Tensor] = {}  # memory for gradients that come sparse where no kernel takes them so

    @torch.no_grad()
    def norm(self) -> float:
        """Of all gradients together."""
        learning = self._learning()
        if run := _kernel("squares", learning):
            values = [_values(p.grad) for p in learning]
            total = np.zeros(1)
            arrays = [np.array([x.numel() for x in values], dtype=np.int64), _pointers(values), _narrow(values), total]  # which have to outlive the call
            run(len(values), *(x.ctypes.data for x in arrays))
            return math.sqrt(total.item())
        self._as_torch_takes_them(learning)
        return float(nn.utils.get_total_norm([p.grad for p in learning]))

    @torch.no_grad()
    def step(self, closure: None = None, *, scale: float = 1.0) -> None:  # type: ignore[override]
        """scale: what all gradients count for, as when they are clipped; they themselves may be left as they are"""
        learning = self._learning()
        if run := _kernel("adamw", learning):
            for group in self.param_groups:
                self._run(run, group, [p for p in group["params"] if p.grad is not None], scale)
            return
        self._as_torch_takes_them(learning)
        if scale != 1:
            torch._foreach_mul_([p.grad for p in learning], scale)  # type: ignore[attr-defined]
        super().step()

    def _learning(self) -> list[Any]:
        """The parameters with a gradient; each row of a sparse one is there once."""
        learning = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in learning:
            if p.grad.is_sparse:
                p.grad = p.grad.coalesce()
        return learning

    def _as_torch_takes_them(self, learning: list[Any]) -> None:
        """Make sparse gradients dense, in memory that is asked for once: the system takes so much back at once, and hands it out again page by page. And narrow ones wide."""
        for p in learning:
            if p.grad.is_sparse:
                if p not in self._dense:
                    self._dense[p] = torch.empty_like(p)
                p.grad = self._dense[p].zero_().index_copy_(0, p.grad.indices()[0], p.grad.values())
            elif p.grad.dtype != p.dtype:
                take_gradients_in(p, p.dtype)

    def _run(self, run: Callable[..., None], group: dict[str, Any], learning: Sequence[Tensor], scale: float) -> None:
        for p in learning:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states = [self.state[p] for p in learning]
        rows = [self._rows_of(p, state["exp_avg"]) for p, state in zip(learning, states, strict=True)]
        sizes = np.array([[len(known) for known in rows], [p.numel() // len(known) for p, known in zip(learning, rows, strict=True)]], dtype=np.int64)
        gradients = [_values(p.grad) for p in learning]
        tensors = [[_places(p.grad) for p in learning], *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))]
        arrays = [*sizes, _pointers(learning), _pointers(gradients), _narrow(gradients), *map(_pointers, tensors), np.array([known.ctypes.data for known in rows], dtype=np.int64)]
        run(len(learning), *(x.ctypes.data for x in arrays), group["lr"], group["weight_decay"], *group["betas"], group["eps"], scale)
        torch.autograd.graph.increment_version(learning)

    def _rows_of(self, p: Tensor, moments: Tensor) -> np.ndarray:
        """One number for each row: see the kernel. Moments that somebody else put there, or changed, are looked at anew."""
        known = self._rows.get(p)
        if known is None or known[0] is not moments or known[1] != moments._version:
            known = self._rows[p] = (moments, moments._version, np.zeros(len(p) if p.dim() > 1 else 1, np.uint8))
        return known[2]


def take_gradients_in(p: Tensor, dtype: torch.dtype) -> None:
    """From now on the gradients of `p` come in this type; one that is there is turned into it."""
    gradient, p.grad = p.grad, None
    p.grad_dtype = dtype  # type: ignore[attr-defined]
    p.grad = None if gradient is None else gradient.to(dtype)


def _kernel(name: str, learning: Sequence[Tensor]) -> Callable[..., None] | None:
    """The kernel of that name where it can take all of these parameters and their gradients."""
    return kernel(name, torch.float32) if all(_plain(p, torch.float32) and (p.grad.is_sparse or _plain(p.grad, torch.float32, torch.bfloat16)) for p in learning) else None  # type: ignore[union-attr, arg-type]


def _plain(x: Tensor, *types: torch.dtype) -> bool:
    return x.is_cpu and x.dtype in types and x.layout == torch.strided and x.is_contiguous() and x.numel() > 0


def _values(gradient: Any) -> Tensor:
    return gradient.values() if gradient.is_sparse else gradient  # type: ignore[no-any-return]


def _places(gradient: Any) -> Tensor | None:
    """(rows,): where among the values of a sparse gradient a row's own are; -1 where it has none."""
    if not gradient.is_sparse:
        return None
    places = torch.full((len(gradient),), -1, dtype=torch.int32)
    places[gradient.indices()[0]] = torch.arange(len(gradient.values()), dtype=torch.int32)
    return places


def _pointers(tensors: Sequence[Tensor | None]) -> np.ndarray:
    return np.array([memory(x) or 0 for x in tensors], dtype=np.int64)


def _narrow(gradients: Sequence[Tensor]) -> np.ndarray:
    return np.array([x.dtype == torch.bfloat16 for x in gradients], dtype=np.uint8)
