"""ViT: a picture as patches behind a class token."""

from luthier.anatomy.family import Family, Stack

FAMILY = Family(
    model_types=("vit",),
    architecture="vision",
    stacks=(
        Stack(
            "layers",
            {
                "attention.query": "attention.q_proj",
                "attention.key": "attention.k_proj",
                "attention.value": "attention.v_proj",
                "attention.output": "attention.o_proj",
                "mlp.up": "mlp.fc1",
                "mlp.down": "mlp.fc2",
                "attention.norm": "layernorm_before",
                "mlp.norm": "layernorm_after",
                "attention.out": "attention.o_proj",
                "mlp.out": "mlp.fc2",
            },
        ),
    ),
)
