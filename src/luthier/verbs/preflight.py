"""What is told before anything is computed: the rows, the first examples as the model reads them, the plan, and whether memory, disk and time will do."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luthier import machine
from luthier.anatomy import Workload
from luthier.errors import UserError
from luthier.tasks.base import Features
from luthier.training.batching import rows_at_once, smaller_batch, total_steps
from luthier.training.frozen import MEMORY
from luthier.verbs.job import Job

NEAR = 0.7  # of the free memory: from here on the longest batch is tried first
EFFICIENCY = 0.45  # of the measured matrix-product ceiling that training on real batches was seen to reach at least


@dataclass(frozen=True)
class Report:
    """lines: to be shown. memory: bytes, with what the process holds already. tight: the estimate comes near the memory that is free."""

    lines: list[str] = field(default_factory=list)
    memory: int = 0
    seconds: float = 0.0
    steps: int = 0
    tight: bool = False


def examine(job: Job, out: Path, device: str) -> Report:
    """Raises UserError where the run cannot fit into memory or onto the disk."""
    recipe = job.recipe
    train = job.features["train"]
    steps = total_steps(len(train), recipe.batch_size, job.chosen["epochs"].value, recipe.max_steps, job.task.loss_per)
    longest = max(f.length for part in job.features.values() for f in part)
    micro = min(rows_at_once(longest, recipe.micro_batch_size or recipe.batch_size, recipe.micro_batch_tokens), len(train))
    free = _gpu_free(device) if device.startswith("cuda") else machine.memory().available
    memory = _memory(job, micro) + _kept(job, steps, free)
    if memory > 1.5 * free:
        raise UserError(
            f"The longest batch ({micro} rows of {longest} tokens) needs about {_bytes(memory)}, and {_bytes(free)} are free. "
            f"Give {smaller_batch(job.task.loss_per, micro, longest)}, {'' if recipe.gradient_checkpointing else '--gradient-checkpointing, '}a smaller --max-length, or a method that trains less."
        )
    held = 0 if device.startswith("cuda") else machine.resident()
    disk = _disk_needed(job)
    if disk > machine.free_disk(out):
        raise UserError(f"The run needs about {_bytes(disk)} on the disk of {out.absolute().parent}, and {_bytes(machine.free_disk(out))} are free. Make room, or give --out on another disk.")
    seconds = _seconds(job, steps, device)
    lines = [
        f"data     {len(train):,} train, {len(job.splits.validation):,} validation, {len(job.splits.test):,} test rows",
        *(f"  {note}" for note in job.notes),
        *_examples(job),
        *job.plan.lines(),
        *([f"  the first {once} of {len(job.anatomy.blocks)} blocks are frozen: run once for all passes"] if (once := _once(job, steps)) else []),
        *(f"  {name} {chosen.value:g} ({chosen.origin})" for name, chosen in job.chosen.items()),
        f"estimate {steps} steps, about {_duration(seconds)}, {_bytes(memory + held)} of memory ({_bytes(held)} held, {_bytes(free)} free), {_bytes(disk)} of disk",
    ]
    return Report(lines, memory + held, seconds, steps, memory > NEAR * free)


def _examples(job: Job, count: int = 1) -> list[str]:
    return [f"  row {i + 1} reads: {job.task.describe(job.splits.train[i], job.features['train'][i], job.tokenizer)}" for i in range(min(count, len(job.splits.train)))]


def _memory(job: Job, micro: int) -> int:
    """Bytes of a step on the longest batch: the model once, and what is kept of each text of a row, since all of them await one backward pass."""
    needed = functools.partial(job.anatomy.memory, trainable=job.plan.trainable, reached=job.plan.reached, recompute=job.recipe.gradient_checkpointing)
    lengths = _lengths([f for part in job.features.values() for f in part])
    model = needed(Workload(batch=0, length=1))
    return model + sum(needed(Workload(batch=micro, length=max(found))) - model for found in lengths.values())


def _once(job: Job, steps: int) -> int:
    """Leading blocks that run once for all passes."""
    one_pass = total_steps(len(job.features["train"]), job.recipe.batch_size, 1, None, job.task.loss_per)
    return job.plan.frozen if job.recipe.reuse and steps > one_pass else 0


def _kept(job: Job, steps: int, free: int) -> int:
    """Bytes of what the frozen blocks made of every token, kept in memory for the passes to come; beyond a share of the free memory it lies on the disk."""
    if not _once(job, steps):
        return 0
    tokens = sum(sum(found) for found in _lengths([*job.features["train"], *job.features["validation"]]).values())
    return min(4 * tokens * job.anatomy.width, int(MEMORY * free))


def _lengths(features: Sequence[Features]) -> dict[str, list[int]]:
    """Tokens of every text, by its part of a row."""
    found: dict[str, list[int]] = {}
    for row in features:
        for name, text in (row.parts or {"": row}).items():
            found.setdefault(name, []).append(text.length)
    return found


def _seconds(job: Job, steps: int, device: str) -> float:
    """Forward and backward products of the real tokens (forward ones of frozen blocks in the first pass alone), and the test rows once, at a share of this machine's ceiling."""
    train = job.features["train"]
    rows = steps * job.recipe.batch_size
    once = _once(job, steps) / len(job.anatomy.blocks)
    passes = rows * (1 - once) + min(rows, len(train)) * once
    backward = (1 + job.plan.trainable / job.plan.total) * job.plan.reached / len(job.anatomy.blocks)
    forward = sum(2 * job.anatomy.macs(Workload(batch=1, length=max(1, round(sum(found) / len(train))))) for found in _lengths(train).values())
    flop = forward * (passes + rows * backward + len(job.splits.test) + len(job.splits.validation) * max(1, job.chosen["epochs"].value))
    return 5 + flop / (machine.ceiling(job.precision, device) * EFFICIENCY)


def _disk_needed(job: Job) -> int:
    """The model once, and three checkpoints of what learns with its two Adam moments."""
    return 4 * job.anatomy.parameters + 3 * 3 * 4 * job.plan.trainable + 10_000_000


def _gpu_free(device: str) -> int:
    import torch

    return torch.cuda.mem_get_info(device)[0]


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds / 5) * 5} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
