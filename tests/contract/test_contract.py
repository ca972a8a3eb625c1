"""Every method on every architecture, and one method of each kind killed and resumed. `make contract` kills and resumes them all."""

from __future__ import annotations

import itertools

import pytest

from luthier.contract import ARCHITECTURES, cases, resume
from luthier.contract.suite import Case
from luthier.methods import Insert, registry
from luthier.methods.kinds import Method, method

GROUPS = [(key, list(group)) for key, group in itertools.groupby(cases(resumed=False), key=lambda case: (case.stack, case.architecture))]


@pytest.mark.parametrize("group", [group for _, group in GROUPS], ids=[f"{stack}-{architecture}" for (stack, architecture), _ in GROUPS])
def test_promises_hold(group: list[Case]) -> None:
    failed = [f"{case.check}: {found.reason}" for case in group if not (found := case.outcome()).good]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("stack", ["lora", "adapter(reduction=8)", "reinit(top=1)|full", "peft(type=vera, r=16)"])
def test_killed_and_resumed_ends_at_the_same_bits(stack: str) -> None:
    resume.check(stack, "bert")


def test_every_shipped_method_is_tried_on_every_architecture() -> None:
    tried = {(case.method, case.architecture) for _, group in GROUPS for case in group}
    assert tried == set(itertools.product(registry.methods(), ARCHITECTURES))


def _lying_method() -> type[Method]:
    import torch
    from torch import nn

    from luthier.methods import Card

    class Shift(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.shift = nn.Parameter(torch.linspace(0, 1, width))  # a layer norm would erase an even one

        def forward(self, hidden):
            return hidden + self.shift

    @method
    class Lying(Insert):
        """Moves the outputs, and promises not to."""

        sites: str = "mlp.out"
        card = Card(name="lying", use="", source="", promises={"starts_at_base"}, lr=1e-3, examples=("lying",), gaps={"acts:bert": "invented"})

        def build(self, site):
            return Shift(site.outputs)

    return Lying


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch):
    known = {**registry.methods(), "lying": _lying_method()}
    monkeypatch.setattr(registry, "methods", lambda: known)


def test_a_broken_promise_fails(lying: None) -> None:
    found = Case("lying", "lying", "bert", "starts_at_base").outcome()
    assert found.result == "fails" and "not close" in found.reason


def test_a_gap_that_closed_must_go(lying: None) -> None:
    found = Case("lying", "lying", "bert", "acts").outcome()
    assert found.result == "closed" and not found.good and "take it off" in found.reason
