"""What this computer can do, tried once in child processes and remembered.

On some machines the CPU advertises AMX and the kernel permits it, yet bf16 matrix products end the process with an illegal
instruction. Nothing is concluded from names or flags: each number type and setting is tried where a crash is an answer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "Answer": "answer",
    "Trial": "answer",
    "known": "answer",
    "in_force": "setting",
    "pristine_environment": "setting",
    "ensure": "probe",
    "ceiling": "precision",
    "choose_device": "precision",
    "choose_precision": "precision",
    "onednn_is_faster": "precision",
    "Memory": "resources",
    "cpus": "resources",
    "describe": "resources",
    "free_disk": "resources",
    "memory": "resources",
    "resident": "resources",
    "trim": "resources",
}

__all__ = ["Answer", "Memory", "Trial", "ceiling", "choose_device", "choose_precision", "cpus", "describe", "ensure", "free_disk", "in_force", "known", "memory", "onednn_is_faster", "pristine_environment", "resident", "trim"]

if TYPE_CHECKING:
    from luthier.machine.answer import Answer, Trial, known
    from luthier.machine.precision import ceiling, choose_device, choose_precision, onednn_is_faster
    from luthier.machine.probe import ensure
    from luthier.machine.resources import Memory, cpus, describe, free_disk, memory, resident, trim
    from luthier.machine.setting import in_force, pristine_environment


def __getattr__(name: str) -> Any:
    """`import luthier` needs the cached answer and the cap only; the rest is imported on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'luthier.machine' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"luthier.machine.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
