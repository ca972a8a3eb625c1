"""`luthier doctor`: what this machine can do, what luthier chose and why, and what it never does."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from luthier import machine
from luthier.machine.answer import CAPPED, TYPES, UNCAPPED, cache_file, forget
from luthier.machine.setting import CAP, CAP_NAMES, given, ours

PACKAGES = ("luthier", "torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "scikit-learn", "sentence-transformers")
SETTINGS = {UNCAPPED: "matrix units as they come", CAPPED: "held below AMX"}
ROUTES = {"linear": "F.linear", "onednn": "oneDNN", "training": "training on one core"}
TRUST = (
    "code that comes with a model (auto_map, trust_remote_code) is never run",
    "pickles (pytorch_model.bin and the like) are never opened; weights are safetensors",
    "models and rows are read from folders and files; no connection is made and nothing is reported",
    "nothing is written outside --out and the search index of a run, but what luthier, torch and matplotlib keep in the user's cache, configuration and temporary folders",
)


def doctor(again: bool = False, console: Any = None) -> dict[str, Any]:
    """Facts as plain values. again: measure anew."""
    from luthier.compute import kernels
    from luthier.verbs.console import Console

    if again:
        forget()
    say = (console or Console()).say
    answer = machine.ensure(say)
    kernels.ensure(say)
    precision, why = machine.choose_precision("auto", "cpu")
    found = machine.memory()
    return {
        "machine": machine.describe(),
        "cpus": machine.cpus(),
        "memory": {"total_gb": round(found.total / 1e9, 1), "available_gb": round(found.available / 1e9, 1)},
        "gpu": _gpu(),
        "trials": {setting: {kind: _shown(trial) for kind, trial in types.items()} for setting, types in answer.trials.items()} if answer else {},
        "copy_gb_per_s": round(answer.bandwidth / 1e9, 1) if answer else None,
        "chosen": {"precision": precision, "why": why, "cap": _cap(answer)},
        "kernels": kernels.outcome(),
        "cache": cache_file() if answer else None,
        "versions": {"python": platform.python_version(), **_versions()},
        "never": list(TRUST),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as people read them."""
    memory = facts["memory"]
    out = [f"machine    {facts['machine']}", f"memory     {memory['available_gb']} of {memory['total_gb']} GB free", f"gpu        {facts['gpu']}"]
    for setting, types in facts["trials"].items():
        for kind in TYPES:
            trial = types[kind]
            speeds = ", ".join(f"{ROUTES[route]} {tflops}" for route, tflops in trial["tflops"].items())
            out.append(f"{kind:<10} {SETTINGS[setting]}: " + (f"sound; TFLOP/s: {speeds}" if trial["sound"] else f"NOT SOUND: {trial['reason']}"))
    if facts["copy_gb_per_s"]:
        out.append(f"copying    {facts['copy_gb_per_s']} GB/s")
    out.append(f"chosen     {facts['chosen']['precision']}: {facts['chosen']['why']}")
    out.append(f"oneDNN     {facts['chosen']['cap']}")
    out.append(f"kernels    {facts['kernels']}")
    out.append(f"kept in    {facts['cache'] or 'nothing: no cache folder can be written, so nothing is measured'}")
    out.append("versions   " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    return out + [f"never      {line}" for line in facts["never"]]


def _shown(trial: machine.Trial) -> dict[str, Any]:
    return {"sound": trial.sound, "reason": trial.reason, "tflops": {route: round(flops / 1e12, 3) for route, flops in trial.flops.items()}}


def _cap(answer: machine.Answer | None) -> str:
    """What oneDNN is told, and by whom."""
    if ours():
        return f"{CAP_NAMES[0]}={CAP}, set by luthier, " + ("because AMX is not sound here" if answer else "because nothing is known of AMX here")
    user = given()
    return "{}={}, set by the user".format(*user) if user else "no cap: the matrix units are sound here as they come"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
