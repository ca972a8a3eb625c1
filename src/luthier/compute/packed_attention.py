"""Attention on packed rows: each row attends to itself, rows of one length together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from luthier.compute.attention import Call
from luthier.compute.dropout import multipliers, seeds
from luthier.compute.kernels import kernel, memory
from luthier.compute.tape import Piece, Tape, Tensors, Wants

SHORT = 64  # tokens; rows up to here are attended in float32 whatever the products' type: torch's softmax is slower in bf16
_softmax_backward = torch.ops.aten._softmax_backward_data.default


class PackedAttention(Piece):
    """Queries, keys and values side by side (N, 3 d) -> what each token saw (N, d), or (B, d) of those alone that leave the block.

    As many heads of keys as of queries, and no rotary positions.
    """

    def __init__(self, call: Call):
        self.call = call

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        width = x.shape[1] // 3
        dropout = self.call.dropout if self.call.module.training else 0.0
        sources = _sources(x, width, tape)
        out = x.new_empty(len(sources[0]), width)
        for rows, length, places in _groups(tape):
            q, k, v = (one for source, (tokens, parts) in zip(sources, places, strict=True) for one in self._apart(source[tokens], rows, parts, _type(x, length)))
            across = _across(length)
            scores = torch.baddbmm(q.new_empty(()), *((k, q.mT) if across else (q, k.mT)), beta=0, alpha=self.call.scale)
            if self.call.causal and tape.tokens is None:
                later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
                scores.masked_fill_(later.T if across else later, torch.finfo(scores.dtype).min)
            weights = torch.softmax(scores, 1 if across else 2)
            factors = multipliers(weights, dropout) if dropout else None
            used = weights if factors is None else torch.mul(weights, factors, out=scores)
            self._together(((used.mT if across else used) @ v)[None], out[places[0][0]], rows)
            tape.keep(q, k, v, weights, factors)
        out[places[0][0].stop :] = 0  # spare tokens
        return out

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor, Tensors]:
        width = d.shape[1]
        d_x = d.new_empty(tape.packing.tokens, 3 * width)
        sources = [d_x] if tape.tokens is None else [torch.empty_like(d), d_x[:, width:]]
        for number, (rows, length, places) in enumerate(_groups(tape)):
            q, k, v, weights, factors = kept[5 * number : 5 * number + 5]
            assert q is not None and k is not None and v is not None and weights is not None
            (g,) = self._apart(d[places[0][0]], rows, 1, q.dtype)
            across = _across(length)
            found = [q.new_empty(3, *q.shape)] if tape.tokens is None else [q.new_empty(1, *q.shape), k.new_empty(2, *k.shape)]
            d_q, d_k, d_v = (one for some in found for one in some)
            used = weights if factors is None else weights * factors
            torch.bmm(used if across else used.mT, g, out=d_v)
            d_weights = v @ g.mT if across else g @ v.mT
            if factors is not None:
                d_weights.mul_(factors)
            d_scores = _softmax_backward(d_weights, weights, 1 if across else 2, weights.dtype).mul_(self.call.scale)
            torch.bmm(d_scores.mT if across else d_scores, k, out=d_q)
            torch.bmm(d_scores if across else d_scores.mT, q, out=d_k)
            for some, source, (tokens, _) in zip(found, sources, places, strict=True):
                self._together(some, source[tokens], rows)
        d_x[places[-1][0].stop :] = 0
        if tape.tokens is not None:
            d_x[:, :width] = 0
            d_x[tape.tokens, :width] = sources[0]
        return d_x, ()

    def _apart(self, x: Tensor, rows: int, parts: int, dtype: torch.dtype) -> Tensor:
        """(rows * t, parts * heads * k) -> (parts, rows * heads, t, k)"""
        heads = self.call.heads
        split = x.view(rows, -1, parts, heads, x.shape[1] // (parts * heads)).permute(2, 0, 3, 1, 4)
        return torch.empty(split.shape, dtype=dtype, device=x.device).copy_(split).flatten(1, 2)

    def _together(self, x: Tensor, out: Tensor, rows: int) -> None:
        """The reverse of `_apart`, into `out`"""
        parts, all_heads, length, width = x.shape
        heads = all_heads // rows
        out.view(rows, length, parts, heads, width).copy_(x.view(parts, rows, heads, length, width).permute(1, 3, 0, 2, 4))


class KernelAttention(Piece):
    """By one kernel each way, which keeps no weights. Groups of heads may share their keys and values, and rotary positions turn queries and keys first."""

    def __init__(self, call: Call, dtype: torch.dtype):
        self.call, self.dtype = call, dtype
        self._forward, self._backward = kernel("attention_forward", dtype), kernel("attention_backward", dtype)

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        assert self._forward
        call, turned = self.call, tape.turns[0].shape if tape.turns else None
        if x.dtype != self.dtype or x.shape[1] != (call.heads + 2 * call.groups) * call.width or turned not in (None, (len(x), call.width)):
            raise ValueError(f"attention of {call.heads} heads of {call.width} cannot read {x.dtype} {tuple(x.shape)}, turned by {turned}")
        rows, width = tape.packing.queries(tape.tokens), call.heads * call.width
        drops = seeds() if self.call.module.training and self.call.dropout else None
        out = x.new_zeros(len(rows), width) if tape.tokens is not None else x.new_empty(len(x), width)
        if tape.packing.spare and tape.tokens is None:
            out[-tape.packing.spare :] = 0
        normaliser = torch.empty(len(out), self.call.heads, dtype=torch.float32) if tape.flows else None
        self._forward(len(rows), memory(rows), *self._layout(tape), memory(x), memory(drops), self.call.dropout, memory(out), memory(normaliser))
        tape.keep(x, normaliser, drops, rows)
        return out

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor, Tensors]:
        x, normaliser, drops, rows = kept
        assert x is not None and rows is not None and self._backward
        d_x, d = torch.empty_like(x), d.to(x.dtype).contiguous()
        self._backward(
            len(x), len(rows), memory(rows), *self._layout(tape), memory(x), memory(d), memory(normaliser), memory(drops), self.call.dropout, memory(d_x),
        )  # fmt: skip
        return d_x, ()

    def _layout(self, tape: Tape) -> tuple[object, ...]:
        cosines, sines = tape.turns or (None, None)
        return self.call.heads, self.call.groups, self.call.width, self.call.causal, self.call.scale, memory(cosines), memory(sines)


def packed_attention(call: Call, turned: int, dtype: torch.dtype) -> Piece | None:
    """By the kernel where there is one for this type; None where nothing here can do it. turned: numbers of a head that rotary positions turn."""
    if kernel("attention_forward", dtype) and turned in (0, call.width):
        return KernelAttention(call, dtype)
    return PackedAttention(call) if call.groups == call.heads and not turned else None


def _sources(x: Tensor, width: int, tape: Tape) -> list[Tensor]:
    """All three parts, or queries of the tokens that leave the block and, of all, keys and values."""
    return [x] if tape.tokens is None else [x[tape.tokens, :width], x[:, width:]]


def _groups(tape: Tape) -> Iterator[tuple[int, int, list[tuple[slice, int]]]]:
    """Of rows of one length: how many, how long, and in each source the place of their tokens with the number of parts side by side."""
    row = 0
    for first, rows, length in tape.packing.groups:
        keys = slice(first, first + rows * length)
        yield rows, length, [(keys, 3)] if tape.tokens is None else [(slice(row, row + rows), 1), (keys, 2)]
        row += rows


def _type(x: Tensor, length: int) -> torch.dtype:
    """In which attention of this length is computed."""
    return torch.float32 if x.dtype == torch.bfloat16 and length <= SHORT else x.dtype


def _across(length: int) -> bool:
    """Whether keys come before queries: torch's softmax is faster across rows than along short ones that fill no vector register."""
    return length <= SHORT and length % 16 != 0
