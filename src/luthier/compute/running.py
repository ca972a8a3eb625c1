"""A forward pass of a model some of whose blocks run fused: packed rows go from one of them to the next."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compute.block import FusedBlock
from luthier.compute.kernels import LANES
from luthier.compute.packing import Packing
from luthier.compute.tape import Given

TURNS = "position_embeddings"  # the argument of a block that brings cosines and sines of rotary positions
OTHERS = "encoder_hidden_states"  # the one that brings another stack's tokens
UNUSUAL = ("past_key_values", "cache", "use_cache", "output_attentions", "output_hidden_states", "inputs_embeds", OTHERS, "encoder_outputs", "decoder_inputs_embeds", "head_mask")


@dataclass
class Blocks:
    """The blocks of a model.

    calls   their modules, in the order of the forward pass
    stacks  of each call, the stack's name
    turned  numbers of a head that rotary positions turn in each
    shifts  whose `compute_bias` says what a block adds to the scores of two tokens
    tuples  of those that answer with several things, how many
    fused   those that can run fused
    leaves  first or last: the only token of a row that matters behind the last block; None: all
    """

    calls: list[nn.Module] = field(default_factory=list)
    stacks: list[str | None] = field(default_factory=list)
    turned: dict[nn.Module, int] = field(default_factory=dict)
    shifts: dict[nn.Module, Any] = field(default_factory=dict)
    tuples: dict[nn.Module, int] = field(default_factory=dict)
    fused: dict[nn.Module, FusedBlock] = field(default_factory=dict)
    leaves: str | None = None

    def mask(self, stack: str | None, inputs: dict[str, Any]) -> Tensor | None:
        """The one of a stack's rows among a model's inputs. A decoder without an input of its own reads the encoder's, moved on by one."""
        own = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_attention_mask", "labels"))
        return inputs.get("decoder_attention_mask" if stack == "decoder" and "encoder" in self.stacks and own else "attention_mask")


