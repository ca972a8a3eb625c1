"""A family is data: where a model type keeps its blocks, and which module plays which role in them."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from luthier.errors import UserError

GROUP = "luthier.families"


@dataclass(frozen=True)
class Stack:
    """One column of blocks.

    blocks  path of the list of blocks in the trunk (`encoder.layer`)
    roles   role -> path inside a block. `attn.c_attn[1/3]` is the second third of a fused weight's outputs. A role whose
            module a block lacks is left out. Points (`attention.out`, `mlp.out`) name the last module of a sublayer
            before its result is added to the residual stream
    repeat  config field that says how often the blocks are gone through, where they are shared
    name    `encoder` or `decoder`, where a model has both
    """

    blocks: str
    roles: Mapping[str, str]
    repeat: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Family:
    """A role map. `embeddings` and `pooler` are paths in the trunk; what is outside the trunk is the head. Norms outside the blocks need no path.

    pooling  how the stock sequence-classification head of the family takes one token of a row: first, last
    """

    model_types: tuple[str, ...]
    architecture: str
    stacks: tuple[Stack, ...]
    embeddings: tuple[str, ...] = ("embeddings",)
    pooler: tuple[str, ...] = ("pooler",)
    pooling: str = "first"
    name: str = field(default="")

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.model_types[0])


_registered: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known in this process; a later one of the same model type replaces it."""
    _registered.update(dict.fromkeys(family.model_types, family))
    return family


def find(model_type: str) -> Family | None:
    return _registered.get(model_type) or _shipped().get(model_type)


def known() -> list[str]:
    return sorted({*_shipped(), *_registered})


@functools.cache
def _shipped() -> dict[str, Family]:
    """Every module of `luthier.anatomy.families`, and what packages announce under the entry point group `luthier.families`, has a `FAMILY`."""
    import luthier.anatomy.families as package

    families = [importlib.import_module(module.name).FAMILY for module in pkgutil.iter_modules(package.__path__, package.__name__ + ".")]
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
        except Exception as error:
            raise UserError(f"The family {entry.name!r} ({entry.value}) cannot be loaded: {error!r}") from error
        families.append(loaded if isinstance(loaded, Family) else loaded.FAMILY)
    return {model_type: family for family in families for model_type in family.model_types}
