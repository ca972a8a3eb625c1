"""The loop: deterministic batches, losses divided once per step, checkpoints that resume bit for bit, guards that name the rows."""

from __future__ import annotations

import contextlib
import json
import math
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from luthier import compute
from luthier.compute.adamw import AdamW
from luthier.data.batch import Batch
from luthier.data.rows import Rows
from luthier.errors import UserError
from luthier.tasks.base import SMALLER_IS_BETTER, Features, Task, Term
from luthier.training import checkpoints, evaluation, schedule
from luthier.training.batching import check_batches, epoch_batches, fewest_rows, micro_batches, smaller_batch, steps_per_epoch, total_steps
from luthier.training.frozen import FrozenTrunk

PATIENT = 9  # the step at which tensors without any gradient are no longer waited for

SAME_RESULT = ("tensorboard", "gradient_checkpointing", "checkpoint_every")  # settings that may be others when a run goes on


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; every field but the last three can change the result.

    micro_batch_tokens  that go through the model at once, padding included; a longer row goes alone
    warmup            share of all steps
    evaluate_every    passes between two evaluations
    patience          evaluations without a better one before training stops; None: train to the end
    checkpoint_every  seconds between two checkpoints
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    lr: float = 1e-3
    warmup: float = 0.1
    schedule: str = "linear"
    weight_decay: float = 0.01
    clip: float = 1.0
    evaluate_every: float = 1.0
    patience: int | None = None
    metric: str | None = None
    precision: str = "fp32"
    seed: int = 0
    tensorboard: bool = False
    gradient_checkpointing: bool = False
    checkpoint_every: float = 60.0


@dataclass(frozen=True)
class TrainingResult:
    """seconds: of training steps and of what they read of frozen blocks, over all resumptions. reason: finished | early stopping."""

    steps: int
    epochs: float
    seconds: float
    examples_per_s: float
    tokens_per_s: float
    peak_memory_mb: float
    best_metric: float | None
    best_step: int | None
    history: list[dict[str, Any]]
    reason: str


class TrainingInterrupted(UserError):
    """Ctrl-C: the step was finished and a checkpoint written."""

    status = 130


