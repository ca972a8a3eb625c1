"""Tiny finished runs of every task and saved form, each made once, and the command line inside this process."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import luthier
from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl
from luthier.verbs.console import Console

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "merged": ("text-classification", {}),
    "other": ("text-classification", {"method": "full", "seed": 0}),
    "adapter": ("text-classification", {"save": "adapter"}),
    "inserts": ("text-classification", {"method": "adapter(reduction=8)"}),
    "difference": ("text-classification", {"method": "bitfit", "save": "difference"}),
    "number": ("regression", {}),
    "tags": ("token-classification", {}),
    "text": ("text-generation", {"options": {"max_new_tokens": 4}}),
    "search": ("sentence-similarity", {"save": "adapter"}),
}


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shop")


@pytest.fixture(scope="session")
def made(shop: Path) -> Callable[[str], Path]:
    """The run folder of a kind. Its rows lie in `TASK.jsonl` beside it, its model in `bert` or `gpt2`."""

    def make(kind: str) -> Path:
        task, settings = KINDS[kind]
        out = shop / kind
        if not out.exists():
            architecture, auto_class = ("gpt2", "AutoModelForCausalLM") if task == "text-generation" else ("bert", "AutoModel")
            model, rows = shop / architecture, shop / f"{task}.jsonl"
            if not model.exists():
                tiny_folder(model, architecture, auto_class)
            if not rows.exists():
                write_jsonl(rows, tiny_rows(task))
            # a rate that moves the tiny model visibly in a few steps
            luthier.adapt(model, rows, task=task, out=out, max_steps=8, lr=1e-2, precision="fp32", baselines=False, console=Console(quiet=True), **settings)
        return out

    return make


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def call() -> Callable[..., Ended]:
    """The command line: exit status, standard output, standard error. `stdin`: bytes."""
    from luthier import cli

    def run(*arguments: object, stdin: bytes = b"") -> Ended:
        out, err, status = io.StringIO(), io.StringIO(), 0
        argv, source = sys.argv, sys.stdin
        sys.argv, sys.stdin = ["luthier", *map(str, arguments)], io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii")
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.argv, sys.stdin = argv, source
        return Ended(status, out.getvalue(), err.getvalue())

    return run
