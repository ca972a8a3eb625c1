"""GPT-2: query, key and value are one fused Conv1D, whose weight is stored (in, out)."""

from luthier.anatomy.family import Family, Stack

FAMILY = Family(
    model_types=("gpt2",),
    architecture="decoder",
    embeddings=("wte", "wpe"),
    pooler=(),
    pooling="last",
    stacks=(
        Stack(
            "h",
            {
                "attention.qkv": "attn.c_attn",
                "attention.query": "attn.c_attn[0/3]",
                "attention.key": "attn.c_attn[1/3]",
                "attention.value": "attn.c_attn[2/3]",
                "attention.output": "attn.c_proj",
                "mlp.up": "mlp.c_fc",
                "mlp.down": "mlp.c_proj",
                "attention.norm": "ln_1",
                "mlp.norm": "ln_2",
                "attention.out": "attn.resid_dropout",
                "mlp.out": "mlp.dropout",
            },
        ),
    ),
)
