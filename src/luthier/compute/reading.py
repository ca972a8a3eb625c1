"""How a block goes, read off one forward pass of its own: norms before or after, where it drops out, what scales it.

That the result is the same is tried on the same pass before it is relied on. What cannot be read this way runs as it always did.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.anatomy import Block
from luthier.anatomy.structure import is_norm
from luthier.compute.attention import Call
from luthier.compute.block import FusedBlock, Sublayer
from luthier.compute.fused import Fused
from luthier.compute.head_norms import head_norms
from luthier.compute.joins import join
from luthier.compute.packed_attention import packed_attention
from luthier.compute.pieces import Insert, gated, is_scale, local
from luthier.compute.products import Linear, type_around
from luthier.compute.tape import Piece
from luthier.methods.changes import Changed, stock_class
from luthier.methods.inserts import Parallel, Sequential

Step = nn.Module | Call


class Unreadable(Exception):
    """The block goes some other way."""


def read(block: Block, steps: Sequence[Step], turned: int, shifted: bool, dtype: torch.dtype | None, learning: bool) -> FusedBlock | None:
    """The block that went through `steps` (its innermost modules and its attention, in the order of the forward pass) in one forward pass, or None.

    turned    numbers of a head that rotary positions turn
    shifted   whether something is added for the distance of two tokens
    dtype     of the products; None: that of their input
    learning  whether what is open for training changes from one forward pass to the next
    """
    try:
        return _Reader(block, steps, turned, shifted, dtype, learning).block()
    except Unreadable:
        return None


class _Reader:
    """Takes steps one by one from the front."""

    def __init__(self, block: Block, steps: Sequence[Step], turned: int, shifted: bool, dtype: torch.dtype | None, learning: bool):
        self.sites = {role: site.module for role, site in block.sites.items()}
        self.left = [step for step in steps if not isinstance(step, nn.Identity) and step is not self.sites.get("attention.bias")]
        self.inserts, self.parallel = ({m.body for m in block.module.modules() if isinstance(m, kind)} for kind in (Sequential, Parallel))
        self.turned, self.shifted, self.dtype, self.learning = turned, shifted, dtype, learning
        self.causal = False
        self.kind = type_around(dtype, self.sites["attention.output"])

    def block(self) -> FusedBlock:
        names = [name for name in ("attention", "cross_attention", "mlp") if f"{name}.output" in self.sites or name == "mlp"]
        opening = self.norm()
        early = opening is not None  # norms stand before the sublayers
        sublayers = []
        for name in names:
            pieces, last = self.mlp() if name == "mlp" else self.attention(name), name == names[-1]
            inserts = [local(Insert(step, self.kind)) for step in self.while_in(self.inserts)]
            within = [local(Insert(step, self.kind)) for step in self.while_in(self.parallel)]
            after = self.after()
            beside = [local(Insert(step, self.kind)) for step in self.while_in(self.parallel)]
            norm = self.norm()
            require((norm is None) == (early and last))
            sublayers.append(Sublayer([*pieces, *inserts], join(after, norm, last or not early, self.kind, last=last), within, beside))
        require(not self.left)
        return FusedBlock(join((), opening, False, self.kind, first=True), sublayers, self.causal)

    def attention(self, name: str) -> list[Piece]:
        query, key, value, output = (self.sites[f"{name}.{part}"] for part in ("query", "key", "value", "output"))
        of_heads = [self.sites[role] for role in (f"{name}.query_norm", f"{name}.key_norm") if role in self.sites]
        before = {query, key, value, *of_heads}
        require(set(self.take(len(before))) == before)
        (call,) = self.take(1)
        require(isinstance(call, Call) and call.plain)
        assert isinstance(call, Call)
        require(self.take(1) == [output])
        if name == "cross_attention":
            require(not of_heads and not call.causal and not call.shifted and query not in (key, value))
            return [self.linear([query]), found(packed_attention(call, self.kind, memory=Fused([self.linear([key, value])]))), self.linear([output])]
        require(self.shifted or not call.shifted)
        self.causal = call.causal
        pieces = [found(packed_attention(call, self.kind, self.turned, self.shifted))]
        if of_heads:
            require(len(of_heads) == 2)
            pieces.insert(0, found(head_norms(call, *of_heads, self.kind)))  # type: ignore[call-arg]
        return [self.linear([query, key, value]), *pieces, self.linear([output])]

    def mlp(self) -> list[Piece]:
        opening, down = [self.sites[role] for role in ("mlp.gate", "mlp.up") if role in self.sites], self.sites["mlp.down"]
        opened = self.take(len(opening) + 1)
        acts = [step for step in opened if step not in opening]
        require(len(acts) == 1 and not isinstance(acts[0], Call) and not _has_numbers(acts[0]))
        activation = local(acts[0]) if len(opening) == 1 else gated(acts[0], self.kind)  # type: ignore[arg-type]
        dropped = [local(self.take(1)[0])] if self.left and type(self.left[0]) is nn.Dropout else []  # type: ignore[arg-type]
        require(self.take(1) == [down])
        return [self.linear(opening), found(activation), *dropped, self.linear([down])]

    def linear(self, modules: Iterable[nn.Module]) -> Linear:
        """Of one or more modules that read the same."""
        together = list(dict.fromkeys(modules))
        for module in together:
            require(stock_class(module) in (nn.Linear, Conv1D) and not (isinstance(module, Changed) and any(change.method.draws and not change.method.input_dropout for change in module.changes())))
        return Linear(together, self.dtype, self.learning)

    def after(self) -> list[nn.Module]:
        """What a sublayer's answer goes through where it joins: dropout, scales, and inserts behind them."""
        steps: list[Any] = []
        while self.left and (type(self.left[0]) is nn.Dropout or is_scale(self.left[0]) or self.left[0] in self.inserts):
            steps += [Insert(step, self.kind) if step in self.inserts else step for step in self.take(1)]  # type: ignore[arg-type]
        return steps

    def while_in(self, bodies: set[nn.Module]) -> list[nn.Module]:
        taken = list(itertools.takewhile(bodies.__contains__, self.left))
        self.take(len(taken))
        return taken  # type: ignore[return-value]

    def norm(self) -> nn.Module | None:
        return self.take(1)[0] if self.left and isinstance(self.left[0], nn.Module) and is_norm(self.left[0]) else None  # type: ignore[return-value]

    def take(self, count: int) -> list[Step]:
        require(len(self.left) >= count)
        taken, self.left = self.left[:count], self.left[count:]
        return taken


def require(holds: bool) -> None:
    if not holds:
        raise Unreadable


def found(piece: Piece | None) -> Piece:
    if piece is None:
        raise Unreadable
    return piece


def _has_numbers(module: Step) -> bool:
    return isinstance(module, nn.Module) and (type(module) is nn.Dropout or any(True for _ in module.parameters()))
