"""Parameters to the unit, multiply-accumulates against torch's counter, memory against what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from architectures import forward_inputs, pairs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from luthier import Anatomy, Workload
from luthier.contract.tiny import CONFIGS, tiny_config, tiny_model

LLAMA_3_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    "config,auto_class,count",
    [
        (transformers.BertConfig(), "AutoModel", 109_482_240),
        (transformers.GPT2Config(), "AutoModel", 124_439_808),
        (transformers.GPT2Config(), "AutoModelForCausalLM", 124_439_808),
        (transformers.LlamaConfig(**LLAMA_3_8B, tie_word_embeddings=False), "AutoModelForCausalLM", 8_030_261_248),
        (transformers.ViTConfig(num_labels=1000), "AutoModelForImageClassification", 86_567_656),
    ],
    ids=["bert-base", "gpt2", "gpt2-lm", "llama-3-8b", "vit-b-16"],
)
def test_parameters_to_the_unit(config: Any, auto_class: str, count: int) -> None:
    assert Anatomy.of(config, auto_class=auto_class).parameters == count


def counted(model: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(**inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("architecture,head", pairs())
def test_macs_agree_with_a_counter(architecture: str, head: str) -> None:
    model = tiny_model(architecture, head)
    model.set_attn_implementation("eager")  # so that the counter sees attention's products
    inputs = forward_inputs(architecture, head)
    targets = inputs["decoder_input_ids"].shape[1] if "decoder_input_ids" in inputs else 0
    assert Anatomy.of(model).macs(Workload(3, 7, targets)) == pytest.approx(counted(model, inputs), rel=0.01)


FULL_SIZE = [
    transformers.BertConfig(),
    transformers.RobertaConfig(),
    transformers.AlbertConfig(),
    transformers.DistilBertConfig(),
    transformers.GPT2Config(),
    transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=8),
    transformers.T5Config(decoder_start_token_id=0),
    transformers.T5Config(feed_forward_proj="gated-gelu", decoder_start_token_id=0),
    transformers.ViTConfig(),
    transformers.ViTConfig(image_size=(96, 160)),
    transformers.Dinov2Config(),
    transformers.Dinov2Config(use_swiglu_ffn=True),
]


@pytest.mark.parametrize("config", FULL_SIZE, ids=lambda config: config.model_type)
def test_macs_of_full_size_models_without_their_weights(config: Any) -> None:
    config._attn_implementation = "eager"
    anatomy = Anatomy.of(config)
    ids = torch.zeros(2, 64, dtype=torch.long, device="meta")
    if anatomy.architecture == "vision":
        height, width = config.image_size if isinstance(config.image_size, tuple) else (config.image_size, config.image_size)
        inputs = {"pixel_values": torch.zeros(2, 3, height, width, device="meta")}
    else:
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :24]} if anatomy.architecture == "encoder-decoder" else {})
    assert anatomy.macs(Workload(2, 64, 24)) == pytest.approx(counted(anatomy.model, inputs), rel=0.01)


def test_macs_grow_with_the_batch_and_with_the_square_of_the_length() -> None:
    anatomy = Anatomy.of(tiny_config("bert"))
    one, two, four = (anatomy.macs(Workload(1, length)) for length in (64, 128, 256))
    assert anatomy.macs(Workload(5, 64)) == 5 * one
    pooler = 32 * 32  # of one token, whatever the length
    scores = 3 * 2 * 32 * 64 * 64
    assert two - pooler == 2 * (one - pooler) + 2 * scores and four > 2 * two


SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "dim", "d_model"), 128),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff"), 512),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads"), 4),
    "head_dim": 32, "d_kv": 32, "mlp_ratio": 4, "vocab_size": 500, "image_size": 112, "num_key_value_heads": 2,
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "architecture,head",
    [(a, "AutoModel") for a in CONFIGS] + [("bert", "AutoModelForMaskedLM"), ("bert", "AutoModelForSequenceClassification"), ("gpt2", "AutoModelForCausalLM"), ("t5", "AutoModelForSeq2SeqLM")],
)
@pytest.mark.parametrize("dropout", [True, False])
def test_memory_follows_what_autograd_keeps(architecture: str, head: str, attention: str, dropout: bool) -> None:
    """Within 30 % of the storages that autograd holds for the backward pass, and two more copies of the logits that live beside them."""
    config = tiny_config(architecture)
    for name in config.to_dict():
        if name in SIZES:
            setattr(config, name, SIZES[name])
        if not dropout and ("dropout" in name or name.endswith("pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    model = getattr(transformers, head).from_config(config, attn_implementation=attention).train()
    inputs = inputs_of(architecture, head)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**inputs)
    logits = output.logits.numel() * 4 if "logits" in output else 0
    targets = inputs["decoder_input_ids"].shape[1] if "decoder_input_ids" in inputs else 0
    anatomy = Anatomy.of(model)
    estimate = anatomy.memory(Workload(4, 48, targets), trainable=0) - 4 * anatomy.parameters
    assert estimate == pytest.approx(sum(kept.values()) + 2 * logits, rel=0.3)


def inputs_of(architecture: str, head: str) -> dict[str, torch.Tensor]:
    if architecture in ("vit", "dinov2"):
        return {"pixel_values": torch.randn(4, 3, 112, 112)}
    ids = torch.randint(5, 90, (4, 48))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if architecture == "t5":
        inputs["decoder_input_ids"] = ids[:, :20]
    if head != "AutoModel":
        labels = torch.zeros(4, dtype=torch.long) if "Sequence" in head else torch.zeros_like(inputs.get("decoder_input_ids", ids))
        inputs["labels"] = labels
    return inputs


def test_training_costs_its_gradients_and_moments() -> None:
    anatomy = Anatomy.of(tiny_config("bert"))
    nothing = anatomy.memory(Workload(2, 8), trainable=0)
    assert anatomy.memory(Workload(2, 8), trainable=1000) - nothing == 12_000
    assert anatomy.memory(Workload(4, 8), trainable=0) - nothing == nothing - 4 * anatomy.parameters


def test_gradient_checkpointing_costs_one_block_and_the_inputs_of_all() -> None:
    anatomy = Anatomy.of(tiny_config("bert"))
    whole, again, one = (anatomy.memory(Workload(2, 8), 0, reached, recompute) - 4 * anatomy.parameters for reached, recompute in ((None, False), (None, True), (1, False)))
    assert again == one + 4 * 2 * 8 * 3 * anatomy.width < whole == 3 * one
