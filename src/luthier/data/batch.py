"""A batch of token rows, and the only place that knows how they lie in memory (padded on either side today)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads.

    inputs   what the model's forward takes by name: `input_ids (B, T)`, `attention_mask (B, T)`, ...
    targets  what the loss reads by name: `labels (B,)`, `(B, T)`, ...
    rows     the number of each row in its `Rows`, for errors and for putting predictions back in order
    parts    batches that go through the model one after the other and meet in the loss (query, document, negative)
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    parts: dict[str, Batch] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        """(B, T), 1 at real tokens."""
        return self.inputs["attention_mask"]

    @property
    def tokens(self) -> int:
        """Real tokens, padding aside, of the batch and its parts."""
        own = int(self.inputs["attention_mask"].sum()) if "attention_mask" in self.inputs else 0
        return own + sum(part.tokens for part in self.parts.values())

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            inputs={k: v.to(device) for k, v in self.inputs.items()},
            targets={k: v.to(device) for k, v in self.targets.items()},
            parts={k: v.to(device) for k, v in self.parts.items()},
        )

    def first(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (B, d): the first real token of each row."""
        index = self.mask.to(torch.int8).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), index]

    def last(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (B, d): the last real token of each row."""
        positions = torch.arange(self.mask.shape[1], device=self.mask.device)
        index = (self.mask.bool() * positions).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), index]

    def mean(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (B, d): the mean over each row's real tokens."""
        mask = self.mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def pad(rows: list[list[int]], value: int, side: str = "right") -> Tensor:
    """Integer rows of unequal length -> one (B, T) tensor, filled up on one side."""
    width = max(len(row) for row in rows)
    out = np.full((len(rows), width), value, dtype=np.int64)
    for filled, row in zip(out, rows, strict=True):
        filled[slice(0, len(row)) if side == "right" else slice(width - len(row), width)] = row
    return torch.from_numpy(out)
