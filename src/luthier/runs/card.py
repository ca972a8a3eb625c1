"""The model card of a run, from what `run.json` records."""

from __future__ import annotations

import json
from typing import Any

from luthier.tasks.base import Metric

PIPELINES = {"regression": "text-classification"}


def render(run: dict[str, Any]) -> str:
    """README.md with Hugging Face's front matter: data, recipe, metrics beside baselines, limits, cost, how to load."""
    tag = run["task"]["tag"]
    front = ["---", "library_name: transformers", f"pipeline_tag: {PIPELINES.get(tag, tag)}", f"base_model: {json.dumps(run['model']['path'].rpartition('/')[2])}", "tags: [luthier]", "---"]
    rows = run["data"]["rows"]
    lines = [
        *front,
        "",
        f"# {tag} by {run['method']}",
        "",
        f"A {run['model']['family']} model of {run['model']['parameters'] / 1e6:.1f} M parameters, adapted with `{run['method']}` on {rows['train']:,} rows.",
        "",
        "![result on the test rows](picture.png)",
        "",
        f"## Results on {rows['test']:,} test rows",
        "",
        *_table(run),
        "",
        *([f"**{' and '.join(behind)} did better** on these rows.", ""] if (behind := run["baselines_ahead"]) else []),
        "Brackets: bootstrap 95 % intervals over rows. Measured on this folder, after saving and reloading. The best checkpoint was chosen on the validation rows.",
        "",
        "## Data",
        "",
        f"Source: `{', '.join(run['data']['source'])}`; {rows['train']:,} train, {rows['validation']:,} validation, {rows['test']:,} test rows; columns {_pairs(run['data']['columns'])}; up to {run['data']['max_length']} tokens.",
        "",
        *(f"- {note}" for note in run["data"]["notes"]),
        "",
        "## Recipe",
        "",
        f"`recipe.yaml` runs it again: `luthier adapt recipe.yaml --out NEW`. {run['training']['steps']} steps; "
        + "; ".join(f"{name} {entry['value']:g} ({entry['origin']})" for name, entry in run["training"]["settings"].items())
        + f"; {run['training']['precision']}.",
        "",
        "## Cost",
        "",
        f"{run['resources']['seconds']:.0f} s of training, {run['resources']['examples_per_s']:.0f} rows/s, {run['resources']['peak_memory_mb']:.0f} MB at the peak, {run['resources']['trainable_parameters']:,} trained parameters, on {run['machine']}.",
        "",
        "## How to load",
        "",
        *_loading(run),
        "",
        "## Limits",
        "",
        "It was measured on rows like those of its test part; on others it may do worse. Rare classes, other languages and longer texts than those in training were not checked. The licence of the base model holds for this folder too.",
        "",
    ]
    return "\n".join(lines)


def _table(run: dict[str, Any]) -> list[str]:
    names = list(run["metrics"])
    sides = {**run["baselines"], "this model": run["metrics"]}
    lines = ["| metric | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(_cell(found.get(name)) for found in sides.values()) + " |")
    return lines


def _cell(metric: dict[str, float] | None) -> str:
    return "" if metric is None else str(Metric(**metric))


def _pairs(columns: dict[str, str]) -> str:
    return ", ".join(f"{role} = `{name}`" for role, name in columns.items())


def _loading(run: dict[str, Any]) -> list[str]:
    saved = run["saved"]
    code = {
        "model": "from transformers import AutoModel  # or the Auto class of the task\nmodel = AutoModel.from_pretrained(FOLDER)",
        "adapter": "from peft import PeftModel\nmodel = PeftModel.from_pretrained(BASE_MODEL, FOLDER)",
        "luthier": "import luthier\nmodel = luthier.load(FOLDER).model",
    }[saved["form"]]
    lines = ["```python", code, "```", "", f"Saved as {saved['form']}, {saved['dtype']}."]
    if saved["form"] != "model":
        lines.append(f"It needs its base model, {run['model']['path']} (SHA-256 {run['model']['sha256'][:16]}...); if that has moved, write the new path into base.path of luthier.json, or pass --base PATH.")
    return lines
