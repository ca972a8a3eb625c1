"""Steps on packed rows that autograd sees as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from luthier.compute.tape import Given, Piece, Tape


class Fused:
    """Pieces one after the other on packed rows (N, d), with their gradient."""

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = list(pieces)

    def __call__(self, x: Tensor, given: Given) -> Tensor:
        """(N, d), or (B, d) where only some tokens leave"""
        inputs = [piece.tensors(given) for piece in self.pieces]
        flat = [x for own in inputs for x in own]
        learns = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, *flat))
        tape = Tape(self.pieces, inputs, given, learns and x.requires_grad, learns)
        return _Pass.apply(self, tape, x, *flat) if learns else self.forward(x, tape)  # type: ignore[no-any-return]

    @property
    def parts(self) -> list[Piece]:
        """All pieces, with those inside of others."""
        return [part for piece in self.pieces for part in piece.parts()]

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        return through(self.pieces, x, tape)

    def backward(self, d: Tensor, tape: Tape) -> Tensor | None:
        """The gradient of x, or None where it is not wanted."""
        return back(self.pieces, d, tape)


def through(pieces: Sequence[Piece], x: Tensor, tape: Tape) -> Tensor:
    for piece in pieces:
        x = tape.run(piece, x)
    return x


def back(pieces: Sequence[Piece], d: Tensor | None, tape: Tape) -> Tensor | None:
    for piece in reversed(pieces):
        if d is not None:
            d = tape.back(piece, d)
    return d


class _Pass(torch.autograd.Function):
    """A pass as one step of autograd's, which gives it the tensors that learn and takes their gradients."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, fused: Fused, tape: Tape, x: Tensor, *inputs: Tensor | None) -> Tensor:
        y = fused.forward(x, tape)
        ctx.save_for_backward(*inputs, *tape.kept)
        ctx.fused, ctx.tape, ctx.type = fused, tape, x.dtype
        tape.release()
        return y

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        tape = ctx.tape
        tape.resume(ctx.saved_tensors)
        d_x = ctx.fused.backward(d, tape)
        gradients = tape.collect()
        tape.release()
        return None, None, None if d_x is None else d_x.to(ctx.type), *gradients
