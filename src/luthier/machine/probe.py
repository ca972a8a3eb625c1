"""The trials: each number type under each setting in a process of its own, where a crash is an answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from luthier.machine.answer import CAPPED, SETTINGS, TYPES, UNCAPPED, Answer, Trial, cache_folder, known, remember
from luthier.machine.setting import CAP, CAP_NAMES, lift, pristine_environment

TIMEOUT = 60  # seconds for one trial
NO_ANSWER = 124  # the status of a trial that took longer, as `timeout` gives it
ILLEGAL_ON_WINDOWS = 0xC000001D
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # the machine is measured, not what one call may use of it

Runner = Callable[[str, Mapping[str, str]], tuple[int, str]]


def ensure(say: Callable[[str], None] | None = None, run: Runner | None = None) -> Answer | None:
    """The answer, found out now (seconds, in child processes) where none is cached. None where nothing can be cached: then it is fp32 under the cap.

    say  is told that the machine is being measured
    run  (type, environment) -> (exit status, output) of one trial
    """
    answer = known()
    if answer is not None or not _writable():
        return answer
    if say:
        say("measuring this machine (once, some seconds)")
    answer, final = probe(run or child)
    remember(answer, keep=final)
    if answer.needs_no_cap:
        lift()
    return answer


def probe(run: Runner) -> tuple[Answer, bool]:
    """The answer, and whether it would be the same tomorrow: not where a trial was killed or had no time, nor where torch itself does not run."""
    bare = {name: value for name, value in pristine_environment().items() if name not in (*CAP_NAMES, *THREADS)}
    environments = {UNCAPPED: bare, CAPPED: {**bare, CAP_NAMES[0]: CAP}}
    ended = {(setting, kind): run(kind, environments[setting]) for setting in SETTINGS for kind in TYPES}
    trials = {setting: {kind: _trial(*ended[setting, kind]) for kind in TYPES} for setting in SETTINGS}
    bandwidth = max(trials[setting]["fp32"].flops.pop("bandwidth", 0.0) for setting in SETTINGS)
    passing = (NO_ANSWER, -signal.SIGTERM, -signal.SIGINT, -9)
    final = any(trials[setting]["fp32"].sound for setting in SETTINGS) and not any(status in passing for status, _ in ended.values())
    return Answer(trials, bandwidth), final


def child(kind: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """One trial; its output, or the last line of its error. -P keeps this folder's modules out of the child's imports."""
    script = Path(__file__).with_name("trial.py")
    try:
        done = subprocess.run([sys.executable, "-P", str(script), kind], env=dict(environment), capture_output=True, text=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return NO_ANSWER, ""
    return done.returncode, done.stdout if done.returncode == 0 else "".join(done.stderr.strip().splitlines()[-1:])


def _trial(status: int, output: str) -> Trial:
    if status != 0:
        return Trial(False, {}, f"it ended with {_ending(status, output)}")
    try:
        content = json.loads(output.strip().splitlines()[-1])
        return Trial(content["sound"], content["flops"], content["reason"])
    except (ValueError, IndexError, KeyError, TypeError):
        return Trial(False, {}, "it gave no answer")


def _ending(status: int, output: str) -> str:
    if status == NO_ANSWER:
        return f"no answer in {TIMEOUT} s"
    if status == ILLEGAL_ON_WINDOWS:
        return "an illegal instruction"
    if status < 0:
        return f"the signal {signal.strsignal(-status) or -status}".lower()
    return f"exit status {status}" + (f" ({output.strip()})" if output.strip() else "")


def _writable() -> bool:
    folder = cache_folder()
    if folder is None:
        return False
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
