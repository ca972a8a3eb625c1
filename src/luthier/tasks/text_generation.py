"""Causal language modelling: continue a text, or answer a prompt."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.compute.heads import logits_of
from luthier.compute.losses import cross_entropy
from luthier.data.batch import Batch, pad
from luthier.data.columns import Column
from luthier.data.rows import Row, Rows
from luthier.errors import UserError
from luthier.tasks import metrics, pictures
from luthier.tasks.base import BaselineContext, Features, Metric, Task, Term, pad_token, padded

IGNORED = -100


@dataclass(frozen=True)
class TextGeneration(Task):
    """prompted: rows are prompt and completion, and only the completion is learnt; otherwise whole texts are."""

    prompted: bool = False
    max_new_tokens: int = 64

    tag = "text-generation"
    use = "text that continues a prompt (greedy)"
    columns = (
        Column("prompt", "text", required=False, names=("prompt", "instruction", "question"), use="what stands before; read, not learnt"),
        Column("text", "text", names=("text", "content", "completion", "output", "response", "answer"), use="the text to learn; with a prompt, what should follow it"),
    )
    metric = "bits_per_byte"
    measures = ("bits_per_byte", "perplexity", "token_accuracy")
    auto_class = "AutoModelForCausalLM"
    options = {"max_new_tokens": 64}
    loss_per = "token"

    @classmethod
    def claims(cls, columns, given, config):
        texts = [name for name, kinds in columns.items() if "text" in kinds and "category" not in kinds]
        others = [name for name, kinds in columns.items() if "category" in kinds or "words" in kinds or ("number" in kinds and name.lower() in ("label", "score"))]
        decoder = any("CausalLM" in name or "LMHead" in name for name in (getattr(config, "architectures", None) or ()))
        prompted = {"prompt", "completion"} <= {name.lower() for name in columns}
        if decoder and (prompted or (len(texts) == 1 and not others)):
            return "the rows are text and the model is a decoder"
        return None

    @classmethod
    def learn(cls, train, validation, test, **options):
        longest = cls.take_options(options)["max_new_tokens"]
        if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
            raise UserError(f"--set max_new_tokens={longest!r}: give a whole number of tokens, 1 or more.")
        return cls("prompt" in train.columns, longest)

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("prompt",) if self.prompted else ("text",)

    def facts(self):
        return {"prompted": self.prompted, "max_new_tokens": self.max_new_tokens}

    def configure(self, config: Any) -> None:
        """Encoders with a language-modelling head (BERT) look ahead until they are told to be decoders, and a model that sees what it should foresee learns nothing."""
        if getattr(config, "is_decoder", True) is False:
            config.is_decoder = True

    def encode(self, row: Row, tokenizer: Any, max_length: int) -> Features:
        prompt = _prompt(row.get("prompt"), tokenizer) if self.prompted else []
        text = row.get("text")
        if text is None:  # to be answered
            kept = prompt[-max_length:]
            return Features({"input_ids": kept, "attention_mask": [1] * len(kept)}, ([IGNORED] * len(kept), 0), 0, len(prompt) - len(kept))
        body, ends = _pieces(text, tokenizer, special=not prompt)
        ids = [*prompt, *body]
        targets = [*[IGNORED] * len(prompt), *body]
        kept = min(len(ids), max_length)
        supervised = sum(t != IGNORED for t in targets[1:kept])
        # the first token of a row is read and never foreseen, and what was cut off is neither: their bytes do not count
        read = ends[0] if ends and not prompt else 0
        foreseen = len(text[read : ends[kept - len(prompt) - 1]].encode()) if supervised else 0
        return Features({"input_ids": ids[:kept], "attention_mask": [1] * kept}, (targets[:kept], foreseen), supervised, len(ids) - kept)

    def collate(self, features: Sequence[Features], rows: Sequence[int], tokenizer: Any) -> Batch:
        labels = pad([f.target[0] for f in features], IGNORED)
        size = torch.tensor([f.target[1] for f in features])
        return Batch(padded(features, tokenizer), {"labels": labels, "bytes": size}, tuple(rows))

    def _foreseen(self, model: nn.Module, batch: Batch) -> tuple[Tensor, bool, Tensor, Tensor]:
        """Of the K tokens that should be foreseen: logits (K or more, V), whether nobody else has them, the tokens (K,) and the rows (K,) that they are of."""
        labels = batch.targets["labels"][:, 1:]
        rows, places = (labels != IGNORED).nonzero(as_tuple=True)
        logits, alone = logits_of(model, {**batch.inputs, "use_cache": False}, rows * (labels.shape[1] + 1) + places)
        return logits, alone, labels[rows, places], rows

    def loss(self, model: nn.Module, batch: Batch) -> Term:
        logits, alone, labels, _ = self._foreseen(model, batch)
        return Term(cross_entropy(logits, labels, overwrite=alone).sum(), float(len(labels)), per="token")

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """(4,) of each row: negative log-likelihood, tokens, tokens whose best guess is right, bytes of the text."""
        logits, _, labels, rows = self._foreseen(model, batch)
        losses, logits = cross_entropy(logits, labels), logits[: len(labels)]
        values = torch.stack([losses, torch.ones_like(losses), (logits.argmax(-1) == labels).float()], 1).double()
        sums = values.new_zeros(len(batch.targets["bytes"]), 3).index_add(0, rows, values)
        return list(torch.cat([sums, batch.targets["bytes"].to(sums)[:, None]], 1).cpu().numpy())

    def predictions(self, outputs: Sequence[Any], rows: Rows, top: int = 1) -> list[dict[str, Any]]:
        raise UserError("text-generation predicts by generating; use run.predict or luthier predict.")

    @torch.no_grad()
    def answers(self, model: nn.Module, features: Sequence[Features], rows: Rows, tokenizer: Any, top: int = 1, batch_size: int = 64) -> list[dict[str, Any]]:
        """The greedy continuation of each prompt (of each text, where texts were learnt), to the end that training taught; of prompts that are too long the end is read."""
        made = []
        device = next(model.parameters()).device
        positions = getattr(model.config, "max_position_embeddings", None)
        room = max(1, positions - self.max_new_tokens) if isinstance(positions, int) and positions > 0 else sys.maxsize
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad_token(tokenizer)
        prompts = [(_prompt(row.get(self.reads[0]), tokenizer) or [begin])[-min(room, max(1, read.length)) :] for row, read in zip(rows, features, strict=True)]
        known = getattr(model, "generation_config", None) or model.config
        ends = {end for found in (tokenizer.eos_token_id, getattr(known, "eos_token_id", None)) for end in (found if isinstance(found, (list, tuple)) else [found]) if end is not None}
        for start in range(0, len(prompts), batch_size):
            ids = prompts[start : start + batch_size]
            # prompts of unequal length end together, so that what follows begins at one place
            inputs = pad(ids, pad_token(tokenizer), "left").to(device)
            mask = pad([[1] * len(i) for i in ids], 0, "left").to(device)
            found = model.generate(  # type: ignore[operator]
                input_ids=inputs, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens, pad_token_id=pad_token(tokenizer), eos_token_id=sorted(ends) or None
            )
            made += [{"predicted": text} for text in tokenizer.batch_decode(found[:, inputs.shape[1] :], skip_special_tokens=True)]
        return made

    def measure(self, outputs: Sequence[Any], rows: Rows) -> dict[str, Metric]:
        counts = np.stack(outputs)
        return metrics.measured({
            "bits_per_byte": metrics.Count(counts, lambda s: s[:, 0] / math.log(2) / np.maximum(s[:, 3], 1)),
            "perplexity": metrics.Count(counts, lambda s: np.exp(s[:, 0] / np.maximum(s[:, 1], 1))),
            "token_accuracy": metrics.Count(counts, lambda s: s[:, 2] / np.maximum(s[:, 1], 1)),
        })

    def per_row(self, outputs: Sequence[Any], rows: Rows) -> list[float]:
        """Minus bits per byte of each row, so that larger is better."""
        counts = np.stack(outputs)
        return (-counts[:, 0] / math.log(2) / np.maximum(counts[:, 3], 1)).tolist()

    def baselines(self, context: BaselineContext) -> dict[str, dict[str, Metric]]:
        return {"unchanged model": self.measure(context.unchanged(), context.test)}

    def picture(self, outputs: Sequence[Any], rows: Rows, path: Path, before: Sequence[Any] | None = None) -> None:
        unchanged = {} if before is None else {"unchanged model": -np.array(self.per_row(before, rows))}
        pictures.histogram({"this run": -np.array(self.per_row(outputs, rows)), **unchanged}, "bits per byte", f"{len(rows)} test texts: fewer bits, better foreseen", path)

    def describe(self, row: Row, features: Features, tokenizer: Any) -> str:
        labels = features.target[0]
        read = tokenizer.decode([i for i, t in zip(features.inputs["input_ids"], labels, strict=True) if t == IGNORED])
        learnt = tokenizer.decode([t for t in labels if t != IGNORED])
        return f"{read[:100]}  ->  {learnt[:100]}"

    def next_commands(self, run: str) -> list[str]:
        return [f'echo "your prompt" | luthier predict {run}', f"luthier evaluate {run} --json"]


def _prompt(text: str | None, tokenizer: Any) -> list[int]:
    """The tokens before an answer: as the tokenizer frames a text, but not ended."""
    ids = list(tokenizer(text, verbose=False)["input_ids"]) if text else []
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _pieces(text: str, tokenizer: Any, special: bool) -> tuple[list[int], list[int]]:
    """The tokens of a text, ended so that where to stop is learnt too, and how many characters of it each has reached."""
    if not tokenizer.is_fast:
        raise UserError("text-generation needs a fast tokenizer (tokenizer.json), which knows the characters of each token.")
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids, reached, ends = list(found["input_ids"]), 0, []
    for _, end in found["offset_mapping"]:
        reached = max(reached, end)  # tokens that stand for no characters say 0
        ends.append(reached)
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids, ends = [*ids, tokenizer.eos_token_id], [*ends, len(text)]
    return ids, ends
