"""BERT and its relatives of the same modules."""

from luthier.anatomy.family import Family, Stack

FAMILY = Family(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    architecture="encoder",
    embeddings=("embeddings", "embeddings_project"),
    stacks=(
        Stack(
            "encoder.layer",
            {
                "attention.query": "attention.self.query",
                "attention.key": "attention.self.key",
                "attention.value": "attention.self.value",
                "attention.output": "attention.output.dense",
                "mlp.up": "intermediate.dense",
                "mlp.down": "output.dense",
                "attention.norm": "attention.output.LayerNorm",
                "mlp.norm": "output.LayerNorm",
                "attention.out": "attention.output.dropout",
                "mlp.out": "output.dropout",
            },
        ),
    ),
)
