"""Writes docs/capabilities.md from the registry, the families, the tasks and the cards' declared gaps: `make docs`.

The page states what is declared; `luthier contract --all` proves it, in both directions: what is not declared a gap must hold, and
a gap that closed must go. Methods of other packages are left out, so that the page does not depend on what is installed beside luthier.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from luthier.anatomy import families
from luthier.anatomy.family import Family
from luthier.contract import ARCHITECTURES, Case, cases
from luthier.methods import registry
from luthier.methods.kinds import PROMISES, Method
from luthier.methods.settings import spell
from luthier.tasks import tasks
from luthier.tasks.base import Task

PAGE = Path(__file__).parent / "capabilities.md"
OWN = "luthier."


def page() -> str:
    """The whole page, as it is written."""
    parts = ["# What works with what", INTRODUCTION, *_grid(), *_methods(), *_families(), *_tasks()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


INTRODUCTION = """
This page is made from the code (`make docs`). It states what the methods' cards declare; `luthier contract --all` proves it on tiny models of every
architecture: what is not named as a gap here holds, and a gap that has closed fails the suite until its entry is taken off the card.
"""


# ---- methods x architectures


def _grid() -> list[str]:
    """One row for each stack that the suite tries, one column for each architecture."""
    reasons: dict[str, int] = {}
    rows = []
    for name in _own_methods():
        tried = sorted(cases(name, resumed=False), key=lambda case: registry.find(name).card.examples.index(case.stack))
        for stack, of_stack in itertools.groupby(tried, key=lambda case: case.stack):
            checked = [case for case in of_stack if case.check != "spells_itself"]  # it holds for a stack whatever the model
            rows.append((_code(stack), *(_cell([case for case in checked if case.architecture == architecture], reasons) for architecture in ARCHITECTURES)))
    checks = {case.check for name in _own_methods() for case in cases(name, resumed=False)}
    return [
        "## Methods on architectures",
        f"A tick means that all checks that apply hold ({len(checks)} different ones over all methods, beside killing and resuming); a number, a declared gap with its reason below the table. "
        "Decoders are tried as language models, the others as classifiers. A family that is not a column here is held to its role map by the tests of families.",
        _table(("stack", *ARCHITECTURES), rows),
        "\n".join(f"{number}. {reason}" for reason, number in reasons.items()),
    ]


def _cell(checks: list[Case], reasons: dict[str, int]) -> str:
    gaps: dict[str, list[str]] = {}
    for case in checks:
        if case.gap is not None:
            gaps.setdefault(case.gap, []).append(case.check)
    if not gaps:
        return "✓"
    numbers = [
        f"{reasons.setdefault(reason, len(reasons) + 1)}" + ("" if len(failed) == len(checks) else f" ({', '.join(failed)})") for reason, failed in gaps.items()
    ]
    return "gap " + ", ".join(numbers)


# ---- methods


def _methods() -> Iterable[str]:
    yield "## Methods"
    yield _table(
        ("method", "kind", "what it does"), [(f"[{name}](#{name})", ", ".join(registry.kinds(cls)), cls.card.use) for name, cls in _own_methods().items()]
    )
    yield "`luthier methods NAME` prints the card of one, `luthier contract NAME` proves it. What the promises mean:"
    yield "\n".join(f"- `{name}`: {meaning}" for name, meaning in PROMISES.items())
    for name, cls in _own_methods().items():
        card = cls.card
        yield f"### {name}"
        rate = f"Learning rate {card.lr:g} at 22 M parameters." if card.lr else "Its learning rate is that of the method beside it."
        yield f"{' '.join((cls.__doc__ or card.use).split())} {_sentence('Source: ' + card.source)} {rate}"
        settings = list(_settings(cls))
        yield _table(("setting", "default", "takes", "also read as"), settings) if settings else "It has no settings."
        yield (
            "Promises "
            + ", ".join(f"`{promise}`" for promise in sorted(card.promises))
            + ". Examples "
            + ", ".join(f"`{example}`" for example in card.examples)
            + "."
        )


def _settings(cls: type[Method]) -> Iterable[tuple[str, ...]]:
    hints = typing.get_type_hints(cls)
    for field in [field for field in dataclasses.fields(cls) if not field.metadata.get("own")]:
        default = "must be given" if field.default is dataclasses.MISSING else _code(spell(field.default))
        others = ", ".join(_code(other) for other, own in cls.aliases.items() if own == field.name)
        yield _code(field.name), default, _takes(hints[field.name]), others


def _takes(hint: Any) -> str:
    """A type as people say it."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(_code(str(option)) for option in options)
    if typing.get_origin(hint) in (tuple, list):
        return "a list"
    if options:
        return " or ".join(_takes(option) for option in options)
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}[hint]


def _own_methods() -> dict[str, type[Method]]:
    return {name: cls for name, cls in registry.methods().items() if cls.__module__.startswith(OWN)}


# ---- families and tasks


def _families() -> Iterable[str]:
    yield "## Families of models"
    yield (
        "A family is a role map; `sites=` of a method names its roles. A model type that is not listed is resolved by structure where that is certain (the plan says so), "
        "and refused otherwise with what was found."
    )
    rows = []
    for family in _shipped_families():
        roles = dict.fromkeys(role for stack in family.stacks for role in stack.roles)
        rows.append((family.name, ", ".join(_code(kind) for kind in family.model_types), family.architecture, ", ".join(_code(role) for role in roles)))
    yield _table(("family", "model types", "architecture", "roles"), rows)


def _shipped_families() -> list[Family]:
    modules = [importlib.import_module(module.name) for module in pkgutil.iter_modules(families.__path__, families.__name__ + ".")]
    return sorted((module.FAMILY for module in modules), key=lambda family: family.name)


def _tasks() -> Iterable[str]:
    yield "## Tasks"
    yield "The columns are found by their usual names or, where that is certain, by their kind; `--columns role=name` says it (`luthier tasks`)."
    for tag, cls in ((tag, cls) for tag, cls in tasks().items() if cls.__module__.startswith(OWN)):
        yield f"### {tag}"
        yield f"{_sentence(cls.use)} Measures {', '.join(_code(name) for name in cls.measures)}; the best checkpoint is chosen by {_code(cls.metric)}. Head: {_code(cls.auto_class)}."
        yield _table(("role", "holds", "needed", "taken by name", "use"), list(_columns(cls)))
        if cls.options:
            yield "Options (`--set name=value`): " + ", ".join(f"{_code(name)} (default {spell(default)})" for name, default in cls.options.items()) + "."


def _columns(cls: type[Task]) -> Iterable[tuple[str, ...]]:
    for column in cls.columns:
        yield _code(column.role), column.kind, "yes" if column.required else "no", ", ".join(_code(name) for name in column.names), column.use


# ---- markdown


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
