"""Which rows make up each step: fixed by seed and epoch alone, rows of like length together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

WINDOW = 32  # batches among which rows are sorted by length


def steps_per_epoch(rows: int, batch_size: int, smallest: int = 1) -> int:
    full, rest = divmod(rows, batch_size)
    return max(1, full + (rest >= smallest))


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, smallest: int = 1) -> list[list[int]]:
    """Row numbers of each batch of an epoch: every row once, exactly `batch_size` rows a batch but the last of the row order.

    Rows are shuffled, sorted by length inside windows of `WINDOW` batches, cut into batches, and the batches are shuffled.
    A last batch of fewer than `smallest` rows joins the one before it: rows that learn from each other need company.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=rng).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = sorted(order[start : start + WINDOW * batch_size], key=lambda row: lengths[row])
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < smallest:
        alone = batches.pop()
        batches[-1] += alone
    return [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]


def smaller_batch(loss_per: str, size: int) -> str:
    """What to give where `size` rows at once are too many."""
    fewer = max(1, size // 4)
    return f"--batch-size {max(2, fewer)}" if loss_per == "batch" else f"--micro-batch-size {fewer} (the result stays the same)"


def micro_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
