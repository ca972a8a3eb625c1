"""Which blocks of a model run fused: found out on the first rows that it is given, and tried there before it is relied on."""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Block
from luthier.compute import attention, block
from luthier.compute.adamw import CAN_BE_NARROW, take_gradients_in
from luthier.compute.block import FusedBlock, Step
from luthier.compute.kernels import kernel
from luthier.compute.packing import Packing
from luthier.compute.products import Linear
from luthier.errors import UserError
from luthier.methods.changes import Changed
from luthier.methods.inserts import Sequential

SAME = {torch.float32: 1e-4, torch.float64: 1e-9}  # of outputs of the two ways, of the largest
ROUGH = 5e-2  # in other types
TURNS = "position_embeddings"  # the argument of a block that brings cosines and sines of rotary positions
UNUSUAL = ("past_key_values", "cache", "use_cache", "output_attentions", "output_hidden_states", "inputs_embeds", "encoder_hidden_states", "decoder_input_ids", "head_mask")


class Fusing:
    """A context in which `model` runs fused what can be.

    dtype     of the products; None: that of their input
    leave     blocks that somebody else runs
    learning  whether what is open for training changes meanwhile
    narrow    whether weights of linear layers may take their gradients in the type of the products, which is what they are computed in
    then      called once with the modules of the fused blocks, as soon as they are known
    remember  keep what is found out, with its laid-out weights, as long as the model lives, for the next context like this one
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, leave: Collection[nn.Module], learning: bool, narrow: bool, then: Callable[[Collection[nn.Module]], None], remember: bool = False):
        self.model, self.dtype, self.learning, self.narrow, self.then = model, dtype, learning, narrow, then
        self.remember = remember and not learning and not leave
        self.leave = {id(module) for module in leave}
        self.blocks: dict[nn.Module, FusedBlock] = {}
        self.calls: list[nn.Module] = []  # the modules of all blocks, in the order of the forward pass
        self.turned: dict[nn.Module, int] = {}  # numbers of a head that rotary positions turn in each
        self.own: dict[nn.Module, Any] = {}  # what stood in the place of forward functions that are replaced
        self.narrowed: list[nn.Parameter] = []
        self.known = False
        self.leaves: str | None = None  # first or last: the only token of a row that matters behind the last block
        self.noise: str | None = None
        self._clear()

    def __enter__(self) -> Self:
        self._hooks = [self.model.register_forward_pre_hook(self._before, with_kwargs=True), self.model.register_forward_hook(self._after, always_call=True)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._put_back()
        for weight in self.narrowed:
            take_gradients_in(weight, weight.dtype)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._clear()
        usual = not args and not any(kwargs.get(name) is not None and kwargs[name] is not False for name in UNUSUAL)
        if not self.known and usual and (rows := _telling(kwargs)) is not None:
            self.known = True  # at once, as finding out runs the model too
            if not (self.remember and self._recall()):
                self._find_out({name: x[rows] if isinstance(x, Tensor) and x.dim() and len(x) > 1 else x for name, x in kwargs.items()})
                if self.remember and self.blocks:
                    _remembered[self.model] = _Found(self.dtype, _references(self.model), _numbers(self.blocks), self.calls, self.turned, self.leaves, self.blocks)
            if self.narrow and self.dtype == torch.bfloat16 and CAN_BE_NARROW and kernel("adamw", torch.float32):
                self.narrowed = self._read_once()
                for weight in self.narrowed:
                    take_gradients_in(weight, torch.bfloat16)
            self.then(self.blocks)
            self._clear()
        mask = kwargs.get("attention_mask")
        if not usual or not self.blocks or (mask is not None and mask.dim() != 2):
            return
        self.packing = Packing.of(mask) if mask is not None else None
        self.active = mask is None or self.packing is not None

    def _after(self, *_: Any) -> None:
        self._clear()

    def _clear(self) -> None:
        """Between two forward passes."""
        self.active = False
        self.packing: Packing | None = None
        self.at = 0  # the next call
        self.handed: Tensor | None = None  # what the last fused block handed on in packed form
        self.turns: tuple[Any, tuple[Tensor, Tensor]] | None = None  # of rotary positions: what the last block was given, and the same packed

    def _recall(self) -> bool:
        """Whether this model was looked at before, and is what it was then."""
        found = _remembered.get(self.model)
        if found is None or found.dtype != self.dtype or _spells_out(self.model) or found.modules != _references(self.model) or found.numbers != _numbers(found.blocks):
            return False
        self.calls, self.turned, self.leaves, self.blocks = found.calls, found.turned, found.leaves, found.blocks
        self._replace()
        return True

    def _find_out(self, inputs: dict[str, Any]) -> None:
        """By `forward` itself: the hooks of the model, its own and those of others, belong to the pass that is under way."""
        if _spells_out(self.model):
            return
        try:
            anatomy = Anatomy.of(self.model)
        except (UserError, AttributeError):
            return
        blocks = [b for b in anatomy.blocks if id(b.module) not in self.leave]
        self.calls = [b.module for b in blocks]
        modes = {module: module.training for module in self.model.modules()}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
                steps = self._trace(inputs)
                self.blocks = self._read(blocks, steps, None)
                found = self._same(inputs) if self.blocks else None
                if found is None:
                    self.blocks = {}
                    return
                self.leaves = next((which for which in ("first", "last") if self._only_leaves(inputs, which, found)), None)
                self.blocks = self._read(blocks, steps, self.dtype)
        except Exception:  # of a model that is made otherwise than its roles tell; if the user's own call is wrong, it fails again without us
            logging.getLogger(__name__).debug("blocks stay as they are", exc_info=True)
            self.blocks = {}
            return
        finally:
            for module, mode in modes.items():
                module.training = mode
        self._replace()

    def _read(self, blocks: list[Block], steps: dict[nn.Module, list[Step]], dtype: torch.dtype | None) -> dict[nn.Module, FusedBlock]:
        return {b.module: found for b in blocks if (found := block.read(b, steps[b.module], self.turned.get(b.module, 0), dtype, self.learning))}

    def _trace(self, inputs: dict[str, Any]) -> dict[nn.Module, list[Step]]:
        """The innermost modules and the attention that each block goes through once in training, in the order in which they begin; what a method changed or inserted is one."""
        steps: dict[nn.Module, list[Step]] = {module: [] for module in self.calls}
        heard: list[Step] = []
        hooks = []
        for module in steps:
            hooks.append(module.register_forward_pre_hook(lambda *_: heard.clear()))
            hooks.append(module.register_forward_pre_hook(self._hear_turns, with_kwargs=True))
            hooks.append(module.register_forward_hook(lambda m, *_: steps.__setitem__(m, list(heard))))
            inserts = [m for m in module.modules() if isinstance(m, Sequential)]
            units = {*(m for m in module.modules() if isinstance(m, Changed)), *(m.body for m in inserts)}
            inner = {*inserts, *(child for m in units for child in m.modules() if child is not m)}
            for m in module.modules():
                if m in units or (m not in inner and all(child in inserts for child in m.children())):
                    hooks.append(m.register_forward_pre_hook(lambda m, *_: heard.append(m)))
        try:
            self.model.train()
            with attention.listening(heard):
                self.model.forward(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return steps

    def _hear_turns(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get(TURNS) is not None:
            self.turned[module] = kwargs[TURNS][0].shape[-1]

    def _same(self, inputs: dict[str, Any]) -> Any:
        """The model's output with fused blocks if it is the one without them, else None."""
        self.model.eval()
        expected = _answer(self.model.forward(**inputs), inputs)
        found = self._tried(inputs)
        if found is None or not (_answer(found, inputs) - expected).abs().max() <= SAME.get(expected.dtype, ROUGH) * expected.abs().max().clamp(min=1):
            return None
        return found

    def _only_leaves(self, inputs: dict[str, Any], which: str, expected: Any) -> bool:
        """Whether nothing else of a row than its first or last token matters behind the last block: noise in the place of all others changes no bit of the output."""
        last = self.blocks.get(self.calls[-1])
        mask = inputs.get("attention_mask")
        if mask is not None and int(mask.sum(1).min()) < 2:  # rows of one token show nothing
            return False
        if last is None or (which == "first" and last.causal):
            return False
        self.noise = which
        try:
            noisy = self._tried(inputs)
        finally:
            self.noise = None
        return all(torch.equal(a, b) for a, b in zip(_tensors(expected), _tensors(noisy), strict=True))

    def _tried(self, inputs: dict[str, Any]) -> Any:
        """The model's output with fused blocks, or None where its rows cannot be packed."""
        self._clear()
        mask = inputs.get("attention_mask")
        self.packing = Packing.of(mask) if mask is not None else None
        if mask is not None and self.packing is None:
            return None
        self.active = True
        self._replace()
        try:
            return self.model.forward(**inputs)
        finally:
            self._put_back()
            self._clear()

    def _read_once(self) -> list[nn.Parameter]:
        """The learning weights in float32 of fused linear layers that a pass reads once, so that nothing is added to their gradients."""
        owners = Counter(id(p) for module in self.model.modules() for p in module.parameters(recurse=False))
        pieces = [piece for module, found in self.blocks.items() if self.calls.count(module) == 1 for piece in found.pieces]
        weights = [module.weight for piece in pieces if isinstance(piece, Linear) and piece.changing for module in piece.modules]
        return [p for p in weights if isinstance(p, nn.Parameter) and p.requires_grad and p.dtype == torch.float32 and owners[id(p)] == 1]

    def _replace(self) -> None:
        for module in self.blocks:
            self.own[module] = module.__dict__.get("forward")
            module.forward = functools.partial(self._forward, module, module.forward)

    def _put_back(self) -> None:
        for module, own in self.own.items():
            del module.forward
            if own is not None:  # somebody else's
                module.forward = own
        self.own.clear()

    def _forward(self, module: nn.Module, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return stock(*args, **kwargs)
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        while self.calls[self.at] is not module:
            self.at += 1
        self.at += 1
        if self.packing is None:
            self.packing = Packing.whole(*x.shape[:2])
        if x is not self.handed:
            x = self.packing.pack(x)
        else:
            x = x.squeeze(0)  # of which the gradient is a view; of x[0], zeros and a copy
        ends = self.at == len(self.calls)
        turns = self._turns(kwargs[TURNS]) if self.turned.get(module) else None
        with torch.autocast("cpu", enabled=False):
            if ends and self.leaves:
                tokens = self.packing.ends(self.leaves == "last")
                return self.packing.unpack(self.blocks[module](x, self.packing, tokens, turns), tokens)
            x = self.blocks[module](x, self.packing, None, turns)
        if ends and self.noise:
            tokens = self.packing.ends(self.noise == "last")
            x = torch.randn_like(x).index_copy(0, tokens, x[tokens])
        if self.at < len(self.calls) and self.calls[self.at] in self.blocks:
            self.handed = x[None]
            return self.handed
        self.handed = None
        return self.packing.unpack(x)

    def _turns(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1 or B, T, k) -> (N, k) each"""
        assert self.packing
        if self.turns is None or self.turns[0] is not given:
            cosines, sines = (self.packing.pack(x.expand(self.packing.shape[0], -1, -1)).float().contiguous() for x in given)
            self.turns = given, (cosines, sines)
        return self.turns[1]


@dataclass(frozen=True)
class _Found:
    """What was found out about a model, and by what it is known again."""

    dtype: torch.dtype | None
    modules: list[weakref.ref[nn.Module]]
    numbers: list[tuple[int, float]]
    calls: list[nn.Module]
    turned: dict[nn.Module, int]
    leaves: str | None
    blocks: dict[nn.Module, FusedBlock]


_remembered: weakref.WeakKeyDictionary[nn.Module, _Found] = weakref.WeakKeyDictionary()


def _references(model: nn.Module) -> list[weakref.ref[nn.Module]]:
    """Of all modules in their order; not the modules, as they would keep the model."""
    return [weakref.ref(module) for module in model.modules()]


def _numbers(blocks: dict[nn.Module, FusedBlock]) -> list[tuple[int, float]]:
    """Where the parameters of linear layers lie, and their sums: a change in place need not be counted by torch, and copies of these weights are kept."""
    linears = {module: None for found in blocks.values() for piece in found.pieces if isinstance(piece, Linear) for module in piece.modules}
    with torch.no_grad():
        return [(p.data_ptr(), float(p.sum(dtype=torch.float32))) for module in linears for p in module.parameters()]


def _spells_out(model: nn.Module) -> bool:
    """Whether more is asked of the model than it answers with fused blocks."""
    return any(getattr(model.config, name, False) for name in ("output_attentions", "output_hidden_states"))


def _telling(inputs: dict[str, Any]) -> Tensor | slice | None:
    """The rows on which blocks are tried: a long one and a short one, or None where all have one token, on which attention and positions show nothing."""
    mask = inputs.get("attention_mask")
    if mask is None:
        ids = inputs.get("input_ids")
        return slice(2) if ids is None or ids.shape[-1] > 1 else None
    if mask.dim() != 2:
        return slice(2)
    lengths = (mask != 0).sum(1)
    order = lengths.argsort()
    order = order[lengths[order] > 1]
    return order[[-1, 0]] if len(order) else None


def _answer(found: Any, inputs: dict[str, Any]) -> Tensor:
    out = found.logits if hasattr(found, "logits") else found.last_hidden_state
    mask = inputs.get("attention_mask")
    return out * mask.unsqueeze(-1) if mask is not None and out.shape[:2] == mask.shape else out


def _tensors(found: Any) -> list[Tensor]:
    return [x for x in found.values() if isinstance(x, Tensor)]
