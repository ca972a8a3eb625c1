"""Checks a stack against a model and itself before any weight is loaded, and says what will happen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from luthier.anatomy import Anatomy, Site
from luthier.errors import UserError
from luthier.methods.engine import Fitted, install, overlaps
from luthier.methods.kinds import Bridge, Insert, Method, NeedsWeights, Selection, Surgery, WeightChange
from luthier.methods.stack import Stack


@dataclass(frozen=True)
class Step:
    """One line of the plan: a method, where it acts (`attention.query: 6 of 6 blocks`), and how many numbers it trains."""

    method: str
    where: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class Plan:
    stack: Stack
    steps: tuple[Step, ...]
    trainable: int
    total: int
    reached: int  # blocks, counted from the last, that gradients go through
    frozen: int  # leading blocks that can be run once for all passes
    new_heads: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """The plan as people read it."""
        out = [f"method   {self.stack}"]
        for step in self.steps:
            out.append(f"  {step.method}: {step.parameters:,} parameters" + (f" at {', '.join(step.where)}" if step.where else ""))
        if self.new_heads:
            out.append(f"  new head, trained and saved: {', '.join(self.new_heads)}")
        out.append(f"  trains {self.trainable:,} of {self.total:,} parameters ({self.trainable / self.total:.2%})")
        return out + [f"  note: {note}" for note in self.notes]


def plan(model: nn.Module, stack: Stack, new_heads: Sequence[str] = (), task_type: str | None = None) -> Plan:
    """Work out what `stack` does to `model` (on the meta device; it is copied, not changed). Raises UserError with both names and the remedy on a conflict."""
    anatomy = Anatomy.of(model)
    check(anatomy, stack, new_heads)
    try:
        fitted = install(copy.deepcopy(model), stack, new_heads=tuple(new_heads), task_type=task_type)
    except NeedsWeights:
        heads = sum(p.numel() for name, p in model.named_parameters() if name in new_heads)
        return Plan(stack, tuple(Step(str(m), (), 0) for m in stack), heads, anatomy.parameters, len(anatomy.blocks), 0, tuple(new_heads), ("its parameters start from the weights and are counted once these are loaded",))
    _check_learning(fitted)
    sizes = {name: p.numel() for name, p in fitted.model.named_parameters()}
    steps = []
    for method in stack:
        if isinstance(method, (WeightChange, Insert)):
            place = next(place for place in fitted.places if place.method is method)
            steps.append(Step(str(method), tuple(anatomy.cover(place.sites)), sum(n for name, n in sizes.items() if place.name in name.split("."))))
        elif isinstance(method, Selection):
            steps.append(Step(str(method), (), sum(sizes[name] for name in set(method.opens(anatomy)) if name in sizes)))
        elif isinstance(method, Bridge):
            steps.append(Step(str(method), (), sum(sizes.get(name, 0) for name in fitted.added)))
        else:
            steps.append(Step(str(method), (), 0))
    trainable = sum(p.numel() for p in fitted.trainable.values())
    return Plan(stack, tuple(steps), trainable, sum(sizes.values()), reached(fitted), len(frozen_blocks(fitted)), tuple(new_heads), tuple(_notes(fitted)))


def check(anatomy: Anatomy, stack: Stack, new_heads: Sequence[str] = ()) -> None:
    """Refuse, by UserError, a stack that contradicts itself or cannot act on this model."""
    _check_order(stack)
    for method in stack:
        method.check(anatomy)
    places = [(m, anatomy.sites(m.sites)) for m in stack if isinstance(m, (WeightChange, Insert))]
    _check_claims(stack, anatomy, places)
    _check_weights(stack, anatomy, new_heads)


def _check_order(stack: Stack) -> None:
    learners = [i for i, m in enumerate(stack) if isinstance(m, (Selection, WeightChange, Insert, Bridge))]
    if not learners:
        first = stack.methods[-1]
        raise UserError(f"Nothing in {str(stack)!r} learns. Put a learner to the right, for example: {stack}|full." if isinstance(first, Surgery) else f"Nothing in {str(stack)!r} learns.")
    for i, method in enumerate(stack):
        if isinstance(method, Surgery) and i > learners[0]:
            learner = stack.methods[learners[0]]
            raise UserError(
                f"{method.card.name} stands right of {learner.card.name}, which means after its training: it would throw away what was learnt. "
                f"Write it first: {'|'.join(str(m) for m in [method, *(m for m in stack if m is not method)])}."
            )
    bridges = [m for m in stack if isinstance(m, Bridge)]
    if bridges and len(stack) > 1:
        others = " and ".join(m.card.name for m in stack if m is not bridges[0])
        raise UserError(
            f"{bridges[0].card.name} hands the whole model to another library and cannot share it with {others}. "
            "Use luthier's own methods together, or two runs: train one, then `--model RUN` for the other."
        )


def _check_claims(stack: Stack, anatomy: Anatomy, places: Sequence[tuple[Method, list[Site]]]) -> None:
    for first, second, site in overlaps(places):
        same = first.card.name == second.card.name
        raise UserError(
            f"{first.card.name} and {second.card.name} both change {site.label} ({site.name}). "
            + (f"Give them different sites, or write one {first.card.name}." if same else "Give them different sites, or keep one of them.")
        )


def _check_weights(stack: Stack, anatomy: Anatomy, new_heads: Sequence[str]) -> None:
    """A weight that learns by itself, or is another one's too, takes no change."""
    opened = {name: m for m in stack if isinstance(m, Selection) for name in m.opens(anatomy)}
    tied = {name for group in anatomy.tied for name in group}
    for method in stack:
        sites = getattr(method, "sites", None) if isinstance(method, (WeightChange, Bridge)) else None
        for site in anatomy.sites(sites) if sites else []:
            weight = f"{site.name}.weight"
            if weight in new_heads:
                raise UserError(f"{method.card.name}: {weight} is a new head, which learns in full; a change of it has nothing to add. Choose other sites.")
            if weight in opened:
                owner = opened[weight].card.name
                raise UserError(
                    f"{owner} trains {weight} itself, and {method.card.name} would add a change to the same weight. "
                    f"Use one of them, or give {method.card.name} sites that {owner} leaves frozen."
                )
            if weight in tied:
                partners = next(group for group in anatomy.tied if weight in group)
                raise UserError(f"{method.card.name}: {weight} is tied to {' and '.join(p for p in partners if p != weight)}; a change of one would not reach the other. Choose other sites, or train it with full.")


