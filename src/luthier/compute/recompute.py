"""Gradient checkpointing: of a block only its input is kept, and the block runs once more on the way back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with the same gradients, to the bit: what is drawn by chance is drawn again alike."""
    return functools.partial(checkpoint, function, use_reentrant=False)
