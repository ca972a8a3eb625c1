"""What a task is: rows to features, features to a loss, outputs to predictions, predictions to metrics with intervals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.batch import Batch, pad
from luthier.data.columns import Column
from luthier.data.rows import Row, Rows
from luthier.errors import UserError, did_you_mean

READ = ("input_ids", "attention_mask", "token_type_ids")  # of what a tokenizer gives
SMALLER_IS_BETTER = ("mae", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Term:
    """A loss as a sum and the number of units it was summed over; the trainer divides once per optimiser step.

    per="batch" terms (in-batch contrast) depend on who else is in the batch and cannot be split into micro-batches.
    """

    sum: Tensor
    count: float
    per: str = "row"  # token | row | batch


@dataclass(frozen=True)
class Metric:
    """A number with its bootstrap 95 % interval over rows."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        form = ",.0f" if abs(self.value) >= 1000 else ".3f"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def defined(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Those that have a value: one answer for all rows correlates with nothing."""
    return {name: metric for name, metric in metrics.items() if np.isfinite(metric.value)}


def ahead(metric: str, metrics: Mapping[str, Metric], baselines: Mapping[str, Mapping[str, Metric]]) -> list[str]:
    """The baselines that do better than the run in `metric`."""
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    rivals = {name: found[metric].value for name, found in baselines.items() if metric in found and metric in metrics}
    return [name for name, value in rivals.items() if sign * value > sign * metrics[metric].value]


@dataclass(frozen=True)
class Features:
    """One row as the model reads it. `inputs` are unpadded lists of equal length; `parts` are further texts of the same row."""

    inputs: dict[str, list[int]] = field(default_factory=dict)
    target: Any = None
    units: float = 1  # supervised units of this row
    truncated: int = 0  # tokens cut off
    parts: dict[str, Features] = field(default_factory=dict)

    @property
    def length(self) -> int:
        own = len(self.inputs.get("input_ids", ()))
        return max([own, *(part.length for part in self.parts.values())])


@dataclass(frozen=True)
class BaselineContext:
    """What a cheap baseline may use: the rows by role, and the model before training."""

    train: Rows
    test: Rows
    embed: Callable[[Sequence[str]], np.ndarray]  # texts -> (n, d) mean-pooled vectors of the unchanged trunk
    unchanged: Callable[[], list[Any]]  # outputs of the unchanged model on the test rows


class Task(ABC):
    """A configured task. Class attributes describe it to `luthier tasks`, to inference and to the planner."""

    tag: ClassVar[str]  # Hugging Face's task tag where there is one
    use: ClassVar[str]  # one line: what a user gets
    columns: ClassVar[tuple[Column, ...]]
    metric: ClassVar[str]  # the metric that chooses the best checkpoint
    measures: ClassVar[tuple[str, ...]]  # names of all its metrics
    auto_class: ClassVar[str]  # transformers' Auto class that carries the head
    options: ClassVar[Mapping[str, Any]] = {}  # settings that only this task reads (`--set name=value`), with their defaults
    reads: ClassVar[tuple[str, ...]]  # roles that prediction needs; the others only supervise
    loss_per: ClassVar[str] = "row"
    steps: ClassVar[int] = 150  # what a few hundred rows need to be learnt from

    @classmethod
    @abstractmethod
    def claims(cls, columns: Mapping[str, set[str]], given: Mapping[str, str], config: Any) -> str | None:
        """Why columns (name -> kinds) and model mean this task, or None."""

    @classmethod
    @abstractmethod
    def learn(cls, train: Rows, validation: Rows, test: Rows, **options: Any) -> Self:
        """Fix what follows from the rows (label names). Rows are by role. Raises UserError with file and line."""

    @classmethod
    def model_options(cls, folder: Path) -> dict[str, Any]:
        """Options that the model's own folder asks for."""
        return {}

    def follow(self, config: Any) -> Self:
        """Take over what the model's own head has fixed: the order of its classes."""
        return self

    @property
    def measured_by(self) -> str:
        """The metric that chooses the best checkpoint of this configured task."""
        return self.metric

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `measure` of this configured task gives."""
        return self.measures

    def check(self, rows: Rows) -> None:
        """Refuse, by UserError with file and line, supervised rows on which this configured task cannot be measured."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Plain JSON from which `from_facts` restores this task with a saved run."""

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        return cls(**facts)

    @classmethod
    def take_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults and what was given. Raises UserError for a name that this task does not have."""
        for name in options:
            if name not in cls.options:
                known = ", ".join(cls.options) or "none"
                raise UserError(f"--set {name}=...: {cls.tag} has no such option.{did_you_mean(name, cls.options)} Its options: {known}.")
        return {**cls.options, **options}

    def configure(self, config: Any) -> None:
        """Write label names and the like into a transformers config before the model is built."""

    def start(self, model: nn.Module, new_heads: Sequence[str]) -> Self:
        """Prepare new heads for training; returns the task as it is from here on."""
        return self

    def settle(self, model: nn.Module, new_heads: Sequence[str]) -> Self:
        """Undo on the trained model what `start` prepared; returns the task of the saved model. `model` may be wrapped, so that names of heads have a prefix."""
        return self

    @abstractmethod
    def encode(self, row: Row, tokenizer: Any, max_length: int) -> Features: ...

    def collate(self, features: Sequence[Features], rows: Sequence[int], tokenizer: Any) -> Batch:
        return Batch(padded(features, tokenizer), self.targets(features), tuple(rows))

    def targets(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """What `loss` reads, from the rows' targets."""
        return {}

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Term: ...

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """One small NumPy value per row of the batch: logits, tag ids, vectors. Called under inference mode."""

    @abstractmethod
    def predictions(self, outputs: Sequence[Any], rows: Rows, top: int = 1) -> list[dict[str, Any]]:
        """What a user wants of each row, as columns to add: label and score, tags, a number."""

    def answers(self, model: nn.Module, features: Sequence[Features], rows: Rows, tokenizer: Any, top: int = 1, batch_size: int = 64) -> list[dict[str, Any]] | None:
        """Predictions that need the model itself rather than its outputs (generated text); None where `predictions` does."""
        return None

    @abstractmethod
    def measure(self, outputs: Sequence[Any], rows: Rows) -> dict[str, Metric]: ...

    @abstractmethod
    def per_row(self, outputs: Sequence[Any], rows: Rows) -> list[float]:
        """One outcome per row (right or wrong, error, reciprocal rank), for paired comparisons of two runs."""

    @abstractmethod
    def baselines(self, context: BaselineContext) -> dict[str, dict[str, Metric]]: ...

    @abstractmethod
    def picture(self, outputs: Sequence[Any], rows: Rows, path: Path, before: Sequence[Any] | None = None) -> None:
        """Draw what people would rather look at than read (confusion, residuals, ranks) to a PNG. `before`: outputs of the unchanged model, where it has any for this task."""

    def describe(self, row: Row, features: Features, tokenizer: Any) -> str:
        """The preflight's decoded example: what the model reads and what is supervised."""
        return f"{tokenizer.decode(features.inputs['input_ids'])}  ->  {features.target}"

    def companions(self, folder: Path, max_length: int) -> None:
        """Files that other libraries need beside the model."""

    def next_commands(self, run: str) -> list[str]:
        return [f"luthier predict {run} --data new.csv --out predicted.csv", f"luthier evaluate {run} --json"]


