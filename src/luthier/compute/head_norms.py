"""Norms of each head's queries and keys, between their products and attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.compute.attention import Call
from luthier.compute.kernels import kernel, memory
from luthier.compute.pieces import RMSNorm, local
from luthier.compute.tape import Given, Piece, Tape, Tensors, Wants


class HeadNorms(Piece):
    """Queries, keys and values side by side (N, (heads + 2 groups) k) -> the same, each head of queries and keys by its norm; by a kernel each way."""

    def __init__(self, call: Call, query: RMSNorm, key: RMSNorm, dtype: torch.dtype):
        self.layout, self.weights, self.eps = (call.heads, call.groups, call.width), (query.module.weight, key.module.weight), query.eps
        self._forward, self._backward = kernel("head_norms_forward", dtype), kernel("head_norms_backward", dtype)

    def tensors(self, given: Given) -> Tensors:
        return self.weights  # type: ignore[return-value]

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        assert self._forward
        heads, groups, _ = self.layout
        y, inverse = torch.empty_like(x), torch.empty(len(x), heads + groups, dtype=torch.float32) if tape.flows else None
        self._forward(len(x), *self.layout, memory(x), *map(memory, tensors), self.eps, memory(y), memory(inverse))
        tape.keep(x, inverse)
        return y

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        x, inverse = kept
        assert x is not None and self._backward
        d, d_x = d.to(x.dtype).contiguous(), torch.empty_like(x) if wants[0] else None
        d_weights = tuple(torch.empty_like(weight) if wanted else None for weight, wanted in zip(tensors, wants[1:], strict=True))  # type: ignore[arg-type]
        self._backward(len(x), *self.layout, memory(d), memory(x), memory(inverse), *map(memory, (*tensors, d_x, *d_weights)))
        return d_x, d_weights


def head_norms(call: Call, query: nn.Module, key: nn.Module, dtype: torch.dtype) -> Piece | None:
    """None where the kernel cannot do what these modules do."""
    own = [local(module) for module in (query, key)]
    alike = all(isinstance(norm, RMSNorm) and norm.eps == own[0].eps and norm.module.weight.shape == (call.width,) and norm.module.weight.dtype == torch.float32 for norm in own)  # type: ignore[attr-defined, union-attr]
    return HeadNorms(call, *own, dtype) if alike and kernel("head_norms_forward", dtype) else None  # type: ignore[arg-type]
