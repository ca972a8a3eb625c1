"""Cross entropy over a vocabulary: the logits of a step are the largest tensor of a small language model, and torch makes four more of that size in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.compute.kernels import kernel, memory


def cross_entropy(logits: Tensor, labels: Tensor, overwrite: bool = False) -> Tensor:
    """The loss of each of the first K rows in float32, (K,), of logits (K or more, V) in any type and labels (K,), as torch computes it without a reduction.

    overwrite: whether the gradient may take the memory of the logits, as nobody reads them any more
    """
    classes = logits.shape[1]
    if len(labels) and logits.device.type == "cpu" and kernel("cross_entropy", logits.dtype) and bool(((labels >= 0) & (labels < classes)).all()):
        return _CrossEntropy.apply(logits, labels, overwrite)  # type: ignore[no-any-return]
    return nn.functional.cross_entropy(logits[: len(labels)].float(), labels, reduction="none")


class _CrossEntropy(torch.autograd.Function):
    """The gradient is computed together with the loss, in the type of the logits, for all of their rows: what is cut off outside is filled with zeros and copied by autograd."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, overwrite: bool) -> Tensor:
        logits, labels, run = logits.contiguous(), labels.contiguous(), kernel("cross_entropy", logits.dtype)
        assert run
        losses = torch.empty(len(labels), dtype=torch.float32)
        gradients = (logits.detach() if overwrite else torch.empty_like(logits)) if ctx.needs_input_grad[0] else None
        run(len(labels), logits.shape[1], memory(logits), memory(labels), memory(losses), memory(gradients))
        if gradients is not None:
            gradients[len(labels) :] = 0
            if overwrite:
                torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradients,) = ctx.saved_tensors
        if not bool((d == 1).all()):
            gradients = torch.cat([gradients[: len(d)] * d.to(gradients.dtype)[:, None], gradients[len(d) :]])
        return gradients, None, None