def _check_learning(fitted: Fitted) -> None:
    names = fitted.stack
    if not fitted.trainable:
        raise UserError(f"{names} opens nothing in this model: nothing would be trained.")
    unopened = fitted.lost - set(fitted.trainable)
    if unopened:
        cutter = next(m.card.name for m in names if isinstance(m, Surgery))
        raise UserError(
            f"{cutter} throws away the trained values of {len(unopened)} tensors (such as {sorted(unopened)[0]}) that nothing in {str(names)!r} trains again. "
            f"Use a learner that opens them, for example: {next(m for m in names if isinstance(m, Surgery))}|full."
        )


def reached(fitted: Fitted) -> int:
    """Blocks, counted from the last, that gradients go through: down to the lowest thing that learns, which may be a block, the embeddings (all of them), or the head alone (none)."""
    blocks = [list(block.module.parameters()) for block in fitted.anatomy.blocks]
    inside = {id(p) for block in blocks for p in block}
    embeddings = {id(p) for site in fitted.anatomy.embeddings for p in site.module.parameters()} - inside
    if any(id(p) in embeddings for p in fitted.trainable.values()) or fitted.bridge:
        return len(blocks)
    learning = [i for i, block in enumerate(blocks) if any(p.requires_grad for p in block)]
    return len(blocks) - min(learning, default=len(blocks))


def frozen_blocks(fitted: Fitted) -> list[nn.Module]:
    """The leading blocks in which and below which nothing learns, and which are therefore run once for all passes; of one stack of blocks that are each their own."""
    modules = [block.module for block in fitted.anatomy.blocks]
    if fitted.anatomy.architecture == "encoder-decoder" or len(set(map(id, modules))) < len(modules):
        return []
    return modules[: len(modules) - reached(fitted)]


def _notes(fitted: Fitted) -> list[str]:
    notes = []
    for group in fitted.anatomy.tied:
        if any(name in fitted.opened for name in group):
            notes.append(f"{' and '.join(group)} are one tensor (tied) and stay so")
    for place in fitted.places:
        uneven = [line for line in fitted.anatomy.cover(place.sites) if _uneven(line)]
        if uneven:
            notes.append(f"{place.method.card.name} covers {', '.join(uneven)}")
    if fitted.anatomy.family == "structure":
        notes.append("this architecture has no role map; its roles were found by structure")
    return notes


def _uneven(line: str) -> bool:
    """`attention.query: 2 of 6 blocks`"""
    words = line.split()
    return "of" in words and words[words.index("of") - 1] != words[words.index("of") + 1]
