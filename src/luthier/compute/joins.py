"""Where a sublayer's answer joins what goes past it: their sum, and the norm that stands there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compute import kernels
from luthier.compute.dropout import seeds
from luthier.compute.kernels import memory
from luthier.compute.pieces import LayerNorm, RMSNorm, local
from luthier.compute.tape import Given, Piece, Tape, Tensors, Wants

Both = tuple[Tensor, Tensor]
Gradients = tuple[Tensor | None, Tensor | None]


class Join:
    """(x, y) -> (x', h): x' = x + after(y) goes past the next sublayer, which reads h = norm(x').

    y         None: nothing joins yet
    after     what y goes through before: dropout, scales
    norm      None: h is x'
    replaces  whether h also goes past the next sublayer in the place of x', as in blocks whose norms come last
    """

    def __init__(self, after: Sequence[Piece], norm: Piece | None, replaces: bool):
        self.after, self.norm, self.replaces = list(after), norm, replaces
        self.pieces = [*self.after, *([norm] if norm else [])]

    def forward(self, x: Tensor, y: Tensor | None, tape: Tape) -> Both:
        for piece in self.after:
            y = tape.run(piece, y)
        total = x if y is None else x + y
        if self.norm is None:
            return total, total
        h = tape.run(self.norm, total)
        return (h if self.replaces else total), h

    def backward(self, d_x: Tensor, d_h: Tensor | None, tape: Tape) -> Gradients:
        """Gradients of x and y from those of x' and h (None: nobody read it); None where nothing that learns is below."""
        if self.norm is None:
            d: Tensor | None = _sum(d_x, d_h)
        elif self.replaces:
            d = tape.back(self.norm, _sum(d_x, d_h))
        else:
            d_normed = tape.back(self.norm, d_h)
            d = None if d_normed is None else d_x + d_normed
        d_y = d
        for piece in reversed(self.after):
            if d_y is not None:
                d_y = tape.back(piece, d_y)
        return d, d_y


class KernelJoin(Join):
    """In one pass over memory each way, for which the backward pass makes dropout's mask again. What goes past is float32.

    dtype  of y and h
    first  whether there is no y
    last   whether nobody reads h
    """

    def __init__(self, dropout: nn.Dropout | None, norm: LayerNorm | RMSNorm | None, replaces: bool, dtype: torch.dtype, first: bool, last: bool):
        self.piece = _Joined(dropout, norm, replaces, dtype, first, last)
        self.pieces = [self.piece]

    def forward(self, x: Tensor, y: Tensor | None, tape: Tape) -> Both:
        return tape.run(self.piece, (x, y))  # type: ignore[no-any-return]

    def backward(self, d_x: Tensor, d_h: Tensor | None, tape: Tape) -> Gradients:
        return tape.back(self.piece, (d_x, d_h)) or (None, None)


class _Joined(Piece):
    def __init__(self, dropout: nn.Dropout | None, norm: LayerNorm | RMSNorm | None, replaces: bool, dtype: torch.dtype, first: bool, last: bool):
        self.dropout, self.norm, self.replaces, self.dtype, self.first, self.last = dropout, norm, replaces, dtype, first, last
        self._forward, self._backward = kernels.kernel("join_forward", dtype), kernels.kernel("join_backward", dtype)

    def tensors(self, given: Given) -> Tensors:
        return (self.norm.module.weight, getattr(self.norm.module, "bias", None)) if self.norm is not None else (None, None)  # type: ignore[return-value]

    def forward(self, x: Any, tensors: Tensors, wants: Wants, tape: Tape) -> Both:
        x, y = x
        assert self._forward
        rows, width = x.shape
        x, y = x.to(torch.float32).contiguous(), None if y is None else y.to(self.dtype).contiguous()
        drops = None if y is None or self.dropout is None or not (self.dropout.training and self.dropout.p) else seeds()
        normed = self.norm is not None
        out = torch.empty_like(x) if normed and (self.replaces or self.dtype == torch.float32) else None
        copy = torch.empty(rows, width, dtype=self.dtype) if normed and self.dtype != torch.float32 and not self.last else None
        total = None if y is None or (self.replaces and not tape.flows) else torch.empty_like(x)
        mean, inverse = torch.empty(2, rows, dtype=torch.float32) if normed and tape.flows else (None, None)
        if normed or y is not None:
            self._forward(
                rows, width, memory(x), memory(y), memory(drops), self._p, *map(memory, tensors), self.norm.eps if self.norm is not None else 0,
                isinstance(self.norm, LayerNorm), memory(total), memory(out), memory(copy), memory(mean), memory(inverse),
            )  # fmt: skip
        if total is None:
            total = x if y is None else out
        assert total is not None
        tape.keep(drops, total if normed else None, mean, inverse)
        h = copy if copy is not None else out if out is not None else total
        return (out if normed and self.replaces else total), h  # type: ignore[return-value]

    def backward(self, d: Any, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Any, Tensors]:
        d_x, d_h = d
        drops, total, mean, inverse = kept
        assert self._backward
        rows, width = d_x.shape
        past = d_x.to(torch.float32).contiguous()
        read = None if d_h is None else d_h.to(self.dtype).contiguous()
        d_weight, d_bias = (torch.empty(width, dtype=torch.float32) if wanted else None for wanted in wants[1:])
        d_x = torch.empty_like(past) if wants[0] else None
        d_y = torch.empty(rows, width, dtype=self.dtype) if wants[0] and not self.first and (drops is not None or self.dtype != torch.float32) else None
        self._backward(
            rows, width, memory(None if self.replaces else past), memory(past if self.replaces else None), memory(read), memory(total), memory(mean), memory(inverse), memory(tensors[0]),
            isinstance(self.norm, LayerNorm), memory(drops), self._p, memory(d_x), memory(d_y), memory(d_weight), memory(d_bias),
        )  # fmt: skip
        return (None if d_x is None else (d_x, d_x if d_y is None else d_y)), (d_weight, d_bias)

    @property
    def _p(self) -> float:
        return self.dropout.p if self.dropout is not None else 0.0


def join(after: Sequence[nn.Module], norm: nn.Module | None, replaces: bool, dtype: torch.dtype, first: bool = False, last: bool = False) -> Join:
    """By the kernel where it can do what these modules do. dtype: of the products; first: whether there is no y; last: whether nobody reads h."""
    parts = [local(module) for module in after]
    normed = local(norm) if norm is not None else None
    plain = not after or [type(module) for module in after] == [nn.Dropout]
    known = normed is None or (isinstance(normed, LayerNorm | RMSNorm) and normed.module.weight.dtype == torch.float32)  # type: ignore[union-attr]
    if plain and known and kernels.kernel("join_forward", dtype):
        return KernelJoin(after[0] if after else None, normed, replaces and normed is not None, dtype, first, last)  # type: ignore[arg-type]
    return Join(parts, normed, replaces)


def _sum(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b
