"""Which rows make up each step: fixed by seed and epoch alone, rows of like length together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from luthier.errors import UserError

WINDOW = 32  # batches among which rows are sorted by length


def steps_per_epoch(rows: int, batch_size: int, smallest: int = 1) -> int:
    full, rest = divmod(rows, batch_size)
    return max(1, full + (rest >= smallest))


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, smallest: int = 1) -> list[list[int]]:
    """Row numbers of each batch of an epoch: every row once, exactly `batch_size` rows a batch but the last of the row order.

    Rows are shuffled, sorted by length inside windows of `WINDOW` batches, cut into batches, and the batches are shuffled.
    A last batch of fewer than `smallest` rows joins the one before it.
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


def fewest_rows(loss_per: str) -> int:
    """Of a batch: rows that learn from each other need company."""
    return 2 if loss_per == "batch" else 1


def total_steps(rows: int, batch_size: int, epochs: float, max_steps: int | None, loss_per: str) -> int:
    return max_steps or max(1, round(epochs * steps_per_epoch(rows, batch_size, fewest_rows(loss_per))))


def check_batches(tag: str, loss_per: str, batch_size: int, micro_batch_size: int | None, micro_batch_tokens: int | None) -> None:
    """Raises UserError where batches of this size leave a task without the company that its rows need."""
    if loss_per != "batch":
        return
    if batch_size < fewest_rows(loss_per):
        raise UserError(f"{tag} compares the rows of a batch with each other: give --batch-size 2 or more.")
    if micro_batch_tokens:
        raise UserError(f"{tag} compares the rows of a batch with each other, so a batch cannot be split: leave --micro-batch-tokens out.")
    if micro_batch_size and micro_batch_size < batch_size:
        raise UserError(f"{tag} compares the rows of a batch with each other, so a batch cannot be split: leave --micro-batch-size out, or give --batch-size {micro_batch_size}.")


def smaller_batch(loss_per: str, size: int, longest: int) -> str:
    """What to give where `size` rows of `longest` tokens are too many at once."""
    fewer = max(1, size // 4)
    return f"--batch-size {max(2, fewer)}" if loss_per == "batch" else f"--micro-batch-tokens {fewer * longest} (larger batches are cut into pieces; the result stays the same)"


def micro_batches(rows: Sequence[int], lengths: Sequence[int], size: int, tokens: int | None = None) -> list[list[int]]:
    """Pieces of a batch, in its order: of at most `size` rows and, padding included, `tokens` tokens, or of one row."""
    pieces: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if pieces and len(pieces[-1]) < size and (not tokens or longest * (len(pieces[-1]) + 1) <= tokens):
            pieces[-1].append(row)
        else:
            pieces.append([row])
            longest = lengths[row]
    return pieces


def rows_at_once(length: int, size: int, tokens: int | None = None) -> int:
    """Of this length, in one micro-batch."""
    return max(1, min(size, tokens // length)) if tokens else size
