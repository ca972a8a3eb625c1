"""Machines of several kinds, without having them, and fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from luthier.machine import answer
from luthier.machine.answer import CAPPED, UNCAPPED, Answer, Trial
from luthier.machine.setting import CAP, CAP_NAMES, MARK

SOURCE = Path(answer.__file__).parents[2]


def trial(linear: float = 1e11, training: float = 1e11) -> Trial:
    return Trial(True, {"linear": linear, "training": training})


def machine(uncapped: Trial, capped: Trial) -> Answer:
    """By what bf16 does there; fp32 always works, at 1e11 FLOP/s."""
    return Answer({UNCAPPED: {"fp32": trial(), "bf16": uncapped}, CAPPED: {"fp32": trial(), "bf16": capped}}, 2e10)


CRASH = Trial(False, {}, "it ended with the signal illegal instruction")
AMX = machine(trial(training=6e11), trial(training=5e10))
BROKEN_AMX = machine(CRASH, trial(training=5e10))
BROKEN_AMX_FAST_CAP = machine(CRASH, trial(training=2e11))
NO_AMX = machine(trial(training=2e11), trial(training=2e11))
NO_BF16 = machine(CRASH, CRASH)


class FakeRunner:
    """Ends each trial as a machine of that kind does: `crashes(type, capped)` names the trials that end with a signal."""

    def __init__(self, crashes: Callable[[str, bool], bool], status: int = -4):
        self.crashes, self.status, self.asked = crashes, status, []

    def __call__(self, kind: str, environment: Mapping[str, str]) -> tuple[int, str]:
        capped = environment.get(CAP_NAMES[0]) == CAP
        self.asked.append((kind, capped))
        if self.crashes(kind, capped):
            return self.status, ""
        speed = 3e11 if kind == "bf16" else 1e11
        return 0, "a warning\n" + json.dumps({"sound": True, "flops": {"linear": speed, "training": speed, **({"bandwidth": 2e10} if kind == "fp32" else {})}, "reason": ""})


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with `luthier` on its path; None takes a variable away."""
    changed = {**dict.fromkeys((*CAP_NAMES, MARK)), "PYTHONPATH": str(SOURCE), **environment}
    given = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done
