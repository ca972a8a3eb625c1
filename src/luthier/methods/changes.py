"""How a WeightChange lives in a model: the module keeps its name and its base weight, and takes a subclass that adds the change."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.anatomy import Site
from luthier.errors import UserError
from luthier.methods.kinds import Linear, Parameters, WeightChange


class Change(nn.Module):
    """The learnt tensors of one method on one site, a child of the site's module."""

    def __init__(self, method: WeightChange, site: Site, rng: torch.Generator):
        super().__init__()
        self.method, self.rows = method, site.rows
        weight = site_weight(site.module, site.rows)
        # an attribute of its own for each tensor, so that state dict names read `...luthier_lora.query.a`
        self.names = []
        for name, tensor in method.create(weight.detach(), rng).items():
            self.register_parameter(name, nn.Parameter(tensor.to(device=weight.device)))
            self.names.append(name)

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)

    @property
    def is_low_rank(self) -> bool:
        return self.method.factors(self) is not None

    def cast(self, like: Tensor) -> Parameters:
        """The learnt tensors in the type of what they meet, should the model be stored in another; autocast sees to it by itself."""
        if torch.is_autocast_enabled(like.device.type) or all(self[name].dtype == like.dtype for name in self.names):
            return self
        return {name: self[name].to(like.dtype) for name in self.names}


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before it carried changes."""
    return type(module).__mro__[2] if isinstance(module, Changed) else type(module)


def site_weight(module: nn.Module, rows: slice | None) -> Tensor:
    """The (out, in) weight of a site, whatever way its module stores it."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight = weight.T if isinstance(module, (Conv1D, nn.Embedding)) else weight
    return weight if rows is None else weight[rows]


class Changed:
    """Mixed into the class of a module that carries changes; its base weight is untouched until `merge`."""

    def changes(self) -> list[Change]:
        return [change for group in self.children() if isinstance(group, Changes) for change in group.values()]  # type: ignore[attr-defined]

    def unchanged(self, x: Tensor) -> Tensor:
        return super().forward(x)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        unchanged = self.unchanged
        changes = self.changes()
        if isinstance(self, nn.Embedding):
            weight = functools.reduce(lambda w, change: change.method.effective(w, change.cast(w)), changes, self.weight.T)
            return nn.functional.embedding(x, weight.T, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        bias: Tensor | None = self.bias  # type: ignore[attr-defined]
        if len(changes) == 1 and changes[0].rows is None:
            change = changes[0]
            return change.method.forward(x, Linear(site_weight(self, None), bias, unchanged), change.cast(x), change.training)  # type: ignore[arg-type]
        whole = unchanged(x)
        pieces, start = [], 0
        for change in sorted(changes, key=lambda c: c.rows.start):  # type: ignore[union-attr]
            rows: slice = change.rows  # type: ignore[assignment]
            part = Linear(
                site_weight(self, rows),  # type: ignore[arg-type]
                None if bias is None else bias[rows],
                lambda z, rows=rows: (whole if z is x else unchanged(z))[..., rows],
            )
            pieces += [whole[..., start : rows.start], change.method.forward(x, part, change.cast(x), change.training)]
            start = rows.stop
        return torch.cat([*pieces, whole[..., start:]], dim=-1)


class Changes(nn.ModuleDict):
    """The changes of one method on one module, by the last word of their role (`query`, `up`; several where the module is fused)."""


@functools.cache
def _changed_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Changed{base.__name__}", (Changed, base), {"__module__": base.__module__})


def attach(site: Site, method: WeightChange, name: str, rng: torch.Generator) -> Change:
    """Give the site's module the change, under the child `name`."""
    module = site.module
    if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
        raise UserError(f"{method.card.name}: {site.name} is a {type(module).__name__}; only linear layers and embeddings can be changed. Choose other sites.")
    if isinstance(module, nn.Embedding) and not isinstance(module, Changed) and type(module).forward is not nn.Embedding.forward:
        raise UserError(f"{method.card.name}: {site.name} is a {type(module).__name__}, which does more than look rows up (it may scale them), and a change of its weight would pass that by. Choose other sites.")
    change = Change(method, site, rng)
    change.train(module.training)
    if not isinstance(module, Changed):
        module.__class__ = _changed_class(type(module))  # type: ignore[assignment]
    if not hasattr(module, name):
        module.add_module(name, Changes())
    getattr(module, name)[site.role.rsplit(".", 1)[-1] if site.role else "weight"] = change
    return change


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Write the effective weights, computed in float32, into the module and take the changes away."""
    assert isinstance(module, Changed)
    for change in module.changes():
        target = site_weight(module, change.rows)
        exact = {name: change[name].float() for name in change.names}
        target.copy_(change.method.effective(target.float(), exact))  # type: ignore[arg-type]  # a view: rows and transposition write through
    for name in [name for name, child in module.named_children() if isinstance(child, Changes)]:
        delattr(module, name)
    module.__class__ = stock_class(module)  # type: ignore[assignment]
