"""bf16 only where it is safe and faster: for every kind of machine, every request, and a torch that came first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from machines import AMX, BROKEN_AMX, BROKEN_AMX_FAST_CAP, CRASH, NO_AMX, NO_BF16, machine, python, trial

from luthier.errors import UserError
from luthier.machine import precision, setting
from luthier.machine.answer import Answer, Trial, remember
from luthier.machine.precision import ceiling, choose_device, choose_precision, onednn_is_faster
from luthier.machine.setting import CAP


def on(machine: Answer, given: str | None = None) -> None:
    """This process as `import luthier` leaves it there, before torch."""
    remember(machine)
    if given is not None:
        os.environ["ONEDNN_MAX_CPU_ISA"] = given
    setting.cap()
    setting._earlier.clear()  # torch is in this process for the sake of other tests


@pytest.mark.parametrize("machine,expected", [(AMX, "bf16"), (BROKEN_AMX, "fp32"), (BROKEN_AMX_FAST_CAP, "bf16"), (NO_AMX, "bf16"), (NO_BF16, "fp32")])
def test_auto_takes_what_is_safe_and_faster(cache: Path, machine: Answer, expected: str) -> None:
    on(machine)
    assert choose_precision("auto")[0] == expected
    assert choose_precision("fp32") == ("fp32", "given")


def test_the_reason_names_what_was_measured(cache: Path) -> None:
    on(AMX)
    assert choose_precision("auto") == ("bf16", "bf16 is sound here and trains 6.0 times as fast as fp32")


def test_safe_but_slower_is_granted_on_request(cache: Path) -> None:
    on(BROKEN_AMX)
    assert choose_precision("auto") == ("fp32", "bf16 is sound here and trains 0.5 times as fast as fp32")
    assert choose_precision("bf16") == ("bf16", "given")


def test_unsafe_is_refused_with_the_reason_and_the_remedy(cache: Path) -> None:
    on(NO_BF16)
    with pytest.raises(UserError, match=r"--precision bf16: bf16 is not sound here .*illegal instruction.*Use --precision fp32"):
        choose_precision("bf16")


@pytest.mark.parametrize("given", ["AVX512_CORE_AMX", "AVX2"])
def test_a_setting_that_was_not_tried_is_refused(cache: Path, given: str) -> None:
    on(AMX, given)
    assert choose_precision("auto")[0] == "fp32"
    with pytest.raises(UserError, match=f"ONEDNN_MAX_CPU_ISA={given} is set"):
        choose_precision("bf16")


@pytest.mark.parametrize("given,expected", [("", "fp32"), ("ALL", "fp32"), (CAP, "bf16"), (CAP.lower(), "bf16")])
def test_a_setting_of_the_user_is_judged_by_its_own_trial(cache: Path, given: str, expected: str) -> None:
    on(BROKEN_AMX_FAST_CAP, given)
    assert choose_precision("auto")[0] == expected


def test_the_users_cap_costs_what_amx_would_bring(cache: Path) -> None:
    on(AMX, CAP)
    assert choose_precision("auto")[0] == "fp32"


def test_an_unwritable_cache_folder_means_fp32(cache: Path) -> None:
    os.environ["LUTHIER_CACHE"] = "/proc/none"
    setting.cap()
    assert choose_precision("auto")[0] == "fp32"
    with pytest.raises(UserError, match="not measured"):
        choose_precision("bf16")


def test_int8_is_taken_on_request_only(cache: Path) -> None:
    on(NO_BF16)
    assert choose_precision("auto")[0] == "fp32"
    assert choose_precision("int8") == ("int8", "given")


def test_slow_int8_is_granted_with_a_word(cache: Path) -> None:
    slow = Trial(True, {"onednn": 7e10})
    on(machine(trial(), trial(), slow, slow))
    assert choose_precision("int8") == ("int8", "int8 is sound here, but its products are only 0.7 times as fast as those of fp32")


def test_int8_is_refused_where_it_is_not_sound_or_not_for_the_device(cache: Path) -> None:
    on(machine(trial(), trial(), CRASH, CRASH))
    with pytest.raises(UserError, match=r"--precision int8: int8 is not sound here .*illegal instruction.*Use --precision fp32"):
        choose_precision("int8")
    for device in ("cuda:0", "mps"):
        with pytest.raises(UserError, match=f"int8 is for the processor, not for {device}"):
            choose_precision("int8", device)


BEFORE = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
import luthier
from luthier.machine import choose_precision
print(*choose_precision("auto"))
try: print(*choose_precision("bf16"))
except luthier.UserError as error: print(error)
"""


