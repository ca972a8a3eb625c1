"""Every method there is: those of this package's folders, and those that other packages announce under the entry point group `luthier.methods`."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil

import luthier.methods as package
from luthier import offers
from luthier.errors import UserError, did_you_mean
from luthier.methods.kinds import Method

GROUP = "luthier.methods"


@functools.cache
def methods() -> dict[str, type[Method]]:
    """Registry name -> class, sorted by name."""
    return offers.collect("method", _own_modules(), GROUP, lambda cls: cls.card.name, lambda value: inspect.isclass(value) and issubclass(value, Method) and "card" in vars(value))


def find(name: str) -> type[Method]:
    known = methods()
    if name not in known:
        raise UserError(f"There is no method {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return known[name]


def kinds(method: type[Method]) -> list[str]:
    """Names of the kinds that a method is of."""
    return [base.__name__ for base in inspect.getmro(method) if base.__module__ == "luthier.methods.kinds" and base is not Method and issubclass(base, Method)]


def _own_modules():
    for folder in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if folder.ispkg:
            for module in pkgutil.iter_modules(importlib.import_module(folder.name).__path__, folder.name + "."):
                yield importlib.import_module(module.name)
