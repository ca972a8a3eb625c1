"""AdamW as torch computes it, on the processor by a kernel that goes through memory once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.compute.kernels import kernel, memory


class AdamW(torch.optim.AdamW):
    """Its state is torch's own, so that either can go on where the other stopped; a step's numbers differ in their last bits.

    A row of a matrix that never had a gradient (in a table of embeddings, a word that did not come yet) has moments of 0.
    It is decayed, as torch does, but its moments are not gone through.
    """

    def __init__(self, params: Iterable[Any], lr: float):
        super().__init__(params, lr=lr, fused=True)
        self._rows: dict[Tensor, tuple[Tensor, int, np.ndarray]] = {}  # what is known of the rows of a parameter, as long as its moments are these

    @torch.no_grad()
    def norm(self) -> float:
        """Of all gradients together."""
        gradients = [p.grad for p in self._learning()]
        if (run := kernel("squares", torch.float32)) and all(map(_plain, gradients)):
            sizes, total = np.array([x.numel() for x in gradients], dtype=np.int64), np.zeros(1)
            run(len(gradients), sizes.ctypes.data, _pointers(gradients).ctypes.data, total.ctypes.data)
            return math.sqrt(total.item())
        return float(nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def step(self, closure: None = None, *, scale: float = 1.0) -> None:  # type: ignore[override]
        """scale: what all gradients count for, as when they are clipped; they themselves may be left as they are"""
        run = kernel("adamw", torch.float32)
        if run and all(_plain(p) and _plain(p.grad) for p in self._learning()):
            for group in self.param_groups:
                self._run(run, group, [p for p in group["params"] if p.grad is not None], scale)
            return
        if scale != 1:
            torch._foreach_mul_([p.grad for p in self._learning()], scale)  # type: ignore[attr-defined]
        super().step()

    def _learning(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _run(self, run: Callable[..., None], group: dict[str, Any], learning: Sequence[Tensor], scale: float) -> None:
        for p in learning:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states = [self.state[p] for p in learning]
        rows = [self._rows_of(p, state["exp_avg"]) for p, state in zip(learning, states, strict=True)]
        sizes = np.array([[len(known) for known in rows], [p.numel() // len(known) for p, known in zip(learning, rows, strict=True)]], dtype=np.int64)
        tensors = [learning, [p.grad for p in learning], *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))]
        arrays = [*sizes, *map(_pointers, tensors), np.array([known.ctypes.data for known in rows], dtype=np.int64)]
        run(len(learning), *(x.ctypes.data for x in arrays), group["lr"], group["weight_decay"], *group["betas"], group["eps"], scale)
        torch.autograd.graph.increment_version(learning)

    def _rows_of(self, p: Tensor, moments: Tensor) -> np.ndarray:
        """One number for each row: see the kernel. Moments that somebody else put there, or changed, are looked at anew."""
        known = self._rows.get(p)
        if known is None or known[0] is not moments or known[1] != moments._version:
            known = self._rows[p] = (moments, moments._version, np.zeros(len(p) if p.dim() > 1 else 1, np.uint8))
        return known[2]


def _plain(x: Tensor | None) -> bool:
    return x is not None and x.device.type == "cpu" and x.dtype == torch.float32 and x.layout == torch.strided and x.is_contiguous() and x.numel() > 0


def _pointers(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([memory(x) for x in tensors], dtype=np.int64)
