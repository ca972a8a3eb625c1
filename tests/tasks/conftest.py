"""Rows by role, and a tiny model with the head of a task, for the tests of every task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from luthier.contract.tiny import tiny_config
from luthier.data.columns import apply, assign
from luthier.data.rows import Row, Rows
from luthier.tasks.base import Task


def _rows(values: Iterable[dict[str, Any]]) -> Rows:
    return Rows.of([Row(v, "rows.jsonl", i) for i, v in enumerate(values, start=1)], "rows.jsonl")


@pytest.fixture(scope="session")
def rows() -> Callable[[Iterable[dict[str, Any]]], Rows]:
    """Rows as they are given."""
    return _rows


@pytest.fixture(scope="session")
def by_role() -> Callable[[type[Task], Iterable[dict[str, Any]]], Rows]:
    """Rows with their columns assigned to the task's roles, as a run assigns them."""

    def make(task: type[Task], values: Iterable[dict[str, Any]]) -> Rows:
        raw = _rows(values)
        return apply(raw, assign(raw, task.columns, {})[0], task.columns)[0]

    return make


@pytest.fixture(scope="session")
def built() -> Callable[..., nn.Module]:
    """A tiny model with the task's head, configured by the task, its parameters moved away from their start."""

    def make(task: Task, architecture: str = "bert", **settings: Any) -> nn.Module:
        config = tiny_config(architecture)
        for name, value in {"eos_token_id": 1, **({} if architecture == "roberta" else {"pad_token_id": 0}), **settings}.items():
            setattr(config, name, value)
        task.configure(config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, type(task).auto_class).from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return make
