"""Pieces of a block whose gradient is written by hand, and what one pass through them keeps for it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from luthier.compute.packing import Packing

Tensors = tuple[Tensor | None, ...]
Wants = tuple[bool, ...]


@dataclass(frozen=True)
class Given:
    """What a block is given in one pass beside its input.

    packing    of its tokens
    tokens     which ones of the packed tokens leave the block; None: all
    turns      cosines and sines (N, head's width) by which queries and keys are turned where positions are rotary
    distances  (heads, 2 T - 1 + LANES): what is added to a score by how far the key is behind the query, from 1 - T on; then zeros
    encoded    tokens of another stack (N', d), packed by `encoded_by`, that cross attention sees
    """

    packing: Packing
    tokens: Tensor | None = None
    turns: tuple[Tensor, Tensor] | None = None
    distances: Tensor | None = None
    encoded: Tensor | None = None
    encoded_by: Packing | None = None

    @functools.cached_property
    def queries(self) -> Tensor:
        """`queries` of attention to tokens of the same stack."""
        return self.packing.all_queries if self.tokens is None else self.packing.queries(self.tokens)

    @functools.cached_property
    def crossing(self) -> Tensor:
        """`queries` of attention to tokens of the other."""
        assert self.encoded_by is not None
        return self.packing.crossing(self.encoded_by, self.tokens is not None)


class Piece(ABC):
    """One step of a block: y = forward(x), a function of x and of some tensors that may learn."""

    def tensors(self, given: Given) -> Tensors:
        """What may learn, or None for what is not there; their own histories are autograd's."""
        return ()

    def parts(self) -> Sequence[Piece]:
        """Itself and the pieces inside it."""
        return (self,)

    @abstractmethod
    def forward(self, x: Any, tensors: Tensors, wants: Wants, tape: Tape) -> Any:
        """y; what `backward` will read is given to `tape.keep`. wants: whether a gradient is wanted of x and of each of the tensors."""

    @abstractmethod
    def backward(self, d: Any, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Any, Tensors]:
        """The gradients of x (None where it is not wanted) and of the tensors, from that of y, which stays as it is."""


class Tape:
    """One forward pass through a block on packed rows and, if anything in it or below it learns, its backward pass.

    flows  whether a gradient is wanted of what has been computed so far
    """

    def __init__(self, pieces: Sequence[Piece], inputs: Sequence[Tensors], given: Given, flows: bool, learns: bool):
        self.inputs: dict[Piece, Tensors] = dict(zip(pieces, inputs, strict=True))
        self.wants = {piece: tuple(learns and x is not None and x.requires_grad for x in own) for piece, own in self.inputs.items()}
        self.given, self.flows = given, flows
        self.kept: list[Tensor | None] = []
        self.gradients: dict[Piece, Tensors] = {}
        self._left: list[tuple[bool, int]] = []  # of `_marks`, on the way back
        self._marks: list[tuple[bool, int]] = []  # of each piece gone through: flows before it, len(kept) before it

    def run(self, piece: Piece, x: Any) -> Any:
        below, wants = self.flows, self.wants[piece]
        self.flows = below or any(wants)
        self._marks.append((below, len(self.kept)))
        return piece.forward(x, self.inputs[piece], (below, *wants), self)

    def keep(self, *tensors: Tensor | None) -> None:
        if self.flows:
            self.kept += tensors

    def back(self, piece: Piece, d: Any) -> Any:
        """The gradient of what `piece` read, or None where nothing below it learns. Pieces are gone through in the reverse order."""
        below, start = self._left.pop()
        if not below and not any(self.wants[piece]):  # what stood beside it learns
            return None
        kept = tuple(self.kept[start:])
        del self.kept[start:]
        d_x, self.gradients[piece] = piece.backward(d, kept, self.inputs[piece], (below, *self.wants[piece]), self)
        return d_x

    def release(self) -> None:
        """Let go of all tensors: autograd has them, and frees what is kept when nobody can ask for it any more."""
        self.kept, self.inputs, self.gradients = [], {}, {}

    def resume(self, saved: Sequence[Tensor | None]) -> None:
        """Take it back: the inputs in their order, then what was kept."""
        left = list(saved)
        for piece, wants in self.wants.items():
            self.inputs[piece] = tuple(left[: len(wants)])
            del left[: len(wants)]
        self.kept, self._left = left, list(self._marks)  # anew, should the same pass go backward twice

    def collect(self) -> list[Tensor | None]:
        """The gradients of all inputs, in their order. Autograd copies a gradient that somebody else still holds: see `release`."""
        return [x for piece, wants in self.wants.items() for x in self.gradients.get(piece, (None,) * len(wants))]