def test_a_torch_that_came_first_makes_the_unproven_type_unsafe(cache: Path) -> None:
    remember(BROKEN_AMX_FAST_CAP)
    auto, asked = python(BEFORE).stdout.splitlines()
    assert auto.startswith("fp32 ") and "import luthier first" in auto
    assert "import luthier first" in asked and "Use --precision fp32" in asked


@pytest.mark.parametrize("machine", [AMX, NO_AMX])
def test_a_torch_that_came_first_does_no_harm_where_no_cap_is_needed(cache: Path, machine: Answer) -> None:
    remember(machine)
    auto, asked = python(BEFORE).stdout.splitlines()
    assert auto.startswith("bf16 ") and asked == "bf16 given"


def test_lifting_the_cap_late_counts_the_slower_setting(cache: Path) -> None:
    on(AMX)
    setting._earlier.add("capped")  # torch may have computed under the cap before the trials ended
    assert choose_precision("auto")[0] == "fp32"


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked_itself(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: supported or including_emulation)
    assert choose_precision("auto", "cuda:0")[0] == ("bf16" if supported else "fp32")
    if not supported:
        with pytest.raises(UserError, match="GPU"):
            choose_precision("bf16", "cuda:0")


def test_a_request_on_another_device_is_refused_rather_than_ignored() -> None:
    assert choose_precision("auto", "mps")[0] == "fp32"
    with pytest.raises(UserError, match="mps"):
        choose_precision("bf16", "mps")


@pytest.mark.parametrize("onednn,expected", [(0.4e12, True), (0.1e12, False), (None, False)])
def test_float32_products_take_the_faster_library(cache: Path, onednn: float | None, expected: bool) -> None:
    speeds = {"linear": 0.2e12} if onednn is None else {"linear": 0.2e12, "onednn": onednn}
    on(NO_AMX._replace(trials={name: {**types, "fp32": types["fp32"]._replace(flops=speeds)} for name, types in NO_AMX.trials.items()}))
    assert onednn_is_faster() is expected


def test_the_ceiling_is_that_of_the_setting_in_force(cache: Path) -> None:
    assert ceiling("fp32", "cpu") == precision.UNMEASURED
    on(NO_BF16)
    assert ceiling("fp32", "cpu") == 1e11 and ceiling("bf16", "cpu") == precision.UNMEASURED


def test_a_model_stored_in_bf16_answers_where_bf16_crashes(cache: Path, shared: Path) -> None:
    """Loaded in float32, whose values hold bf16's exactly, and computed in fp32."""
    import torch
    from safetensors.torch import load_file

    from luthier.pretrained import Pretrained

    on(NO_BF16)
    folder = shared / "models" / "dinov2_small_5layers"
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model, new = Pretrained.open(folder).load("AutoModel")
    assert not new and {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(float(p.sum()) for p in model.double().parameters()) == pytest.approx(sum(float(t.double().sum()) for t in stored.values()), rel=1e-12)
    model.float()
    assert choose_precision("auto")[0] == "fp32"
    pictures = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        found = model(pixel_values=pictures).last_hidden_state
        expected = model.double()(pixel_values=pictures.double()).last_hidden_state
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == "cpu"
    for name in ("cuda:99", "meta", "quantum"):
        with pytest.raises(UserError, match="--device"):
            choose_device(name)
