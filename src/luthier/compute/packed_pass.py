"""A forward pass on packed rows, which go from one block to the next: fused where a block can be, else through its own modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compute import attention
from luthier.compute.block import FusedBlock
from luthier.compute.kernels import LANES
from luthier.compute.packing import Packing
from luthier.compute.recompute import recomputed
from luthier.compute.tape import Given
from luthier.compute.varlen import attend

TURNS = "position_embeddings"  # the argument of a block that brings cosines and sines of rotary positions
OTHERS = "encoder_hidden_states"  # the one that brings another stack's tokens
CACHES = ("past_key_values", "cache", "layer_past")  # arguments of a block that keep keys and values, which nobody reads behind a whole row
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
    packed  those that are given packed rows and run by themselves
    leaves  first or last: the only token of a row that matters behind the last block; None: all
    """

    calls: list[nn.Module] = field(default_factory=list)
    stacks: list[str | None] = field(default_factory=list)
    turned: dict[nn.Module, int] = field(default_factory=dict)
    shifts: dict[nn.Module, Any] = field(default_factory=dict)
    tuples: dict[nn.Module, int] = field(default_factory=dict)
    fused: dict[nn.Module, FusedBlock] = field(default_factory=dict)
    packed: set[nn.Module] = field(default_factory=set)
    leaves: str | None = None

    @property
    def take_packed_rows(self) -> bool:
        """Whether any of them does."""
        return bool(self.fused or self.packed)

    def mask(self, stack: str | None, inputs: dict[str, Any]) -> Tensor | None:
        """The one of a stack's rows among a model's inputs. A decoder without an input of its own reads the encoder's, moved on by one."""
        own = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_attention_mask", "labels"))
        return inputs.get("decoder_attention_mask" if stack == "decoder" and "encoder" in self.stacks and own else "attention_mask")


