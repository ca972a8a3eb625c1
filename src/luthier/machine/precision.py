"""Which device and number type a run takes here and why, and how fast this machine is in it."""

from __future__ import annotations

from typing import NamedTuple

from luthier.errors import UserError, did_you_mean
from luthier.machine.answer import CAPPED, UNCAPPED, known
from luthier.machine.probe import ensure
from luthier.machine.setting import CAP_NAMES, in_force

PRECISIONS = ("auto", "fp32", "bf16")
FASTER = 1.1  # bf16 must train so many times as fast as fp32 to be taken unasked
UNMEASURED = 50e9  # FLOP/s of a processor that nobody measured
GPU = {"fp32": 20e12, "bf16": 100e12}  # FLOP/s; a rough guess, for estimates of duration only


class Verdict(NamedTuple):
    """Of bf16 in this process."""

    safe: bool
    faster: bool
    why: str


def choose_device(requested: str | None = None) -> str:
    """The device asked for, where this machine has it; without a wish its first GPU, or the processor. Raises UserError."""
    import torch

    if requested is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(requested).type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=requested)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {requested}: torch cannot use it here ({str(error).splitlines()[0]}). Use cpu.") from None
    return requested


def choose_precision(requested: str, device: str = "cpu") -> tuple[str, str]:
    """(`fp32` or `bf16`, why).

    requested  auto (bf16 only where it is safe and faster), fp32 or bf16
    Measures the machine first where that was not done. Raises UserError where bf16 is asked for and is not safe on `device` in this process.
    """
    if requested not in PRECISIONS:
        raise UserError(f"--precision {requested}: there is no such precision.{did_you_mean(requested, PRECISIONS)} Choose {', '.join(PRECISIONS)}.")
    if requested == "fp32":
        return "fp32", "given"
    bf16 = _on_cpu() if device == "cpu" else _elsewhere(device)
    if requested == "bf16":
        if not bf16.safe:
            raise UserError(f"--precision bf16: {bf16.why}. Use --precision fp32 (or auto).")
        return "bf16", "given"
    return "bf16" if bf16.faster else "fp32", bf16.why


def ceiling(precision: str, device: str) -> float:
    """FLOP per second of matrix products: measured on the processor, a guess elsewhere."""
    if device != "cpu":
        return GPU[precision]
    answer = known()
    if answer is None:
        return UNMEASURED
    setting = next((name for name in in_force() if name in answer.trials), CAPPED)
    return answer.trials[setting][precision].flops.get("linear", UNMEASURED)


def onednn_is_faster() -> bool:
    """Whether oneDNN computes float32 products faster here than torch's usual library does, under all settings that may be in force."""
    answer = known()
    if answer is None:
        return False
    speeds = [answer.trials[setting]["fp32"].flops if setting in answer.trials else {} for setting in in_force()]
    return all(found.get("onednn", 0) > found.get("linear", UNMEASURED) for found in speeds)


def _on_cpu() -> Verdict:
    """Of all settings that may be in force, the worst counts."""
    answer = ensure()
    if answer is None:
        return Verdict(False, False, "this machine is not measured, as no cache folder can be written")
    settings = in_force()
    for setting in settings:
        if setting not in answer.trials:
            return Verdict(False, False, f"{CAP_NAMES[0]}={setting} is set, under which bf16 was not tried")
        trial = answer.trials[setting]["bf16"]
        if not trial.sound:
            late = "; torch was imported before luthier, so a cap may come too late: import luthier first" if setting == UNCAPPED and CAPPED in settings else ""
            return Verdict(False, False, f"bf16 is not sound here ({setting}: {trial.reason}){late}")
    speeds = [answer.trials[setting] for setting in settings]
    gain = min(types["bf16"].flops["training"] / types["fp32"].flops["training"] for types in speeds if types["fp32"].sound)
    return Verdict(True, gain > FASTER, f"bf16 is sound here and trains {gain:.1f} times as fast as fp32")


def _elsewhere(device: str) -> Verdict:
    if not device.startswith("cuda"):
        return Verdict(False, False, f"bf16 is not tried on {device}")
    import torch

    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Verdict(True, True, "this GPU computes bf16")
    return Verdict(False, False, "this GPU does not compute bf16")
