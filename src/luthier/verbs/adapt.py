"""`luthier adapt`: rows and a pretrained model in, a better model with its proof in one folder out."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier import machine
from luthier.errors import UserError
from luthier.methods import loading, saving
from luthier.methods.engine import Fitted, install
from luthier.methods.planner import frozen_blocks
from luthier.methods.stock_adapter import TASK_TYPES
from luthier.recipe import Recipe
from luthier.runs import Followed, RunFolder, card
from luthier.tasks.base import BaselineContext, Features, Metric, encode_texts, hidden_states
from luthier.training import checkpoints, evaluation
from luthier.training.trainer import Trainer, TrainingResult, TrainingSettings
from luthier.verbs import preflight, record
from luthier.verbs.job import Job, prepare
from luthier.verbs.run import Run, load

SAME = 1e-3  # of reloaded against trained outputs, float32


def adapt(
    model: str | Path | None = None,
    data: Any = None,
    *,
    recipe: Recipe | None = None,
    out: str | Path = "run",
    overwrite: bool = False,
    resume: bool = False,
    device: str | None = None,
    dry_run: bool = False,
    console: Any = None,
    **settings: Any,
) -> Run | Job:
    """Adapt a pretrained model to rows, and leave a run folder.

    model, data, settings  fields of `Recipe`; `data` may also be a list of dictionaries, a pandas or a `datasets` object
    recipe                 a whole recipe instead, which the other settings override
    out                    the run folder; it appears when it is complete (`OUT.partial` until then)
    dry_run                stop before weights are read, and return the Job with its plan
    Raises UserError for every mistake that the user can mend, before anything is written.
    """
    from luthier.verbs.console import Console

    leads = int(os.environ.get("RANK", "0")) == 0
    console = console or Console(quiet=not leads)
    recipe, rows = _recipe(recipe, model, data, settings)
    device = _own_device(machine.choose_device(device))
    folder = RunFolder(out) if leads else Followed(out)
    folder.check(overwrite=overwrite, resume=resume, reads=[recipe.model, *loading.chain(recipe.model), *([recipe.data] if rows is None else [])])
    job = prepare(recipe, rows, device, console.say)
    if resume:
        _keep_precision(job, folder.partial, device)
    report = preflight.examine(job, folder.path, device)
    for line in report.lines:
        console.say(line)
    if dry_run:
        return job
    folder.start(overwrite=overwrite, resume=resume)
    try:
        return _run(job, report, folder, resume, device, console)
    except BaseException:
        folder.abandon()
        raise
    finally:
        folder.release()


def _keep_precision(job: Job, partial: Path, device: str) -> None:
    """What was chosen by itself where the run began holds on every machine that goes on with it."""
    found = checkpoints.latest(partial / "checkpoints")
    if found is None or job.recipe.precision != "auto":
        return
    kept = checkpoints.record(found)["settings"]["precision"]
    if kept != job.precision:
        try:
            job.precision = machine.choose_precision(kept, device)[0]
        except UserError as error:
            raise UserError(f"This run began in {kept}, in which it cannot go on here ({error}). Resume it on a machine where it can, or start anew with --overwrite.") from error
        job.notes.append(f"precision {kept}: that of the checkpoint")


def _own_device(device: str) -> str:
    """Under `torchrun` each process of a machine takes a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _recipe(recipe: Recipe | None, model: Any, data: Any, settings: dict[str, Any]) -> tuple[Recipe, Any]:
    """The validated recipe, and the rows where they are an object rather than a path."""
    rows = None if data is None or isinstance(data, (str, Path)) else data
    given = dict(settings)
    if model is not None:
        given["model"] = str(model)
    if data is not None:
        given["data"] = str(data) if rows is None else f"<{type(data).__name__}>"
    return (recipe.merged(**given) if recipe else Recipe.build(**given)), rows


def _run(job: Job, report: preflight.Report, folder: RunFolder, resume: bool, device: str, console: Any) -> Run:
    started = time.time()
    recipe = job.recipe
    if not resume:
        folder.write_recipe(recipe)
    base = saving.Base(str(Path(recipe.model).resolve()), loading.sha256(recipe.model), job.auto_class)
    model, new_heads = open_base(job)
    job.task = task = job.task.start(model, new_heads)
    model.to(device)
    baselines, before = {}, None
    if recipe.baselines and not isinstance(folder, Followed):
        with console.doing("baselines"):
            context = _baseline_context(job, model, device)
            baselines = task.baselines(context)
            before = context.unchanged() if "unchanged model" in baselines else None
    still = [] if recipe.dropout else list(model.modules())  # before the method adds its own
    fitted = install(model, job.stack, recipe.seed, new_heads, TASK_TYPES.get(job.auto_class))
    unreached = unreached_parameters(fitted, job, device)
    if unreached:
        fitted.close(unreached)
        job.notes.append(f"{len(unreached)} tensors are never reached by this task's forward pass and stay as they are: {', '.join(sorted(unreached)[:3])}{' ...' if len(unreached) > 3 else ''}")
        console.say(job.notes[-1])
    result = _train(job, fitted, still, {"base model": base.sha256, **job.identity}, folder, resume, device, report.tight, console)
    if isinstance(folder, Followed):
        torch.distributed.barrier()  # until the first process has published the run
        return load(folder.path, device=device)

    job.task = task = task.settle(fitted.model, new_heads)
    probe = _probe(job, device)
    folder.write_recipe(recipe)  # a resumption may differ in what does not change the result
    with console.doing("saving and reloading"):
        saved = saving.save(fitted, folder.partial, base, recipe.save, probe)
        job.tokenizer.save_pretrained(str(folder.partial))
        task.companions(folder.partial, job.max_length)
        reloaded = loading.load(folder.partial, job.auto_class, task.configure, dtype=torch.float32).to(device)
        _check_reload(fitted.model, reloaded, probe, folder)
        fitted.model.to("meta")  # its memory: the reloaded one is measured
        machine.trim()
    metrics, outcomes, outputs = _measure(job, reloaded, device, console)
    task.picture(outputs, job.splits.test, folder.partial / "picture.png", before)
    folder.write_outcomes(job.splits.test.fingerprint, outcomes)
    entry = record.build(job, fitted, result, saved, metrics, baselines, report, time.time() - started, device)
    folder.write_json("run.json", entry)
    (folder.partial / "README.md").write_text(card.render(entry), encoding="utf-8")
    path = folder.finish()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    console.finished(path, task, metrics, baselines)
    return load(path, device=device)


