"""Learning rates over a training: a linear warm-up, then what was asked."""

from __future__ import annotations

import math

SCHEDULES = ("linear", "cosine", "constant")


def factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """The share of the peak rate at `step` (from 0) of `total`; never 0, so that every step moves."""
    rising = max(1, round(warmup * total)) if warmup > 0 else 0
    if step < rising:
        return (step + 1) / rising
    left = (total - step) / max(1, total - rising)
    if schedule == "linear":
        return left
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return 1.0
