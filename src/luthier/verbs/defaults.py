"""Learning rate, warm-up, passes and method where the user gives none. The rule and the runs it was derived from: docs/evidence.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from luthier.errors import UserError
from luthier.methods.kinds import Bridge, Insert, Selection, WeightChange
from luthier.methods.stack import Stack
from luthier.tasks.base import Task

REFERENCE_PARAMETERS = 22e6  # the cards' learning rates were measured at this size
FEWEST, MOST = 1, 8  # passes, of a task that takes the usual number of steps


@dataclass(frozen=True)
class Chosen:
    """A setting and where it came from."""

    value: Any
    origin: str


def learning_rate(stack: Stack, parameters: int) -> Chosen:
    """The card's rate, halved for each tenfold growth of the model: the smallest of the stack's methods, so that none diverges."""
    rates = {method.card.name: method.card.lr for method in stack if isinstance(method, (Selection, WeightChange, Insert, Bridge)) and method.card.lr}
    if not rates:
        raise UserError(f"None of the methods in {stack} has a default learning rate: give --lr.")
    name = min(rates, key=lambda key: rates[key])
    scale = 0.5 ** max(0.0, math.log10(parameters / REFERENCE_PARAMETERS))
    return Chosen(float(f"{rates[name] * scale:.2g}"), f"default of {name} for {parameters / 1e6:.3g} M parameters")


def epochs(rows: int, batch_size: int, steps: int) -> Chosen:
    """As many passes as make about `steps` of the task, at least 1; at most 8, or more where the task takes more steps than usual."""
    most = MOST * steps // Task.steps
    passes = min(max(round(steps * batch_size / rows), FEWEST), most)
    return Chosen(float(passes), f"default for {rows:,} rows: about {steps} steps, at least {FEWEST} and at most {most} passes")


def warmup() -> Chosen:
    return Chosen(0.1, "default: a deep encoder without it can fail to learn")


def method() -> Chosen:
    return Chosen("lora", "default: trains under 1 % of the model, and merges into a stock folder")
