"""Cross entropy over a vocabulary: the logits of a step are the largest tensor of a small language model, and torch makes four more of that size in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.compute.kernels import kernel, memory


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each row in float32, (K,), of logits (K, V) in any type and labels (K,), as torch computes it without a reduction."""
    classes = logits.shape[1]
    if len(labels) and logits.device.type == "cpu" and kernel("cross_entropy", logits.dtype) and bool(((labels >= 0) & (labels < classes)).all()):
        return _CrossEntropy.apply(logits, labels)  # type: ignore[no-any-return]
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")


class _CrossEntropy(torch.autograd.Function):
    """The gradient is computed together with the loss, in the type of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels, run = logits.contiguous(), labels.contiguous(), kernel("cross_entropy", logits.dtype)
        assert run
        losses = torch.empty(len(labels), dtype=torch.float32)
        gradients = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        run(*logits.shape, memory(logits), memory(labels), memory(losses), memory(gradients))
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradients,) = ctx.saved_tensors
        return (gradients if bool((d == 1).all()) else gradients * d.to(gradients.dtype)[:, None]), None
