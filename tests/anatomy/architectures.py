"""The tiny models that the tests of this folder share, and the inputs that their heads accept."""

from __future__ import annotations

import torch
import transformers

from luthier.contract.tiny import CONFIGS, tiny_config, tiny_inputs

HEADS = (
    "AutoModel",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForPreTraining",
    "AutoModelForImageClassification",
    "AutoModelForMaskedImageModeling",
)


def pairs() -> list[tuple[str, str]]:
    """Every architecture with every head that transformers has for it."""
    return [
        (architecture, head)
        for architecture in CONFIGS
        for head in HEADS
        if type(tiny_config(architecture)) in getattr(transformers, head)._model_mapping and not (head == "AutoModelForCausalLM" and architecture in ("bert", "roberta"))
    ]


def forward_inputs(architecture: str, head: str) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(architecture)
    if architecture == "t5" and ("Classification" in head or "Question" in head):  # these make the decoder's side themselves
        inputs.pop("decoder_input_ids")
        inputs["input_ids"][torch.arange(3), inputs["attention_mask"].sum(1) - 1] = 1
    return inputs