def open_base(job: Job) -> tuple[nn.Module, tuple[str, ...]]:
    """The weights to start from, float32, and the names of the parameters that are new."""
    if job.continues:
        return loading.load_plain(job.recipe.model, job.auto_class, job.task.configure), job.new_heads
    return job.start.load(job.auto_class, job.task.configure, job.recipe.seed)


def unreached_parameters(fitted: Fitted, job: Job, device: str) -> set[str]:
    """Trainable parameters that get no gradient at all from this task's loss (such as a pooler under mean pooling).

    Raises UserError where another library's tuner cannot go through this model's forward pass.
    """
    rows = list(range(min(2, len(job.features["train"]))))
    batch = job.task.collate([job.features["train"][i] for i in rows], rows, job.tokenizer).to(device)
    fitted.model.eval()
    try:
        with torch.random.fork_rng():
            job.task.loss(fitted.model, batch).sum.backward()
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        if not fitted.bridge:
            raise
        raise UserError(f"{fitted.bridge} does not work with this {job.anatomy.family} model: {(str(error) or repr(error)).splitlines()[0]} Use another type, or one of luthier's own methods.") from error
    unreached = {name for name, p in fitted.trainable.items() if p.grad is None}
    for parameter in fitted.model.parameters():
        parameter.grad = None
    if unreached == set(fitted.trainable):
        raise UserError(f"{job.stack} trains only tensors that this task's forward pass never reaches ({', '.join(sorted(unreached)[:3])}).")
    return unreached


def _train(job: Job, fitted: Fitted, still: list[nn.Module], identity: dict[str, Any], folder: RunFolder, resume: bool, device: str, tight: bool, console: Any) -> TrainingResult:
    recipe = job.recipe
    settings = TrainingSettings(
        epochs=job.chosen["epochs"].value,
        max_steps=recipe.max_steps,
        batch_size=recipe.batch_size,
        micro_batch_size=recipe.micro_batch_size,
        micro_batch_tokens=recipe.micro_batch_tokens,
        lr=job.chosen["lr"].value,
        warmup=job.chosen["warmup"].value,
        schedule=recipe.schedule,
        weight_decay=recipe.weight_decay,
        clip=recipe.clip,
        evaluate_every=recipe.evaluate_every,
        patience=recipe.patience,
        metric=recipe.metric,
        precision=job.precision,
        seed=recipe.seed,
        tensorboard=recipe.tensorboard,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    trainer = Trainer(
        fitted.model,
        job.task,
        job.features["train"],
        (job.features["validation"], job.splits.validation),
        job.tokenizer,
        settings,
        folder.partial,
        device,
        rows=job.splits.train,
        eval_modules=still,
        frozen=frozen_blocks(fitted) if recipe.reuse else (),
        identity=identity,
        rehearse_longest=tight,
        console=console,
    )
    return trainer.fit(resume=resume)


def _probe(job: Job, device: str) -> Callable[[nn.Module], Tensor]:
    """Outputs on a few test rows, as one tensor: what saving, merging and reloading must keep."""
    rows = list(range(min(4, len(job.features["test"]))))
    batch = job.task.collate([job.features["test"][i] for i in rows], rows, job.tokenizer).to(device)

    def probe(model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            parts = list(batch.parts.values()) or [batch]
            found = [hidden_states(model, part) if job.auto_class == "AutoModel" else loading.first_output(model(**part.inputs)) for part in parts]
        return torch.cat([out.flatten().float() for out in found])

    return probe


def _check_reload(trained: nn.Module, reloaded: nn.Module, probe: Callable[[nn.Module], Tensor], folder: RunFolder) -> None:
    difference = saving.difference(probe(trained), probe(reloaded))
    if not difference <= SAME:
        raise UserError(f"The saved model does not answer as the trained one (largest difference {difference:.1e}). Nothing was published; the checkpoints are in {folder.partial}.")


def _measure(job: Job, model: nn.Module, device: str, console: Any) -> tuple[dict[str, Metric], list[float], list[Any]]:
    with console.progress("testing", len(job.features["test"])) as advance:
        outputs = evaluation.outputs(model, job.task, job.features["test"], job.tokenizer, device=device, precision=job.precision, progress=advance)
    return job.task.measure(outputs, job.splits.test), job.task.per_row(outputs, job.splits.test), outputs


def _baseline_context(job: Job, model: nn.Module, device: str) -> BaselineContext:
    trunk: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]

    def embed(texts: Any) -> np.ndarray:
        features = [Features(encode_texts(job.tokenizer, text, None, job.max_length)[0]) for text in texts]
        return evaluation.mean_vectors(trunk, features, job.tokenizer, device, job.precision)

    @functools.cache
    def unchanged() -> list[Any]:
        return evaluation.outputs(model, job.task, job.features["test"], job.tokenizer, device=device, precision=job.precision)

    return BaselineContext(job.splits.train, job.splits.test, embed, unchanged)
