"""Texts to vectors, by an embedding run or by a plain encoder with the pooling that its folder asks for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier import compute, machine
from luthier.data.batch import Batch
from luthier.errors import UserError
from luthier.pretrained import Pretrained
from luthier.tasks.base import READ, Features, as_floats, padded
from luthier.tasks.sentence_similarity import SentenceSimilarity
from luthier.training.evaluation import by_length
from luthier.verbs.job import usual
from luthier.verbs.run import Run


class Encoder:
    """`encoder.embed(texts)` gives (n, d) float32 vectors of unit length.

    max_length  tokens that are read of each text
    wanted      the precision: auto, fp32, bf16 or int8
    """

    def __init__(self, model: nn.Module, task: SentenceSimilarity, tokenizer: Any, max_length: int, device: str, wanted: str, name: str, sha256: str):
        self.model, self.task, self.tokenizer, self.max_length = model, task, tokenizer, max_length
        self.device, self.wanted, self.name, self.sha256 = device, wanted, name, sha256
        self.truncated = 0  # texts so far that were longer than what is read

    def __repr__(self) -> str:
        return f"Encoder({self.name!r}, {self.task.pooling} pooling, {self.max_length} tokens, {self.wanted})"

    @classmethod
    def open(cls, path: str | Path, base: str | Path | None = None, device: str | None = None, precision: str | None = None) -> Encoder:
        """From a run folder, or from a stock model folder: its sentence-transformers files say how to pool and with which prefixes, else the mean of all tokens is taken.

        precision  auto, fp32, bf16 or int8; by default the run's own, and auto for a stock folder
        Raises UserError for a run of another task, and for a folder that is neither.
        """
        if (Path(path) / "run.json").is_file():
            return cls.of(Run(path, base, device, precision))
        start = Pretrained.open(path)
        device = machine.choose_device(device)
        config = start.config()
        task = SentenceSimilarity.configured(**SentenceSimilarity.model_options(start.path))
        tokenizer = start.tokenizer()
        model = start.load(SentenceSimilarity.auto_class)[0].to(device)
        return cls(model, task, tokenizer, usual(config, tokenizer, start.path), device, precision or "auto", str(path), start.sha256)

    @classmethod
    def of(cls, run: Run, precision: str | None = None) -> Encoder:
        if not isinstance(run.task, SentenceSimilarity):
            raise UserError(f"{run.path} is a {run.task.tag} run; vectors come from an embedding run (adapt --task sentence-similarity).")
        return cls(run.model, run.task, run.tokenizer, run.record.data["max_length"], run.device, precision or run.wanted, str(run.path), run.record.content["created"])

    @functools.cached_property
    def precision(self) -> str:
        return machine.choose_precision(self.wanted, self.device)[0]

    def embed(self, texts: Sequence[str], part: str = "document", batch_size: int = 64, progress: Callable[[int], None] = lambda texts: None) -> np.ndarray:
        """(n, d) float32 of unit length, in the order of `texts`.

        part      query or document: which of the model's prefixes the texts get
        progress  called with the number of texts done
        """
        if isinstance(texts, str):
            raise UserError("embed takes a list of texts; put the one text into brackets.")
        return self._vectors(self._features(list(texts), part), self.precision, batch_size, progress)

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """Around many calls: the model is prepared once for all of them."""
        return compute.prepared(self.model, self.device, self.precision, learning=False, remember=True)

    def likeness(self, texts: Sequence[str], part: str = "document") -> np.ndarray:
        """(n,): the cosine between each text's vector and the one in fp32, which is what a precision costs. Not inside of `ready`."""
        features, before = self._features(list(texts), part), self.truncated
        self.truncated = before - sum(f.truncated > 0 for f in features)  # these texts count when they are embedded
        return (self._vectors(features, self.precision) * self._vectors(features, "fp32")).sum(1)

    def _vectors(self, features: Sequence[Features], precision: str, batch_size: int = 64, progress: Callable[[int], None] = lambda texts: None) -> np.ndarray:
        found = np.empty((len(features), self._width()), dtype=np.float32)
        with torch.inference_mode(), compute.running(self.model.eval(), self.device, precision, remember=True):
            for rows in by_length([f.length for f in features], batch_size):
                batch = Batch(padded([features[i] for i in rows], self.tokenizer)).to(self.device)
                found[rows] = as_floats(self.task.vectors(self.model, batch))
                progress(len(rows))
        return found

    def _features(self, texts: list[str], part: str) -> list[Features]:
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"Text {number + 1} is {text!r}, not a string.")
        prefix = self.task.prefix(part)
        given = self.tokenizer([prefix + text for text in texts], truncation=False, verbose=False) if texts else {"input_ids": []}
        found = []
        for i, text in enumerate(texts):
            if len(given["input_ids"][i]) > self.max_length:  # cut by the tokenizer itself, so that what it ends a text with stays
                found.append(self.task.encode_text(text, part, self.tokenizer, self.max_length))
                continue
            inputs = {name: given[name][i] for name in READ if name in given}
            found.append(Features({**inputs, "attention_mask": [1] * len(inputs["input_ids"])}))
        self.truncated += sum(f.truncated > 0 for f in found)
        return found

    def _width(self) -> int:
        config: Any = getattr(self.model, "config")  # noqa: B009
        return next(int(size) for name in ("hidden_size", "dim", "d_model", "n_embd") if (size := getattr(config, name, None)))


def load(path: str | Path, base: str | Path | None = None, device: str | None = None, precision: str | None = None) -> Run | Encoder:
    """Open a run folder, or a stock model folder as an encoder."""
    plain = not (Path(path) / "run.json").is_file() and (Path(path) / "config.json").is_file()
    return Encoder.open(path, base, device, precision) if plain else Run(path, base, device, precision)
