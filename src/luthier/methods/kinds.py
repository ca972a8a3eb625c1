"""What a method author writes: settings (a frozen dataclass), a card, and one or two functions of a kind.

A method may be of several kinds. Everything that is not its mathematics (finding sites, devices, freezing, many at once,
merging, saving, resuming) is the engine's.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, dataclass_transform

import torch
from torch import Tensor, nn

from luthier.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from luthier.anatomy import Anatomy, Site

PROMISES = {
    "starts_at_base": "before training, outputs equal the unchanged model's",
    "merges_exactly": "the merged model answers as the unmerged one, to rounding",
    "keeps_base": "the weights of the base stay bit for bit",
    "keeps_shapes": "the model keeps its shapes and names: a stock folder",
    "reloads_in_stock_transformers": "the saved folder opens in transformers or peft with equal outputs",
    "resumes_exactly": "killed and resumed, training ends at the same bits",
}


@dataclass(frozen=True)
class Card:
    """What a user reads about a method, and what the contract suite holds it to.

    use       one line: what it does for a user
    source    paper and section, or the library whose behaviour it keeps
    writes    aspects of the model that it changes: weights, selection, structure (shown to users)
    promises  names from `PROMISES`; each is tested
    lr        peak learning rate for a model of 22 M parameters; the recipe scales it with model and rows
    examples  stacks that the contract suite runs; the first is the one that the documentation shows
    gaps      `{"check:architecture": reason}` what is known not to work, held strictly: a gap that closes must go
    """

    name: str
    use: str
    source: str
    writes: frozenset[str] | set[str] = frozenset()
    promises: frozenset[str] | set[str] = frozenset()
    lr: float | None = None
    examples: tuple[str, ...] = ()
    gaps: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all kinds. Subclasses are frozen keyword-only dataclasses with a `card`, made so by `@method`."""

    card: ClassVar[Card]
    aliases: ClassVar[Mapping[str, str]] = {}  # spellings of other libraries -> ours

    def check(self, anatomy: Anatomy) -> None:
        """Refuse, by UserError, what these settings cannot do to this model. Shapes only: no weights are there yet."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Build from plain values; unknown fields and wrong types are errors with the nearest right one."""
        from luthier.methods.settings import convert

        name = cls.card.name
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in settings.items():
            target = cls.aliases.get(key, key)
            if target not in fields:
                known = ", ".join(fields) or "none"
                raise UserError(f"{name}: there is no setting {key!r}.{did_you_mean(key, [*fields, *cls.aliases])} Its settings: {known}.")
            if target in values:
                raise UserError(f"{name}: {target!r} is set twice (as {key!r}).")
            values[target] = convert(value, cls, fields[target], name)
        missing = [f.name for f in fields.values() if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        if missing:
            raise UserError(f"{name}: {' and '.join(missing)} must be given, for example {cls.card.examples[0] if cls.card.examples else name + '(' + missing[0] + '=...)'}.")
        return cls(**values)

    def settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default}

    def __str__(self) -> str:
        from luthier.methods.settings import spell

        inner = ", ".join(f"{key}={spell(value)}" for key, value in self.settings().items())
        return f"{self.card.name}({inner})" if inner else self.card.name


T = TypeVar("T", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def method(cls: T) -> T:
    """Make a class a method: a frozen, keyword-only dataclass. It is found by its module, or by an entry point of the group `luthier.methods`."""
    return dataclass(frozen=True, kw_only=True)(cls)


class Selection(Method):
    """Chooses which tensors of the model itself learn."""

    @abstractmethod
    def opens(self, anatomy: Anatomy) -> Iterable[str]:
        """Names of parameters that learn. New heads learn anyway; what the forward pass never reaches is left out by the engine."""


class Parameters(Protocol):
    """What a WeightChange created, by name."""

    def __getitem__(self, name: str, /) -> Tensor: ...


class WeightChange(Method):
    """Replaces the weight of each chosen site by a function of it and of a few learnt tensors. Weights are (out, in) whatever the module stores."""

    sites: str

    @property
    def draws(self) -> bool:
        """Whether `forward` draws random numbers in training, so that nothing else may stand in for it there."""
        return getattr(self, "dropout", 0) > 0

    @property
    def input_dropout(self) -> float:
        """Of a change that has `factors`: the share of the inputs of A that `forward` drops in training, if that is all that it draws."""
        return 0.0

    @abstractmethod
    def create(self, weight: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Learnt tensors at their start, float32. `weight` (out, in) may lie on the meta device: use its shape only."""

    @abstractmethod
    def effective(self, weight: Tensor, params: Parameters) -> Tensor:
        """(out, in): the weight that acts. This is what merging writes."""

    def forward(self, x: Tensor, base: Linear, params: Parameters, training: bool) -> Tensor:
        """The changed site's output (..., out) for x (..., in). Override where `effective` would waste work; the contract holds both equal outside training."""
        return nn.functional.linear(x, self.effective(base.weight, params), base.bias)

    def factors(self, params: Parameters) -> tuple[Tensor, Tensor, float] | None:
        """(A (r, in), B (out, r), scale) if the change is scale * B @ A: the engine then writes a stock LoRA adapter."""
        return None


@dataclass(frozen=True)
class Linear:
    """The unchanged site as a WeightChange sees it: `base(x)`, and its weight (out, in) and bias (out,)."""

    weight: Tensor
    bias: Tensor | None
    call: Any

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)


class Insert(Method):
    """Puts a new module at each chosen point: after it, reading its output, or in parallel to the sublayer that ends there."""

    sites: str

    @property
    def parallel(self) -> bool:
        """True: the module reads the input of the sublayer that ends at the point, and its result is added to the output."""
        return False

    @abstractmethod
    def build(self, site: Site) -> nn.Module:
        """A module from (..., width) to (..., width). Sequential: its result replaces the point's output. Parallel: its result is added to it."""


class Surgery(Method):
    """Changes the model itself, before training, keeping config and weights true to each other."""

    @abstractmethod
    def cut(self, anatomy: Anatomy, rng: torch.Generator) -> set[str]:
        """Change `anatomy.model` in place; return the names of parameters whose trained values are gone and must learn."""


class Bridge(Method):
    """Hands the model to another library, which adds and owns its parameters, and saves in that library's format."""

    @abstractmethod
    def attach(self, anatomy: Anatomy, task_type: str | None, new_heads: list[str]) -> nn.Module:
        """Add the library's parameters; return the model to call (the same object where the library injects in place)."""

    @abstractmethod
    def learns(self, model: nn.Module) -> set[str]:
        """Names of the parameters that the library added."""

    @abstractmethod
    def save(self, model: nn.Module, folder: str, base: str, new_heads: list[str]) -> None:
        """Write the library's own stock folder."""


class NeedsWeights(Exception):
    """Raised by a Bridge on the meta device, where the library computes its start from the weights: its parameters are counted after loading."""
