"""The trials are run where they must be, their endings are read rightly, and the answer is found out once."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from machines import FakeRunner

from luthier.machine import probe as probing
from luthier.machine import setting
from luthier.machine.answer import CAPPED, UNCAPPED, known
from luthier.machine.probe import child, ensure, probe
from luthier.machine.setting import CAP

FAKE_TORCH = f"""
import json, os, signal, sys
if sys.argv[1] == "bf16" and os.environ.get("ONEDNN_MAX_CPU_ISA") != "{CAP}":
    os.kill(os.getpid(), signal.SIGILL)
print(json.dumps({{"sound": True, "flops": {{"linear": 1e11, "training": 1e11, "onednn": 1e11}}, "reason": ""}}))
sys.exit()
"""


def nothing_crashes(kind: str, capped: bool) -> bool:
    return False


def amx_crashes(kind: str, capped: bool) -> bool:
    return kind == "bf16" and not capped


def test_each_type_is_tried_under_each_setting_once(cache: Path) -> None:
    runner, said = FakeRunner(nothing_crashes), []
    first = ensure(said.append, runner)
    assert sorted(runner.asked) == [("bf16", False), ("bf16", True), ("fp32", False), ("fp32", True), ("int8", False), ("int8", True)]
    assert ensure(said.append, runner) == first == known()
    assert len(runner.asked) == 6 and len(said) == 1


def test_a_crash_is_an_answer(cache: Path) -> None:
    found = ensure(run=FakeRunner(amx_crashes))
    assert found and not found.needs_no_cap
    assert not found.trials[UNCAPPED]["bf16"].sound and "illegal instruction" in found.trials[UNCAPPED]["bf16"].reason
    assert found.trials[CAPPED]["bf16"].sound and found.trials[UNCAPPED]["fp32"].sound
    assert found.bandwidth == 2e10


def test_where_amx_proves_sound_the_cap_is_lifted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    setting.cap()
    ensure(run=FakeRunner(nothing_crashes))
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ and setting.in_force() == [UNCAPPED]


def test_a_lift_after_torch_leaves_both_settings_possible(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.delitem(sys.modules, "torch", raising=False)
        setting.cap()
    monkeypatch.setitem(sys.modules, "torch", sys)
    ensure(run=FakeRunner(nothing_crashes))
    assert setting.in_force() == [CAPPED, UNCAPPED]


@pytest.mark.parametrize("kind,crashes,free", [("int8", "uncapped", False), ("int8", "always", True), ("bf16", "always", False)])
def test_int8_holds_the_cap_only_where_the_cap_mends_it(cache: Path, kind: str, crashes: str, free: bool) -> None:
    """Some machines have no kernels for it at all."""
    found = ensure(run=FakeRunner(lambda tried, capped: tried == kind and not (capped and crashes == "uncapped")))
    assert found and found.needs_no_cap is free and known() == found


def test_where_amx_crashes_the_cap_stays(cache: Path) -> None:
    setting.cap()
    ensure(run=FakeRunner(amx_crashes))
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == CAP


def test_the_users_cap_is_neither_lifted_nor_seen_by_the_uncapped_trials(cache: Path) -> None:
    os.environ["ONEDNN_MAX_CPU_ISA"] = CAP
    setting.cap()
    runner = FakeRunner(nothing_crashes)
    ensure(run=runner)
    assert ("bf16", False) in runner.asked and os.environ["ONEDNN_MAX_CPU_ISA"] == CAP


@pytest.mark.parametrize("folder", ["/proc/none", "/dev/null/below"])
def test_an_unwritable_cache_folder_means_no_trial(cache: Path, folder: str) -> None:
    os.environ["LUTHIER_CACHE"] = folder
    runner = FakeRunner(nothing_crashes)
    assert ensure(run=runner) is None and not runner.asked


@pytest.mark.parametrize("status", [-signal.SIGKILL, probing.NO_ANSWER])
def test_what_may_end_otherwise_tomorrow_is_not_kept(cache: Path, status: int) -> None:
    ensure(run=FakeRunner(amx_crashes, status))
    assert known() is not None and not list(cache.iterdir())


def test_a_torch_that_does_not_run_at_all_is_not_kept(cache: Path) -> None:
    found, final = probe(lambda kind, environment: (1, "ModuleNotFoundError: No module named 'torch'"))
    assert not final and "No module named 'torch'" in found.trials[CAPPED]["fp32"].reason


@pytest.mark.parametrize("output", ["", "no json", "[]", "{}", '{"sound": true}'])
def test_a_trial_without_an_answer_is_not_sound(output: str) -> None:
    found, _ = probe(lambda kind, environment: (0, output))
    assert not found.needs_no_cap and found.trials[UNCAPPED]["bf16"].reason == "it gave no answer"


def test_a_process_that_really_dies_of_an_illegal_instruction(cache: Path, tmp_path: Path) -> None:
    """The real runner and real children; only the torch that they import is one that crashes as AMX does."""
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    os.environ["PYTHONPATH"] = str(tmp_path)
    found = ensure()
    assert found and found.trials[UNCAPPED]["bf16"] == (False, {}, "it ended with the signal illegal instruction")
    assert all(trial.sound for trial in (found.trials[CAPPED]["bf16"], *(found.trials[s]["fp32"] for s in (CAPPED, UNCAPPED))))


def test_a_child_that_hangs_is_an_answer_too(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(probing, "TIMEOUT", 0.5)
    assert child("bf16", {**os.environ, "PYTHONPATH": str(tmp_path)}) == (probing.NO_ANSWER, "")


def test_this_machine(cache: Path) -> None:
    """Whatever it is: fp32 works, what is called sound has speeds, and what is not has a reason."""
    found = ensure()
    assert found and found == known() and found.bandwidth > 0
    for types in found.trials.values():
        assert types["fp32"].sound
        for trial in types.values():
            assert trial.flops if trial.sound else trial.reason
