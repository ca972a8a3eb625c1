"""Which device and number type a run takes here and why, and how fast this machine is in it."""

from __future__ import annotations

from typing import NamedTuple

from luthier.errors import UserError, did_you_mean
from luthier.machine.answer import CAPPED, UNCAPPED, Trial, known
from luthier.machine.probe import ensure
from luthier.machine.setting import CAP_NAMES, in_force

PRECISIONS = ("auto", "fp32", "bf16", "int8")
FASTER = 1.1  # bf16 must train so many times as fast as fp32 to be taken unasked
UNMEASURED = 50e9  # FLOP/s of a processor that nobody measured
GPU = {"fp32": 20e12, "bf16": 100e12}  # FLOP/s; a rough guess, for estimates of duration only


class Verdict(NamedTuple):
    """Of a type in this process."""

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
    """(`fp32`, `bf16` or `int8`, why).

    requested  auto (bf16 only where it is safe and faster; never int8, which costs accuracy), fp32, bf16 or int8
    Measures the machine first where that was not done. Raises UserError where bf16 or int8 is asked for and is not safe on `device` in this process.
    """
    if requested not in PRECISIONS:
        raise UserError(f"--precision {requested}: there is no such precision.{did_you_mean(requested, PRECISIONS)} Choose {', '.join(PRECISIONS)}.")
    if requested == "fp32":
        return "fp32", "given"
    found = _int8(device) if requested == "int8" else _on_cpu() if device == "cpu" else _elsewhere(device)
    if requested == "auto":
        return "bf16" if found.faster else "fp32", found.why
    if not found.safe:
        raise UserError(f"--precision {requested}: {found.why}. Use --precision fp32 (or auto).")
    return requested, found.why if requested == "int8" and not found.faster else "given"


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
    trials = _trials("bf16")
    if isinstance(trials, str):
        return Verdict(False, False, trials)
    gain = min(types["bf16"].flops["training"] / types["fp32"].flops["training"] for types in trials if types["fp32"].sound)
    return Verdict(True, gain > FASTER, f"bf16 is sound here and trains {gain:.1f} times as fast as fp32")


def _int8(device: str) -> Verdict:
    if device != "cpu":
        return Verdict(False, False, f"int8 is for the processor, not for {device}")
    trials = _trials("int8")
    if isinstance(trials, str):
        return Verdict(False, False, trials)
    gain = min(types["int8"].flops["onednn"] / max(types["fp32"].flops[route] for route in ("linear", "onednn") if route in types["fp32"].flops) for types in trials if types["fp32"].sound)
    return Verdict(True, gain > 1, f"int8 is sound here, but its products are only {gain:.1f} times as fast as those of fp32")


def _trials(kind: str) -> list[dict[str, Trial]] | str:
    """Of all settings that may be in force, the trials of every type, or why `kind` is not sound under one of them: the worst counts."""
    answer = ensure()
    if answer is None:
        return "this machine is not measured, as no cache folder can be written"
    settings = in_force()
    for setting in settings:
        if setting not in answer.trials:
            return f"{CAP_NAMES[0]}={setting} is set, under which {kind} was not tried"
        trial = answer.trials[setting][kind]
        if not trial.sound:
            late = "; torch was imported before luthier, so a cap may come too late: import luthier first" if setting == UNCAPPED and CAPPED in settings else ""
            return f"{kind} is not sound here ({setting}: {trial.reason}){late}"
    return [answer.trials[setting] for setting in settings]


def _elsewhere(device: str) -> Verdict:
    if not device.startswith("cuda"):
        return Verdict(False, False, f"bf16 is not tried on {device}")
    import torch

    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Verdict(True, True, "this GPU computes bf16")
    return Verdict(False, False, "this GPU does not compute bf16")
