"""A block of a transformer on packed rows, put together from its roles: what stock modules do in many small steps, in few.

How a block goes (norms before or after, where it drops out, what scales it) is read off one forward pass of its own; that the
result is the same is tried on the same pass before it is relied on. What cannot be read this way runs as it always did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from transformers.pytorch_utils import Conv1D

from luthier.anatomy import Block
from luthier.anatomy.structure import is_norm
from luthier.compute.attention import Call, packed, pooled
from luthier.compute.dropout import multipliers
from luthier.compute.packing import Packing
from luthier.compute.products import Linear
from luthier.methods.changes import Changed, stock_class

Step = nn.Module | Call


@dataclass(frozen=True)
class Sublayer:
    """x + core(x), with what stands around the core.

    before  a norm of what the core reads, or None
    after   modules between the core and the sum: dropout, a learnt scale
    norm    a norm of the sum, or None
    """

    before: nn.Module | None
    after: tuple[nn.Module, ...]
    norm: nn.Module | None

    def leave(self, residual: Tensor, y: Tensor) -> Tensor:
        for module in self.after:
            if type(module) is not nn.Dropout:
                y = module(y)
            elif module.training and module.p:
                y = _Scaled.apply(y, multipliers(y, module.p))
        total = residual + y
        return total if self.norm is None else self.norm(total)


class FusedBlock:
    """What a block computes, on packed rows (N, d)."""

    def __init__(self, attention: Sublayer, mlp: Sublayer, call: Call, qkv: Linear, output: Linear, up: Linear, activation: nn.Module, down: Linear):
        self.attention, self.mlp, self.call = attention, mlp, call
        self.qkv, self.output, self.up, self.activation, self.down = qkv, output, up, activation, down
        self.query, self.key_value = qkv.apart(1)

    def pooled(self, x: Tensor, packing: Packing, tokens: Tensor) -> Tensor:
        """(B, d): the block's answer for one token of each row, all that leaves it. `tokens`: which (B,)."""
        read = x if self.attention.before is None else self.attention.before(x)
        seen = pooled(self.query(read[tokens]), self.key_value(read), packing, self.call)
        return self._mlp(self.attention.leave(x[tokens], self.output(seen)))

    def __call__(self, x: Tensor, packing: Packing) -> Tensor:
        read = x if self.attention.before is None else self.attention.before(x)
        seen = packed(self.qkv(read), packing, self.call)
        return self._mlp(self.attention.leave(x, self.output(seen)))

    def _mlp(self, x: Tensor) -> Tensor:
        read = x if self.mlp.before is None else self.mlp.before(x)
        return self.mlp.leave(x, self.down(self.activation(self.up(read))))


class _Scaled(torch.autograd.Function):
    """y * factors in the memory of y, which nothing else reads."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, y: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        ctx.mark_dirty(y)
        return y.mul_(factors)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (factors,) = ctx.saved_tensors
        return gradient * factors, None


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

    def linear(modules: Sequence[nn.Module]) -> Linear:
        return Linear(modules, dtype, learning)

    attention = Sublayer(before, attention_after, between if before is None else None)
    mlp = Sublayer(between if before is not None else None, mlp_after, last)
    return FusedBlock(attention, mlp, call, linear(qkv), linear([output]), linear([up]), activation, linear([down]))  # type: ignore[arg-type]


def _scales(step: Step) -> bool:
    """A learnt factor for each channel, the same in training and out of it."""
    return isinstance(step, nn.Module) and not is_norm(step) and [p.dim() for p in step.parameters()] == [1]


def _has_numbers(module: nn.Module) -> bool:
    return type(module) is nn.Dropout or any(True for _ in module.parameters())