def in_order_of(config: Any, labels: Sequence[str]) -> tuple[str, ...]:
    """`labels` as a model knows them whose head tells all of them apart already, so that it goes on with what it learnt."""
    known = tuple(str(name) for _, name in sorted(config.id2label.items()))
    return known if set(labels) <= set(known) else tuple(labels)


def encode_texts(tokenizer: Any, text: str, pair: str | None, max_length: int) -> tuple[dict[str, list[int]], int]:
    """The tokenizer's inputs, cut to `max_length` (the longer of two texts first), and how many tokens were cut off."""
    whole = tokenizer(text, pair, truncation=False, verbose=False)
    length = len(whole["input_ids"])
    if length > max_length:
        whole = tokenizer(text, pair, truncation="longest_first" if pair is not None else True, max_length=max_length, verbose=False)
    inputs = {name: list(values) for name, values in whole.items() if name in READ}
    inputs.setdefault("attention_mask", [1] * len(inputs["input_ids"]))
    return inputs, length - len(inputs["input_ids"])


def padded(features: Sequence[Features], tokenizer: Any) -> dict[str, Tensor]:
    """The rows' inputs as (B, T) tensors, padded on the right, masked by position and never by token.

    On the right whatever side the tokenizer prefers: models number positions from the left, so that padding there moves a
    row's positions with the length of its neighbours. The left is for generation, which corrects the positions itself.
    """
    fill = {"input_ids": pad_token(tokenizer), "attention_mask": 0, "token_type_ids": 0}
    return {name: pad([f.inputs[name] for f in features], fill[name]) for name in features[0].inputs}


def pad_token(tokenizer: Any) -> int:
    """The token that fills up rows; a tokenizer without one of its own lends its end of text."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def name_pad_token(config: Any) -> None:
    """Stock decoder heads read a row at its last token that is not padding and refuse batches until they know which that is."""
    if getattr(config, "pad_token_id", None) is None:
        ends = getattr(config, "eos_token_id", None)
        config.pad_token_id = ends[0] if isinstance(ends, (list, tuple)) else ends


def row_logits(model: nn.Module, batch: Batch) -> Tensor:
    """(B, classes). Padding takes the id by which the model itself knows it, should the tokenizer have filled up with another."""
    inputs = batch.inputs
    config: Any = getattr(model, "module", model).config  # `module`: inside a wrapper for several processes
    if getattr(config, "pad_token_id", None) is not None:
        inputs = {**inputs, "input_ids": inputs["input_ids"].masked_fill(batch.mask == 0, config.pad_token_id)}
    if not getattr(config, "is_encoder_decoder", False):
        return model(**inputs).logits
    # stock heads of encoder-decoders read a row at its last end of text, and refuse rows together that have unequal numbers of them
    ends = (inputs["input_ids"] == config.eos_token_id).sum(1)
    groups = [(ends == count).nonzero().flatten() for count in ends.unique()]
    found = torch.cat([model(**{name: values[rows] for name, values in inputs.items()}).logits for rows in groups])
    return found[torch.cat(groups).argsort()]


def hidden_states(trunk: nn.Module, batch: Batch) -> Tensor:
    """(B, T, d); of an encoder-decoder, its encoder's."""
    reads = trunk.get_encoder() if getattr(trunk.config, "is_encoder_decoder", False) else trunk  # type: ignore[union-attr, operator]
    return reads(**batch.inputs).last_hidden_state  # type: ignore[operator]


def as_floats(values: Tensor) -> np.ndarray:
    return values.detach().to("cpu", torch.float32).numpy()
