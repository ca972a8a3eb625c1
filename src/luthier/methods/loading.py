"""Reads every saved form back, whole or as the start of a further training.

A run folder is a stock model, or names a base (another run, even) and holds what was learnt on it: `luthier.json` says which.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.errors import UserError
from luthier.methods import changes
from luthier.methods.engine import Fitted, install
from luthier.methods.kinds import Insert
from luthier.methods.stack import Stack, parse
from luthier.pretrained import Configure, Pretrained, stored_shapes

RECORD = ("form", "stack", "base", "auto_class", "new_heads", "tensors")


def load(folder: str | Path, auto_class: str, configure: Configure | None = None, base: str | Path | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of any saved form, in eval mode. `base` overrides where an adapter's base model lies.

    Raises UserError for a base that moved or changed, and for tensors that do not fit.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None:
        model, new = Pretrained.open(folder).load(auto_class, configure, dtype=dtype)
        if new and (folder / "run.json").is_file():  # a start may lack its head, a finished run does not
            raise UserError(f"{folder} does not hold {', '.join(new[:3])}, which would be random. Copy it from the original run.")
        return model
    model = _load_base(folder, record, configure, base, dtype)
    if record["form"] == "adapter":
        import peft

        stored = set(stored_shapes(folder / "adapter_model.safetensors"))  # peft would look for a missing file on the hub
        try:
            model = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=False).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{folder}: peft cannot put this adapter on {record['base']['path']}: {str(error).splitlines()[0]}") from error
        wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        if stored != wanted:  # peft leaves what it misses at its start and forgets what it does not know
            raise UserError(f"{folder / 'adapter_model.safetensors'} does not fit its adapter: unknown {sorted(stored - wanted)[:3]}, missing {sorted(wanted - stored)[:3]}. Copy it from the original run.")
        return model
    stack = parse(record["stack"])
    fitted = install(model, stack, new_heads=tuple(record["new_heads"]))
    _fill(fitted, folder / "luthier.safetensors", set(record["tensors"]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def read_record(folder: Path) -> dict[str, Any] | None:
    """`luthier.json`, or None for a stock model folder."""
    path = folder / "luthier.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(record, dict) or not set(RECORD) <= set(record) or not {"path", "sha256"} <= set(record["base"]):
        raise UserError(f"{path} does not say how to load the folder; it needs {', '.join(RECORD)} (base with path and sha256). Copy it from the original run.")
    return record


def _load_base(folder: Path, record: Mapping[str, Any], configure: Configure | None, base: str | Path | None, dtype: torch.dtype) -> nn.Module:
    path = _base_path(folder, record, base)
    if sha256(path) != record["base"]["sha256"]:
        raise UserError(f"{folder} was trained on other weights than those in {path} now (their SHA-256 differ). Find the original model, or train again.")
    return load_plain(path, record["auto_class"], configure) if read_record(path) else Pretrained.open(path).load(record["auto_class"], configure, dtype=dtype)[0]


def _base_path(folder: Path, record: Mapping[str, Any], base: str | Path | None = None) -> Path:
    path = Path(base or record["base"]["path"])
    if not path.is_dir():
        raise UserError(f"{folder} is an adapter for {path}, which is not there. Pass --base PATH, or write the new path into base.path of {folder / 'luthier.json'}.")
    return path


def sha256(path: str | Path) -> str:
    """The hash by which an adapter names its base: of a stock folder, or of an adapter run's own tensors and what they go on, wherever that lies."""
    folder = Path(path)
    record = read_record(folder)
    if record is None:
        return Pretrained.open(folder).sha256
    said = {name: record[name] for name in RECORD if name != "base"} | {"base": record["base"]["sha256"]}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _fill(fitted: Fitted, file: Path, wanted: set[str]) -> None:
    """Strictly: every tensor that learnt is in the file, and nothing else."""
    stored = stored_shapes(file)
    state = dict(fitted.model.state_dict())
    unknown = sorted(name for name, shape in stored.items() if name not in wanted or name not in state or tuple(state[name].shape) != shape)
    missing = sorted((wanted | {name for name in fitted.added if name in state}) - set(stored))
    if unknown or missing:
        raise UserError(f"{file} does not fit its stack {fitted.stack}: unknown {unknown[:3]}, missing {missing[:3]}. It may come from another version of a method's package.")
    tensors = load_file(str(file))
    with torch.no_grad():
        for name in stored:
            state[name].copy_(tensors[name])


def load_plain(folder: str | Path, auto_class: str, configure: Configure | None = None, base: str | Path | None = None) -> nn.Module:
    """The model of a run with every change merged into its weights, float32: what a further training starts from, and what `export` writes.

    Inserted modules stay in the model. Raises UserError for a peft tuner that has no merge.
    """
    model = load(folder, auto_class, configure, base)
    if hasattr(model, "peft_config"):
        if not hasattr(getattr(model, "base_model", None), "merge_and_unload") or model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
            raise UserError(f"{folder}: {model.active_peft_config.peft_type.value.lower()} cannot be merged into the weights.")  # type: ignore[union-attr]
        model = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    for module in [m for m in model.modules() if isinstance(m, changes.Changed)]:
        changes.merge(module)  # type: ignore[arg-type]
    return model.eval()


def meta(folder: str | Path, auto_class: str, configure: Configure | None = None) -> tuple[nn.Module, tuple[str, ...]]:
    """What `load_plain` makes of a run, or what a stock folder holds, on the meta device, and the names of the parameters that will be new.

    Raises UserError where the run learnt another task or other labels than those that it shall go on with.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None:
        return Pretrained.open(folder).meta(auto_class, configure)
    mergeable = "Otherwise make it a stock model first: luthier export RUN --save merged --out MODEL."
    if record["auto_class"] != auto_class:
        raise UserError(f"{folder} is an adapter for {record['auto_class']} models, and this task needs {auto_class}. Go on with its own task. {mergeable}")
    model, new = meta(_base_path(folder, record), auto_class, configure)
    stored = {name.removeprefix("base_model.model."): shape for name, shape in Pretrained(folder).shapes.items()}
    for name in set(record["new_heads"]) & set(new):
        if stored.get(name, ()) != tuple(model.get_parameter(name).shape):
            raise UserError(f"{folder} learnt its head ({name}) for other labels than these rows have. Go on with rows of the same labels. {mergeable}")
    inserts = [method for method in parse(record["stack"]) if isinstance(method, Insert)]
    if inserts:
        install(model, Stack(tuple(inserts)))
    return model, tuple(name for name in new if name not in record["new_heads"])


def chain(folder: str | Path) -> list[Path]:
    """The bases of an adapter run, down to the stock folder."""
    record = read_record(Path(folder))
    if record is None:
        return []
    base = _base_path(Path(folder), record)
    return [base, *chain(base)]


def earlier(folder: str | Path) -> list[Stack]:
    """The stacks of the adapter runs that `folder` goes on from, the last first."""
    records = [read_record(Path(path)) for path in (folder, *chain(folder))]
    return [parse(record["stack"]) for record in records if record]


def earlier_facts(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the task (a prefix, a pooling) with which an adapter run was trained."""
    path = folder / "run.json"
    if read_record(folder) is None or not path.is_file():
        return {}
    facts = json.loads(path.read_text(encoding="utf-8"))["task"]["facts"]
    return {name: facts[name] for name in options if name in facts}


def first_output(found: Any) -> Tensor:
    """Logits where there is a head, the last hidden state otherwise."""
    return found.logits if hasattr(found, "logits") else found.last_hidden_state
