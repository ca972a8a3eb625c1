"""`luthier doctor` says what was tried, what was chosen, and what luthier never does; as text and as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from machines import AMX, BROKEN_AMX, FakeRunner

from luthier.machine import probe, setting
from luthier.machine.answer import Answer, remember
from luthier.machine.setting import CAP
from luthier.verbs.doctor import TRUST, doctor, lines


def told(found: Answer | None) -> tuple[dict, str]:
    if found:
        remember(found)
    setting.cap()
    setting._earlier.clear()
    facts = doctor()
    assert json.loads(json.dumps(facts)) == facts
    return facts, "\n".join(lines(facts))


def test_a_machine_whose_amx_crashes(cache: Path) -> None:
    facts, text = told(BROKEN_AMX)
    assert facts["chosen"]["precision"] == "fp32" and not facts["trials"]["uncapped"]["bf16"]["sound"]
    assert "bf16       matrix units as they come: NOT SOUND: it ended with the signal illegal instruction" in text
    assert f"ONEDNN_MAX_CPU_ISA={CAP}, set by luthier, because AMX is not sound here" in text


def test_a_machine_where_all_is_well(cache: Path) -> None:
    facts, text = told(AMX)
    assert facts["chosen"]["precision"] == "bf16" and "trains 6.0 times as fast" in text and "no cap" in text
    assert facts["trials"]["uncapped"]["bf16"]["tflops"] == {"linear": 0.1, "training": 0.6}
    assert "int8       matrix units as they come: sound; TFLOP/s: oneDNN 0.4" in text


def test_a_setting_of_the_user_is_shown_as_theirs(cache: Path) -> None:
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    assert "ONEDNN_MAX_CPU_ISA=AVX2, set by the user" in told(AMX)[1]


def test_without_a_cache_folder(cache: Path) -> None:
    os.environ["LUTHIER_CACHE"] = "/proc/none"
    facts, text = told(None)
    assert facts["trials"] == {} and facts["chosen"]["precision"] == "fp32" and "no cache folder can be written" in text


def test_what_is_never_done_is_said(cache: Path) -> None:
    facts, text = told(AMX)
    assert facts["never"] == list(TRUST)
    for word in ("trust_remote_code", "pickles", "no connection", "outside --out"):
        assert word in text


def test_again_measures_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(AMX)
    runner = FakeRunner(lambda kind, capped: False)
    monkeypatch.setattr(probe, "child", runner)
    assert doctor()["chosen"]["why"].startswith("bf16 is sound here and trains 6.0") and not runner.asked
    assert doctor(again=True)["chosen"]["why"].startswith("bf16 is sound here and trains 3.0") and len(runner.asked) == 6
