"""A model's outputs on rows, in batches of like length, returned in the order of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier import compute
from luthier.data.batch import Batch
from luthier.tasks.base import Features, Task, hidden_states, padded


def outputs(
    model: nn.Module,
    task: Task,
    features: Sequence[Features],
    tokenizer: Any,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    progress: Any = None,
) -> list[Any]:
    """`task.outputs` of every row. The model is in eval mode meanwhile; random streams and gradients are not touched.

    progress  called with the number of rows done
    """
    found: list[Any] = [None] * len(features)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), compute.running(model, device, precision):
        for rows in by_length([f.length for f in features], batch_size):
            batch = task.collate([features[i] for i in rows], rows, tokenizer).to(device)
            for row, value in zip(rows, task.outputs(model, batch), strict=True):
                found[row] = value
            if progress:
                progress(len(rows))
    model.train(was_training)
    return found


def mean_vectors(trunk: nn.Module, features: Sequence[Features], tokenizer: Any, device: str | torch.device = "cpu", precision: str = "fp32", batch_size: int = 64) -> np.ndarray:
    """(n, d): the mean of each row's last hidden states, for baselines on the unchanged model."""
    found: list[Any] = [None] * len(features)
    was_training = trunk.training
    trunk.eval()
    with torch.inference_mode(), compute.running(trunk, device, precision):
        for rows in by_length([f.length for f in features], batch_size):
            batch = Batch(padded([features[i] for i in rows], tokenizer)).to(device)
            for row, vector in zip(rows, batch.mean(hidden_states(trunk, batch)).float().cpu().numpy(), strict=True):
                found[row] = vector
    trunk.train(was_training)
    return np.stack(found)


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The longest first, so that what does not fit into memory is found at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
