"""The head of a language model, for the tokens that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.compute.packing import spare


def logits_of(model: nn.Module, inputs: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """(K, V): the logits that `model` gives of these (K,) of its B * T tokens, without computing those of the others.

    A vocabulary is larger than all else in a small model, and of a batch only what is to be foreseen is wanted of it: neither
    padding nor prompts. Some more than K are computed where a product of a number of rows that was not met before would cost more.
    """
    inner: Any = getattr(model, "module", model)
    shape = inputs["input_ids"].shape
    asked = torch.cat([tokens, tokens.new_zeros(spare(len(tokens)))])
    hooks, chosen = [], []

    def choose(head: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if chosen or not states or states[0].shape[:2] != shape:
            return None
        chosen.append(True)
        return (states[0].flatten(0, 1)[asked][None],)

    def begin(*_: Any) -> None:
        """Not before: what was hooked to the model earlier may run it on other rows."""
        head = inner.get_output_embeddings()
        if len(hooks) == 1 and head is not None:
            hooks.append(head.register_forward_pre_hook(choose))

    hooks.append(inner.register_forward_pre_hook(begin))
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    if chosen:
        return _First.apply(logits, len(tokens))  # type: ignore[no-any-return]
    return logits[:, -shape[1] :].flatten(0, 1)[tokens]  # a method may have put tokens of its own before these


class _First(torch.autograd.Function):
    """(1, R, V), count -> (count, V): the first rows. torch's own slices fill the gradient of all with zeros, and then copy, once for each axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.shape = x.shape
        return x[0, :count]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        d_x = d.new_empty(ctx.shape)
        d_x[0, : len(d)] = d
        d_x[0, len(d) :] = 0
        return d_x, None
