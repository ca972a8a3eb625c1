"""Every method there is: those of this package's folders, and those that other packages announce under the entry point group `luthier.methods`."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType

import luthier.methods as package
from luthier.errors import UserError, did_you_mean
from luthier.methods.kinds import Method

GROUP = "luthier.methods"


@functools.cache
def methods() -> dict[str, type[Method]]:
    """Registry name -> class, sorted by name."""
    found: dict[str, type[Method]] = {}
    for module in _own_modules():
        _collect(module, found)
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
        except Exception as error:
            owner = entry.dist.name if entry.dist else entry.value
            raise UserError(f"The package {owner!r} offers the method {entry.name!r} to luthier, but loading {entry.value} failed: {error!r}. Repair it or: pip uninstall {owner}") from error
        if isinstance(loaded, ModuleType):
            _collect(loaded, found)
        else:
            _add(loaded, found)
    return dict(sorted(found.items()))


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


def _collect(module: ModuleType, found: dict[str, type[Method]]) -> None:
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, Method) and "card" in vars(value) and value.__module__ == module.__name__:
            _add(value, found)


def _add(cls: type[Method], found: dict[str, type[Method]]) -> None:
    name = cls.card.name
    if name in found and found[name] is not cls:
        raise UserError(f"Two methods are called {name!r}: {found[name].__module__} and {cls.__module__}. Uninstall one of the packages.")
    found[name] = cls