class Trainer:
    """Trains what `requires_grad` in `model`.

    train           encoded rows; `rows` are the same rows, for errors that name file and line
    validation      (encoded rows, rows) that choose the best checkpoint, or None: the last one is kept
    folder          where `checkpoints/` and `metrics.jsonl` go
    eval_modules    modules (each by itself, without its children) that stay in eval mode: no dropout there
    frozen          the leading blocks in which and below which nothing learns: they run without dropout, and once for a row if it is met again
    identity        what else fixes the result (base weights, rows, method), by the name a user knows: a resumption must have the same
    rehearse_longest  run the longest batch once before the first step, to meet a lack of memory at once
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        train: Sequence[Features],
        validation: tuple[Sequence[Features], Rows] | None,
        tokenizer: Any,
        settings: TrainingSettings,
        folder: Path,
        device: str = "cpu",
        *,
        rows: Rows | None = None,
        eval_modules: Collection[nn.Module] = (),
        frozen: Sequence[nn.Module] = (),
        identity: Mapping[str, Any] | None = None,
        rehearse_longest: bool = False,
        console: Any = None,
    ):
        self.model, self.task, self.train, self.validation, self.tokenizer = model, task, train, validation, tokenizer
        self.settings, self.folder, self.rows, self.console = settings, Path(folder), rows, console
        self.eval_modules, self.identity, self.rehearse_longest = list(eval_modules), dict(identity or {}), rehearse_longest
        self.trunk = FrozenTrunk(model, frozen) if frozen else None
        # accelerate keeps one precision a process; ours is chosen for each run, so its autocast is ours too
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device = self.accelerator.device if self.world > 1 and device != "cpu" else torch.device(device)
        self.micro = settings.micro_batch_size or settings.batch_size
        if task.loss_per == "batch" and self.world > 1:
            raise UserError(f"{task.tag} compares the rows of a batch with each other, which cannot be spread over {self.world} processes yet. Run it in one.")
        check_batches(task.tag, task.loss_per, settings.batch_size, settings.micro_batch_size, settings.micro_batch_tokens)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UserError("Nothing in the model is open for training.")
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.lengths = [f.length for f in train]
        self.smallest = fewest_rows(task.loss_per)
        self.per_epoch = steps_per_epoch(len(train), settings.batch_size, self.smallest)
        self.total = total_steps(len(train), settings.batch_size, settings.epochs, settings.max_steps, task.loss_per)
        self.state: dict[str, Any] = {"step": 0, "moves": 0, "best": None, "best_step": None, "waited": 0, "reason": "finished", "seconds": 0.0, "examples": 0, "tokens": 0, "history": []}
        self.reached: set[str] = set()
        self.interrupted = False

    def fit(self, resume: bool = False) -> TrainingResult:
        """Train to the end, restore the best checkpoint, and say how it went. `resume` continues from the newest checkpoint, if there is one.

        Raises UserError with the rows at fault for a loss that is not finite, and names parameters that never get a gradient.
        """
        settings = self.settings
        self.model.to(self.device)
        self.optimizer = self._optimizer()
        self.called = self.accelerator.prepare_model(self.model) if self.world > 1 else self.model
        found = checkpoints.latest(self.folder / "checkpoints") if resume else None
        if found:
            self._restore(found)
        elif self.main:
            (self.folder / "metrics.jsonl").write_text("", encoding="utf-8")
        if self.trunk:
            self.eval_modules += self.trunk.below(self._batch(range(min(2, len(self.train)))))
        started = time.perf_counter()
        frozen_states = self._frozen_states()
        self.state["seconds"] += time.perf_counter() - started
        leave, alone = self.trunk.blocks if self.trunk and frozen_states is self.trunk else (), self.world == 1
        whole = self.micro >= settings.batch_size and not settings.micro_batch_tokens  # a step is one backward pass
        with compute.prepared(self.model, self.device, settings.precision, leave=leave, sparse=alone, narrow=alone and whole, recompute=settings.gradient_checkpointing):
            self._train(frozen_states, fresh=not found)
        if self.main and self.validation and (self.folder / "checkpoints" / "best").exists():  # the first process alone saves, measures and cleans up
            checkpoints.restore(self.model, checkpoints.read(self.folder / "checkpoints" / "best", self.device)[0])
        self.model.eval()
        return self._result()

    def _train(self, frozen_states: contextlib.AbstractContextManager, fresh: bool) -> None:
        settings = self.settings
        if self.rehearse_longest and fresh:
            self._rehearse()
        board = self._tensorboard()
        with frozen_states, _Interrupts(self), self._progress() as advance:
            last_saved = time.monotonic()
            batches: list[list[int]] = []
            epoch, told = -1, False
            while self.state["step"] < self.total and self.state["reason"] == "finished":
                step = self.state["step"]
                if step // self.per_epoch != epoch:
                    epoch = step // self.per_epoch
                    batches = epoch_batches(self.lengths, settings.batch_size, settings.seed, epoch, self.smallest)
                entry = self._step(batches[step % self.per_epoch], step)
                if not told:
                    told = True
                    self._tell_padding()
                advance(1, f"loss {entry['loss']:.3f}")
                self._log(entry, board)
                evaluates = self._evaluates(step + 1)
                if evaluates and self.validation:
                    self._evaluate(step + 1, board)
                ends = self.state["step"] == self.total or self.state["reason"] != "finished"
                if evaluates or ends or self.interrupted or time.monotonic() - last_saved > settings.checkpoint_every:
                    self._save()
                    last_saved = time.monotonic()
                if self.interrupted and not ends:
                    raise TrainingInterrupted(f"Stopped after step {self.state['step']} of {self.total}; nothing is lost. Go on with the same command and --resume.")
        if self.trunk:
            self.trunk.clear()
        if board:
            board.close()

    def _tell_padding(self) -> None:
        padded, blocks = compute.padded(self.model)
        if padded and self.console and self.main:
            self.console.say(f"{padded} of {blocks} blocks cannot run on packed rows here, and compute the padding of their batches too")

    @property
    def main(self) -> bool:
        return self.rank == 0

    def _step(self, rows: list[int], step: int) -> dict[str, Any]:
        """One optimiser step over `rows`: gradients of the summed loss, divided once by the units of all micro-batches and processes."""
        started = time.perf_counter()
        self._training_mode()
        _seed(self.settings.seed, step, self.rank)
        own = rows[self.rank :: self.world]
        weight = 1.0 if own else 0.0  # a process without rows takes part in the reduction all the same
        pieces = micro_batches(own or rows[:1], self.lengths, max(1, self.micro // self.world), self.settings.micro_batch_tokens)
        total, count, tokens = 0.0, 0.0, 0
        for number, piece in enumerate(pieces):
            batch = self._batch(piece)
            last = number == len(pieces) - 1
            with compute.autocast(self.device, self.settings.precision), self.accelerator.no_sync(self.called) if self.world > 1 and not last else contextlib.nullcontext():
                term = self.task.loss(self.called, batch)
            self._check(term, piece)
            (term.sum * weight).backward()
            total += float(term.sum.detach()) * weight
            count += term.count * weight
            tokens += batch.tokens
        sums = torch.tensor([total, count], dtype=torch.float64, device=self.device if self.device.type != "mps" else "cpu")
        if self.world > 1:
            sums = self.accelerator.reduce(sums, "sum")
        total, count = sums.tolist()  # type: ignore[union-attr]
        if count == 0:
            raise UserError(f"Step {step + 1}: its rows hold nothing to learn from ({self._where(rows)}). Every supervised token may have been cut off: raise --max-length.")
        mean = self.world / count
        norm = self.optimizer.norm() * mean
        if not (norm < float("inf")):
            raise UserError(f"Step {step + 1}: the gradient is {norm} (rows: {self._where(rows)}). {self._advice()}")
        if self.state["moves"] < 2:
            self._check_reached(step, norm)
        rate = self.settings.lr * schedule.factor(step, self.total, self.settings.warmup, self.settings.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step(scale=mean * min(1.0, self.settings.clip / (norm + 1e-6)))
        self.optimizer.zero_grad(set_to_none=True)
        self.state["step"] = step + 1
        self.state["seconds"] += time.perf_counter() - started
        self.state["examples"] += len(rows)
        self.state["tokens"] += tokens * self.world
        return {"step": step + 1, "epoch": round((step + 1) / self.per_epoch, 4), "loss": total / count, "lr": rate, "gradient_norm": norm}

    def _batch(self, rows: Sequence[int]) -> Batch:
        return self.task.collate([self.train[i] for i in rows], rows, self.tokenizer).to(self.device)

    def _frozen_states(self) -> contextlib.AbstractContextManager:
        """What the frozen blocks make of every row that is met more than once, computed in batches of its own so that a resumed run reads the same numbers."""
        if not self.trunk or self.world > 1 or self.total <= self.per_epoch:
            return contextlib.nullcontext()
        if not self.trunk.agrees(self._batch(range(min(2, len(self.train))))):
            return self._computed_anew("this model answers otherwise with kept states")
        features = [*self.train, *(self.validation[0] if self.validation and sum(map(self._evaluates, range(1, self.total + 1))) > 1 else ())]
        tokens = sum(text.length for row in features for text in (row.parts.values() or [row]))
        batches = (self.task.collate([features[i] for i in rows], rows, self.tokenizer).to(self.device) for rows in evaluation.by_length([f.length for f in features], 64))
        showing = self.console.progress("frozen blocks", len(features)) if self.console and self.main else contextlib.nullcontext(lambda count: None)
        others = set(self.model.modules()) - set(self.trunk.blocks)
        ready = compute.prepared(self.model, self.device, self.settings.precision, leave=others, learning=False)
        with showing as advance, ready, compute.autocast(self.device, self.settings.precision):
            kept = self.trunk.keep(tokens, batches, self.folder, advance)
        return self.trunk if kept else self._computed_anew("neither memory nor the disk has room for their states")

    def _computed_anew(self, reason: str) -> contextlib.AbstractContextManager:
        if self.console:
            self.console.say(f"the frozen blocks run in every pass: {reason}")
        return contextlib.nullcontext()

    def _check(self, term: Term, rows: Sequence[int]) -> None:
        if not torch.isfinite(term.sum.detach()):
            raise UserError(f"Step {self.state['step'] + 1}: the loss is {float(term.sum.detach())} (rows: {self._where(rows)}). {self._advice()}")

    def _check_reached(self, step: int, norm: float) -> None:
        """Every parameter that is open must have had a gradient other than zero within two steps in which anything had one."""
        self.state["moves"] += norm > 0  # rows that tell the model nothing new (all of one score) move nothing
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and bool(((parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad) != 0).any()):
                self.reached.add(name)
        if self.state["moves"] == 2 or step == PATIENT:
            lost = sorted(set(self.parameters) - self.reached)
            if lost:
                raise UserError(f"{len(lost)} tensors that should learn got no gradient in {step + 1} steps: {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}. The method opens what this task does not reach, or its start is stuck at zero.")

    def _where(self, rows: Sequence[int]) -> str:
        places = [self.rows[i].where if self.rows else str(i) for i in rows]
        return ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")

    def _advice(self) -> str:
        saved = checkpoints.latest(self.folder / "checkpoints")
        kept = f"The last good checkpoint is {saved}." if saved else "No checkpoint was written yet."
        return f"{kept} Try a smaller --lr (now {self.settings.lr:g})" + (", or --precision fp32." if self.settings.precision == "bf16" else ".")

    def _training_mode(self) -> None:
        if not self.model.training or any(module.training for module in self.eval_modules):
            self.model.train()
            for module in self.eval_modules:
                module.training = False

    def _optimizer(self) -> AdamW:
        """AdamW; biases, norms and other vectors are not decayed."""
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        vectors = [p for p in self.parameters.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": self.settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return AdamW([g for g in groups if g["params"]], lr=self.settings.lr)

    def _evaluates(self, step: int) -> bool:
        every = self.settings.evaluate_every * self.per_epoch
        return step == self.total or int(step / every) > int((step - 1) / every)

    def _evaluate(self, step: int, board: Any) -> None:
        assert self.validation is not None
        features, rows = self.validation
        found = evaluation.outputs(self.model, self.task, features, self.tokenizer, device=self.device, precision=self.settings.precision)
        metrics = {name: m.value for name, m in self.task.measure(found, rows).items()}
        name = self.settings.metric or self.task.measured_by
        entry = {"step": step, "epoch": round(step / self.per_epoch, 4), **{f"validation_{key}": value for key, value in metrics.items() if math.isfinite(value)}}
        self._log(entry, board)
        if self.console:
            self.console.say(f"step {step}/{self.total}  validation {name} {metrics[name]:.4f}")
        smaller = name in SMALLER_IS_BETTER
        best, defined = self.state["best"], math.isfinite(metrics[name])  # one answer for all rows correlates with nothing
        if defined and (best is None or (metrics[name] < best if smaller else metrics[name] > best)):
            self.state.update(best=metrics[name], best_step=step, waited=0)
            if self.main:
                checkpoints.write(self.folder / "checkpoints" / "best", checkpoints.learnt(self.model), {"step": step, name: metrics[name]})
            return
        self.state["waited"] += 1
        if self.settings.patience is not None and self.state["waited"] >= self.settings.patience:
            self.state["reason"] = "early stopping"

    def _log(self, entry: Mapping[str, Any], board: Any) -> None:
        self.state["history"].append(dict(entry))
        if self.main:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        if board:
            for name, value in entry.items():
                if name not in ("step", "epoch"):
                    board.add_scalar(name, value, entry["step"])

    def _save(self) -> None:
        if not self.main:
            return
        tensors: dict[str, Tensor] = {f"model/{name}": t for name, t in checkpoints.learnt(self.model).items()}
        tensors |= {f"optimizer/{name}": t for name, t in checkpoints.optimizer_tensors(self.optimizer, self.names).items()}
        folder = self.folder / "checkpoints"
        checkpoints.write(folder / f"step-{self.state['step']}", tensors, {"state": self.state, "settings": self._fingerprint(), "reached": sorted(self.reached), "route": compute.route(self.device)})
        checkpoints.prune(folder)

    def _restore(self, folder: Path) -> None:
        tensors, record = checkpoints.read(folder, self.device)
        if record["settings"] != self._fingerprint():
            changed = [key for key, value in self._fingerprint().items() if record["settings"].get(key) != value]
            raise UserError(f"The checkpoint in {folder.parent} was made with another {', '.join(changed)}. Resume with the same settings, or start anew with --overwrite.")
        part = {kind: {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(kind + "/")} for kind in ("model", "optimizer")}
        checkpoints.restore(self.model, part["model"])
        checkpoints.restore_optimizer(self.optimizer, self.names, part["optimizer"])
        self.state, self.reached = record["state"], set(record["reached"])
        if self.main:
            (self.folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in self.state["history"]), encoding="utf-8")
        if self.console:
            self.console.say(f"resumed after step {self.state['step']} of {self.total}")
            if (before := record["route"]) != (now := compute.route(self.device)):
                self.console.say(f"the last bits may differ from those of a run that was never interrupted: its checkpoint is of {before}, and it goes on on {now}")

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resumption to be exact."""
        same = {key: value for key, value in asdict(self.settings).items() if key not in SAME_RESULT}
        return same | {"number of training rows": len(self.train), "number of processes": self.world} | json.loads(json.dumps(self.identity))

    def _rehearse(self) -> None:
        by_length = sorted(range(len(self.train)), key=lambda i: -self.lengths[i])
        longest = micro_batches(by_length[: self.micro], self.lengths, self.micro, self.settings.micro_batch_tokens)[0]
        try:
            with compute.autocast(self.device, self.settings.precision):
                self._training_mode()
                self.task.loss(self.model, self._batch(longest)).sum.backward()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise UserError(f"The longest batch ({len(longest)} rows of up to {max(self.lengths)} tokens) does not fit into memory. Give {smaller_batch(self.task.loss_per, len(longest), max(self.lengths))}, --gradient-checkpointing or a smaller --max-length.") from error
            raise
        self.optimizer.zero_grad(set_to_none=True)

    def _progress(self) -> Any:
        if self.console is None or not self.main:
            return contextlib.nullcontext(lambda count, text="": None)
        return self.console.progress("training", self.total, self.state["step"])

    def _tensorboard(self) -> Any:
        if not self.settings.tensorboard or not self.main:
            return None
        from torch.utils.tensorboard.writer import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"))

    def _result(self) -> TrainingResult:
        state = self.state
        seconds = max(state["seconds"], 1e-9)
        return TrainingResult(
            state["step"],
            state["step"] / self.per_epoch,
            state["seconds"],
            state["examples"] / seconds,
            state["tokens"] / seconds,
            peak_memory_mb(self.device),
            state["best"],
            state["best_step"],
            state["history"],
            state["reason"],
        )


def peak_memory_mb(device: torch.device) -> float:
    """Of the process (or of its GPU memory) so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _seed(*numbers: int) -> None:
    """Torch's, NumPy's and Python's global streams from a few numbers: a step draws the same whether or not the run was interrupted before it."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond, to note for devices that are not there who called it
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)


class _Interrupts:
    """The first Ctrl-C (or SIGTERM) lets the step finish and a checkpoint be written; the second ends at once."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self.active:
            self.old = {number: signal.signal(number, self._first) for number in (signal.SIGINT, signal.SIGTERM)}

    def _first(self, number: int, frame: Any) -> None:
        self.trainer.interrupted = True
        signal.signal(number, self.old[signal.Signals(number)] or signal.SIG_DFL)

    def __exit__(self, *error: object) -> None:
        if self.active:
            for number, handler in self.old.items():
                signal.signal(number, handler or signal.SIG_DFL)
