"""What is measured: each benchmark is a few settings, and run.py takes them all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import inputs
from inputs import Inputs

Found = dict[str, Any]
BEST = "Trainer's fastest"  # stands for the arm of Trainer that `speed` found fastest on this machine, for this method or else for LoRA
PLAIN = "luthier fp32 through F.linear"
OPENVINO = "OPENVINO_PYTHON"  # names the Python of an environment with sentence-transformers[openvino], nncf and datasets, which need an older transformers
BESIDE = ("nothing", "a busy process")


@dataclass(frozen=True)
class Benchmark:
    """Arms that take turns, round for round, over cases.

    arms     name -> what arms.py is given
    cases    what it is given besides, and the line says: the method at least
    inputs   makes the rows and the model
    values   from an answer, the answers of this round and case, and the benchmark: what the line says was measured
    steps    that are measured after `warm_up` of them; None: all of the passes, which `given` tells
    given    to every arm
    count    what the number of a round is called; it is the seed, too
    primed   each arm runs once before what is kept, so that caches of files and rows are full
    """

    arms: Mapping[str, Found]
    cases: Sequence[Found]
    inputs: Inputs
    values: Callable[[Found, Mapping[str, Found], Benchmark], Found]
    steps: int | None = None
    warm_up: int = 0
    given: Mapping[str, Any] | None = None
    rounds: int = 3
    count: str = "turn"
    primed: bool = False


def _rates(found: Found, round_so_far: Mapping[str, Found], benchmark: Benchmark) -> Found:
    assert benchmark.steps and benchmark.given
    seconds = found["ends"][-1] - found["ends"][benchmark.warm_up - 1]
    tokens = {"tokens_per_s": sum(found["tokens"][benchmark.warm_up :]) / seconds} if "tokens" in found else {}
    return {"examples_per_s": benchmark.given["batch"] * benchmark.steps / seconds, **tokens}


def _outcome(found: Found, round_so_far: Mapping[str, Found], benchmark: Benchmark) -> Found:
    return {"seconds": found["seconds"], "accuracy": found["accuracy"]}


def _start(found: Found, round_so_far: Mapping[str, Found], benchmark: Benchmark) -> Found:
    return {"seconds": found["ends"][0] - found["started"]}


def _vectors(found: Found, round_so_far: Mapping[str, Found], benchmark: Benchmark) -> Found:
    exact = round_so_far.get("sentence-transformers fp32")
    apart = max(1 - sum(a * b for a, b in zip(x, y, strict=True)) for x, y in zip(found["vectors"], exact["vectors"], strict=True)) if exact else None
    return {"texts_per_s": found["texts"] / median(found["seconds"]), "cosine_from_fp32": apart}


def _shares(found: Found, round_so_far: Mapping[str, Found], benchmark: Benchmark) -> Found:
    return {"shares": found["shares"], "ms": found["ms"]}


def _step(found: Found, round_so_far: Mapping[str, Found], benchmark: Benchmark) -> Found:
    ends = found["ends"][benchmark.warm_up - 1 :]
    return {"seconds": median(after - before for before, after in pairwise(ends)), "before_mb": found["before_mb"], "trainable": found["trainable"]}


def _trainers(arm: str, *batches: str) -> dict[str, Found]:
    """Trainer in both number types, and with batches made in these ways."""
    return {f"trainer {precision}{'' if kind == 'random' else f', {kind}'}": {"arm": arm, "precision": precision, "batches": kind} for precision in ("fp32", "bf16") for kind in batches}


LUTHIER = {"luthier": {"arm": "adapt"}}
PEERS = _trainers("trainer", "random", "grouped")
AGAINST_BEST = {**LUTHIER, BEST: {}}
SHORT = {"batch": 32, "epochs": 1}

AXES: dict[str, tuple[Any, ...]] = {"length": (16, 32, 64, 128, 256, 512), "batch": (4, 8, 16, 32, 64, 128), "width": (128, 256, 384, 512, 768, 1024), "method": ("lora(r=1)", "lora(r=4)", "lora(r=16)", "lora(r=64)", "full")}
GROWN_FROM = {"method": "lora", "length": 128, "batch": 8, "width": 384}

SUITE = {
    "speed": Benchmark({**LUTHIER, **PEERS}, [{"method": "lora"}, {"method": "full"}], inputs.sentences, _rates, steps=100, warm_up=20, given=SHORT),
    "accuracy": Benchmark(AGAINST_BEST, [{"method": "lora"}, {"method": "full"}], inputs.sentences, _outcome, given=SHORT, count="seed"),
    # several passes, as what luthier computes once is worth more the more there are
    "frozen": Benchmark(AGAINST_BEST, [{"method": "head"}, {"method": "freeze(bottom=5)"}], inputs.sentences, _outcome, given={"batch": 32, "epochs": 3}),
    "long": Benchmark({**LUTHIER, **_trainers("trainer", "grouped")}, [{"method": "lora"}], inputs.reviews, _rates, steps=20, warm_up=5, given={"batch": 8, "epochs": 1}),
    "decoder": Benchmark({**LUTHIER, **_trainers("trainer", "grouped", "flattened")}, [{"method": "full"}], inputs.instructions, _rates, steps=20, warm_up=5, given={"batch": 16, "epochs": 1}),
    "two_stacks": Benchmark({**LUTHIER, **_trainers("trainer", "random", "grouped")}, [{"method": "full"}], inputs.sentences_for_two_stacks, _rates, steps=20, warm_up=5, given=SHORT),
    "vision": Benchmark({"luthier": {"arm": "apply_to_pictures"}, **_trainers("trainer_on_pictures", "random")}, [{"method": "lora"}], inputs.pictures, _rates, steps=20, warm_up=5, given={"batch": 32}),
    "profile": Benchmark({"luthier": {"arm": "profile"}}, [{"method": "lora"}, {"method": "full"}], inputs.sentences, _shares, steps=80, given=SHORT, rounds=1),
    "profile_decoder": Benchmark({"luthier": {"arm": "profile"}}, [{"method": "full"}], inputs.instructions, _shares, steps=24, given={"batch": 16, "epochs": 1}, rounds=1),
    "encode": Benchmark(
        {f"{name} {precision}": {"arm": arm, "precision": precision} for precision in ("fp32", "bf16") for name, arm in (("sentence-transformers", "sentence_transformers"), ("luthier", "encode"))}
        | {"sentence-transformers int8": {"arm": "openvino", "python": OPENVINO}, "luthier int8": {"arm": "encode", "precision": "int8"}, PLAIN: {"arm": "encode", "precision": "fp32", "onednn": False}},
        [{"method": "encode"}],
        inputs.pairs,
        _vectors,
    ),
    "start": Benchmark(AGAINST_BEST, [{"method": "lora"}], inputs.sentences, _start, steps=1, given=SHORT, rounds=5, primed=True),
    "busy": Benchmark(AGAINST_BEST, [{"method": "lora", "beside": beside} for beside in BESIDE], inputs.sentences, _rates, steps=40, warm_up=10, given=SHORT),
    "gpu": Benchmark(
        {"luthier": {"arm": "apply_to_random_net"}, **{name: arm for name, arm in _trainers("trainer_on_random_net", "random", "grouped", "flattened").items() if "bf16" in name}},
        [{"net": net, "method": method} for net in ("bert-base", "llama-1b") for method in ("lora", "full")],
        inputs.gpu,
        _rates,
        steps=20,
        warm_up=10,
        given={"batch": 32, "device": "cuda"},
        rounds=1,
    ),
    "growth": Benchmark({"luthier": {"arm": "apply_to_random_bert"}}, [{"axis": axis, **GROWN_FROM, axis: value} for axis, values in AXES.items() for value in values], inputs.nothing, _step, steps=10, warm_up=3),
}
