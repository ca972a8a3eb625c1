"""Everything that a training needs to go on bit for bit, as safetensors and JSON: what learns, the optimiser, the place in the data. Random numbers follow from the step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.errors import UserError, disk_is_full

KEPT = 2


def write(folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Whole or not at all: written beside, flushed to the disk, renamed. Raises UserError where the disk is full; earlier checkpoints stay."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        # safetensors refuses tensors that share memory, and stores contiguous ones only
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, str(partial / "state.safetensors"))
        (partial / "state.json").write_text(json.dumps(record), encoding="utf-8")
        for file in partial.iterdir():
            _flush(file)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if disk_is_full(error):
            raise UserError(f"The disk of {folder.parent} is full, so the checkpoint could not be written; the earlier ones are whole. Make room, then go on with --resume.") from error
        raise


def read(folder: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(str(folder / "state.safetensors"), device=str(device)), record(folder)


def record(folder: Path) -> dict[str, Any]:
    """Of a checkpoint, all but its tensors."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    whole = [path for path in folder.glob("step-*") if path.suffix != ".partial" and (path / "state.json").is_file()]
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def prune(folder: Path) -> None:
    whole = sorted((path for path in folder.glob("step-*") if path.suffix != ".partial"), key=lambda path: int(path.name.partition("-")[2]))
    for path in whole[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def learnt(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the parameters that learn, and persistent buffers (running statistics)."""
    parameters = dict(model.named_parameters())
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters or parameters[name].requires_grad}


@torch.no_grad()
def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = learnt(model)
    if set(own) != set(tensors):
        odd = sorted(set(own) ^ set(tensors))[:3]
        raise UserError(f"The checkpoint is of another set of trained tensors than this run's (such as {', '.join(odd)}). Was the recipe changed? Start anew with --overwrite.")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(f"The checkpoint holds {name} as {tuple(tensors[name].shape)}, and this run trains {tuple(tensor.shape)}. Was the recipe changed? Start anew with --overwrite.")
        tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimiser's state by the name of its parameter. names: id of a parameter -> name."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{names[id(parameter)]}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = names[id(parameter)] + "/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            optimizer.state[parameter] = {key: value.to(parameter.device) if key != "step" or parameter.is_cuda else value for key, value in state.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
