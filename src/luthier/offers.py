"""What other packages announce under an entry point group, beside what luthier brings itself: one registry for methods and for tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from types import ModuleType
from typing import TypeVar

from luthier.errors import UserError

T = TypeVar("T", bound=type)


def collect(noun: str, own: Iterable[ModuleType], group: str, name: Callable[[T], str], belongs: Callable[[object], bool]) -> dict[str, T]:
    """Name -> class, sorted: of the modules `own`, and of entry points of `group`, which may name a module or a class.

    noun     what they are called in errors
    belongs  whether a value of a module is one of them
    Raises UserError that names the package where it cannot be loaded, and both modules where two have one name.
    """
    found: dict[str, T] = {}

    def add(cls: T) -> None:
        twin = found.setdefault(name(cls), cls)
        if twin is not cls:
            raise UserError(f"Two {noun}s are called {name(cls)!r}: {twin.__module__} and {cls.__module__}. Uninstall one of the packages.")

    def add_all(module: ModuleType) -> None:
        for value in vars(module).values():
            if belongs(value) and value.__module__ == module.__name__:
                add(value)

    for module in own:
        add_all(module)
    for entry in entry_points(group=group):
        try:
            loaded = entry.load()
        except Exception as error:
            owner = entry.dist.name if entry.dist else entry.value
            raise UserError(f"The package {owner!r} offers the {noun} {entry.name!r} to luthier, but loading {entry.value} failed: {error!r}. Repair it or: pip uninstall {owner}") from error
        add_all(loaded) if isinstance(loaded, ModuleType) else add(loaded)
    return dict(sorted(found.items()))
