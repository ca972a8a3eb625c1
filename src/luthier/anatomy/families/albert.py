"""ALBERT: all blocks are one module, gone through `num_hidden_layers` times."""

from luthier.anatomy.family import Family, Stack

FAMILY = Family(
    model_types=("albert",),
    architecture="encoder",
    embeddings=("embeddings", "encoder.embedding_hidden_mapping_in"),
    stacks=(
        Stack(
            "encoder.albert_layer_groups.0.albert_layers",
            {
                "attention.query": "attention.query",
                "attention.key": "attention.key",
                "attention.value": "attention.value",
                "attention.output": "attention.dense",
                "mlp.up": "ffn",
                "mlp.down": "ffn_output",
                "attention.norm": "attention.LayerNorm",
                "mlp.norm": "full_layer_layer_norm",
                "attention.out": "attention.output_dropout",
                "mlp.out": "ffn_output",
            },
            repeat="num_hidden_layers",
        ),
    ),
)
