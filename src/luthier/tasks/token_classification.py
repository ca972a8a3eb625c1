"""A tag for each word (BIO), and the entities that the tags spell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.data.batch import Batch, pad
from luthier.data.columns import Column
from luthier.data.rows import Row, Rows
from luthier.errors import UserError, did_you_mean
from luthier.tasks import metrics, pictures
from luthier.tasks.base import BaselineContext, Features, Metric, Task, Term, in_order_of, padded

IGNORED = -100
BIO = re.compile(r"O|[BIES]-.+", re.DOTALL)  # E and S: the end of an entity and one of a single word, where tags say so


@dataclass(frozen=True)
class TokenClassification(Task):
    """labels: tags in order, `O` first unless the model knows them in another. A word's tag is read at its first piece; words that were cut off count as `O`."""

    labels: tuple[str, ...]

    tag = "token-classification"
    use = "a tag for each word, and the entities they spell"
    columns = (
        Column("words", "words", names=("words", "tokens"), use="the words of a sentence, as a list"),
        Column("tags", "tags", names=("tags", "ner_tags", "labels"), use="one BIO tag for each word, as a list"),
    )
    metric = "f1"
    measures = ("f1", "precision", "recall", "accuracy")  # and the F1 of each type
    auto_class = "AutoModelForTokenClassification"
    reads = ("words",)
    loss_per = "token"
    steps = 450  # entities are rare among words, and found late

    @classmethod
    def claims(cls, columns, given, config):
        lists = [name for name, kinds in columns.items() if "words" in kinds]
        usual = {name for column in cls.columns for name in column.names} | set(given.values())
        return f"columns {' and '.join(map(repr, lists))} hold a list for each row" if len(lists) == 2 and any(name.lower() in usual or name in usual for name in lists) else None

    @classmethod
    def learn(cls, train, validation, test, **options):
        cls.take_options(options)
        task = cls(("O", *sorted({tag for row in train for tag in row["tags"]} - {"O"})))
        task.check(train)
        if len(task.labels) < 2:
            raise UserError(f"All words of the {len(train)} training rows have the tag O: there is nothing to find.")
        for rows in (validation, test):
            task.check(rows)
        return task

    def check(self, rows):
        for row in rows:
            if len(row["words"]) != len(row["tags"]):
                raise UserError(f"{row.where}: {len(row['words'])} words, but {len(row['tags'])} tags. Each word needs one.")
            for tag in row["tags"]:
                if not BIO.fullmatch(tag):
                    raise UserError(f"{row.where}: the tag {tag!r} is not BIO, in which O is a word outside, B-PER the first word of a PER and I-PER each further one. Entities cannot be read off it: write the tags so.")
                if tag not in self.labels:
                    raise UserError(f"{row.where}: the tag {tag!r} occurs in no training row.{did_you_mean(tag, self.labels)} Training tags: {', '.join(self.labels[:20])}.")

    def follow(self, config):
        return replace(self, labels=in_order_of(config, self.labels))

    @property
    def types(self) -> list[str]:
        """Kinds of entities."""
        return sorted({tag[2:] for tag in self.labels if tag != "O"})

    @property
    def metrics(self):
        return (*self.measures, *(f"f1/{kind}" for kind in self.types))

    def facts(self):
        return {"labels": list(self.labels)}

    @classmethod
    def from_facts(cls, facts):
        return cls(tuple(facts["labels"]))

    def configure(self, config: Any) -> None:
        config.num_labels = len(self.labels)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: i for i, name in enumerate(self.labels)}

    def encode(self, row: Row, tokenizer: Any, max_length: int) -> Features:
        if not tokenizer.is_fast:
            raise UserError("token-classification needs a fast tokenizer (tokenizer.json), which knows the word of each piece.")
        texts = spaced(row["words"], tokenizer)
        whole = tokenizer(texts, is_split_into_words=True, truncation=False, verbose=False)
        length = len(whole["input_ids"])
        if length > max_length:
            whole = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length, verbose=False)
        words = whole.word_ids()
        first = [word is not None and (i == 0 or words[i - 1] != word) for i, word in enumerate(words)]
        inputs = {name: list(whole[name]) for name in ("input_ids", "attention_mask", "token_type_ids") if name in whole}
        places = {name: i for i, name in enumerate(self.labels)}
        tags = row.get("tags")
        targets = [places[tags[word]] if lead and tags is not None else IGNORED for word, lead in zip(words, first, strict=True)]
        words_at = [word if lead else -1 for word, lead in zip(words, first, strict=True)]
        return Features(inputs, (targets, words_at, len(row["words"])), units=sum(first), truncated=length - len(words))

    def collate(self, features: Sequence[Features], rows: Sequence[int], tokenizer: Any) -> Batch:
        inputs = padded(features, tokenizer)
        targets = {
            "labels": pad([f.target[0] for f in features], IGNORED),
            "words": pad([f.target[1] for f in features], -1),
            "count": torch.tensor([f.target[2] for f in features]),
        }
        return Batch(inputs, targets, tuple(rows))

    def loss(self, model: nn.Module, batch: Batch) -> Term:
        logits = model(**batch.inputs).logits.float()
        labels = batch.targets["labels"]
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return Term(total, float((labels != IGNORED).sum()), per="token")

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Tag numbers (words,) of each row; that of `O` for words that were cut off."""
        best = model(**batch.inputs).logits.argmax(-1).cpu().numpy()
        words, counts = batch.targets["words"].cpu().numpy(), batch.targets["count"].cpu().numpy()
        made = []
        for row in range(len(best)):
            tags = np.full(counts[row], self.labels.index("O"), dtype=np.int16)
            leads = words[row] >= 0
            tags[words[row][leads]] = best[row][leads]
            made.append(tags)
        return made

    def predictions(self, outputs: Sequence[Any], rows: Rows, top: int = 1) -> list[dict[str, Any]]:
        made = []
        for tags, row in zip(outputs, rows, strict=True):
            names = [self.labels[i] for i in tags]
            found = [{"type": kind, "text": " ".join(row["words"][start : end + 1]), "start": start, "end": end + 1} for kind, start, end in entities(names)]
            made.append({"predicted": names, "entities": found})
        return made

    def measure(self, outputs: Sequence[Any], rows: Rows) -> dict[str, Metric]:
        """Entity F1, precision and recall over all types, accuracy of words, and F1 of each type (`f1/PER`)."""
        types, counts = self._counts(outputs, rows)
        total = counts.sum(1)
        found = {
            "f1": metrics.Count(total, metrics.f1_from_counts),
            "precision": metrics.Count(total, lambda s: s[:, 0] / np.maximum(s[:, 2], 1e-12)),
            "recall": metrics.Count(total, lambda s: s[:, 0] / np.maximum(s[:, 1], 1e-12)),
            "accuracy": metrics.mean(*self._word_accuracy(outputs, rows)),
        }
        return metrics.measured(found | {f"f1/{kind}": metrics.Count(counts[:, i], metrics.f1_from_counts) for i, kind in enumerate(types)})

    def per_row(self, outputs: Sequence[Any], rows: Rows) -> list[float]:
        """F1 of each sentence; 1 where there is nothing to find and nothing was found."""
        total = self._counts(outputs, rows)[1].sum(1)
        return np.where(total[:, 1] + total[:, 2] > 0, metrics.f1_from_counts(total), 1.0).tolist()

    def baselines(self, context: BaselineContext) -> dict[str, dict[str, Metric]]:
        """Each word's most frequent tag in training (`O` for words that were not met)."""
        seen: dict[str, np.ndarray] = {}
        places = {name: i for i, name in enumerate(self.labels)}
        for row in context.train:
            for word, tag in zip(row["words"], row["tags"], strict=True):
                seen.setdefault(word, np.zeros(len(self.labels)))[places[tag]] += 1
        guesses = [np.array([seen[word].argmax() if word in seen else places["O"] for word in row["words"]]) for row in context.test]
        return {"most frequent tag": self.measure(guesses, context.test)}

    def picture(self, outputs: Sequence[Any], rows: Rows, path: Path, before: Sequence[Any] | None = None) -> None:
        found = {name.removeprefix("f1/"): m for name, m in self.measure(outputs, rows).items() if name == "f1" or name.startswith("f1/")}
        pictures.bars({("all" if name == "f1" else name): m for name, m in found.items()}, "entity F1", f"{len(rows)} test sentences, 95 % intervals", path)

    def describe(self, row: Row, features: Features, tokenizer: Any) -> str:
        return " ".join(word if tag == "O" else f"{word}/{tag}" for word, tag in zip(row["words"], row["tags"], strict=True))[:200]

    def _word_accuracy(self, outputs: Sequence[Any], rows: Rows) -> tuple[list[float], list[float]]:
        shares, weights = [], []
        for tags, row in zip(outputs, rows, strict=True):
            right = sum(self.labels[i] == tag for i, tag in zip(tags, row["tags"], strict=True))
            shares.append(right / len(row["tags"]))
            weights.append(float(len(row["tags"])))
        return shares, weights

    def _counts(self, outputs: Sequence[Any], rows: Rows) -> tuple[list[str], np.ndarray]:
        """Types, and (rows, types, 3): entities that are right, true, predicted."""
        types = self.types
        places = {kind: i for i, kind in enumerate(types)}
        counts = np.zeros((len(rows), len(types), 3))
        for n, (tags, row) in enumerate(zip(outputs, rows, strict=True)):
            true, predicted = set(entities(row["tags"])), set(entities([self.labels[i] for i in tags]))
            for column, found in enumerate((true & predicted, true, predicted)):
                for kind, _, _ in found:
                    if kind in places:
                        counts[n, places[kind], column] += 1
        return types, counts


def spaced(words: Sequence[str], tokenizer: Any) -> list[str]:
    """The words as running text has them: with the space before each but the first that byte-level tokenizers make part of a word and a list of words lacks."""
    split = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    if split == tokenizer("a a", add_special_tokens=False)["input_ids"]:
        return list(words)
    return [*words[:1], *(f" {word}" for word in words[1:])]


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word) by seqeval's reading of BIO."""
    from seqeval.metrics.sequence_labeling import get_entities

    return get_entities(list(tags))
