"""Pieces of a block whose gradient is written by hand, and what one pass through them keeps for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from luthier.compute.packing import Packing

Tensors = tuple[Tensor | None, ...]
Wants = tuple[bool, ...]


class Piece(ABC):
    """One step of a block: y = forward(x), a function of x and of some tensors that may learn."""

    def tensors(self) -> Tensors:
        """What may learn, or None for what is not there; their own histories are autograd's."""
        return ()

    @abstractmethod
    def forward(self, x: Any, tensors: Tensors, wants: Wants, tape: Tape) -> Any:
        """y; what `backward` will read is given to `tape.keep`. wants: whether a gradient is wanted of x and of each of the tensors."""

    @abstractmethod
    def backward(self, d: Any, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Any, Tensors]:
        """The gradients of x (None where it is not wanted) and of the tensors, from that of y, which stays as it is."""


class Tape:
    """One forward pass through a block on packed rows and, if anything in it or below it learns, its backward pass.

    tokens  which ones of the packed tokens leave the block; None: all
    turns   cosines and sines (N, head's width) by which queries and keys are turned where positions are rotary
    flows   whether a gradient is wanted of what has been computed so far
    """

    def __init__(self, pieces: Sequence[Piece], inputs: Sequence[Tensors], packing: Packing, tokens: Tensor | None, turns: tuple[Tensor, Tensor] | None, flows: bool, learns: bool):
        self.inputs: dict[Piece, Tensors] = dict(zip(pieces, inputs, strict=True))
        self.wants = {piece: tuple(learns and x is not None and x.requires_grad for x in own) for piece, own in self.inputs.items()}
        self.packing, self.tokens, self.turns, self.flows = packing, tokens, turns, flows
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
