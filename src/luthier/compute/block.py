"""A block of a transformer on packed rows, put together from its roles: what stock modules do in many small steps, in few.

How a block goes (norms before or after, where it drops out, what scales it) is read off one forward pass of its own; that the
result is the same is tried on the same pass before it is relied on. What cannot be read this way runs as it always did.
"""

from __future__ import annotations

import itertools
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
from luthier.compute.head_norms import head_norms
from luthier.compute.joins import Join, join
from luthier.compute.packed_attention import packed_attention
from luthier.compute.packing import Packing
from luthier.compute.pieces import Insert, gated, local
from luthier.compute.products import Linear, type_around
from luthier.compute.tape import Piece, Tape
from luthier.methods.changes import Changed, stock_class
from luthier.methods.inserts import Sequential

Step = nn.Module | Call


class FusedBlock:
    """What a block computes, on packed rows (N, d), with its gradient: two sublayers, each of which reads what one join hands on and answers to the next."""

    def __init__(self, joins: tuple[Join, Join, Join], attention: Sequence[Piece], mlp: Sequence[Piece], causal: bool):
        self.joins, self.attention, self.mlp, self.causal = joins, list(attention), list(mlp), causal
        self.pieces = [*joins[0].pieces, *attention, *joins[1].pieces, *mlp, *joins[2].pieces]

    def __call__(self, x: Tensor, packing: Packing, tokens: Tensor | None = None, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(N, d), or (B, d) where only `tokens`, one of each row (B,), leave the block. turns: see Tape"""
        inputs = [piece.tensors() for piece in self.pieces]
        flat = [x for own in inputs for x in own]
        learns = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, *flat))
        tape = Tape(self.pieces, inputs, packing, tokens, turns, learns and x.requires_grad, learns)
        return _Pass.apply(self, tape, x, *flat) if learns else self.forward(x, tape)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        start, between, end = self.joins
        x, h = start.forward(x, None, tape)
        y = _through(self.attention, h, tape)
        x, h = between.forward(x if tape.tokens is None else x[tape.tokens], y, tape)
        return end.forward(x, _through(self.mlp, h, tape), tape)[0]

    def backward(self, d: Tensor, tape: Tape) -> Tensor | None:
        """The gradient of x, or None where it is not wanted."""
        start, between, end = self.joins
        d_x, d_y = end.backward(d, None, tape)
        d_h = _back(self.mlp, d_y, tape)
        if d_x is None or d_h is None:
            return None
        d_x, d_y = between.backward(d_x, d_h, tape)
        d_h = _back(self.attention, d_y, tape)
        if d_x is None or d_h is None:
            return None
        if tape.tokens is not None:
            d_x = d_x.new_zeros(len(d_h), d_x.shape[1]).index_copy_(0, tape.tokens, d_x)
        return start.backward(d_x, d_h, tape)[0]


def _through(pieces: Sequence[Piece], h: Tensor, tape: Tape) -> Tensor:
    for piece in pieces:
        h = tape.run(piece, h)
    return h


def _back(pieces: Sequence[Piece], d: Tensor | None, tape: Tape) -> Tensor | None:
    for piece in reversed(pieces):
        if d is not None:
            d = tape.back(piece, d)
    return d


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


def read(block: Block, steps: Sequence[Step], turned: int, dtype: torch.dtype | None, learning: bool) -> FusedBlock | None:
    """The block that went through `steps` (its innermost modules and its attention, in the order of the forward pass) in one forward pass, or None.

    turned    numbers of a head that rotary positions turn
    dtype     of the products; None: that of their input
    learning  whether what is open for training changes from one forward pass to the next
    """
    sites = {role: site.module for role, site in block.sites.items()}
    if any(role.startswith("cross_attention") for role in sites):
        return None
    qkv = list(dict.fromkeys(sites[f"attention.{part}"] for part in ("query", "key", "value")))
    of_heads = [sites[role] for role in ("attention.query_norm", "attention.key_norm") if role in sites]
    output, down = sites["attention.output"], sites["mlp.down"]
    opening = [sites[role] for role in ("mlp.gate", "mlp.up") if role in sites]
    linears = (*qkv, output, *opening, down)
    if not all(stock_class(m) in (nn.Linear, Conv1D) for m in linears) or any(
        change.method.draws for m in linears if isinstance(m, Changed) for change in m.changes()
    ):
        return None
    left = [step for step in steps if not isinstance(step, nn.Identity)]

    def take(count: int) -> list[Step]:
        taken, left[:] = left[:count], left[count:]
        return taken

    def norm() -> nn.Module | None:
        return take(1)[0] if left and isinstance(left[0], nn.Module) and is_norm(left[0]) else None  # type: ignore[return-value]

    kind = type_around(dtype, output)
    bodies = {m.body for m in block.module.modules() if isinstance(m, Sequential)}

    def behind() -> tuple[list[Piece], list[nn.Module]]:
        """What follows a linear layer: inserts, and from the first dropout or scale on, what joins."""
        found: list[Any] = []
        while left and (type(left[0]) is nn.Dropout or _scales(left[0]) or left[0] in bodies):
            found += [Insert(step, kind) if step in bodies else step for step in take(1)]  # type: ignore[arg-type]
        inserts = list(itertools.takewhile(lambda step: isinstance(step, Insert), found))
        return [local(insert) for insert in inserts], found[len(inserts) :]

    before = norm()
    if set(take(len(qkv) + len(of_heads))) != {*qkv, *of_heads} or not (left and isinstance(left[0], Call)):
        return None
    (call,) = take(1)
    if take(1) != [output] or not call.plain:  # type: ignore[union-attr]
        return None
    (attention_inserts, attention_after), between = behind(), norm()
    opened = take(len(opening) + 1)
    acts = [step for step in opened if step not in opening]
    if len(acts) != 1 or isinstance(acts[0], Call) or _has_numbers(acts[0]) or take(1) != [down]:
        return None
    (mlp_inserts, mlp_after), last = behind(), norm()
    if left or (before is None) == (last is None) or between is None:
        return None

    early = before is not None  # norms stand before the sublayers
    joins = (
        join((), before, False, kind, first=True),
        join(attention_after, between, not early, kind),
        join(mlp_after, last, True, kind, last=True),
    )
    middle = [packed_attention(call, turned, kind)]  # type: ignore[arg-type]
    if of_heads:
        middle.insert(0, head_norms(call, *of_heads, kind) if len(of_heads) == 2 else None)  # type: ignore[arg-type]
    activation = local(acts[0]) if len(opening) == 1 else gated(acts[0], kind)
    if None in middle or activation is None:
        return None
    attends = [Linear(qkv, dtype, learning), *middle, Linear([output], dtype, learning), *attention_inserts]
    thinks = [Linear(opening, dtype, learning), activation, Linear([down], dtype, learning), *mlp_inserts]
    return FusedBlock(joins, attends, thinks, call.causal)  # type: ignore[union-attr]


def _scales(step: Step) -> bool:
    """A learnt factor for each channel, the same in training and out of it."""
    return isinstance(step, nn.Module) and not is_norm(step) and [p.dim() for p in step.parameters()] == [1]


def _has_numbers(module: nn.Module) -> bool:
    return type(module) is nn.Dropout or any(True for _ in module.parameters())
