"""T5: an encoder and a decoder with cross attention; positions are a learnt bias that the first block of each stack holds."""

from luthier.anatomy.family import Family, Stack

SELF = {
    "attention.query": "layer.0.SelfAttention.q",
    "attention.key": "layer.0.SelfAttention.k",
    "attention.value": "layer.0.SelfAttention.v",
    "attention.output": "layer.0.SelfAttention.o",
    "attention.bias": "layer.0.SelfAttention.relative_attention_bias",
    "attention.norm": "layer.0.layer_norm",
    "attention.out": "layer.0.dropout",
}
CROSS = {
    "cross_attention.query": "layer.1.EncDecAttention.q",
    "cross_attention.key": "layer.1.EncDecAttention.k",
    "cross_attention.value": "layer.1.EncDecAttention.v",
    "cross_attention.output": "layer.1.EncDecAttention.o",
    "cross_attention.norm": "layer.1.layer_norm",
    "cross_attention.out": "layer.1.dropout",
}


def _feed_forward(layer: str) -> dict[str, str]:
    # wi where the feed-forward is plain, wi_0 (gate) and wi_1 (up) where it is gated
    return {
        "mlp.up": f"{layer}.DenseReluDense.wi|{layer}.DenseReluDense.wi_1",
        "mlp.gate": f"{layer}.DenseReluDense.wi_0",
        "mlp.down": f"{layer}.DenseReluDense.wo",
        "mlp.norm": f"{layer}.layer_norm",
        "mlp.out": f"{layer}.dropout",
    }


FAMILY = Family(
    model_types=("t5", "mt5"),
    architecture="encoder-decoder",
    embeddings=("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
    pooler=(),
    pooling="last",
    stacks=(
        Stack("encoder.block", SELF | _feed_forward("layer.1"), name="encoder"),
        Stack("decoder.block", SELF | CROSS | _feed_forward("layer.2"), name="decoder"),
    ),
)
