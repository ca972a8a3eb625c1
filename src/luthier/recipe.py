"""Every setting of an adaptation as one validated object; flags, YAML and keyword arguments are three spellings of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator

from luthier.errors import UserError, did_you_mean


class Recipe(BaseModel):
    """What to train on what, and how. A field that is None follows from method, model and rows (docs/defaults.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="folder of a pretrained model, or a run to go on from")
    data: str = Field(description="a file (jsonl, csv, tsv, parquet), a folder with train/validation/test files, or python:FOLDER")
    task: str | None = Field(None, description="what to learn (see `luthier tasks`); inferred from the columns")
    columns: dict[str, str] = Field({}, description="role=column pairs; guessed where that is certain")
    where: dict[str, str] = Field({}, description="column=value pairs that rows must have")
    encoding: str | None = Field(None, description="of text files; UTF-8")
    group: str | None = Field(None, description="column whose values must not be on two sides of a split")
    train_rows: int | None = Field(None, ge=1, description="use only so many training rows")
    method: str | None = Field(None, description="a stack of methods, such as lora(r=8) or reinit(top=1)|full; lora")
    epochs: float | None = Field(None, gt=0, description="passes over the training rows; from their number")
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps, whatever the passes")
    batch_size: int = Field(32, ge=1, description="rows of one optimiser step")
    micro_batch_size: int | None = Field(None, ge=1, description="rows that go through the model at once; the result stays the same")
    micro_batch_tokens: int | None = Field(None, ge=1, description="tokens that go through the model at once, padding included; the result stays the same")
    gradient_checkpointing: bool = Field(False, description="keep less for the way back and compute it again; the result stays the same")
    lr: float | None = Field(None, gt=0, description="peak learning rate; from the method and the size of the model")
    warmup: float | None = Field(None, ge=0, lt=1, description="share of the steps in which the rate rises; 0.1")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="how the rate falls afterwards: linear, cosine, constant")
    weight_decay: float = Field(0.01, ge=0, description="of matrices, by AdamW")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    dropout: bool = Field(True, description="keep the model's own dropout while it trains; off is faster, and overfits sooner")
    reuse: bool = Field(True, description="run the blocks below all that learns without dropout, and once for all passes; off: in every pass, with it")
    max_length: int | None = Field(None, ge=4, description="tokens of a row; what the model takes, at most 1024")
    options: dict[str, Any] = Field({}, description="options of the task, such as class_weights=balanced (--set name=value)")
    evaluate_every: float = Field(1.0, gt=0, description="passes between two evaluations on the validation rows")
    patience: int | None = Field(None, ge=1, description="stop after so many evaluations without a better one")
    metric: str | None = Field(None, description="the validation metric that chooses the best checkpoint; the task's own")
    save: Literal["auto", "adapter", "merged", "difference"] = Field("auto", description="form of the saved model: auto, adapter, merged, difference")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto takes bf16 where this machine computes it soundly and faster")
    baselines: bool = Field(True, description="measure cheap baselines beside the result")
    seed: int = Field(0, ge=0, description="of new heads, row order, dropout and splits")
    tensorboard: bool = Field(False, description="write TensorBoard files into the run folder")

    @field_validator("method", mode="before")
    @classmethod
    def _canonical(cls, value: Any) -> Any:
        if value is None:
            return None
        from luthier.methods.stack import parse

        return str(parse(value))

    @field_validator("precision", mode="before")
    @classmethod
    def _learns(cls, value: Any) -> Any:
        if value == "int8":
            raise ValueError("nothing learns in int8, which is for predict and embed. Choose auto, fp32 or bf16")
        return value

    @field_validator("where", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        """YAML reads `year: 2020` as a number; values are compared as they are written."""
        return {name: str(v) if isinstance(v, (int, float)) else v for name, v in value.items()} if isinstance(value, dict) else value

    @classmethod
    def build(cls, **settings: Any) -> Recipe:
        """Validate. Raises UserError with all mistakes at once, each with the nearest right name."""
        try:
            return cls(**settings)
        except pydantic.ValidationError as error:
            raise UserError("\n".join(_explain(problem) for problem in error.errors())) from None

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Recipe:
        """From a YAML file; `overrides` win."""
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"There is no recipe {path}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not readable YAML: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path} must be a mapping such as `model: ./minilm`, one setting a line.")
        try:
            return cls.build(**{str(name): value for name, value in content.items()} | overrides)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def merged(self, **overrides: Any) -> Recipe:
        return Recipe.build(**{**self.model_dump(), **overrides})

    def anchored(self) -> Recipe:
        """With absolute paths, so that it runs again from any folder."""
        return self.merged(model=absolute(self.model), data=absolute(self.data))

    def dump(self) -> str:
        """YAML of what differs from the defaults."""
        import yaml

        return yaml.safe_dump(self.model_dump(exclude_defaults=True), sort_keys=False, allow_unicode=True)


def absolute(source: str) -> str:
    """A path, or python:PATH, as seen from anywhere; rows that were given as an object stay what they are called."""
    kind, colon, path = source.partition(":") if source.startswith("python:") else ("", "", source)
    return source if source.startswith("<") else kind + colon + os.path.abspath(path)


def _explain(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    known = list(Recipe.model_fields)
    if problem["type"] == "extra_forbidden":
        return f"There is no setting {name!r}.{did_you_mean(name, known)} Settings: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{name} is missing: {Recipe.model_fields[name].description}."
    return f"{name}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."
