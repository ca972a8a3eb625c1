"""Writes a fitted model as the most stock folder that holds it; `loading` reads every form back.

model     what transformers opens: a full model, weight changes merged into it
adapter   what peft opens: the learnt tensors, with the base named by path and hash
luthier   `luthier.json` (stack, base, names) and `luthier.safetensors` (everything that learnt): stacks, inserts, small partial trainings of large models
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from luthier.errors import UserError
from luthier.methods import stock_adapter
from luthier.methods.engine import Fitted
from luthier.methods.kinds import Bridge, Insert, Selection, Surgery, WeightChange
from luthier.methods.stack import Stack
from luthier.pretrained import quiet

FORMS = ("auto", "adapter", "merged", "difference")
SMALL = 1_000_000_000  # bytes; above it only what learnt is written
TOLERANCE = 1e-4  # of merged against unmerged outputs, float32; see `difference`
SHARD = "20GB"


@dataclass(frozen=True)
class Base:
    """The model that was trained, as an adapter run names it."""

    path: str
    sha256: str
    auto_class: str


@dataclass(frozen=True)
class Saved:
    """form: model | adapter | luthier. max_difference: of merged and unmerged outputs on the probe, where a merge happened."""

    form: str
    dtype: str
    max_difference: float | None = None


def save(fitted: Fitted, folder: Path, base: Base, form: str = "auto", probe: Callable[[nn.Module], Tensor] | None = None) -> Saved:
    """Write the model into `folder`, which exists. `probe` gives the outputs that a merge must keep.

    Raises UserError where the asked form cannot hold this stack, before anything is written.
    """
    check_form(fitted.stack, form)
    size = sum(p.numel() * p.element_size() for p in fitted.model.parameters())
    if fitted.stock:
        partial = len(fitted.trainable) < len(list(fitted.model.parameters()))
        if form == "difference" or (form == "auto" and size > SMALL and partial):
            return _save_difference(fitted, folder, base)
        return save_stock(fitted.model, folder)
    if fitted.mergeable and form in ("auto", "merged") and (size <= SMALL or form == "merged"):
        merged, changed = merge_copy(fitted, probe)
        if changed is None or changed <= TOLERANCE:
            return save_stock(merged, folder, changed)
        if form == "merged":
            raise UserError(f"Merging changes outputs by {changed:.1e}, more than {TOLERANCE:g}: refused. Save it as an adapter (--save adapter).")
    return _save_adapter(fitted, folder, base)


def check_form(stack: Stack, form: str) -> None:
    """Raises UserError where `form` cannot hold what `stack` makes; settings decide it, so it is known before weights are read."""
    if form not in FORMS:
        raise UserError(f"save={form!r} is none of {', '.join(FORMS)}.")
    blockers = [method.card.name for method in stack if isinstance(method, (Insert, Bridge))]
    if form == "merged" and blockers:
        raise UserError(f"save=merged: {' and '.join(blockers)} cannot be merged, being no change of a weight. Use --save adapter, or leave --save out.")
    if form == "adapter" and all(isinstance(method, (Selection, Surgery)) for method in stack):
        raise UserError(f"save=adapter: {stack} adds no tensors, it changes the model itself. Use --save difference to store only what learnt, or leave --save out.")


def merge_copy(fitted: Fitted, probe: Callable[[nn.Module], Tensor] | None) -> tuple[nn.Module, float | None]:
    """A merged copy, and the largest difference of its probe outputs from the unmerged ones."""
    before = _probe(fitted.model, probe)
    twin = copy.deepcopy(fitted)
    twin.merge()
    after = _probe(twin.model, probe)
    return twin.model, None if before is None or after is None else difference(before, after)


def difference(before: Tensor, after: Tensor) -> float:
    """Largest absolute difference; of outputs beyond 1 (numbers in a label's own scale), as a share of the largest."""
    return float((before.float() - after.float()).abs().max() / before.float().abs().max().clamp(min=1.0))


def _probe(model: nn.Module, probe: Callable[[nn.Module], Tensor] | None) -> Tensor | None:
    if probe is None:
        return None
    training = model.training
    model.eval()
    with torch.no_grad():
        outputs = probe(model)
    model.train(training)
    return outputs


def save_stock(model: nn.Module, folder: Path, changed: float | None = None) -> Saved:
    """Write a model that transformers can express as its own folder. Raises UserError where methods' modules are in it."""
    inserted = sorted({word for name in model.state_dict() for word in name.split(".") if word.startswith("luthier_")})
    if inserted:
        raise UserError(f"{', '.join(w.removeprefix('luthier_') for w in inserted)} cannot be merged: it is a module of its own, not a change of a weight. The run folder itself loads by luthier.load.")
    with quiet():
        model.save_pretrained(str(folder), max_shard_size=SHARD)  # type: ignore[operator]
    return Saved("model", _dtype(model), changed)


def _save_adapter(fitted: Fitted, folder: Path, base: Base) -> Saved:
    task_type = stock_adapter.TASK_TYPES.get(base.auto_class)
    heads = {name: p for name, p in fitted.model.named_parameters() if name in fitted.new_heads or (task_type in stock_adapter.OWN_HEAD and name in _heads(fitted))}
    if fitted.bridge:
        fitted.bridge.save(fitted.model, str(folder), base.path, list(heads))
        return _name_base(folder, fitted, base, "adapter", ())
    only_changes = not fitted.carries and all(isinstance(method, WeightChange) for method in fitted.stack) and fitted.opened <= set(fitted.new_heads)
    stock = stock_adapter.low_rank(fitted.model, task_type) if only_changes else None
    if stock is None:
        return _save_difference(fitted, folder, base)
    config, tensors = stock
    stock_adapter.write(folder, config, tensors, heads, base.path)
    return _name_base(folder, fitted, base, "adapter", ())


def _heads(fitted: Fitted) -> set[str]:
    return {tensor.name for tensor in fitted.anatomy.tensors() if tensor.role == "head"}


def _save_difference(fitted: Fitted, folder: Path, base: Base) -> Saved:
    state = fitted.model.state_dict()
    kept = {name: state[name] for name in state if name in fitted.added | set(fitted.trainable) | set(fitted.new_heads) | fitted.lost}
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in kept.items()}, folder / "luthier.safetensors", {"format": "pt"})
    return _name_base(folder, fitted, base, "luthier", kept)


def _name_base(folder: Path, fitted: Fitted, base: Base, form: str, tensors: Iterable[str]) -> Saved:
    """tensors: what `luthier.safetensors` holds, where there is one."""
    content = {
        "form": form,
        "stack": str(fitted.stack),
        "base": {"path": base.path, "sha256": base.sha256},
        "auto_class": base.auto_class,
        "new_heads": list(fitted.new_heads),
        "tensors": sorted(tensors),
        "if_the_base_moved": "write its new path into base.path here (and base_model_name_or_path of adapter_config.json), or pass --base PATH",
    }
    (folder / "luthier.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fitted.model.config.save_pretrained(str(folder))  # type: ignore[union-attr, operator]
    return Saved(form, _dtype(fitted.model))


def _dtype(model: nn.Module) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
