"""A run that is killed in the middle and resumed ends at the same bits as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

STEPS = 40


def check(stack: str, architecture: str, seed: int = 0) -> None:
    """On bert as a classifier, on a decoder as a language model. Raises AssertionError where a tensor differs. The kill -9 falls on a random step."""
    import torch

    from luthier.contract.checks import DECODERS
    from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        decoder = architecture in DECODERS
        model = tiny_folder(folder / "model", architecture, "AutoModelForCausalLM" if decoder else "AutoModel")
        rows = write_jsonl(folder / "rows.jsonl", tiny_rows("text-generation" if decoder else "text-classification"))
        common = ["--model", str(model), "--data", str(rows), "--method", stack, "--max-steps", str(STEPS), "--batch-size", "8", "--micro-batch-size", "3"]
        common += ["--evaluate-every", "0.5", "--no-baselines", "--precision", "fp32"]
        whole, broken = folder / "whole", folder / "broken"
        finished = subprocess.run([*_luthier(), "adapt", *common, "--out", str(whole)], capture_output=True, text=True, check=False, env=_one_thread())
        assert finished.returncode == 0, f"the uninterrupted run failed: {_last(finished.stderr)}"
        _kill([*_luthier(), "adapt", *common, "--out", str(broken)], broken, random.Random(f"{stack}{seed}").randint(4, STEPS - 4))
        finished = subprocess.run([*_luthier(), "adapt", *common, "--out", str(broken), "--resume"], capture_output=True, text=True, check=False, env=_one_thread())
        assert finished.returncode == 0, f"resuming failed: {_last(finished.stderr)}"
        assert "resumed after step" in finished.stderr, "the resumed run began anew"
        files = [path.name for path in whole.glob("*.safetensors")]
        assert files, "the run left no tensors"
        for file in files:
            first, second = load_file(whole / file), load_file(broken / file)
            assert first.keys() == second.keys()
            different = [key for key in first if not torch.equal(first[key], second[key])]
            assert not different, f"after kill and resume {len(different)} tensors differ, such as {different[0]}"
        logs = [(folder / which / "metrics.jsonl").read_text(encoding="utf-8") for which in ("whole", "broken")]
        assert logs[0] == logs[1], "metrics.jsonl differs: steps are missing, doubled or other"


def _kill(command: list[str], out: Path, step: int) -> None:
    """Start, and kill -9 once `step` lines are logged."""
    log = out.with_name(out.name + ".partial") / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_one_thread())
    while process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= step:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.001)
    raise AssertionError("the run ended before it could be killed")


def _last(said: str) -> str:
    """The line that says what was wrong."""
    return (said.strip() or "it said nothing").splitlines()[-1]


def _luthier() -> list[str]:
    return [sys.executable, "-m", "luthier"]


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
