"""Roles of an architecture that no role map covers, where its module tree leaves no doubt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.anatomy.family import Family, Stack
from luthier.errors import UserError, did_you_mean

OWN = "luthier_"  # modules that methods brought carry this prefix and are no part of the anatomy

# last words of module paths, as the field's code bases spell them
WORDS = {
    "attention.query": ("q_proj", "query", "q_lin", "q", "wq", "query_proj"),
    "attention.key": ("k_proj", "key", "k_lin", "k", "wk", "key_proj"),
    "attention.value": ("v_proj", "value", "v_lin", "v", "wv", "value_proj"),
    "attention.output": ("o_proj", "out_proj", "out_lin", "o", "attention.output.dense", "self_attn.dense"),
    "mlp.gate": ("gate_proj", "wi_0"),
    "mlp.up": ("up_proj", "fc1", "lin1", "wi", "wi_1", "c_fc", "intermediate.dense", "fc_in", "dense_h_to_4h"),
    "mlp.down": ("down_proj", "fc2", "lin2", "wo", "output.dense", "fc_out", "dense_4h_to_h", "mlp.c_proj"),
}
REQUIRED = tuple(role for role in WORDS if role != "mlp.gate")


def brought(name: str) -> bool:
    """Whether a module or parameter of this name came with a method."""
    return any(word.startswith(OWN) for word in name.split("."))


def native(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, without those that methods brought."""
    return ((name, child) for name, child in module.named_modules() if not brought(name))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm that learns, by the name of its class."""
    return "norm" in type(module).__name__.lower() and module._parameters.get("weight") is not None


def linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in native(module) if isinstance(child, (nn.Linear, Conv1D))}


def infer(model: nn.Module) -> Family:
    """Raises UserError that lists the linear modules of a block, and how to name their roles, where the roles are not certain."""
    trunk: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
    stacks = list(_stacks(trunk))
    if len(stacks) == 1:
        path, block = stacks[0]
        roles = _roles(block)
        if all(role in roles for role in REQUIRED) and _consistent(block, roles):
            inside = roles | {"attention.out": roles["attention.output"], "mlp.out": roles["mlp.down"]}
            return replace(outside(model, path), stacks=(Stack(path, inside),))
    config: Any = model.config
    raise UserError(
        f"luthier has no role map for model_type={config.model_type!r}, and its structure is not certain. Found {describe(trunk)}. "
        "Name the roles: Anatomy.of(model, roles={'blocks': PATH, 'attention.query': PATH_IN_BLOCK, 'attention.key': ..., 'attention.value': ..., "
        "'attention.output': ..., 'mlp.up': ..., 'mlp.down': ...}), or add a file with a FAMILY (docs/architecture.md)."
    )


def outside(model: nn.Module, blocks: str) -> Family:
    """What can be told of a model whose list of blocks is at `blocks`, but for the roles inside."""
    trunk: Any = getattr(model, "base_model", model)
    architecture = _architecture(trunk)
    pooling = "last" if architecture == "decoder" else "first"
    return Family((trunk.config.model_type,), architecture, (), _embeddings(trunk, blocks), name="structure", pooling=pooling)


def describe(trunk: nn.Module) -> str:
    """The lists of blocks, with the linear modules of their first one."""
    return "; ".join(f"{path} ({type(block).__name__}): {', '.join(linears(block))}" for path, block in _stacks(trunk)) or "no list of equal blocks"


def nearest(trunk: nn.Module, path: str) -> str:
    """`did_you_mean` among the paths inside a block."""
    return did_you_mean(path, (name for _, block in _stacks(trunk) for name, _ in native(block)))


def _architecture(trunk: Any) -> str:
    if trunk.main_input_name == "pixel_values":
        return "vision"
    causal, masked = (type(trunk.config) in auto._model_mapping for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM))
    return "decoder" if causal and not masked else "encoder"


def _embeddings(trunk: nn.Module, blocks: str) -> tuple[str, ...]:
    """Modules beside the list of blocks, or beside what holds it, that look tokens or patches up or carry the embeddings to the width."""
    found, holder, prefix = [], trunk, ""
    for word in blocks.split("."):
        for name, child in holder.named_children():
            tables = any(isinstance(part, (nn.Embedding, nn.Conv2d)) for part in child.modules())
            if name != word and (tables or "embed" in name) and next(child.parameters(), None) is not None:
                found.append(prefix + name)
        if word not in dict(holder.named_children()):
            break
        holder, prefix = holder.get_submodule(word), f"{prefix}{word}."
    return tuple(found)


def _stacks(trunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Lists of blocks of one class that hold linear layers, outermost only."""
    taken: list[str] = []
    for name, module in native(trunk):
        children = list(module.children())
        if isinstance(module, nn.ModuleList) and len({type(child) for child in children}) == 1 and linears(children[0]) and not any(name.startswith(t + ".") for t in taken):
            taken.append(name)
            yield name, children[0]


def _roles(block: nn.Module) -> dict[str, str]:
    """A role is given where exactly one linear module ends in one of its words."""
    names = list(linears(block))
    roles: dict[str, str] = {}
    for role, words in WORDS.items():
        hits = [name for name in names if name not in roles.values() and any(name == word or name.endswith("." + word) for word in words)]
        if role == "mlp.down":
            hits = [name for name in hits if "attention" not in name and "attn" not in name]
        if len(hits) == 1:
            roles[role] = hits[0]
    return roles


def _consistent(block: nn.Module, roles: dict[str, str]) -> bool:
    """Shapes fit each other, and no linear module is left over."""
    size = {role: _shape(block.get_submodule(path)) for role, path in roles.items()}
    width = size["attention.query"][1]
    fits = (
        size["attention.output"] == (width, size["attention.query"][0])
        and size["attention.key"] == size["attention.value"]
        and size["attention.key"][1] == size["mlp.up"][1] == width
        and size["mlp.down"] == (width, size["mlp.up"][0])
    )
    return fits and len(linears(block)) == len(roles)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in)"""
    weight: Any = module.weight
    return tuple(reversed(weight.shape)) if isinstance(module, Conv1D) else tuple(weight.shape)  # type: ignore[return-value]
