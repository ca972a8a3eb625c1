"""What a run will do, worked out from recipe, rows and config before any weight is read."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier import compute, machine
from luthier.anatomy import Anatomy
from luthier.data import checks
from luthier.data.columns import apply, assign
from luthier.data.rows import Rows
from luthier.data.sources import PYTHON, read
from luthier.data.splits import Splits, split
from luthier.errors import UserError, did_you_mean
from luthier.methods import loading
from luthier.methods.planner import Plan, plan
from luthier.methods.saving import check_form
from luthier.methods.stack import Stack, parse
from luthier.methods.stock_adapter import TASK_TYPES
from luthier.pretrained import Pretrained
from luthier.recipe import Recipe
from luthier.tasks import find, infer
from luthier.tasks.base import Features, Task
from luthier.training.batching import check_batches
from luthier.verbs import defaults
from luthier.verbs.defaults import Chosen

LONGEST = 1024  # tokens, for models that take more and when nothing else is asked
UNLIMITED = 10**9


@dataclass
class Job:
    """Everything decided. `splits` and `features` are by role and in the order of the rows; `notes` are what the user is told and the run records."""

    recipe: Recipe
    start: Pretrained  # the folder whose config and tokenizer are used
    task: Task
    tokenizer: Any
    mapping: dict[str, str]
    splits: Splits
    features: dict[str, list[Features]]
    max_length: int
    stack: Stack
    plan: Plan
    anatomy: Anatomy
    new_heads: tuple[str, ...]
    chosen: dict[str, Chosen]
    precision: str
    sources: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def auto_class(self) -> str:
        return type(self.task).auto_class

    @property
    def identity(self) -> dict[str, Any]:
        """What besides the settings of the training and the weights makes the run what it is."""
        return {
            "task": self.task.tag,
            "task options": self.task.facts(),
            "method": str(self.stack),
            "dropout": self.recipe.dropout,
            "reuse": self.recipe.reuse,
            "max_length": self.max_length,
            "training rows": self.splits.train.fingerprint,
            "validation rows": self.splits.validation.fingerprint,
        }

    @property
    def continues(self) -> bool:
        """Whether the base is an adapter run rather than a stock folder."""
        return loading.read_record(self.start.path) is not None


def prepare(recipe: Recipe, data: Any, device: str, say: Callable[[str], None]) -> Job:
    """Read and type the rows, fix the task, check the plan. `data` overrides the recipe's path by an object; `say` hears what takes long. Raises UserError; writes nothing."""
    stack = parse(recipe.method or defaults.method().value)
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard")
    start = Pretrained.open(recipe.model)
    for earlier in [stack, *loading.earlier(start.path)]:
        check_form(earlier, recipe.save)
    parts = read(recipe.data if data is None else data, recipe.encoding, recipe.where or None)
    config = start.config()
    first = next(iter(parts.values()))
    task_type, reason = (find(recipe.task), "given") if recipe.task else infer(first, recipe.columns, config)
    notes = [f"task {task_type.tag}: {reason}"]
    if not recipe.method:
        notes.append(f"method {stack}: {defaults.method().origin}")
    mapping, reasons = assign(first, task_type.columns, recipe.columns)
    notes += reasons
    notes += checks.duplicates(parts, mapping, task_type.columns)
    raw = split(parts, *split_settings(recipe, mapping))
    notes += raw.notes
    typed: dict[str, Rows] = {}
    for name in ("train", "validation", "test"):
        typed[name], warnings = apply(getattr(raw, name), mapping, task_type.columns)
        notes += [f"{name}: {warning}" for warning in warnings]
    splits = checks.without_shared(replace(raw, **typed), task_type.columns)
    notes += splits.notes[len(raw.notes) :]
    notes += checks.report(splits, task_type.columns)
    task = task_type.learn(splits.train, splits.validation, splits.test, **{**task_type.model_options(start.path), **loading.earlier_facts(start.path, task_type.options), **recipe.options}).follow(config)
    if recipe.metric and recipe.metric not in task.metrics:
        raise UserError(f"--metric {recipe.metric}: {task.tag} measures {', '.join(task.metrics)} on these rows.{did_you_mean(recipe.metric, task.metrics)}")
    check_batches(task.tag, task.loss_per, recipe.batch_size, recipe.micro_batch_size, recipe.micro_batch_tokens)
    tokenizer = start.tokenizer()
    if recipe.max_length and recipe.max_length > limit(config):
        raise UserError(f"--max-length {recipe.max_length}: the model takes {limit(config)} tokens. Give {limit(config)} or less.")
    max_length = recipe.max_length or usual(config, tokenizer, start.path)
    features = {name: encode(task, getattr(splits, name), tokenizer, max_length) for name in ("train", "validation", "test")}
    notes += _truncation(features, max_length, recipe, limit(config))
    splits, features["train"], dropped = _without_empty(splits, features["train"], max_length)
    notes += dropped

    model, new_heads = loading.meta(start.path, task_type.auto_class, task.configure)
    anatomy = Anatomy.of(model)
    the_plan = plan(model, stack, new_heads, TASK_TYPES.get(task_type.auto_class))
    chosen = {
        "lr": Chosen(recipe.lr, "given") if recipe.lr is not None else defaults.learning_rate(stack, anatomy.parameters),
        "epochs": Chosen(recipe.epochs, "given") if recipe.epochs is not None else defaults.epochs(len(splits.train), recipe.batch_size, task.steps),
        "warmup": Chosen(recipe.warmup, "given") if recipe.warmup is not None else defaults.warmup(),
    }
    compute.ready(say)  # last, as it may take some seconds, and what is wrong with the rest is known by now
    precision, why = machine.choose_precision(recipe.precision, device)
    notes.append(f"precision {precision}: {why}")
    sources = [str(data if isinstance(data, str) else recipe.data)]
    return Job(recipe, start, task, tokenizer, mapping, splits, features, max_length, stack, the_plan, anatomy, new_heads, chosen, precision, sources, notes)


