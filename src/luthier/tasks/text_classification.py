"""One class for each text, or for each pair of texts."""

from __future__ import annotations

from collections import Counter
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
from luthier.errors import UserError, did_you_mean
from luthier.tasks import metrics, pictures
from luthier.tasks.base import BaselineContext, Features, Metric, Task, Term, as_floats, encode_texts, in_order_of, name_pad_token, row_logits

TEXT = Column("text", "text", names=("text", "sentence", "sentence1", "body", "review", "premise", "question", "content", "comment"), use="the text")
PAIR = Column("text_pair", "text", required=False, names=("text_pair", "sentence2", "hypothesis"), use="a second text, read together with the first")


@dataclass(frozen=True)
class TextClassification(Task):
    """labels: class names in order. weights: one per class, or None."""

    labels: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    tag = "text-classification"
    use = "a label and a score for each text or pair of texts"
    columns = (TEXT, PAIR, Column("label", "category", names=("label", "labels", "class", "category", "target", "team", "topic", "sentiment"), use="the class"))
    metric = "accuracy"
    measures = ("accuracy", "macro_f1")
    auto_class = "AutoModelForSequenceClassification"
    options = {"class_weights": None}
    reads = ("text", "text_pair")

    @classmethod
    def claims(cls, columns, given, config):
        if any({"words", "tags"} <= kinds for kinds in columns.values()):
            return None
        name = given.get("label") or next((n for n in columns if n.lower() in cls.columns[2].names and "category" in columns[n]), None)
        texts = [n for n, kinds in columns.items() if "text" in kinds and n != name]
        if name is None and len(texts) >= 1:
            names = [n for n, kinds in columns.items() if "category" in kinds and n not in given.values()]
            name = names[0] if len(names) == 1 and len([t for t in texts if t != names[0]]) == 1 else None
        if name is not None and name in columns and "category" in columns[name] and any(t != name for t in texts):
            return f"column {name!r} holds class names"
        return None

    @classmethod
    def learn(cls, train, validation, test, **options):
        given = cls.take_options(options)
        counts = Counter(row["label"] for row in train)
        if len(counts) < 2:
            raise UserError(f"All {len(train)} training rows have one label, {next(iter(counts))!r}: there is nothing to tell apart. Is it the right column? (--columns label=NAME)")
        labels = tuple(sorted(counts, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))
        weights = None
        if given["class_weights"] is not None:
            if given["class_weights"] != "balanced":
                raise UserError(f"--set class_weights={given['class_weights']!r}: the only choice is balanced (each class weighs as much as the others).")
            weights = tuple(len(train) / (len(labels) * counts[name]) for name in labels)
        task = cls(labels, weights)
        for rows in (validation, test):
            task.check(rows)
        return task

    def check(self, rows):
        for row in rows:
            if row["label"] not in self.labels:
                raise UserError(f"{row.where}: the label {row['label']!r} occurs in no training row.{did_you_mean(row['label'], self.labels)} Training labels: {', '.join(self.labels[:20])}.")

    def follow(self, config):
        labels = in_order_of(config, self.labels)
        weights = dict(zip(self.labels, self.weights, strict=True)) if self.weights else {}
        return replace(self, labels=labels, weights=tuple(weights.get(name, 1.0) for name in labels) if weights else None)

    def facts(self):
        return {"labels": list(self.labels), "weights": list(self.weights) if self.weights else None}

    @classmethod
    def from_facts(cls, facts):
        return cls(tuple(facts["labels"]), tuple(facts["weights"]) if facts["weights"] else None)

    def configure(self, config: Any) -> None:
        config.num_labels = len(self.labels)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: i for i, name in enumerate(self.labels)}
        config.problem_type = "single_label_classification"
        name_pad_token(config)

    def encode(self, row: Row, tokenizer: Any, max_length: int) -> Features:
        inputs, cut = encode_texts(tokenizer, row["text"], row.get("text_pair"), max_length)
        label = row.get("label")
        return Features(inputs, self.labels.index(label) if label in self.labels else None, truncated=cut)

    def targets(self, features: Sequence[Features]) -> dict[str, Tensor]:
        return {} if any(f.target is None for f in features) else {"labels": torch.tensor([f.target for f in features])}

    def loss(self, model: nn.Module, batch: Batch) -> Term:
        logits = row_logits(model, batch).float()
        labels = batch.targets["labels"]
        weights = torch.tensor(self.weights, device=logits.device) if self.weights else None
        total = nn.functional.cross_entropy(logits, labels, weight=weights, reduction="sum")
        return Term(total, float(weights[labels].sum()) if weights is not None else len(labels))

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        return list(as_floats(row_logits(model, batch)))

    def predictions(self, outputs: Sequence[Any], rows: Rows, top: int = 1) -> list[dict[str, Any]]:
        made = []
        for logits in outputs:
            shares = np.exp(logits - logits.max())
            shares /= shares.sum()
            best = np.argsort(-shares, kind="stable")[: max(1, top)]
            answer: dict[str, Any] = {"predicted": self.labels[best[0]], "score": round(float(shares[best[0]]), 6)}
            if top > 1:
                answer["top"] = [{"label": self.labels[i], "score": round(float(shares[i]), 6)} for i in best]
            made.append(answer)
        return made

    def measure(self, outputs: Sequence[Any], rows: Rows) -> dict[str, Metric]:
        return metrics.classification(self._truth(rows), np.stack(outputs).argmax(1), len(self.labels))

    def per_row(self, outputs: Sequence[Any], rows: Rows) -> list[float]:
        return (self._truth(rows) == np.stack(outputs).argmax(1)).astype(float).tolist()

    def baselines(self, context: BaselineContext) -> dict[str, dict[str, Metric]]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        truth, train = self._truth(context.test), self._truth(context.train)
        majority = np.full_like(truth, np.bincount(train).argmax())
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1, class_weight="balanced" if self.weights else None))
        probe.fit(context.embed(_texts(context.train)), train)
        frozen = probe.predict(context.embed(_texts(context.test)))
        return {
            "majority class": metrics.classification(truth, majority, len(self.labels)),
            "frozen embeddings": metrics.classification(truth, np.asarray(frozen), len(self.labels)),
        }

    def picture(self, outputs: Sequence[Any], rows: Rows, path: Path, before: Sequence[Any] | None = None) -> None:
        pictures.confusion(self._truth(rows), np.stack(outputs).argmax(1), self.labels, path)

    def describe(self, row: Row, features: Features, tokenizer: Any) -> str:
        return f"{tokenizer.decode(features.inputs['input_ids'])[:200]}  ->  {row['label']}"

    def _truth(self, rows: Rows) -> np.ndarray:
        places = {name: i for i, name in enumerate(self.labels)}
        return np.array([places[row["label"]] for row in rows])


def _texts(rows: Rows) -> list[str]:
    return [row["text"] + (f" {row['text_pair']}" if row.get("text_pair") else "") for row in rows]
