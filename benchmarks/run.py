"""luthier against what a user would take instead, on this machine: python benchmarks/run.py WHAT

    speed     LoRA and full training on short rows: 100 steps of each arm after 20 to warm up (a quarter of an hour for each method on two quiet cores)
    accuracy  one pass of luthier and of Trainer's fastest setting, three seeds
    frozen    three passes of methods that leave most of the model frozen
    long      LoRA on rows of 512 tokens
    decoder   training all of a small random Llama
    two_stacks  training all of a small random T5
    vision    LoRA on pictures, through luthier.apply
    profile   where the time of such a step goes; profile_decoder: of a step of the Llama
    encode    2,000 sentences into vectors, against sentence-transformers; its OpenVINO backend where OPENVINO_PYTHON names the Python of an environment that has it
    start     from the start of the process to the end of the first step
    busy      LoRA alone, and beside a process that keeps the same cores busy
    gpu       LoRA and full training of a random BERT base and a random Llama of 1.2 billion parameters, on the first GPU
    growth    luthier's step against length, batch, width and what learns
    report    write docs/benchmarks.md and its pictures from what is there

Arms take turns, three rounds or more. Every measurement is one line of benchmarks/results.jsonl, with the machine it was taken on; what this machine has measured already is not measured again.
`accuracy`, `frozen`, `start` and `busy` need `speed` first. LUTHIER_SHARED names the folder of the data (default ../shared).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from suite import BESIDE, BEST, PEERS, SUITE, Benchmark, Found

HERE = Path(__file__).parent
# until its standard input ends, which it does with the process that started it, however that ended
MULTIPLYING = "import select, sys, torch; torch.set_num_threads(2); a = torch.randn(1024, 1024); print(flush=True)\nwhile not select.select([sys.stdin], [], [], 0)[0]: a @ a"


class Results:
    """The lines of a file, those of this machine apart."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[Found] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    @property
    def here(self) -> list[Found]:
        return [line for line in self.lines if line["machine"]["machine"] == machine()["machine"]]

    def has(self, label: Found) -> bool:
        return any(all(line.get(name) == value for name, value in label.items()) for line in self.here)

    def keep(self, line: Found) -> None:
        self.lines.append({**line, "machine": machine()})
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.lines[-1]) + "\n")
        print(line, flush=True)

    def fastest_peer(self, method: str) -> str:
        """Of Trainer's settings, as `speed` found it."""
        rates: dict[str, list[float]] = {}
        for line in self.here:
            if line["what"] == "speed" and line["method"] == ("full" if method == "full" else "lora") and line["arm"] in PEERS:
                rates.setdefault(line["arm"], []).append(line["examples_per_s"])
        if not rates:
            sys.exit("which of Trainer's settings is the fastest is not known here: python benchmarks/run.py speed")
        return max(rates, key=lambda arm: fmean(rates[arm]))


def machine(found: Found = {}) -> Found:  # noqa: B006  # measured once
    """What the numbers hold for: this kind of processor, and how fast its products are."""
    if not found:
        facts = json.loads(subprocess.run([sys.executable, "-m", "luthier", "doctor", "--json"], capture_output=True, text=True, check=True).stdout)
        found |= {name: facts[name] for name in ("machine", "trials", "versions")}
    return found


def take(what: str, benchmark: Benchmark, methods: list[str] | None, results: Results) -> None:
    """Measure what is missing."""
    missing = [label for label in _labels(what, benchmark, results) if not results.has(label) and (not methods or label["method"] in methods)]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        given, said = benchmark.inputs(Path(folder))
        if benchmark.primed:
            for label in {label["arm"]: label for label in missing}.values():
                measure(label, benchmark, given)
        answers: dict[str, dict[str, Found]] = {}
        for label in missing:
            if found := measure(label, benchmark, given):
                so_far = answers.setdefault(str({name: value for name, value in label.items() if name != "arm"}), {})
                so_far[label["arm"]] = found
                results.keep({**label, **benchmark.values(found, so_far, benchmark), "peak_mb": found["peak_mb"], "precision": found["precision"], **said})


def _labels(what: str, benchmark: Benchmark, results: Results) -> list[Found]:
    return [
        {"what": what, **case, "arm": results.fastest_peer(case["method"]) if arm == BEST else arm, benchmark.count: number}
        for number in range(benchmark.rounds) for case in benchmark.cases for arm in benchmark.arms
    ]  # fmt: skip


def measure(label: Found, benchmark: Benchmark, given: Mapping[str, Any]) -> Found | None:
    """The answer of an arm in a process of its own, or None, with the reason on standard error."""
    from luthier.machine.setting import pristine_environment

    steps = benchmark.steps and benchmark.warm_up + benchmark.steps
    arm = {**PEERS, **benchmark.arms}[label["arm"]]
    python = os.environ.get(arm["python"]) if "python" in arm else sys.executable
    if python is None:
        print(f"{label['arm']}: left out, as {arm['python']} is not set", file=sys.stderr)
        return None
    arguments = {**label, "seed": label[benchmark.count], "steps": steps, **given, **(benchmark.given or {}), **arm}
    with _company(label.get("beside", BESIDE[0])):
        started = time.perf_counter()  # the clock of all processes
        done = subprocess.run([python, "-W", "ignore", str(HERE / "arms.py"), json.dumps(arguments)], capture_output=True, text=True, check=False, env=pristine_environment())
    if done.returncode:
        print(f"{label['arm']}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return {**json.loads(done.stdout), "started": started}


@contextlib.contextmanager
def _company(beside: str) -> Iterator[None]:
    if beside == BESIDE[0]:
        yield
        return
    from luthier.machine.setting import pristine_environment

    environment = {name: value for name, value in pristine_environment().items() if not name.startswith("OMP_")}
    process = subprocess.Popen([sys.executable, "-c", MULTIPLYING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout
        process.stdout.readline()  # it says that it has begun
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*SUITE, "report"))
    parser.add_argument("--method", nargs="*", help="these alone, such as lora")
    parser.add_argument("--trial", type=Path, metavar="FILE", help="one round of a few steps, kept in FILE (and reported beside it), to see whether it all runs")
    given = parser.parse_args()
    results = Results(given.trial or HERE / "results.jsonl")
    if given.what == "report":
        from report import PAGE, write

        write(results.lines, given.trial.with_suffix(".md") if given.trial else PAGE)
        return
    benchmark = SUITE[given.what]
    if given.trial:
        benchmark = replace(benchmark, rounds=1, steps=benchmark.steps and min(3, benchmark.steps), warm_up=min(1, benchmark.warm_up), primed=False)
    take(given.what, benchmark, given.method, results)


if __name__ == "__main__":
    main()
