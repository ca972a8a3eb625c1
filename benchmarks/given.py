"""What both sides are given alike: learning rates, the clock that stops them, made-up pictures, rows and models, passes over texts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

RATES = {"lora": 3e-3, "full": 1e-4, "head": 3e-3, "freeze(bottom=5)": 1e-4}  # luthier's defaults at the size of the encoder
CLASSES = 10  # of made-up pictures
PICTURES = 512
LONGEST = 512  # tokens of a made-up row


class Enough(Exception):
    """The steps that are measured are done; what would follow them is not."""


class Clock:
    """Called at the end of each step; raises Enough at the end of the last of `steps` (None: never)."""

    def __init__(self, steps: int | None):
        self.steps, self.ends = steps, list[float]()

    def __call__(self, *_: Any, **__: Any) -> None:
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.synchronize()  # what a GPU was told to do may not be done
        self.ends.append(time.perf_counter())
        if len(self.ends) == self.steps:
            raise Enough


def pictures(side: int) -> list[dict[str, Any]]:
    """Noise with labels at random."""
    import torch

    rng = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, side, side, generator=rng), "labels": number % CLASSES} for number in range(PICTURES)]


def random_model(net: str, device: str) -> Any:
    """Of random weights, made where it is to be: BERT base or a Llama of 1.2 billion parameters; tiny ones to see whether it all runs."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        if "bert" in net:
            return BertForSequenceClassification(BertConfig(num_labels=CLASSES) if net == "bert-base" else BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=CLASSES))
        sizes = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192} if net == "llama-1b" else {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000, max_position_embeddings=LONGEST, use_cache=False, **sizes))


def random_rows(net: str, count: int) -> list[dict[str, Any]]:
    """Of 20 to 100 % of the longest, 60 on average; with a class, or to be foretold."""
    import random

    rng = random.Random(0)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(1000, 30000) for _ in range(rng.randint(LONGEST // 5, LONGEST))]
        rows.append({"input_ids": ids, "labels": rng.randrange(CLASSES) if "bert" in net else ids})
    return rows


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch, on the right of which is padding."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def together(values: list[Any], fill: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(one) for one in values], batch_first=True, padding_value=fill) if isinstance(values[0], list) else torch.tensor(values)

    ids = [row["input_ids"] for row in rows]
    return {"input_ids": together(ids, 0), "attention_mask": together([[1] * len(one) for one in ids], 0), "labels": together([row["labels"] for row in rows], -100)}


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
