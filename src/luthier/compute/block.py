"""A block of a transformer on packed rows, put together from its roles: what stock modules do in many small steps, in few.

How a block goes (norms before or after, where it drops out, what scales it) is read off one forward pass of its own; that the
result is the same is tried on the same pass before it is relied on. What cannot be read this way runs as it always did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from luthier.anatomy import Block
from luthier.anatomy.structure import is_norm
from luthier.compute.attention import Call
from luthier.compute.packed_attention import PackedAttention
from luthier.compute.packing import Packing
from luthier.compute.pieces import local
from luthier.compute.products import Linear
from luthier.compute.tape import Piece, Tape
from luthier.methods.changes import Changed, stock_class

Step = nn.Module | Call


class Sublayer:
    """x + core(x), then perhaps a norm of the sum."""

    def __init__(self, core: Sequence[Piece], norm: Piece | None):
        self.core, self.norm = core, norm

    @property
    def pieces(self) -> list[Piece]:
        return [*self.core, *([self.norm] if self.norm else [])]

    def forward(self, x: Tensor, tape: Tape, tokens: Tensor | None = None) -> Tensor:
        """tokens: which ones of x the core answers for; None: all"""
        y = x
        for piece in self.core:
            y = tape.run(piece, y)
        total = (x if tokens is None else x[tokens]) + y
        return total if self.norm is None else tape.run(self.norm, total)  # type: ignore[no-any-return]

    def backward(self, d: Tensor, tape: Tape, tokens: Tensor | None = None) -> Tensor | None:
        """The gradient of x, or None where it is not wanted."""
        if self.norm is not None:
            d = tape.back(self.norm, d)
        d_x: Tensor | None = d
        for piece in reversed(self.core):
            if d_x is not None:
                d_x = tape.back(piece, d_x)
        if d_x is None:
            return None
        return d + d_x if tokens is None else d_x.to(d.dtype, copy=True).index_add_(0, tokens, d)


class FusedBlock:
    """What a block computes, on packed rows (N, d), with its gradient."""

    def __init__(self, attention: Sublayer, mlp: Sublayer, causal: bool):
        self.attention, self.mlp, self.causal = attention, mlp, causal
        self.pieces = [*attention.pieces, *mlp.pieces]

    def __call__(self, x: Tensor, packing: Packing, tokens: Tensor | None = None) -> Tensor:
        """(N, d), or (B, d) where only `tokens`, one of each row (B,), leave the block."""
        inputs = [piece.tensors() for piece in self.pieces]
        flat = [x for own in inputs for x in own]
        learns = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, *flat))
        tape = Tape(self.pieces, inputs, packing, tokens, learns and x.requires_grad, learns)
        return _Pass.apply(self, tape, x, *flat) if learns else self.forward(x, tape)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        return self.mlp.forward(self.attention.forward(x, tape, tape.tokens), tape)

    def backward(self, d: Tensor, tape: Tape) -> Tensor | None:
        d_x = self.mlp.backward(d, tape)
        return None if d_x is None else self.attention.backward(d_x, tape, tape.tokens)


class _Pass(torch.autograd.Function):
    """A block's pass as one step of autograd's, which gives it the tensors that learn and takes their gradients."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, block: FusedBlock, tape: Tape, x: Tensor, *inputs: Tensor | None) -> Tensor:
        y = block.forward(x, tape)
        ctx.save_for_backward(*inputs, *tape.kept)
        ctx.block, ctx.tape, ctx.type = block, tape, x.dtype
        tape.release()
        return y

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        tape = ctx.tape
        tape.resume(ctx.saved_tensors)
        d_x = ctx.block.backward(d, tape)
        gradients = tape.collect()
        tape.release()
        return None, None, None if d_x is None else d_x.to(ctx.type), *gradients


def read(block: Block, steps: Sequence[Step], dtype: torch.dtype | None, learning: bool) -> FusedBlock | None:
    """The block that went through `steps` (its innermost modules and its attention, in the order of the forward pass) in one forward pass, or None.

    dtype     of the products; None: that of their input
    learning  whether what is open for training changes from one forward pass to the next
    """
    sites = {role: site.module for role, site in block.sites.items()}
    if any(role.startswith(("cross_attention", "mlp.gate")) for role in sites):
        return None
    qkv = list(dict.fromkeys(sites[f"attention.{part}"] for part in ("query", "key", "value")))
    output, up, down = sites["attention.output"], sites["mlp.up"], sites["mlp.down"]
    linears = (*qkv, output, up, down)
    if not all(stock_class(m) in (nn.Linear, Conv1D) for m in linears) or any(change.method.draws for m in linears if isinstance(m, Changed) for change in m.changes()):
        return None
    left = [step for step in steps if not isinstance(step, nn.Identity)]

    def take(count: int) -> list[Step]:
        taken, left[:] = left[:count], left[count:]
        return taken

    def norm() -> nn.Module | None:
        return take(1)[0] if left and isinstance(left[0], nn.Module) and is_norm(left[0]) else None  # type: ignore[return-value]

    def after() -> tuple[nn.Module, ...]:
        found = []
        while left and (type(left[0]) is nn.Dropout or _scales(left[0])):
            found += take(1)
        return tuple(found)  # type: ignore[arg-type]

    before = norm()
    if set(take(len(qkv))) != set(qkv) or not (left and isinstance(left[0], Call)):
        return None
    (call,) = take(1)
    if take(1) != [output] or not call.plain:  # type: ignore[union-attr]
        return None
    attention_after, between = after(), norm()
    if take(1) != [up] or not left or isinstance(left[0], Call) or _has_numbers(left[0]):
        return None
    (activation,) = take(1)
    if take(1) != [down]:
        return None
    mlp_after, last = after(), norm()
    if left or (before is None) == (last is None) or between is None:
        return None

    def pieces(*modules: nn.Module | None) -> list[Piece]:
        return [local(module) for module in modules if module is not None]

    first = [*pieces(before), Linear(qkv, dtype, learning), PackedAttention(call), Linear([output], dtype, learning), *pieces(*attention_after)]  # type: ignore[arg-type]
    second = [*pieces(between if before is not None else None), Linear([up], dtype, learning), *pieces(activation), Linear([down], dtype, learning), *pieces(*mlp_after)]  # type: ignore[arg-type]
    norms = [local(between), local(last)] if before is None else [None, None]  # type: ignore[arg-type]
    return FusedBlock(Sublayer(first, norms[0]), Sublayer(second, norms[1]), call.causal)  # type: ignore[union-attr]


def _scales(step: Step) -> bool:
    """A learnt factor for each channel, the same in training and out of it."""
    return isinstance(step, nn.Module) and not is_norm(step) and [p.dim() for p in step.parameters()] == [1]


def _has_numbers(module: nn.Module) -> bool:
    return type(module) is nn.Dropout or any(True for _ in module.parameters())
