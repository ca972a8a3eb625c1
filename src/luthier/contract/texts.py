"""A tiny tokenizer and tiny rows for every task, so that whole runs fit into a test."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from luthier.contract.tiny import VOCABULARY

WORDS = ("red", "blue", "green", "small", "large", "old", "new", "boat", "house", "tree", "bird", "river", "runs", "sings", "falls", "in", "the", "a", "over", "not")
SPECIAL = ("[PAD]", "[EOS]", "[CLS]", "[SEP]", "[UNK]")


def tiny_tokenizer(architecture: str = "bert") -> Any:
    """A fast word-level tokenizer of `WORDS`; encoders frame a row in [CLS] and [SEP], T5 and decoders end it as they do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    assert len(vocabulary) <= VOCABULARY
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    decoder = architecture in ("gpt2", "llama")
    if architecture == "t5":
        core.post_processor = processors.TemplateProcessing(single="$A [EOS]", pair="$A [EOS] $B [EOS]", special_tokens=[("[EOS]", 1)])
    elif not decoder:
        core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="[EOS]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", model_max_length=48)


def tiny_folder(path: Path, architecture: str = "bert", auto_class: str = "AutoModel", seed: int = 0, **settings: Any) -> Path:
    """A model folder as a user has it: config, weights, tokenizer."""
    from luthier.contract.tiny import tiny_model
    from luthier.pretrained import quiet

    special = {"pad_token_id": 0, "eos_token_id": 1} if architecture != "roberta" else {}
    model = tiny_model(architecture, auto_class, seed, **{**special, **settings})
    with quiet():
        model.save_pretrained(str(path))
    tiny_tokenizer(architecture).save_pretrained(str(path))
    return path


def tiny_rows(task: str, count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of unequal length that can be learnt: what is asked follows from the words."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(2, 9))
        text = " ".join(words)
        if task == "text-classification":
            rows.append({"text": text, "label": "color" if any(w in words for w in ("red", "blue", "green")) else "plain"})
        elif task == "regression":
            rows.append({"text": text, "score": len(words) + 0.5})
        elif task == "token-classification":
            rows.append({"tokens": words, "tags": ["B-COL" if w in ("red", "blue", "green") else "B-SIZE" if w in ("small", "large") else "O" for w in words]})
        elif task == "text-generation":
            rows.append({"text": text})
        elif task == "sentence-similarity":
            rows.append({"query": text, "document": " ".join(reversed(words))})
        else:
            raise ValueError(task)
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


