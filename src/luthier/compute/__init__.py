"""How a model is run, whatever runs it: the same answers, by the route that this machine is fast at.

Blocks run on packed rows, which hold no padding: on the processor those that can be read off by their roles with a few fused
steps, the others through their own modules. There, too, attention, dropout and frozen linear layers take other routes than stock
torch's. This holds inside of `prepared`; outside of it the model is as it was.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from luthier import machine
from luthier.compute import attention, kernels, linear
from luthier.compute.dropout import dropout
from luthier.compute.fusing import Fusing
from luthier.errors import UserError
from luthier.machine.setting import keep_memory

LARGE = 1 << 22  # numbers of a table of embeddings from which on a gradient of a step's rows pays

_inside: weakref.WeakKeyDictionary[nn.Module, Fusing] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def prepared(model: nn.Module, device: str | torch.device, precision: str, leave: Collection[nn.Module] = (), learning: bool = True, remember: bool = False, sparse: bool = False, narrow: bool = False, recompute: bool = False) -> Iterator[None]:
    """Inside, `model` (a transformers model, and on `device`) takes the fast routes there in `precision` (fp32, bf16, or int8 where nothing learns), which each forward pass says by `autocast`.

    leave     blocks that somebody else runs
    learning  whether what is open for training changes meanwhile; all else must stay as it is
    remember  of a model that does not learn, keep what was found out about it for the next time, with copies of its weights
    sparse    whether gradients of large tables of embeddings may be sparse tensors of the rows that were looked up
    narrow    whether those of linear layers may be in bf16, which is what they are computed in: for optimisers that take them, and steps of one backward pass
    recompute  whether blocks keep nothing for their gradients but what they read, and run once more instead (gradient checkpointing)
    May be nested: the outermost counts. Raises UserError for int8 where something learns, and anywhere but on the processor.
    """
    if precision == "int8" and (learning or torch.device(device).type != "cpu"):
        raise UserError("int8 is for predicting and embedding on the processor; use fp32 or bf16 here.")
    with contextlib.ExitStack() as undo:
        if torch.device(device).type in ("cpu", "cuda") and model not in _inside:
            _enter(model, torch.device(device), precision, leave, learning, remember, sparse, narrow, recompute, undo)
        yield


def padded(model: nn.Module) -> tuple[int, int]:
    """How many blocks of a prepared model keep the padding of their batches, of how many; (0, 0) where that is not known."""
    return _inside[model].padded if model in _inside else (0, 0)


def ready(say: Callable[[str], None]) -> None:
    """Find out what this machine does best, and compile the kernels, where that was not done yet: which takes some seconds, and is said."""
    machine.ensure(say)
    kernels.ensure(say)


def autocast(device: str | torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Around each forward pass by itself: torch keeps weights that learn in bf16 until its end."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def route(device: str | torch.device) -> str:
    """On what, and by whose kernels, a model is computed: another route may give other last bits."""
    name = str(device)
    if not name.startswith("cpu"):
        return machine.describe(name)
    return f"{machine.describe()} with {torch.get_num_threads()} threads, oneDNN {'/'.join(machine.in_force())}, {'our' if kernels.library() else 'no'} kernels"


@contextlib.contextmanager
def running(model: nn.Module, device: str | torch.device, precision: str, remember: bool = False) -> Iterator[None]:
    """Both at once, for a model that does not learn meanwhile."""
    with prepared(model, device, precision, learning=False, remember=remember), autocast(device, precision):
        yield


def _enter(model: nn.Module, device: torch.device, precision: str, leave: Collection[nn.Module], learning: bool, remember: bool, sparse: bool, narrow: bool, recompute: bool, undo: contextlib.ExitStack) -> None:
    on_processor = device.type == "cpu"
    if on_processor:
        keep_memory()
    gc.freeze()  # what is there now stays; looking through it again and again took 3 % of a small model's training step
    undo.callback(gc.unfreeze)
    for config in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        if config._attn_implementation == "sdpa":
            config._attn_implementation = {"": attention.NAME}  # type: ignore[assignment]  # of itself alone, and not of the configs inside it
            undo.callback(setattr, config, "_attn_implementation", {"": "sdpa"})
    tables = [m for m in model.modules() if type(m) is nn.Embedding and _takes_rows(m)] if sparse and on_processor else []
    for module in tables:
        module.sparse = True
        undo.callback(setattr, module, "sparse", False)
    dtype = {"bf16": torch.bfloat16, "int8": torch.int8}.get(precision)
    undo.callback(_inside.pop, model, None)
    other_routes = functools.partial(_stock_modules, model, dtype, undo) if on_processor else lambda fused: None
    _inside[model] = undo.enter_context(Fusing(model, device, dtype, leave, learning, narrow and on_processor, other_routes, remember, recompute))


def _stock_modules(model: nn.Module, dtype: torch.dtype | None, undo: contextlib.ExitStack, fused: Collection[nn.Module]) -> None:
    """Other routes for the modules outside of the `fused` blocks."""
    inside = {id(m) for block in fused for m in block.modules()}
    cast = linear.Cast()
    undo.callback(cast.forget)
    if dtype == torch.int8:
        other = {m: functools.partial(linear.in_int8, m) for m in linear.inner_linears(model)}
    else:
        other = {m: functools.partial(linear.in_bf16, m, cast) for m in linear.frozen_linears(model)} if dtype else {}
    for module in model.modules():
        if id(module) in inside:
            continue
        if type(module) is nn.Dropout and not module.inplace:
            _replace(module, "forward", functools.partial(_drop, module), undo)
        elif module in other:
            _replace(module, linear.place(module), other[module](), undo)


def _takes_rows(module: nn.Embedding) -> bool:
    return module.weight.requires_grad and module.weight.numel() >= LARGE and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def _drop(module: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    return dropout(x, module.p) if module.training else x


def _replace(module: nn.Module, name: str, value: object, undo: contextlib.ExitStack) -> None:
    if name not in module.__dict__:  # someone else's replacement stays
        module.__dict__[name] = value
        undo.callback(module.__dict__.pop, name, None)
