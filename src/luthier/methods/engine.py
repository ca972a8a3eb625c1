"""Applies a stack to a model: one code path for planning (meta device), training (real weights) and loading (replayed, then filled)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from luthier.anatomy import Anatomy, Site
from luthier.anatomy.anatomy import OWN
from luthier.errors import UserError
from luthier.methods import changes, inserts
from luthier.methods.kinds import Bridge, Insert, Method, Selection, Surgery, WeightChange
from luthier.methods.stack import Stack


@dataclass(frozen=True)
class Place:
    """Where one method acts, and the name of the child modules that it has there."""

    method: Method
    sites: list[Site]
    name: str


@dataclass
class Fitted:
    """A model with a stack applied to it.

    opened   names of the base's own parameters that learn
    added    names of the parameters and buffers that the methods brought
    places   where each method acts, in the order of the stack
    lost     names of parameters whose trained values a Surgery took away
    carries  whether the base, an earlier run, came with inserted modules
    """

    model: nn.Module
    stack: Stack
    anatomy: Anatomy
    new_heads: tuple[str, ...]
    opened: set[str] = field(default_factory=set)
    added: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    places: list[Place] = field(default_factory=list)
    carries: bool = False

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def bridge(self) -> Bridge | None:
        return next((m for m in self.stack if isinstance(m, Bridge)), None)

    @property
    def stock(self) -> bool:
        """Whether stock transformers can express the model as it is."""
        return not self.added and not self.carries

    @property
    def mergeable(self) -> bool:
        return not self.carries and all(isinstance(method, (Selection, WeightChange, Surgery)) for method in self.stack)

    def merge(self) -> None:
        """Write every weight change into its weight; the model is a stock one afterwards."""
        if not self.mergeable:
            blockers = " and ".join(m.card.name for m in self.stack if isinstance(m, (Insert, Bridge)))
            raise UserError(f"{blockers} cannot be merged into the weights: it is not a change of a weight. Save it as an adapter (--save adapter).")
        for module in [m for m in self.model.modules() if isinstance(m, changes.Changed)]:
            changes.merge(module)  # type: ignore[arg-type]
        self.added = set()

    def close(self, names: set[str]) -> None:
        """Stop these from learning."""
        for name, parameter in self.model.named_parameters():
            if name in names:
                parameter.requires_grad_(False)
        self.opened -= names


def install(model: nn.Module, stack: Stack, seed: int = 0, new_heads: tuple[str, ...] = (), task_type: str | None = None, anatomy: Anatomy | None = None) -> Fitted:
    """Apply `stack` to `model` in place and open what learns.

    new_heads  parameters of the model that no checkpoint filled: they always learn
    Raises UserError before anything was changed where a site matches nothing or a method refuses.
    """
    anatomy = anatomy or Anatomy.of(model)
    for method in stack:
        method.check(anatomy)
    places = [(m, anatomy.sites(m.sites)) for m in stack if isinstance(m, (WeightChange, Insert))]  # matched before the first change
    carries = any(word.startswith(OWN) for name in model.state_dict() for word in name.split("."))
    fitted = Fitted(model, stack, anatomy, new_heads, carries=carries)
    rng = torch.Generator().manual_seed(seed)
    before = set(model.state_dict())
    for method in stack:
        if isinstance(method, Surgery):
            fitted.lost |= method.cut(anatomy, rng)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    device = next(model.parameters()).device
    with torch.device("meta" if device.type == "meta" else "cpu"):
        for method, sites in places:
            name = _free_name(method, model)
            fitted.places.append(Place(method, sites, name))
            for site in _once(sites):
                _place(method, site, name, rng, device)
    for method in stack:
        if isinstance(method, Bridge):
            with _seeded(rng):
                fitted.model = method.attach(anatomy, task_type, list(new_heads))
            fitted.added |= method.learns(fitted.model)
    if not fitted.bridge:
        fitted.added |= set(model.state_dict()) - before
    for method in stack:
        if isinstance(method, Selection):
            fitted.opened |= set(method.opens(anatomy))
    fitted.opened |= set(new_heads)
    for name, parameter in fitted.model.named_parameters():
        if name in fitted.opened or name in fitted.added or (fitted.bridge and _bridged(name, new_heads)):
            parameter.requires_grad_(True)
    return fitted


def _bridged(name: str, heads: tuple[str, ...]) -> bool:
    """A bridge may wrap the model, so that its own names gain a prefix."""
    return any(name.endswith(head) for head in heads)


def _place(method: Method, site: Site, name: str, rng: torch.Generator, device: torch.device) -> None:
    if isinstance(method, WeightChange):
        changes.attach(site, method, name, rng)
    elif isinstance(method, Insert):
        with _seeded(rng):
            body = method.build(site)
        place = (inserts.Parallel if method.parallel else inserts.Sequential)(body.to(device))
        place.train(site.module.training)
        place.attach(site, name)


class _seeded:
    """Torch's global stream, for modules that draw their start from it, set from `rng` and put back afterwards."""

    def __init__(self, rng: torch.Generator):
        self.seed = int(torch.randint(2**31, (), generator=rng, device="cpu"))

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.state)


def _once(sites: list[Site]) -> list[Site]:
    """Blocks that share one module (ALBERT) are one place."""
    seen: dict[tuple[int, str, str], Site] = {}
    for site in sites:
        seen.setdefault((id(site.module), site.role, str(site.rows)), site)
    return list(seen.values())


def _free_name(method: Method, model: nn.Module) -> str:
    """`luthier_lora`, or `luthier_lora_2` where an earlier lora already lives in the model."""
    taken = {word for name, _ in model.named_modules() for word in name.split(".") if word.startswith(OWN)}
    base, n = OWN + method.card.name, 1
    while (name := base if n == 1 else f"{base}_{n}") in taken:
        n += 1
    return name


def overlaps(places: Sequence[tuple[Method, list[Site]]]) -> list[tuple[Method, Method, Site]]:
    """Pairs of methods that would change the same rows of the same weight."""
    owners: dict[int, list[tuple[Method, Site]]] = defaultdict(list)
    found = []
    for method, sites in places:
        if not isinstance(method, WeightChange):
            continue
        for site in _once(sites):
            for other, taken in owners[id(site.module)]:
                if site.rows is None or taken.rows is None or (site.rows.start < taken.rows.stop and taken.rows.start < site.rows.stop):
                    found.append((other, method, site))
            owners[id(site.module)].append((method, site))
    return found
