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


WHOLE = Trial(True, {"onednn": 4e11})


def machine(uncapped: Trial, capped: Trial, int8: Trial = WHOLE, int8_capped: Trial = WHOLE) -> Answer:
    """By what bf16 and int8 do there; fp32 always works, at 1e11 FLOP/s."""
    return Answer({UNCAPPED: {"fp32": trial(), "bf16": uncapped, "int8": int8}, CAPPED: {"fp32": trial(), "bf16": capped, "int8": int8_capped}}, 2e10)


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
        speed = {"fp32": 1e11, "bf16": 3e11, "int8": 4e11}[kind]
        flops = {"onednn": speed} if kind == "int8" else {"linear": speed, "training": speed, **({"bandwidth": 2e10} if kind == "fp32" else {})}
        return 0, "a warning\n" + json.dumps({"sound": True, "flops": flops, "reason": ""})


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with `luthier` on its path; None takes a variable away."""
    changed = {**dict.fromkeys((*CAP_NAMES, MARK)), "PYTHONPATH": str(SOURCE), **environment}
    given = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done
