"""What a run records about itself in `run.json`: everything measured, and where each setting came from."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luthier import machine
from luthier.methods import loading
from luthier.methods.engine import Fitted
from luthier.methods.saving import Saved
from luthier.tasks.base import Metric, ahead, defined
from luthier.training.trainer import TrainingResult
from luthier.verbs.job import Job
from luthier.verbs.preflight import Report

PACKAGES = ("luthier", "torch", "transformers", "peft", "accelerate", "safetensors", "scikit-learn", "seqeval")


def build(
    job: Job,
    fitted: Fitted,
    result: TrainingResult,
    saved: Saved,
    metrics: Mapping[str, Metric],
    baselines: Mapping[str, Mapping[str, Metric]],
    report: Report,
    seconds: float,
    device: str,
) -> dict[str, Any]:
    splits = {name: getattr(job.splits, name) for name in ("train", "validation", "test")}
    return {
        "luthier": importlib.metadata.version("luthier"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "task": {"tag": job.task.tag, "facts": job.task.facts()},
        "method": str(job.stack),
        "model": {
            "path": str(Path(job.recipe.model).resolve()),
            "sha256": loading.sha256(job.recipe.model),
            "family": job.anatomy.family,
            "parameters": job.anatomy.parameters,
        },
        "data": {
            "source": job.sources,
            "sha256": {name: rows.fingerprint for name, rows in splits.items()},
            "rows": {name: len(rows) for name, rows in splits.items()},
            "columns": job.mapping,
            "max_length": job.max_length,
            "notes": job.notes,
        },
        "metrics": plain(metrics),
        "baselines": {name: plain(found) for name, found in baselines.items()},
        "baselines_ahead": ahead(job.task.measured_by, metrics, baselines),
        "training": {
            "steps": result.steps,
            "epochs": result.epochs,
            "ended": result.reason,
            "best": result.best_metric,
            "precision": job.precision,
            "precision_asked": job.recipe.precision,
            "settings": {name: {"value": chosen.value, "origin": chosen.origin} for name, chosen in job.chosen.items()},
            "plan": job.plan.lines(),
            "new_heads": list(fitted.new_heads),
        },
        "resources": {
            "seconds": round(result.seconds, 2),
            "total_seconds": round(seconds, 2),
            "examples_per_s": round(result.examples_per_s, 2),
            "tokens_per_s": round(result.tokens_per_s, 1),
            "peak_memory_mb": round(result.peak_memory_mb, 1),
            "estimated_memory_mb": round(report.memory / 1e6, 1),
            "estimated_seconds": round(report.seconds, 1),
            "trainable_parameters": sum(p.numel() for p in fitted.trainable.values()),
        },
        "saved": asdict(saved),
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "machine": machine.describe(device),
    }


def plain(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float]]:
    return {name: {"value": m.value, "low": m.low, "high": m.high} for name, m in defined(metrics).items()}
