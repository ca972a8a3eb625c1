"""Llama and the decoders that keep its modules: gated feed-forward, grouped-query attention, rotary positions."""

from luthier.anatomy.family import Family, Stack

FAMILY = Family(
    model_types=("llama", "mistral", "qwen2"),
    architecture="decoder",
    embeddings=("embed_tokens",),
    pooler=(),
    pooling="last",
    stacks=(
        Stack(
            "layers",
            {
                "attention.query": "self_attn.q_proj",
                "attention.key": "self_attn.k_proj",
                "attention.value": "self_attn.v_proj",
                "attention.output": "self_attn.o_proj",
                "mlp.gate": "mlp.gate_proj",
                "mlp.up": "mlp.up_proj",
                "mlp.down": "mlp.down_proj",
                "attention.norm": "input_layernorm",
                "mlp.norm": "post_attention_layernorm",
                "attention.out": "self_attn.o_proj",
                "mlp.out": "mlp.down_proj",
            },
        ),
    ),
)