def split_settings(recipe: Recipe, mapping: Mapping[str, str]) -> tuple[str | None, str | None, int, int | None]:
    """The arguments of `split` after the parts: rows of code are grouped by file unless another group is given."""
    group = recipe.group or ("file" if recipe.data.startswith(PYTHON) else None)
    return mapping.get("label"), group, recipe.seed, recipe.train_rows


def encode(task: Task, rows: Rows, tokenizer: Any, max_length: int) -> list[Features]:
    return [task.encode(row, tokenizer, max_length) for row in rows]


def limit(config: Any) -> int:
    """Tokens that the model can take."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return UNLIMITED
    # RoBERTa counts positions from padding_idx + 1
    return positions - config.pad_token_id - 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else positions


def usual(config: Any, tokenizer: Any, folder: Path) -> int:
    """Tokens that are read when nobody asks for another number: what the model can take and was trained to read, as its tokenizer or sentence-transformers records it; at most `LONGEST`."""
    recorded = folder / "sentence_bert_config.json"
    length = json.loads(recorded.read_text(encoding="utf-8")).get("max_seq_length") if recorded.is_file() else None
    return min(number for number in (LONGEST, limit(config), tokenizer.model_max_length, length) if isinstance(number, int) and number > 0)


def _truncation(features: Mapping[str, Sequence[Features]], max_length: int, recipe: Recipe, most: int) -> list[str]:
    """Counts what is cut off; stops where a longer setting would have kept it and nobody asked for this one."""
    notes = []
    for name, part in features.items():
        cut = [f for f in part if f.truncated]
        if not cut:
            continue
        share = len(cut) / len(part)
        notes.append(f"{name}: {len(cut)} of {len(part)} rows ({share:.0%}) are longer than {max_length} tokens; {sum(f.truncated for f in cut):,} tokens are cut off")
        if share > 0.1 and recipe.max_length is None and max_length == LONGEST < most:
            longest = min(most, max(f.length + f.truncated for f in part))
            raise UserError(f"{share:.0%} of the {name} rows are longer than {max_length} tokens and would be cut. Give --max-length {longest} to keep {'them' if longest < most else 'what the model takes'}, or --max-length {max_length} to cut them.")
    return notes


def _without_empty(splits: Splits, features: list[Features], max_length: int) -> tuple[Splits, list[Features], list[str]]:
    """The training rows that have something to learn from, and a note of the others. Raises UserError where none has."""
    kept = [i for i, f in enumerate(features) if f.units]
    if not kept:
        raise UserError(f"None of the {len(features)} training rows has anything to learn from: after encoding to {max_length} tokens no supervised token is left. Raise --max-length or check --columns.")
    if len(kept) == len(features):
        return splits, features, []
    first = next(splits.train[i].where for i, f in enumerate(features) if not f.units)
    note = f"train: {len(features) - len(kept)} rows (the first is {first}) are left out: encoded to {max_length} tokens they hold nothing to learn"
    return replace(splits, train=splits.train.take(kept)), [features[i] for i in kept], [note]
