"""`torchrun -m luthier adapt` is one process to rounding, and leaves one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from luthier.contract.texts import tiny_folder, tiny_rows, write_jsonl


def test_two_processes_leave_the_run_of_one(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", tiny_rows("text-classification", 120))
    command = ["-m", "luthier", "adapt", "--model", str(model), "--data", str(data), "--method", "full", "--lr", "1e-3", "--batch-size", "10", "--max-steps", "6", "--no-dropout", "--precision", "fp32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(21000 + os.getpid() % 20000)])):
        done = subprocess.run([sys.executable, *start, *command, "--out", str(tmp_path / name)], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr.count("run folder") == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
    first, second = (json.loads((tmp_path / name / "run.json").read_text())["metrics"]["accuracy"] for name in ("one", "two"))
    assert first == second and not list(tmp_path.glob("*.partial"))
