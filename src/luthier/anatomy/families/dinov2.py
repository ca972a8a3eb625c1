"""DINOv2: a ViT whose sublayers end in a learnt scale for each channel."""

from luthier.anatomy.family import Family, Stack

FAMILY = Family(
    model_types=("dinov2",),
    architecture="vision",
    pooler=(),
    stacks=(
        Stack(
            "encoder.layer",
            {
                "attention.query": "attention.q_proj",
                "attention.key": "attention.k_proj",
                "attention.value": "attention.v_proj",
                "attention.output": "attention.o_proj",
                "mlp.up": "mlp.fc1|mlp.up_proj",
                "mlp.gate": "mlp.gate_proj",
                "mlp.down": "mlp.fc2|mlp.down_proj",
                "attention.norm": "norm1",
                "mlp.norm": "norm2",
                "attention.scale": "layer_scale1",
                "mlp.scale": "layer_scale2",
                "attention.out": "layer_scale1",
                "mlp.out": "layer_scale2",
            },
        ),
    ),
)
