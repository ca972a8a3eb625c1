"""Which rows make up each step: fixed by seed and epoch alone, rows of like length together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

WINDOW = 32  # batches among which rows are sorted by length


def steps_per_epoch(rows: int, batch_size: int) -> int:
    return math.ceil(rows / batch_size)


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of each batch of an epoch: every row once, exactly `batch_size` rows a batch but the last of the row order.

    Rows are shuffled, sorted by length inside windows of `WINDOW` batches, cut into batches, and the batches are shuffled.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=rng).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = sorted(order[start : start + WINDOW * batch_size], key=lambda row: lengths[row])
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]


def micro_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