class Running:
    """Blocks on packed rows in the place of the model's own, while `begin` was the last word.

    recompute  whether they run once more on their way back instead of keeping what they computed
    noise      first or last: behind the last block, all other tokens are replaced by noise
    """

    def __init__(self, blocks: Blocks, recompute: bool = False):
        self.blocks, self.recompute = blocks, recompute
        self.noise: str | None = None
        self.own: dict[nn.Module, Any] = {}  # what stood in the place of forward functions that are replaced
        self.clear()

    def begin(self, inputs: dict[str, Any]) -> None:
        """A forward pass, unless these rows cannot be packed."""
        self.clear()
        masks = {stack: self.blocks.mask(stack, inputs) for stack in self.blocks.stacks}
        if any(mask is not None and mask.dim() != 2 for mask in masks.values()):
            return
        found = {id(mask): Packing.of(mask) for mask in masks.values() if mask is not None}  # two stacks may share one
        self.active = all(found.values())
        self.packings = {stack: packing for stack, mask in masks.items() if (packing := found.get(id(mask)))}

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
        for module in dict.fromkeys(self.blocks.calls):
            if self.recompute or module in self.blocks.fused or module in self.blocks.packed:
                self.own[module] = module.__dict__.get("forward")
                module.forward = functools.partial(self._forward, module, module.forward)

    def put_back(self) -> None:
        for module, own in self.own.items():
            del module.forward
            if own is not None:  # somebody else's
                module.forward = own
        self.own.clear()

    def _forward(self, module: nn.Module, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again = self.recompute and torch.is_grad_enabled()
        around = recomputed if again else _as_it_is
        if again:  # what ran twice would be kept twice
            kwargs = {name: None if name in CACHES else value for name, value in kwargs.items()}
        if not self.active or not self.packs(module):
            return around(stock)(*args, **kwargs)
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        calls, stacks, fused = self.blocks.calls, self.blocks.stacks, self.blocks.fused.get(module)
        while calls[self.at] is not module:
            self.at += 1
        stack, self.at = stacks[self.at], self.at + 1
        ends = self.at == len(calls)
        with torch.autocast(x.device.type, enabled=False):
            given = self._given(module, stack, x, functools.partial(_arguments, module, args, kwargs))
            packing = given.packing
            x = x.squeeze(0) if x is self.handed else packing.pack(x)  # of squeeze the gradient is a view; of x[0], zeros and a copy
            if fused and ends and self.blocks.leaves:
                tokens = packing.ends(self.blocks.leaves == "last")
                return self._answer(module, stack, packing.unpack(around(fused)(x, replace(given, tokens=tokens)), tokens))
            if fused:
                x = around(fused)(x, given)
        if not fused:
            x = around(functools.partial(self._by_itself, stock, packing, args, kwargs))(x)
        if ends and self.noise:
            tokens = packing.ends(self.noise == "last")
            x = torch.randn_like(x).index_copy(0, tokens, x[tokens])
        goes_on = not ends and stacks[self.at] == stack and self.packs(calls[self.at])
        self.handed = x[None] if goes_on else None
        return self._answer(module, stack, packing.unpack(x) if self.handed is None else self.handed)

    def packs(self, module: nn.Module) -> bool:
        return module in self.blocks.fused or module in self.blocks.packed

    def _by_itself(self, stock: Callable[..., Any], packing: Packing, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
        """The block's own modules on packed tokens (N, d), which are one row to them, except to attention."""
        kwargs = {name: None if name in CACHES else _packed(value, packing) for name, value in kwargs.items() if name != "hidden_states"}
        with attention.instead(functools.partial(attend, packing)):
            answer = stock(x[None], *(_packed(value, packing) for value in args[1:]), **kwargs)
        return (answer[0] if isinstance(answer, tuple) else answer).squeeze(0)

    def _given(self, module: nn.Module, stack: str | None, x: Tensor, arguments: Callable[[], dict[str, Any]]) -> Given:
        """What a block of this stack is given; only what differs from the block before is made anew."""
        given = self.given.get(stack) or Given(self._packing(stack, x))
        turns = self._turns(arguments()[TURNS], given.packing) if module in self.blocks.fused and self.blocks.turned.get(module) else None
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
        if owner is None or module not in self.blocks.fused:
            return None
        if owner not in self.distances:
            ahead, behind = owner.compute_bias(1, reach)[0, :, 0], owner.compute_bias(reach, 1)[0, :, :, 0]
            self.distances[owner] = torch.cat([behind.flip(1), ahead[:, 1:], ahead.new_zeros(len(ahead), LANES)], 1).float()
        return self.distances[owner]

    def _others(self, module: nn.Module, arguments: Callable[[], dict[str, Any]]) -> Tensor | None:
        fused = self.blocks.fused.get(module)
        return arguments().get(OTHERS) if fused and fused.crosses else None

    def _answer(self, module: nn.Module, stack: str | None, x: Tensor) -> Any:
        """As the block itself answers."""
        if (count := self.blocks.tuples.get(module)) is None:
            return x
        shift, length = None, self.given[stack].packing.shape[1]
        if module in self.blocks.shifts and any(not self.packs(m) for m, of in zip(self.blocks.calls, self.blocks.stacks, strict=True) if of == stack):
            shift = self.blocks.shifts[module].compute_bias(length, length)  # which the first block of a stack makes for all
        return (x, shift, *[None] * count)[:count]


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _packed(value: Any, packing: Packing) -> Any:
    """What belongs to the tokens (1 or B, T, ...) for packed ones (1, N, ...); no mask, as attention keeps rows apart by itself."""
    if isinstance(value, tuple):
        return tuple(_packed(one, packing) for one in value)
    if not isinstance(value, Tensor):
        return value
    rows, width = packing.shape
    if value.dim() in (2, 3) and value.shape[1] == width and value.shape[0] in (1, rows):
        return packing.pack(value.expand(rows, *value.shape[1:]))[None]
    return None if value.dim() == 4 else value


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name"""
    return {**dict(zip(_names(type(module).forward), args, strict=False)), **kwargs}


@functools.cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Of positional arguments, without self."""
    return tuple(name for name in inspect.signature(function).parameters if name != "self")
