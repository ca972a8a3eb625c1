"""luthier fits any pretrained transformer to a job, and proves that it got better.

    import luthier
    run = luthier.adapt("./minilm", "tickets.csv", method="lora(r=8)", out="run")
    run.metrics, run.model, run.predict(["my invoice is wrong"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from luthier.machine.setting import cap, share

cap()  # before torch computes anything: it reads the cap once
share()

__version__ = "0.1.0"

_LAZY = {
    "adapt": "luthier.verbs.adapt",
    "apply": "luthier.verbs.apply",
    "embed": "luthier.verbs.embed",
    "evaluate": "luthier.verbs.evaluate",
    "export": "luthier.verbs.export",
    "load": "luthier.verbs.encoder",
    "predict": "luthier.verbs.predict",
    "search": "luthier.verbs.search",
    "Encoder": "luthier.verbs.encoder",
    "Run": "luthier.verbs.run",
    "Recipe": "luthier.recipe",
    "Anatomy": "luthier.anatomy",
    "Workload": "luthier.anatomy",
    "UserError": "luthier.errors",
}

__all__ = ["Anatomy", "Encoder", "Recipe", "Run", "UserError", "Workload", "__version__", "adapt", "apply", "embed", "evaluate", "export", "load", "predict", "search"]

if TYPE_CHECKING:
    from luthier.anatomy import Anatomy, Workload
    from luthier.errors import UserError
    from luthier.recipe import Recipe
    from luthier.verbs.adapt import adapt
    from luthier.verbs.apply import apply
    from luthier.verbs.embed import embed
    from luthier.verbs.encoder import Encoder, load
    from luthier.verbs.evaluate import evaluate
    from luthier.verbs.export import export
    from luthier.verbs.predict import predict
    from luthier.verbs.run import Run
    from luthier.verbs.search import search


def __getattr__(name: str) -> Any:
    """Heavy modules are imported on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value  # so that the function, not the module of its name, is found from now on
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
