"""Every task there is: those of this package, and those announced under the entry point group `luthier.tasks`."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import ModuleType
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
    for module in pkgutil.iter_modules(__path__, __name__ + "."):
        _collect(importlib.import_module(module.name), found)
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
        except Exception as error:
            owner = entry.dist.name if entry.dist else entry.value
            raise UserError(f"The package {owner!r} offers the task {entry.name!r} to luthier, but loading {entry.value} failed: {error!r}. Repair it or: pip uninstall {owner}") from error
        if isinstance(loaded, ModuleType):
            _collect(loaded, found)
        else:
            _add(loaded, found)
    return dict(sorted(found.items()))


def _collect(module: ModuleType, found: dict[str, type[Task]]) -> None:
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, Task) and not inspect.isabstract(value) and value.__module__ == module.__name__:
            _add(value, found)


def _add(task: type[Task], found: dict[str, type[Task]]) -> None:
    if task.tag in found and found[task.tag] is not task:
        raise UserError(f"Two tasks are called {task.tag!r}: {found[task.tag].__module__} and {task.__module__}. Uninstall one of the packages.")
    found[task.tag] = task


def find(name: str) -> type[Task]:
    known = tasks()
    tag = ALIASES.get(name, name).replace("_", "-")
    if tag not in known:
        raise UserError(f"There is no task {name!r}.{did_you_mean(name, [*known, *ALIASES])} Known: {', '.join(known)}.")
    return known[tag]


def infer(rows: Rows, given: Mapping[str, str], config: Any) -> tuple[type[Task], str]:
    """The task that columns and model leave no doubt about, and why. Raises UserError otherwise."""
    kinds = {name: kinds_of(rows.column(name)) for name in rows.columns}
    claims = [(task, reason) for task in tasks().values() if (reason := task.claims(kinds, given, config))]
    if len(claims) == 1:
        return claims[0]
    columns = ", ".join(rows.columns)
    if not claims:
        raise UserError(f"Cannot tell the task from the columns {columns}. Give --task, one of: {', '.join(tasks())}. `luthier tasks` says which columns each reads.")
    raise UserError(f"The columns {columns} fit {' and '.join(task.tag for task, _ in claims)}. Choose with --task.")
