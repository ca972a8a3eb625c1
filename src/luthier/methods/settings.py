"""One setting between its three spellings: text of a stack, a Python value, YAML."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from luthier.errors import UserError, did_you_mean

_BARE = re.compile(r"[A-Za-z_](?:[\w.*+:/-]|\[[\w.*+:/-]*\])*")
_WORDS = {"true": True, "false": False, "none": None}


def spell(value: Any) -> str:
    """A value as a stack string writes it; `read` is its inverse."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and isinstance(read(value), str) else _quoted(value)  # true and inf are words too
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(spell(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(k) if ':' in str(k) else spell(k)}: {spell(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return repr(value)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def read(text: str) -> Any:
    """The value that a piece of a stack string means: number, true/false/none, list, mapping, quoted or bare text."""
    text = text.strip()
    if text[:1] in "\"'" and text[-1:] == text[:1] and len(text) > 1:
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if text[:1] == "[" and text[-1:] == "]":
        from luthier.methods.stack import divide

        return [read(piece) for piece in divide(text[1:-1], ",") if piece.strip()]
    if text[:1] == "{" and text[-1:] == "}":
        from luthier.methods.stack import divide

        pairs = [divide(piece, ":") for piece in divide(text[1:-1], ",") if piece.strip()]
        if any(len(pair) < 2 for pair in pairs):
            raise UserError(f"Cannot read {text!r}: a mapping is written {{name: value, name: value}}.")
        return {read(key): read(":".join(value)) for key, *value in pairs}
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def convert(value: Any, owner: type, field: dataclasses.Field, method: str) -> Any:
    """Check `value` against the field's type hint; int is taken for float, a list of sites for their union."""
    hint = typing.get_type_hints(owner)[field.name]
    accepted, ok = _fit(value, hint)
    if ok:
        return accepted
    if typing.get_origin(hint) is typing.Literal:
        choices = [str(c) for c in typing.get_args(hint)]
        raise UserError(f"{method}: {field.name}={value!r} is none of {', '.join(choices)}.{did_you_mean(str(value), choices)}")
    raise UserError(f"{method}: {field.name}={value!r} is not {_describe(hint)}. Its default is {spell(field.default) if field.default is not dataclasses.MISSING else 'none: it must be given'}.")


def _fit(value: Any, hint: Any) -> tuple[Any, bool]:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value, True
    if origin in (typing.Union, types.UnionType):
        for option in options:
            accepted, ok = _fit(value, option)
            if ok:
                return accepted, True
        return value, False
    if origin is typing.Literal:
        return value, value in options
    if hint is type(None):
        return None, value is None
    if hint is bool:
        return value, isinstance(value, bool)
    if hint is int:
        return (int(value), True) if isinstance(value, float) and value.is_integer() else (value, isinstance(value, int) and not isinstance(value, bool))
    if hint is float:
        return (float(value), True) if isinstance(value, (int, float)) and not isinstance(value, bool) else (value, False)
    if hint is str:
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
            return "+".join(value), True
        return value, isinstance(value, str)
    if origin in (tuple, list):
        inner = options[0] if options else Any
        if not isinstance(value, (list, tuple)):
            return value, False
        fitted = [_fit(v, inner) for v in value]
        return origin(v for v, _ in fitted), all(ok for _, ok in fitted)
    return value, isinstance(value, hint)


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    return names.get(hint, str(hint))
