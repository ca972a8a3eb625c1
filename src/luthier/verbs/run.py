"""A finished run: its record, and its model and task opened on first use."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import nn

from luthier import machine
from luthier.data.columns import apply
from luthier.data.rows import Row, Rows
from luthier.errors import UserError, did_you_mean
from luthier.methods import loading
from luthier.pretrained import Pretrained
from luthier.runs import RunRecord, read_run
from luthier.tasks import find
from luthier.tasks.base import Features, Task
from luthier.training.evaluation import outputs
from luthier.verbs.job import encode


class Run:
    """A run folder. `run.metrics`, `run.model` (a transformers or peft model in eval mode), `run.predict(texts)`.

    base       where the base model lies, for an adapter whose base has moved
    device     where the model is put: the GPU where there is one
    precision  auto, fp32, bf16 or int8; by default fp32 where the run was asked for it, else auto
    """

    def __init__(self, path: str | Path, base: str | Path | None = None, device: str | None = None, precision: str | None = None):
        self.path = Path(path)
        self.record: RunRecord = read_run(self.path)
        if base is not None and not Path(base).is_dir():
            raise UserError(f"--base {base}: there is no such folder.")
        self.base, self.device, self.asked = base, machine.choose_device(device), precision
        self.index = "search"  # the folder of its search vectors
        self.truncated = 0  # rows so far that were longer than the model reads

    def __repr__(self) -> str:
        name, metric = next(iter(self.metrics.items()))
        return f"Run({str(self.path)!r}, {self.record.method}, {name} {metric['value']:.3f})"

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """`{name: {value, low, high}}` on the test rows, measured on what was saved, reloaded."""
        return self.record.metrics

    @functools.cached_property
    def task(self) -> Task:
        return find(self.record.task["tag"]).from_facts(self.record.task["facts"])

    @functools.cached_property
    def tokenizer(self) -> Any:
        return Pretrained(self.path).tokenizer()

    @functools.cached_property
    def model(self) -> nn.Module:
        try:
            found = loading.load(self.path, type(self.task).auto_class, self.task.configure, self.base)
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError) as error:  # what other hands or half a copy did to the files
            raise UserError(f"{self.path} cannot be opened: its files are broken, incomplete or of different runs ({type(error).__name__}: {str(error).splitlines()[0]}). Copy the folder again.") from error
        return found.to(self.device)

    def unchanged(self) -> Run:
        """This run with the model as it was before training, for a look at what training changed."""
        before = Run(self.path, self.base, self.device)
        before.index = "unchanged"
        task, start = self.task, self.record.content["model"]["path"]
        before.__dict__["model"] = loading.load_plain(self.base or start, type(task).auto_class, task.configure).to(self.device)
        return before

    def typed(self, rows: Rows, supervised: bool = True, columns: Mapping[str, str] | None = None) -> Rows:
        """The rows by role, with this run's columns unless others are given; roles that only supervise are left out when there is nothing to compare with."""
        roles = [c for c in type(self.task).columns if supervised or c.role in self.task.reads]
        mapping = {role: column for role, column in self.columns(columns).items() if any(c.role == role for c in roles)}
        optional = {c.role for c in roles if not c.required and c.role not in (columns or {})}
        missing = [f"{column!r} (for {role})" for role, column in mapping.items() if column not in rows.columns and role not in optional]
        if missing:
            raise UserError(f"{rows.name} lacks the column {' and '.join(missing)}. It has: {', '.join(rows.columns)}. Say which it is: --columns ROLE=NAME.")
        return apply(rows, {role: column for role, column in mapping.items() if column in rows.columns}, tuple(roles))[0]

    def columns(self, given: Mapping[str, str] | None = None) -> dict[str, str]:
        """Role -> column: those of the training unless others are given."""
        roles = [column.role for column in type(self.task).columns]
        for role in given or {}:
            if role not in roles:
                raise UserError(f"--columns: {self.task.tag} reads no {role!r}.{did_you_mean(role, roles)} It reads: {', '.join(roles)}.")
        return self.record.data["columns"] | dict(given or {})

    def outputs(self, rows: Rows, batch_size: int = 64) -> list[Any]:
        """What the task reads off the model for each (typed) row, in order."""
        return self._outputs(self._features(rows), batch_size)

    @property
    def wanted(self) -> str:
        """The precision that was asked for; float32 where the run was, so that its metrics come out again; else what is safe and fastest here, wherever it was trained."""
        return self.asked or ("fp32" if self.record.content.get("training", {}).get("precision_asked") == "fp32" else "auto")

    @functools.cached_property
    def precision(self) -> str:
        return machine.choose_precision(self.wanted, self.device)[0]

    def at(self, precision: str) -> Run:
        """This run, its model shared, in another precision."""
        self.model  # noqa: B018 (opened once for both)
        other = copy.copy(self)
        other.__dict__.pop("precision", None)
        other.asked = precision
        return other

    def predict(self, rows: Iterable[Any], top: int = 1, batch_size: int = 64) -> list[dict[str, Any]]:
        """Predictions for texts, or for dictionaries with this run's columns: labels and scores, tags, numbers, vectors, text."""
        return self.answers(self.typed(self._rows(rows), supervised=False), top, batch_size)

    def answers(self, typed: Rows, top: int = 1, batch_size: int = 64) -> list[dict[str, Any]]:
        """Predictions for rows by role."""
        if self.asked in ("bf16", "int8") and type(self.task).answers is not Task.answers:
            raise UserError(f"--precision {self.asked}: {self.task.tag} generates in fp32 only. Use --precision fp32 (or auto).")
        features = self._features(typed)
        written = self.task.answers(self.model, features, typed, self.tokenizer, top, batch_size)
        return written if written is not None else self.task.predictions(self._outputs(features, batch_size), typed, top)

    def embed(self, texts: Sequence[str], part: str = "query", batch_size: int = 64) -> np.ndarray:
        """(n, d) float32 vectors of unit length, of a sentence-similarity run; part (query or document) chooses the prefix."""
        from luthier.verbs.encoder import Encoder

        return Encoder.of(self).embed(texts, part, batch_size)

    def _outputs(self, features: Sequence[Features], batch_size: int) -> list[Any]:
        return outputs(self.model, self.task, features, self.tokenizer, batch_size=batch_size, device=self.device, precision=self.precision)

    def _features(self, rows: Rows) -> list[Features]:
        features = encode(self.task, rows, self.tokenizer, self.record.data["max_length"])
        self.truncated += sum(f.truncated > 0 for f in features)
        return features

    def _rows(self, rows: Iterable[Any]) -> Rows:
        role, column = next(iter(self.record.data["columns"].items()))
        made = []
        for i, row in enumerate(rows, start=1):
            if isinstance(row, str):
                row = {column: row}
            if not isinstance(row, dict):
                raise UserError(f"Row {i} is {row!r}; give texts, or dictionaries with the column {column!r} ({role}).")
            made.append(Row(row, "rows", i))
        if not made:
            raise UserError("There are no rows to predict.")
        return Rows.of(made)


def load(path: str | Path, base: str | Path | None = None, device: str | None = None, precision: str | None = None) -> Run:
    """Open a run folder."""
    return Run(path, base, device, precision)
