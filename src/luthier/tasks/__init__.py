"""Every task there is: those of this package, and those announced under the entry point group `luthier.tasks`."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from luthier.data.columns import kinds_of
from luthier.data.rows import Rows
from luthier.errors import UserError, did_you_mean
from luthier.tasks.base import Task

GROUP = "luthier.tasks"
ALIASES = {"classification": "text-classification", "ner": "token-classification", "embedding": "sentence-similarity", "causal-lm": "text-generation", "text-regression": "regression"}


@functools.cache
def tasks() -> dict[str, type[Task]]:
    """Tag -> class, sorted."""
    found: dict[str, type[Task]] = {}
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(__path__, __name__ + ".")]
    modules += [entry.load() for entry in entry_points(group=GROUP)]
    for module in modules:
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, Task) and not inspect.isabstract(value) and value.__module__ == module.__name__:
                found[value.tag] = value
    return dict(sorted(found.items()))


def find(name: str) -> type[Task]:
    known = tasks()
    tag = ALIASES.get(name, name).replace("_", "-")
    if tag not in known:
        raise UserError(f"There is no task {name!r}.{did_you_mean(name, [*known, *ALIASES])} Known: {', '.join(known)}.")
    return known[tag]


def infer(rows: Rows, given: Mapping[str, str], config: Any) -> tuple[type[Task], str]:
    """The task that columns and model leave no doubt about, and why. Raises UserError otherwise."""
    claims = [(task, reason) for task in tasks().values() if (reason := task.claims(_kinds(rows), given, config))]
    if len(claims) == 1:
        return claims[0]
    columns = ", ".join(rows.columns)
    if not claims:
        raise UserError(f"Cannot tell the task from the columns {columns}. Give --task, one of: {', '.join(tasks())}. `luthier tasks` says which columns each reads.")
    raise UserError(f"The columns {columns} fit {' and '.join(task.tag for task, _ in claims)}. Choose with --task.")


def _kinds(rows: Rows) -> dict[str, set[str]]:
    return {name: kinds_of(rows.column(name)) for name in rows.columns}
