"""`luthier.apply`: methods alone, on a model and in a training loop of one's own."""

from __future__ import annotations

import copy
from typing import Any

import transformers
from torch import nn

from luthier.anatomy import Anatomy
from luthier.methods.engine import install
from luthier.methods.planner import plan
from luthier.methods.stack import parse
from luthier.methods.stock_adapter import TASK_TYPES


def apply(model: nn.Module, stack: Any, *, seed: int = 0, heads: bool = True) -> nn.Module:
    """Apply a stack to a transformers model in place, and open exactly what it trains.

    heads  whether the task's head learns too (a language model's output layer is no new head and stays as the stack says)
    Returns the model (wrapped where peft has to wrap it); `model.luthier` is the `Fitted` with `.trainable`, `.places` and `.merge()`.
    Raises UserError for conflicts, before the model is touched.
    """
    stack = parse(stack)
    anatomy = Anatomy.of(model)
    new = head_names(model, anatomy) if heads else ()
    plan(_shapes(model), stack, new, _task_type(model))
    fitted = install(model, stack, seed, new, _task_type(model), anatomy)
    fitted.model.luthier = fitted  # type: ignore[assignment]
    return fitted.model


def _shapes(model: nn.Module) -> nn.Module:
    """The model on the meta device, its weights not copied."""
    tensors = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, tensors | {id(b): b.to("meta") for b in model.buffers()})


def head_names(model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """Parameters of a task's head; the output layer of a language model is none."""
    language = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    output = {id(p) for p in language.parameters()} if language is not None else set()
    return tuple(t.name for t in anatomy.tensors() if t.role == "head" and id(t.parameter) not in output)


def _task_type(model: nn.Module) -> str | None:
    """peft's name for the task of the model's class."""
    for auto_class, kind in TASK_TYPES.items():
        mapping = getattr(transformers, auto_class)._model_mapping
        if type(model.config) in mapping and mapping[type(model.config)] is type(model):
            return kind
    return None