class Running:
    """Fused blocks in the place of the model's own, while `begin` was the last word.

    noise  first or last: behind the last block, all other tokens are replaced by noise
    """

    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        self.noise: str | None = None
        self.own: dict[nn.Module, Any] = {}  # what stood in the place of forward functions that are replaced
        self.clear()

    def begin(self, inputs: dict[str, Any]) -> None:
        """A forward pass, unless these rows cannot be packed."""
        self.clear()
        masks = {stack: self.blocks.mask(stack, inputs) for stack in self.blocks.stacks}
        if any(mask is not None and mask.dim() != 2 for mask in masks.values()):
            return
        found = {stack: Packing.of(mask) for stack, mask in masks.items() if mask is not None}
        self.packings = {stack: packing for stack, packing in found.items() if packing}
        self.active = len(found) == len(self.packings)

    def clear(self) -> None:
        """Between two forward passes."""
        self.active = False
        self.packings: dict[str | None, Packing] = {}
        self.given: dict[str | None, Given] = {}
        self.at = 0  # the next call
        self.handed: Tensor | None = None  # what the last fused block handed on in packed form
        self.turns: tuple[Any, tuple[Tensor, Tensor]] | None = None  # of rotary positions: what the last block was given, and the same packed
        self.distances: dict[nn.Module, Tensor] = {}

    def replace(self) -> None:
        for module in self.blocks.fused:
            self.own[module] = module.__dict__.get("forward")
            module.forward = functools.partial(self._forward, module, module.forward)

    def put_back(self) -> None:
        for module, own in self.own.items():
            del module.forward
            if own is not None:  # somebody else's
                module.forward = own
        self.own.clear()

    def _forward(self, module: nn.Module, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return stock(*args, **kwargs)
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        calls, stacks, fused = self.blocks.calls, self.blocks.stacks, self.blocks.fused
        while calls[self.at] is not module:
            self.at += 1
        stack, self.at = stacks[self.at], self.at + 1
        ends = self.at == len(calls)
        with torch.autocast("cpu", enabled=False):
            given = self._given(module, stack, x, functools.partial(_arguments, stock, args, kwargs))
            packing = given.packing
            x = x.squeeze(0) if x is self.handed else packing.pack(x)  # of squeeze the gradient is a view; of x[0], zeros and a copy
            if ends and self.blocks.leaves:
                tokens = packing.ends(self.blocks.leaves == "last")
                return self._answer(module, stack, packing.unpack(fused[module](x, replace(given, tokens=tokens)), tokens))
            x = fused[module](x, given)
        if ends and self.noise:
            tokens = packing.ends(self.noise == "last")
            x = torch.randn_like(x).index_copy(0, tokens, x[tokens])
        goes_on = not ends and stacks[self.at] == stack and calls[self.at] in fused
        self.handed = x[None] if goes_on else None
        return self._answer(module, stack, packing.unpack(x) if self.handed is None else self.handed)

    def _given(self, module: nn.Module, stack: str | None, x: Tensor, arguments: Callable[[], dict[str, Any]]) -> Given:
        """What a block of this stack is given; only what differs from the block before is made anew."""
        given = self.given.get(stack) or Given(self._packing(stack, x))
        turns = self._turns(arguments()[TURNS], given.packing) if self.blocks.turned.get(module) else None
        distances = self._distances(module, given.packing.shape[1])
        encoded, by = given.encoded, given.encoded_by
        if encoded is None and (others := self._others(module, arguments)) is not None:
            by = self._packing("encoder", others)
            encoded = by.pack(others)
        if turns is not given.turns or distances is not given.distances or encoded is not given.encoded:
            given = replace(given, turns=turns, distances=distances, encoded=encoded, encoded_by=by)
        self.given[stack] = given
        return given

    def _packing(self, stack: str | None, x: Tensor) -> Packing:
        if stack not in self.packings:
            self.packings[stack] = Packing.whole(*x.shape[:2])
        return self.packings[stack]

    def _turns(self, given: tuple[Tensor, Tensor], packing: Packing) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1 or B, T, k) -> (N, k) each"""
        if self.turns is None or self.turns[0] is not given:
            cosines, sines = (packing.pack(x.expand(packing.shape[0], -1, -1)).float().contiguous() for x in given)
            self.turns = given, (cosines, sines)
        return self.turns[1]

    def _distances(self, module: nn.Module, reach: int) -> Tensor | None:
        """See `Given`."""
        owner = self.blocks.shifts.get(module)
        if owner is None:
            return None
        if owner not in self.distances:
            ahead, behind = owner.compute_bias(1, reach)[0, :, 0], owner.compute_bias(reach, 1)[0, :, :, 0]
            self.distances[owner] = torch.cat([behind.flip(1), ahead[:, 1:], ahead.new_zeros(len(ahead), LANES)], 1).float()
        return self.distances[owner]

    def _others(self, module: nn.Module, arguments: Callable[[], dict[str, Any]]) -> Tensor | None:
        return arguments().get(OTHERS) if self.blocks.fused[module].crosses else None

    def _answer(self, module: nn.Module, stack: str | None, x: Tensor) -> Any:
        """As the block itself answers."""
        if (count := self.blocks.tuples.get(module)) is None:
            return x
        shift, length = None, self.given[stack].packing.shape[1]
        if module in self.blocks.shifts and any(m not in self.blocks.fused for m, of in zip(self.blocks.calls, self.blocks.stacks, strict=True) if of == stack):
            shift = self.blocks.shifts[module].compute_bias(length, length)  # which the first block of a stack makes for all
        return (x, shift, *[None] * count)[:count]


def _arguments(stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name"""
    names = _names(stock.__func__ if inspect.ismethod(stock) else stock)
    return {**dict(zip(names, args, strict=False)), **kwargs}


@functools.cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Of positional arguments, without self."""
    return tuple(name for name in inspect.signature(function).parameters if name != "self")
