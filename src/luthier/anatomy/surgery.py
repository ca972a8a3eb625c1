"""Changes of the model itself that keep config and weights true to each other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def reinitialise(model: nn.Module, modules: Iterable[nn.Module], rng: torch.Generator) -> set[str]:
    """Fresh values by the model's own rule (`_init_weights`) for everything in `modules`; returns the names of the parameters."""
    chosen = list(modules)
    inside = {id(p) for module in chosen for p in module.parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in inside}
    seed = int(torch.randint(2**31, (), generator=rng, device="cpu"))
    if any(p.is_meta for p in model.parameters()):
        return names
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in chosen:
            for part in reversed(list(module.modules())):  # a parent corrects what its children were given
                for parameter in part.parameters(recurse=False):
                    # transformers skips what it has marked as loaded
                    parameter._is_hf_initialized = False  # type: ignore[attr-defined]
                part._is_hf_initialized = False  # type: ignore[assignment]
                model._init_weights(part)  # type: ignore[operator]
    return names
