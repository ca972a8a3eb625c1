"""Attention on packed rows: each row attends to itself, rows of one length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from luthier.compute.attention import Call
from luthier.compute.dropout import multipliers, seeds
from luthier.compute.fused import Fused
from luthier.compute.kernels import LANES, kernel, memory, strided
from luthier.compute.tape import Given, Piece, Tape, Tensors, Wants

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
            if self.call.causal and tape.given.tokens is None:
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
        d_x = d.new_empty(tape.given.packing.tokens, 3 * width)
        sources = [d_x] if tape.given.tokens is None else [torch.empty_like(d), d_x[:, width:]]
        for number, (rows, length, places) in enumerate(_groups(tape)):
            q, k, v, weights, factors = kept[5 * number : 5 * number + 5]
            assert q is not None and k is not None and v is not None and weights is not None
            (g,) = self._apart(d[places[0][0]], rows, 1, q.dtype)
            across = _across(length)
            found = [q.new_empty(3, *q.shape)] if tape.given.tokens is None else [q.new_empty(1, *q.shape), k.new_empty(2, *k.shape)]
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
        if tape.given.tokens is not None:
            d_x[:, :width] = 0
            d_x[tape.given.tokens, :width] = sources[0]
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
    """By one kernel each way, which keeps no weights. Groups of heads may share their keys and values, rotary positions turn queries and keys first, and what belongs to the distance of two tokens is added to their score.

    memory  what makes keys and values of another stack's tokens, where x are queries alone (cross attention)
    """

    def __init__(self, call: Call, dtype: torch.dtype, memory: Fused | None = None):
        self.call, self.dtype, self.memory = call, dtype, memory
        self._forward, self._backward = kernel("attention_forward", dtype), kernel("attention_backward", dtype)

    def tensors(self, given: Given) -> Tensors:
        """Keys and values of another stack, what is added for distances."""
        if self.memory is None:
            return None, given.distances
        assert given.encoded is not None
        return self.memory(given.encoded, given), None

    def parts(self) -> Sequence[Piece]:
        return self, *(self.memory.parts if self.memory else ())

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        assert self._forward
        call, given = self.call, tape.given
        self._check(x, tensors, given)
        rows = given.queries if tensors[0] is None else given.crossing
        drops = seeds() if call.module.training and call.dropout else None
        alone = given.tokens is not None
        out = _ending(x.new_empty(len(rows) if alone else len(x), call.heads * call.width), 0 if alone else given.packing.spare)
        normaliser = torch.empty(len(out), call.heads, dtype=torch.float32) if tape.flows else None
        self._forward(len(rows), memory(rows), *self._layout(x, tensors, given), memory(drops), call.dropout, memory(out), memory(normaliser))
        tape.keep(x, normaliser, drops, rows)
        return out

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        x, normaliser, drops, rows = kept
        assert x is not None and rows is not None and self._backward
        given, (others, distances) = tape.given, tensors
        alone, d = given.tokens is not None, d.to(x.dtype).contiguous()
        d_x = _ending(torch.empty_like(x), 0 if alone and others is not None else given.packing.spare)
        d_others = None if others is None else _ending(torch.empty_like(others), given.encoded_by.spare)  # type: ignore[union-attr]
        d_queries, d_keys = self._sides(d_x, d_others)
        if alone and others is None:  # all other tokens asked nothing
            d_queries.zero_()
        d_distances = distances.new_zeros(len(rows), *distances.shape) if distances is not None and wants[2] else None  # of each row, as rows go by in several threads
        self._backward(
            len(rows), memory(rows), *self._layout(x, tensors, given), memory(drops), self.call.dropout, memory(d), memory(normaliser),
            d_queries.data_ptr(), d_keys.data_ptr(), memory(d_distances),
        )  # fmt: skip
        return (d_x if wants[0] else None), (d_others, None if d_distances is None else d_distances.sum(0))

    def _sides(self, x: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries, and keys with values"""
        own = self.call.heads * self.call.width
        return (x[:, :own], x[:, own:]) if others is None else (x, others)

    def _layout(self, x: Tensor, tensors: Tensors, given: Given) -> tuple[object, ...]:
        call, (others, distances) = self.call, tensors
        cosines, sines = (given.turns if others is None else None) or (None, None)
        reach = 0 if distances is None else self._reach(distances)
        queries, keys = self._sides(x, others)
        return call.heads, call.groups, call.width, call.causal, call.scale, memory(cosines), memory(sines), reach, memory(distances), *strided(queries), *strided(keys)

    def _reach(self, distances: Tensor) -> int:
        return (distances.shape[1] + 1 - LANES) // 2

    def _check(self, x: Tensor, tensors: Tensors, given: Given) -> None:
        """A kernel reads memory as it is told."""
        call, (others, distances) = self.call, tensors
        own, both = call.heads * call.width, 2 * call.groups * call.width
        turned = given.turns[0].shape if given.turns and others is None else None
        found = [tuple(t.shape) for t in (x, others) if t is not None]
        if (
            any(t.dtype != self.dtype for t in (x, others) if t is not None)
            or [shape[1] for shape in found] != ([own + both] if others is None else [own, both])
            or turned not in (None, (len(x), call.width))
            or (distances is not None and (len(distances) != call.heads or self._reach(distances) < given.packing.shape[1]))
        ):
            raise ValueError(f"attention of {call.heads} heads of {call.width} cannot read {x.dtype} {found}, turned by {turned}, with distances {None if distances is None else tuple(distances.shape)}")


def packed_attention(call: Call, dtype: torch.dtype, turned: int = 0, shifted: bool = False, memory: Fused | None = None) -> Piece | None:
    """By the kernel where there is one for this type; None where nothing here can do it.

    turned   numbers of a head that rotary positions turn
    shifted  whether something is added for the distance of two tokens
    memory   see KernelAttention
    """
    if kernel("attention_forward", dtype) and turned in (0, call.width):
        return KernelAttention(call, dtype, memory)
    return PackedAttention(call) if call.groups == call.heads and not (turned or shifted or memory) else None


def _ending(x: Tensor, spare: int) -> Tensor:
    """x with zeros for tokens that nobody computes"""
    if spare:
        x[-spare:] = 0
    return x


def _sources(x: Tensor, width: int, tape: Tape) -> list[Tensor]:
    """All three parts, or queries of the tokens that leave the block and, of all, keys and values."""
    return [x] if tape.given.tokens is None else [x[tape.given.tokens, :width], x[:, width:]]


def _groups(tape: Tape) -> Iterator[tuple[int, int, list[tuple[slice, int]]]]:
    """Of rows of one length: how many, how long, and in each source the place of their tokens with the number of parts side by side."""
    row = 0
    for first, rows, length in tape.given.packing.groups:
        keys = slice(first, first + rows * length)
        yield rows, length, [(keys, 3)] if tape.given.tokens is None else [(slice(row, row + rows), 1), (keys, 2)]
        row += rows


def _type(x: Tensor, length: int) -> torch.dtype:
    """In which attention of this length is computed."""
    return torch.float32 if x.dtype == torch.bfloat16 and length <= SHORT else x.dtype


def _across(length: int) -> bool:
    """Whether keys come before queries: torch's softmax is faster across rows than along short ones that fill no vector register."""
    return length <= SHORT and length % 16 != 0
