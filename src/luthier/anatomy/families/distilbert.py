"""DistilBERT: BERT's blocks under other names, without token types and pooler."""

from luthier.anatomy.family import Family, Stack

FAMILY = Family(
    model_types=("distilbert",),
    architecture="encoder",
    pooler=(),
    stacks=(
        Stack(
            "transformer.layer",
            {
                "attention.query": "attention.q_lin",
                "attention.key": "attention.k_lin",
                "attention.value": "attention.v_lin",
                "attention.output": "attention.out_lin",
                "mlp.up": "ffn.lin1",
                "mlp.down": "ffn.lin2",
                "attention.norm": "sa_layer_norm",
                "mlp.norm": "output_layer_norm",
                "attention.out": "attention.out_lin",
                "mlp.out": "ffn.dropout",
            },
        ),
    ),
)
