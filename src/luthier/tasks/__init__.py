"""Every task there is: those of this package, and those announced under the entry point group `luthier.tasks`."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from luthier import offers
from luthier.data.columns import kinds_of
from luthier.data.rows import Rows
from luthier.errors import UserError, did_you_mean
from luthier.tasks.base import Task

GROUP = "luthier.tasks"
ALIASES = {"classification": "text-classification", "ner": "token-classification", "embedding": "sentence-similarity", "causal-lm": "text-generation", "text-regression": "regression"}


@functools.cache
def tasks() -> dict[str, type[Task]]:
    """Tag -> class, sorted."""
    own = (importlib.import_module(module.name) for module in pkgutil.iter_modules(__path__, __name__ + "."))
    return offers.collect("task", own, GROUP, lambda task: task.tag, lambda value: inspect.isclass(value) and issubclass(value, Task) and not inspect.isabstract(value))


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
