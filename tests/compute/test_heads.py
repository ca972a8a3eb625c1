"""A head that answers for some tokens alone answers the same, and is whole again afterwards."""

from __future__ import annotations

import pytest
import torch

from luthier import compute
from luthier.compute.heads import logits_of
from luthier.contract.tiny import tiny_inputs, tiny_model
from luthier.methods.engine import install
from luthier.methods.stack import parse


@pytest.mark.parametrize("tokens", [[], [3], [0, 5, 5, 11], list(range(16))], ids=len)
@pytest.mark.parametrize("stack", ["full", "lora"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_logits_and_gradients_are_those_of_the_whole(architecture: str, stack: str, tokens: list[int]) -> None:
    model = install(tiny_model(architecture, "AutoModelForCausalLM"), parse(stack)).model
    inputs, chosen, seen = {name: x for name, x in tiny_inputs(architecture, batch=2, length=8).items() if name != "attention_mask"}, torch.tensor(tokens, dtype=torch.int64), []
    head = model.get_output_embeddings()  # type: ignore[operator]
    watch = head.register_forward_hook(lambda _, states, logits: seen.append(logits.shape))
    with compute.prepared(model, "cpu", "fp32"):  # which tries its blocks on rows of its own in the first pass
        found = logits_of(model, inputs, chosen)[0][: len(chosen)]
        gradients = torch.autograd.grad(found.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        expected = model(**inputs).logits.flatten(0, 1)[chosen]
    watch.remove()
    torch.testing.assert_close(found, expected)
    assert seen[-2][1] == (len(tokens) + 31) // 32 * 32 and seen[-1][:2] == (2, 8)
    wanted = torch.autograd.grad(expected.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    torch.testing.assert_close(gradients, wanted)


def test_logits_that_somebody_else_has_are_not_given_away() -> None:
    """A hook that keeps them, and a model that makes something of what its head said."""
    model, inputs, tokens, kept = tiny_model("llama", "AutoModelForCausalLM"), {"input_ids": torch.arange(1, 9).view(2, 4)}, torch.tensor([0, 5]), []
    assert logits_of(model, inputs, tokens)[1]
    hook = model.register_forward_hook(lambda _, __, out: kept.append(out))
    assert not logits_of(model, inputs, tokens)[1]
    hook.remove()
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_hook(lambda _, __, logits: kept.append(logits))
    assert not logits_of(model, inputs, tokens)[1]
    hook.remove()
    model.register_forward_hook(lambda _, __, out: out.__setitem__("logits", out.logits.tanh()))
    assert not logits_of(model, inputs, tokens)[1]
