"""A block of a transformer on packed rows: what stock modules do in many small steps, in few."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from luthier.compute.fused import Fused, back, through
from luthier.compute.joins import Join
from luthier.compute.packed_attention import KernelAttention
from luthier.compute.tape import Piece, Tape


@dataclass(frozen=True, eq=False)
class Sublayer:
    """pieces  one after the other, the first of which reads what is handed to the sublayer
    join    where their answer is added to what goes past
    within  pieces that read the same, and whose answers are added to that of `pieces`
    beside  the same, but added behind what the join does to the answer
    """

    pieces: Sequence[Piece]
    join: Join
    within: Sequence[Piece] = ()
    beside: Sequence[Piece] = ()


class FusedBlock(Fused):
    """What a block computes: sublayers, each of which reads what one join hands on and answers to the next. The first one attends to the block's own tokens; behind it only those go on that leave the block."""

    def __init__(self, start: Join, sublayers: Sequence[Sublayer], causal: bool):
        """causal: whether a token of the first sublayer sees those before it alone"""
        self.start, self.sublayers, self.causal = start, list(sublayers), causal
        super().__init__([*start.pieces, *(piece for sublayer in sublayers for piece in (*sublayer.pieces, *sublayer.within, *sublayer.beside, *sublayer.join.pieces))])

    @functools.cached_property
    def crosses(self) -> bool:
        """Whether it sees another stack's tokens."""
        return any(isinstance(piece, KernelAttention) and piece.memory is not None for piece in self.pieces)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        x, h = self.start.forward(x, None, tape)
        for number, sublayer in enumerate(self.sublayers):
            y = through(sublayer.pieces, h, tape)
            if number == 0 and (tokens := tape.given.tokens) is not None:
                x, h = x[tokens], h[tokens]
            for piece in sublayer.within:
                y = y + tape.run(piece, h)
            for piece in sublayer.beside:
                x = x + tape.run(piece, h)
            x, h = sublayer.join.forward(x, y, tape)
        return x

    def backward(self, d: Tensor, tape: Tape) -> Tensor | None:
        d_x: Tensor | None = d
        d_h: Tensor | None = None  # nobody reads what the last join hands on beside x
        for number, sublayer in reversed(list(enumerate(self.sublayers))):
            assert d_x is not None
            d_x, d_y = sublayer.join.backward(d_x, d_h, tape)
            d_beside = [tape.back(piece, d_x) for piece in reversed(sublayer.beside) if d_x is not None]
            d_beside += [tape.back(piece, d_y) for piece in reversed(sublayer.within) if d_y is not None]
            d_h = back(sublayer.pieces, d_y, tape)
            if d_x is None or d_h is None:
                return None
            for one in d_beside:
                d_h = d_h + _spread(one, tape, len(d_h), number)
            d_x = _spread(d_x, tape, len(d_h), number)
        assert d_x is not None
        return self.start.backward(d_x, d_h, tape)[0]


def _spread(d: Tensor, tape: Tape, count: int, number: int) -> Tensor:
    """The gradient of all tokens that went into a sublayer of this number, from that of those which leave it."""
    if number or tape.given.tokens is None:
        return d
    return d.new_zeros(count, d.shape[1]).index_copy_(0, tape.given.tokens, d)
