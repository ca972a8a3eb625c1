"""A block of a transformer on packed rows: what stock modules do in many small steps, in few."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from luthier.compute.fused import Fused, back, through
from luthier.compute.joins import Join
from luthier.compute.packed_attention import KernelAttention
from luthier.compute.tape import Piece, Tape


class FusedBlock(Fused):
    """What a block computes: sublayers, each of which reads what one join hands on and answers to the next. The first one attends to the block's own tokens; behind it only those go on that leave the block.

    joins   one more than there are sublayers
    causal  whether a token of the first sublayer sees those before it alone
    """

    def __init__(self, joins: Sequence[Join], sublayers: Sequence[Sequence[Piece]], causal: bool):
        self.joins, self.sublayers, self.causal = list(joins), [list(pieces) for pieces in sublayers], causal
        start, *ends = self.joins
        super().__init__([*start.pieces, *(piece for pieces, end in zip(self.sublayers, ends, strict=True) for piece in (*pieces, *end.pieces))])

    @functools.cached_property
    def crosses(self) -> bool:
        """Whether it sees another stack's tokens."""
        return any(isinstance(piece, KernelAttention) and piece.memory is not None for piece in self.pieces)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        start, *ends = self.joins
        x, h = start.forward(x, None, tape)
        for pieces, end in zip(self.sublayers, ends, strict=True):
            y = through(pieces, h, tape)
            if pieces is self.sublayers[0] and tape.given.tokens is not None:
                x = x[tape.given.tokens]
            x, h = end.forward(x, y, tape)
        return x

    def backward(self, d: Tensor, tape: Tape) -> Tensor | None:
        start, *ends = self.joins
        d_x: Tensor | None = d
        d_h: Tensor | None = None  # nobody reads what the last join hands on beside x
        for pieces, end in zip(reversed(self.sublayers), reversed(ends), strict=True):
            assert d_x is not None
            d_x, d_y = end.backward(d_x, d_h, tape)
            d_h = back(pieces, d_y, tape)
            if d_x is None or d_h is None:
                return None
            if pieces is self.sublayers[0] and tape.given.tokens is not None:
                d_x = d_x.new_zeros(len(d_h), d_x.shape[1]).index_copy_(0, tape.given.tokens, d_x)
        assert d_x is not None
        return start.backward(d_x, d_h, tape)[0]
