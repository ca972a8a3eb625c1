"""LoRA: learn a low-rank change of each chosen weight.

Hu et al. 2021, arXiv 2106.09685, section 4.1. Shapes: W (out, in), A (r, in), B (out, r).
Deviation: A starts uniform within 1/sqrt(in), as in the authors' code; the paper says Gaussian.
"""

import torch

from luthier.methods import Card, UserError, WeightChange, method


@method
class LoRA(WeightChange):
    """Train A and B in W + (alpha / r) * B @ A; W itself stays frozen."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    sites: str = "attention.query+attention.value"

    aliases = {"rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "sites"}
    card = Card(
        name="lora",
        use="train a low-rank change of some weights: small, fast, merges away",
        source="Hu et al. 2021, arXiv 2106.09685, section 4.1",
        writes={"weights"},
        promises={"starts_at_base", "merges_exactly", "keeps_base", "keeps_shapes", "reloads_in_stock_transformers", "resumes_exactly"},
        lr=3e-3,
        examples=("lora", "lora(r=3, alpha=5, dropout=0.1, sites=attention.*+mlp.*)"),
    )

    def check(self, anatomy):
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora: dropout={self.dropout} is a share of the inputs to drop: 0 or more, below 1.")
        for site in anatomy.sites(self.sites):
            if not 0 < self.r <= (most := min(site.inputs, site.outputs)):
                raise UserError(f"lora: r={self.r} is outside 1..{most} for {site.label}, a weight of {site.outputs} x {site.inputs}. Try r={min(8, most)}.")

    def create(self, weight, rng):
        outputs, inputs = weight.shape
        a = torch.empty(self.r, inputs).uniform_(-1, 1, generator=rng) * inputs**-0.5
        return {"a": a, "b": torch.zeros(outputs, self.r)}

    def effective(self, weight, params):
        return weight + self.alpha / self.r * params["b"] @ params["a"]

    def forward(self, x, base, params, training):
        # B @ A is never formed
        low = torch.nn.functional.dropout(x, self.dropout, training) @ params["a"].T
        return base(x) + self.alpha / self.r * (low @ params["b"].T)

    @property
    def input_dropout(self):
        return self.dropout

    def factors(self, params):
        return params["a"], params["b"], self.alpha / self.r
