"""What both sides are given alike: learning rates, the clock that stops them, made-up pictures, passes over texts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

RATES = {"lora": 3e-3, "full": 1e-4, "head": 3e-3, "freeze(bottom=5)": 1e-4}  # luthier's defaults at the size of the encoder
CLASSES = 10  # of made-up pictures
PICTURES = 512


class Enough(Exception):
    """The steps that are measured are done; what would follow them is not."""


class Clock:
    """Called at the end of each step; raises Enough at the end of the last of `steps` (None: never)."""

    def __init__(self, steps: int | None):
        self.steps, self.ends = steps, list[float]()

    def __call__(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) == self.steps:
            raise Enough


def pictures(side: int) -> list[dict[str, Any]]:
    """Noise with labels at random."""
    import torch

    rng = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, side, side, generator=rng), "labels": number % CLASSES} for number in range(PICTURES)]


def passes(encode: Callable[[list[str]], Any], data: str) -> dict[str, Any]:
    """Seconds of three passes over all texts after one to warm up, and the vectors of the first few."""
    with open(data, encoding="utf-8") as stream:
        texts = json.load(stream)
    found, seconds = encode(texts), []
    for _ in range(3):
        started = time.perf_counter()
        found = encode(texts)
        seconds.append(time.perf_counter() - started)
    return {"texts": len(texts), "seconds": seconds, "vectors": [[float(x) for x in row] for row in found[:20]]}


def memory_mb(name: str) -> float:
    """VmRSS (now) or VmHWM (at most) of this process. Its ru_maxrss would count the process that started it too."""
    with open("/proc/self/status", encoding="utf-8") as stream:
        return next(int(line.split()[1]) / 1024 for line in stream if line.startswith(name))
