"""How an Insert lives in a model: a child of the point's module, called by hooks that are its own bound methods (so a deep copy keeps them)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Site


class Sequential(nn.Module):
    """Replaces the point's output by what the body makes of it."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def attach(self, site: Site, name: str) -> None:
        site.module.add_module(name, self)
        site.module.register_forward_hook(self.after)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return in_own_type(self.body, output)


class Parallel(nn.Module):
    """Adds to the point's output what the body makes of the sublayer's input, which is met at the sublayer's first projection."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        self.seen: list[Tensor] = []

    def attach(self, site: Site, name: str) -> None:
        assert site.entry is not None
        site.module.add_module(name, self)
        site.entry.register_forward_pre_hook(self.before, with_kwargs=True)
        site.module.register_forward_hook(self.after)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.seen.append(args[0] if args else next(iter(kwargs.values())))

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + in_own_type(self.body, self.seen.pop())


def in_own_type(body: nn.Module, hidden: Tensor) -> Tensor:
    """What learns stays in float32 whatever type the model is stored in; autocast sees to it by itself."""
    own = next((p.dtype for p in body.parameters()), hidden.dtype)
    if own == hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
        return body(hidden)
    return body(hidden.to(own)).to(hidden.dtype)
