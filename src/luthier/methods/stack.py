"""A stack: methods in time order, `reinit(top=1)|full`, and its three spellings (text, Python list, YAML)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.errors import UserError
from luthier.methods.kinds import Method
from luthier.methods.registry import find
from luthier.methods.settings import read

_STEP = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(?:\((.*)\))?\s*", re.DOTALL)


@dataclass(frozen=True)
class Stack:
    """Methods, left to right in time. `str(stack)` is canonical: parsing it gives an equal stack."""

    methods: tuple[Method, ...]

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    def __str__(self) -> str:
        return "|".join(str(method) for method in self.methods)

    def plain(self) -> list[dict[str, dict[str, Any]]]:
        """The YAML form: one `{name: settings}` a method."""
        return [{method.card.name: method.settings()} for method in self.methods]


def parse(stack: str | Method | Stack | Sequence[Any] | Mapping[str, Any]) -> Stack:
    """Any spelling of a stack -> Stack. Raises UserError for unknown names, fields and broken syntax."""
    if isinstance(stack, Stack):
        return stack
    if isinstance(stack, Method):
        return Stack((stack,))
    if isinstance(stack, str):
        steps = divide(stack, "|")
        if not all(step.strip() for step in steps):
            raise UserError(f"The stack {stack!r} has an empty step. Write methods separated by '|', for example: reinit(top=1)|full.")
        return Stack(tuple(_step(step) for step in steps))
    if isinstance(stack, Mapping):
        return Stack(tuple(_named(name, settings) for name, settings in stack.items()))
    if isinstance(stack, Sequence) and stack:
        return Stack(tuple(method for item in stack for method in parse(item)))
    raise UserError(f"A stack is text such as 'lora(r=8)', a list of methods, or their YAML; got {stack!r}.")


def _named(name: str, settings: Any) -> Method:
    if settings is None:
        settings = {}
    if not isinstance(settings, Mapping):
        raise UserError(f"{name}: its settings must be a mapping such as {{r: 8}}; got {settings!r}.")
    return find(name).from_settings(settings)


def _step(text: str) -> Method:
    match = _STEP.fullmatch(text)
    if not match:
        raise UserError(f"Cannot read {text.strip()!r} as a method. Write a name and its settings, for example: lora(r=8, sites=attention.query+attention.value).")
    name, inner = match.groups()
    settings: dict[str, Any] = {}
    for piece in divide(inner, ",") if inner and inner.strip() else []:
        key, equals, value = piece.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UserError(f"{name}: cannot read {piece.strip()!r}. Settings are written name=value, separated by commas.")
        if key.strip() in settings:
            raise UserError(f"{name}: {key.strip()!r} is given twice.")
        settings[key.strip()] = read(value)
    return find(name.replace("-", "_")).from_settings(settings)


def divide(text: str, separator: str) -> list[str]:
    """Split at `separator` outside quotes and brackets. Raises UserError where one is left open."""
    pieces, start, depth, quote, skip = [], 0, 0, "", False
    for i, char in enumerate(text):
        if skip:
            skip = False
        elif quote:
            skip = char == "\\"
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth < 0:
                break
        elif char == separator and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    if depth or quote:
        raise UserError(f"Brackets or quotes do not match in {text!r}.")
    return [*pieces, text[start:]]
