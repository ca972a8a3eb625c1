"""Which blocks of a model run fused: found out on the first rows that it is given, and tried there before it is relied on."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Block
from luthier.compute import attention, reading
from luthier.compute.adamw import CAN_BE_NARROW, take_gradients_in
from luthier.compute.block import FusedBlock
from luthier.compute.kernels import kernel
from luthier.compute.packed_pass import TURNS, UNUSUAL, Blocks, Running
from luthier.compute.products import Linear
from luthier.compute.reading import Step
from luthier.errors import UserError
from luthier.methods.changes import Changed
from luthier.methods.inserts import Parallel, Sequential

SAME = {torch.float32: 1e-4, torch.float64: 1e-9}  # of outputs of the two ways, of the largest
ROUGH = 5e-2  # in other types


class Fusing:
    """A context in which `model` runs fused what can be, and on packed rows what can be of the rest.

    device    where the model is; on a GPU nothing runs fused
    dtype     of the products; None: that of their input
    leave     blocks that somebody else runs
    learning  whether what is open for training changes meanwhile
    narrow    whether weights of linear layers may take their gradients in the type of the products, which is what they are computed in
    then      called once with the modules of the fused blocks, as soon as they are known
    remember  keep what is found out, with its laid-out weights, as long as the model lives, for the next context like this one
    recompute whether blocks run once more on their way back instead of keeping what they computed
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None, leave: Collection[nn.Module], learning: bool, narrow: bool, then: Callable[[Collection[nn.Module]], None], remember: bool = False, recompute: bool = False):
        self.model, self.device, self.dtype, self.learning, self.narrow, self.then = model, device, dtype, learning, narrow, then
        self.recompute, self.remember = recompute, remember and not learning and not leave
        self.leave = {id(module) for module in leave}
        self.found, self.known = Blocks(), False
        self.running = Running(self.found)
        self.narrowed: list[nn.Parameter] = []

    def __enter__(self) -> Self:
        self._hooks = [self.model.register_forward_pre_hook(self._before, with_kwargs=True), self.model.register_forward_hook(self._after, always_call=True)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.running.put_back()
        for weight in self.narrowed:
            take_gradients_in(weight, weight.dtype)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running.clear()
        usual = not args and not any(kwargs.get(name) is not None and kwargs[name] is not False for name in UNUSUAL)
        if not self.known and usual and (rows := _telling(kwargs)) is not None:
            self.known = True  # at once, as finding out runs the model too
            self.found = (self.remember and _recalled(self.model, self.dtype)) or self._find_out({name: x[rows] if isinstance(x, Tensor) and x.dim() and len(x) > 1 else x for name, x in kwargs.items()})
            self.running = Running(self.found, self.recompute)
            self.running.replace()
            if self.remember and self.found.take_packed_rows:
                _remembered[self.model] = _Known(self.dtype, _references(self.model), _numbers(self.found), self.found)
            if self.narrow and self.dtype == torch.bfloat16 and CAN_BE_NARROW and kernel("adamw", torch.float32):
                self.narrowed = self._read_once()
                for weight in self.narrowed:
                    take_gradients_in(weight, torch.bfloat16)
            self.then(self.found.fused)
        if usual and self.found.take_packed_rows:
            self.running.begin(kwargs)

    @property
    def padded(self) -> tuple[int, int]:
        """How many blocks keep the padding of a batch, and how many there are, once that is known."""
        modules = set(self.found.calls)
        return sum(not self.running.packs(module) for module in modules), len(modules)

    def _after(self, *_: Any) -> None:
        self.running.clear()

    def _find_out(self, inputs: dict[str, Any]) -> Blocks:
        """By `forward` itself: the hooks of the model, its own and those of others, belong to the pass that is under way."""
        try:
            anatomy = Anatomy.of(self.model)
        except (UserError, AttributeError):
            return Blocks()
        of_model = [b for b in anatomy.blocks if id(b.module) not in self.leave]
        plain = Blocks([b.module for b in of_model], [b.stack for b in of_model])
        if _spells_out(self.model):
            return plain
        blocks = Blocks(plain.calls, plain.stacks, shifts=_shifts(anatomy))
        modes = {module: module.training for module in self.model.modules()}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.autocast(self.device.type, enabled=False):
                steps = self._trace(blocks, inputs)
                blocks.fused = self._read(of_model, blocks, steps, None)
                by_themselves = {b.module for b in of_model if b.module not in blocks.fused and _attends_once(steps[b.module])}
                answer = None
                for candidates in (by_themselves, set[nn.Module]()):
                    blocks.packed = candidates
                    if blocks.take_packed_rows and (answer := self._same(blocks, inputs)) is not None:
                        break
                if answer is None:
                    return plain
                if self.device.type == "cuda":
                    self._goes_back(blocks, inputs)
                blocks.leaves = next((which for which in ("first", "last") if self._only_leaves(blocks, inputs, which, answer)), None)
                blocks.fused = self._read(of_model, blocks, steps, self.dtype)
                return blocks
        except Exception:  # of a model that is made otherwise than its roles tell; if the user's own call is wrong, it fails again without us
            logging.getLogger(__name__).debug("blocks stay as they are", exc_info=True)
            return plain
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _read(self, of_model: list[Block], blocks: Blocks, steps: dict[nn.Module, list[Step]], dtype: torch.dtype | None) -> dict[nn.Module, FusedBlock]:
        if self.device.type != "cpu":
            return {}
        found = {b.module: reading.read(b, steps[b.module], blocks.turned.get(b.module, 0), b.module in blocks.shifts, dtype, self.learning) for b in of_model}
        return {module: fused for module, fused in found.items() if fused}

    def _trace(self, blocks: Blocks, inputs: dict[str, Any]) -> dict[nn.Module, list[Step]]:
        """The innermost modules and the attention that each block goes through once in training, in the order in which they begin; what a method changed or inserted is one."""
        steps: dict[nn.Module, list[Step]] = {module: [] for module in blocks.calls}
        heard: list[Step] = []
        hooks = []

        def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard.clear()
            if kwargs.get(TURNS) is not None:
                blocks.turned[module] = kwargs[TURNS][0].shape[-1]

        def ends(module: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
            steps[module] = list(heard)
            if isinstance(answer, tuple):
                blocks.tuples[module] = len(answer)

        for module in steps:
            hooks += [module.register_forward_pre_hook(begins, with_kwargs=True), module.register_forward_hook(ends)]
            inserts = [m for m in module.modules() if isinstance(m, Sequential | Parallel)]
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

    def _same(self, blocks: Blocks, inputs: dict[str, Any]) -> Any:
        """The model's output with fused blocks if it is the one without them, else None."""
        self.model.eval()
        mask = blocks.mask(blocks.stacks[-1], inputs)
        expected = _answer(self.model.forward(**inputs), mask)
        found = self._tried(blocks, inputs)
        if found is None or not (_answer(found, mask) - expected).abs().max() <= SAME.get(expected.dtype, ROUGH) * expected.abs().max().clamp(min=1):
            return None
        return found

    def _only_leaves(self, blocks: Blocks, inputs: dict[str, Any], which: str, expected: Any) -> bool:
        """Whether nothing else of a row than its first or last token matters behind the last block: noise in the place of all others changes no bit of the output."""
        last = blocks.fused.get(blocks.calls[-1])
        mask = blocks.mask(blocks.stacks[-1], inputs)
        if mask is not None and int(mask.sum(1).min()) < 2:  # rows of one token show nothing
            return False
        if last is None or (which == "first" and last.causal):
            return False
        noisy = self._tried(blocks, inputs, which)
        return all(torch.equal(a, b) for a, b in zip(_tensors(expected), _tensors(noisy), strict=True))

    def _tried(self, blocks: Blocks, inputs: dict[str, Any], noise: str | None = None) -> Any:
        """The model's output with fused blocks, or None where its rows cannot be packed."""
        running = Running(blocks)
        running.noise = noise
        running.begin(inputs)
        if not running.active:
            return None
        running.replace()
        try:
            return self.model.forward(**inputs)
        finally:
            running.put_back()

    def _goes_back(self, blocks: Blocks, inputs: dict[str, Any]) -> None:
        """Raises where attention over jagged rows cannot be had in the type of the products, or has no gradient in it."""
        learning = [p for p in self.model.parameters() if p.requires_grad]
        with torch.set_grad_enabled(self.learning and bool(learning)), torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out = _answer(self._tried(blocks, inputs), None)
            if out.requires_grad:
                torch.autograd.grad(out.float().sum(), learning, allow_unused=True)

    def _read_once(self) -> list[nn.Parameter]:
        """The learning weights in float32 of fused linear layers that a pass reads once, so that nothing is added to their gradients."""
        owners = Counter(id(p) for module in self.model.modules() for p in module.parameters(recurse=False))
        pieces = [piece for module, block in self.found.fused.items() if self.found.calls.count(module) == 1 for piece in block.parts]
        weights = [module.weight for piece in pieces if isinstance(piece, Linear) and piece.changing for module in piece.modules]
        return [p for p in weights if isinstance(p, nn.Parameter) and p.requires_grad and p.dtype == torch.float32 and owners[id(p)] == 1]


@dataclass(frozen=True)
class _Known:
    """What was found out about a model, and by what it is known again."""

    dtype: torch.dtype | None
    modules: list[weakref.ref[nn.Module]]
    numbers: list[tuple[int, float]]
    found: Blocks


_remembered: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _recalled(model: nn.Module, dtype: torch.dtype | None) -> Blocks | None:
    """What was found out about this model, if it is what it was then."""
    known = _remembered.get(model)
    if known is None or known.dtype != dtype or _spells_out(model) or known.modules != _references(model) or known.numbers != _numbers(known.found):
        return None
    return known.found


def _references(model: nn.Module) -> list[weakref.ref[nn.Module]]:
    """Of all modules in their order; not the modules, as they would keep the model."""
    return [weakref.ref(module) for module in model.modules()]


def _numbers(blocks: Blocks) -> list[tuple[int, float]]:
    """Where the parameters of linear layers lie, and their sums: a change in place need not be counted by torch, and copies of these weights are kept."""
    linears = {module: None for fused in blocks.fused.values() for piece in fused.parts if isinstance(piece, Linear) for module in piece.modules}
    with torch.no_grad():
        return [(p.data_ptr(), float(p.sum(dtype=torch.float32))) for module in linears for p in module.parameters()]


def _attends_once(steps: list[Step]) -> bool:
    """And so that each row can be attended to by itself."""
    calls = [step for step in steps if isinstance(step, attention.Call)]
    return len(calls) == 1 and calls[0].plain and not calls[0].shifted


def _shifts(anatomy: Anatomy) -> dict[nn.Module, Any]:
    """Of each block whose attention adds something for the distance of two tokens, the module that says what: its own, or that of the first of its stack."""
    owners: dict[str | None, Any] = {}
    found = {}
    for block in anatomy.blocks:
        if (site := block.sites.get("attention.bias")) is not None:
            owners[block.stack] = anatomy.model.get_submodule(site.name.rpartition(".")[0])
        if block.stack in owners:
            found[block.module] = owners[block.stack]
    return found


def _spells_out(model: nn.Module) -> bool:
    """Whether more is asked of the model than it answers with fused blocks."""
    return any(getattr(model.config, name, False) for name in ("output_attentions", "output_hidden_states"))


def _telling(inputs: dict[str, Any]) -> Tensor | slice | None:
    """The rows on which blocks are tried: a long one and a short one, or None where all have one token, on which attention and positions show nothing."""
    mask, answers = inputs.get("attention_mask"), inputs.get("decoder_input_ids")
    if answers is not None and answers.shape[-1] == 1:
        return None
    if mask is None:
        ids = inputs.get("input_ids")
        return slice(2) if ids is None or ids.shape[-1] > 1 else None
    if mask.dim() != 2:
        return slice(2)
    lengths = (mask != 0).sum(1)
    order = lengths.argsort()
    order = order[lengths[order] > 1]
    return order[[-1, 0]] if len(order) else None


def _answer(output: Any, mask: Tensor | None) -> Tensor:
    """The part of a model's output that is read: that of padding is not."""
    out: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return out * mask.unsqueeze(-1) if mask is not None and out.shape[:2] == mask.shape else out


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in output.values() if isinstance(x, Tensor)]
