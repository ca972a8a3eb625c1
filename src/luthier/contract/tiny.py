"""Tiny random models, one per architecture, that the contract suite and the tests run every method on.

Widths, head counts and depths differ between architectures on purpose: what only works at one size is found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AlbertConfig,
    BertConfig,
    Dinov2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

VOCABULARY = 96

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64),
    "roberta": lambda: RobertaConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1),
    "albert": lambda: AlbertConfig(vocab_size=VOCABULARY, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=56, max_position_embeddings=64),
    "distilbert": lambda: DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=72, max_position_embeddings=64),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "llama": lambda: LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=56, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "t5": lambda: T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4, decoder_start_token_id=0),  # type: ignore[call-arg]
    "vit": lambda: ViTConfig(image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
    "dinov2": lambda: Dinov2Config(image_size=28, patch_size=14, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2),
}


def tiny_config(architecture: str) -> PretrainedConfig:
    return CONFIGS[architecture]()


def tiny_model(architecture: str, auto_class: str = "AutoModel", seed: int = 0, **settings):
    """A randomly initialised model in eval mode; `settings` go into its config (`num_labels=3`, ...)."""
    import transformers

    config = tiny_config(architecture)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, auto_class).from_config(config).eval()


def tiny_inputs(architecture: str, batch: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs with unequal row lengths (right padded) for the model's forward; pictures for vision."""
    rng = torch.Generator().manual_seed(seed)
    config = tiny_config(architecture)
    if architecture in ("vit", "dinov2"):
        return {"pixel_values": torch.randn(batch, 3, config.image_size, config.image_size, generator=rng)}
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=rng)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - row :] = 0
    ids[mask == 0] = config.pad_token_id or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if architecture == "t5":
        inputs["decoder_input_ids"] = torch.randint(5, VOCABULARY, (batch, 5), generator=rng)
    return inputs
