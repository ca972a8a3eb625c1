"""The head of a language model, for the tokens that count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from luthier.compute.packing import spare


@contextlib.contextmanager
def answering_for(model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Inside, the head of `model` answers for these (K,) of its B * T tokens alone: its logits are (1, K or more, V).

    A vocabulary is larger than all else in a small model, and of a batch only what is to be foreseen is wanted of it: neither
    padding nor prompts. There are more than K where a product of a number of rows that was not met before would cost more.
    """
    inner: Any = getattr(model, "module", model)
    asked = torch.cat([tokens, tokens.new_zeros(spare(len(tokens)))])
    hooks = []

    def begin(*_: Any) -> None:
        """Not before: what was hooked to the model earlier may run it on other rows."""
        hooks.append(inner.get_output_embeddings().register_forward_pre_hook(lambda _, states: (states[0].flatten(0, 1)[asked][None],)))

    hooks.append(inner.register_forward_pre_hook(begin))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
