"""The head of a language model, for the tokens that count."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compute.packing import spare


def logits_of(model: nn.Module, inputs: Mapping[str, Any], tokens: Tensor) -> tuple[Tensor, bool]:
    """(K or more, V): first the logits that `model` gives of these (K,) of its B * T tokens, without computing those of the others; and whether nobody else has them, so that their memory is the caller's.

    A vocabulary is larger than all else in a small model, and of a batch only what is to be foreseen is wanted of it: neither
    padding nor prompts. Some more than K are computed where a product of a number of rows that was not met before would cost more.
    """
    inner: Any = getattr(model, "module", model)
    shape = inputs["input_ids"].shape
    asked = torch.cat([tokens, tokens.new_zeros(spare(len(tokens)))])
    hooks, chosen, made = [], [], []

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
            hooks.append(head.register_forward_hook(lambda _, __, logits: made.append(logits.data_ptr())))

    hooks.append(inner.register_forward_pre_hook(begin))
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    if chosen:  # what the model made of the head's answer may be needed for its gradient, and a hook may have kept it: then it has more references than this name
        alone = logits.data_ptr() == made[-1] and sys.getrefcount(logits) == _references_of_a_name()
        return logits.squeeze(0), alone
    return logits[:, -shape[1] :].flatten(0, 1)[tokens], False  # a method may have put tokens of its own before these


def _references_of_a_name() -> int:
    """What Python counts where there is no other reference, which is not the same in all of its versions."""
    x = torch.empty(0)
    return sys.getrefcount(x)
