"""One number for each text, or for each pair of texts.

A new head learns numbers in units of their spread around their mean, since an optimiser's steps have one size whatever the
labels mean; then both are folded into its last layer, so that the saved folder answers in the scale of the labels.
Hugging Face has no tag of its own for this task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.batch import Batch
from luthier.data.columns import Column
from luthier.data.rows import Row, Rows
from luthier.errors import UserError
from luthier.tasks import metrics, pictures
from luthier.tasks.base import BaselineContext, Features, Metric, Task, Term, as_floats, defined, encode_texts, name_pad_token, row_logits
from luthier.tasks.text_classification import PAIR, TEXT, _texts


@dataclass(frozen=True)
class Regression(Task):
    """mean, spread: of the training numbers; the loss is the squared error in units of the spread.

    scale, shift  number = scale * (what the model answers) + shift, while a new head trains
    """

    mean: float
    spread: float
    scale: float = 1.0
    shift: float = 0.0

    tag = "regression"
    use = "a number for each text or pair of texts"
    columns = (TEXT, PAIR, Column("label", "number", names=("label", "score", "rating", "value", "target", "similarity"), use="the number"))
    metric = "pearson"
    measures = ("pearson", "spearman", "mae", "r2")
    auto_class = "AutoModelForSequenceClassification"
    reads = ("text", "text_pair")

    @classmethod
    def claims(cls, columns, given, config):
        name = given.get("label") or next((n for n in columns if n.lower() in cls.columns[2].names), None)
        if name is not None and name in columns and "number" in columns[name] and "category" not in columns[name] and any("text" in kinds for kinds in columns.values()):
            return f"column {name!r} holds numbers with fractions"
        return None

    @classmethod
    def learn(cls, train, validation, test, **options):
        cls.take_options(options)
        values = np.array([row["label"] for row in train])
        if np.ptp(values) == 0:
            raise UserError(f"All {len(train)} training rows have the number {values[0]:g}: there is nothing to learn.")
        return cls(float(values.mean()), float(values.std()))

    def facts(self):
        return {"mean": self.mean, "spread": self.spread}

    def configure(self, config: Any) -> None:
        config.num_labels = 1
        config.problem_type = "regression"
        name_pad_token(config)

    def start(self, model: nn.Module, new_heads: Sequence[str]):
        last = _last_layer(model, new_heads)
        if "bias" in last:
            with torch.no_grad():
                last["bias"].zero_()
            return replace(self, scale=self.spread, shift=self.mean)
        # stock decoder heads have no bias that could hold the mean: their weights have to reach it
        return replace(self, scale=float(np.hypot(self.mean, self.spread))) if last else self

    def settle(self, model: nn.Module, new_heads: Sequence[str]):
        last = _last_layer(model, new_heads)
        with torch.no_grad():
            for parameter in last.values():
                parameter.mul_(self.scale)
            if "bias" in last:
                last["bias"].add_(self.shift)
        return replace(self, scale=1.0, shift=0.0)

    def encode(self, row: Row, tokenizer: Any, max_length: int) -> Features:
        inputs, cut = encode_texts(tokenizer, row["text"], row.get("text_pair"), max_length)
        return Features(inputs, row.get("label"), truncated=cut)

    def targets(self, features: Sequence[Features]) -> dict[str, Tensor]:
        return {} if any(f.target is None for f in features) else {"labels": torch.tensor([f.target for f in features], dtype=torch.float32)}

    def loss(self, model: nn.Module, batch: Batch) -> Term:
        predicted = self.numbers(row_logits(model, batch).squeeze(-1).float())
        return Term((((predicted - batch.targets["labels"]) / self.spread) ** 2).sum(), len(predicted))

    def numbers(self, answered: Tensor) -> Tensor:
        return answered * self.scale + self.shift

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        return list(as_floats(self.numbers(row_logits(model, batch).squeeze(-1).float())))

    def predictions(self, outputs: Sequence[Any], rows: Rows, top: int = 1) -> list[dict[str, Any]]:
        return [{"predicted": round(float(value), 6)} for value in outputs]

    def measure(self, outputs: Sequence[Any], rows: Rows) -> dict[str, Metric]:
        return metrics.regression(_truth(rows), np.array(outputs, dtype=np.float64))

    def per_row(self, outputs: Sequence[Any], rows: Rows) -> list[float]:
        return (-np.abs(_truth(rows) - np.array(outputs))).tolist()

    def baselines(self, context: BaselineContext) -> dict[str, dict[str, Metric]]:
        from sklearn.linear_model import Ridge

        truth, train = _truth(context.test), _truth(context.train)
        probe = Ridge(alpha=1.0).fit(_vectors(context, context.train), train)
        return {
            "mean": defined(metrics.regression(truth, np.full_like(truth, train.mean()))),
            "frozen embeddings": metrics.regression(truth, np.asarray(probe.predict(_vectors(context, context.test)), dtype=np.float64)),
        }

    def picture(self, outputs: Sequence[Any], rows: Rows, path: Path, before: Sequence[Any] | None = None) -> None:
        pictures.residuals(_truth(rows), np.array(outputs, dtype=np.float64), "number", path)

    def describe(self, row: Row, features: Features, tokenizer: Any) -> str:
        return f"{tokenizer.decode(features.inputs['input_ids'])[:200]}  ->  {features.target:g}"


def _last_layer(model: nn.Module, new_heads: Sequence[str]) -> dict[str, nn.Parameter]:
    """`weight` (1, d) and, where it has one, `bias` (1,) of the head's last layer, if that is new. A wrapper may have put names of its own between the head's."""
    heads = {name.partition(".")[0] for name in new_heads}
    return {name.rpartition(".")[2]: p for name, p in model.named_parameters() if p.requires_grad and p.dim() and len(p) == 1 and heads & set(name.split("."))}


def _truth(rows: Rows) -> np.ndarray:
    return np.array([row["label"] for row in rows], dtype=np.float64)


def _vectors(context: BaselineContext, rows: Rows) -> np.ndarray:
    """Of a pair: how alike and how different its two vectors are, which is what a number about a pair is mostly about."""
    if not any(row.get("text_pair") for row in rows):
        return context.embed(_texts(rows))
    first, second = context.embed([row["text"] for row in rows]), context.embed([row.get("text_pair") or "" for row in rows])
    return np.concatenate([first * second, np.abs(first - second)], axis=1)
