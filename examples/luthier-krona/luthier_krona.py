"""KronA: learn a Kronecker product as the change of each chosen weight.

Edalati, Tahaei, Kobyzev, Partovi Nia, Clark & Rezagholizadeh 2022, arXiv 2212.10650, section "KronA":

    W_tuned = W + s * kron(A, B)        W (out, in), A (rows, columns), B (out / rows, in / columns)

One factor starts at zero, so training starts at the model as it is. With out * in numbers in the product, its rank is
rank(A) * rank(B): it can be full, where the change of LoRA has at most rank r. The product is never formed while training: by
kron(A, B) @ vec(X) = vec(A @ X @ B.T), with X the input in `columns` rows, row after row.

Deviation: weights are (out, in) here as torch stores them, (in, out) in the paper; the factors are transposed alike.
"""

import math

import torch

from luthier.methods import Card, UserError, WeightChange, method


@method
class KronA(WeightChange):
    """Train A and B in W + scale * kron(A, B); W itself stays frozen. Where no shape is given, A is as near to square roots as divisors allow."""

    rows: int | None = None
    columns: int | None = None
    scale: float = 4.0
    sites: str = "attention.query+attention.value"

    aliases = {"s": "scale"}
    card = Card(
        name="krona",
        use="train a Kronecker product as the change of a weight: fewer numbers than lora, full rank",
        source="Edalati et al. 2022, arXiv 2212.10650",
        writes={"weights"},
        promises={"starts_at_base", "merges_exactly", "keeps_base", "keeps_shapes", "reloads_in_stock_transformers", "resumes_exactly"},
        lr=3e-3,
        examples=("krona", "krona(rows=4, columns=8, scale=3, sites=mlp.*)", "krona(sites=mlp.up+mlp.down)|lora(r=2)"),
    )

    def shape(self, outputs, inputs):
        return _divisor(outputs) if self.rows is None else self.rows, _divisor(inputs) if self.columns is None else self.columns

    def check(self, anatomy):
        for site in anatomy.sites(self.sites):
            rows, columns = self.shape(site.outputs, site.inputs)
            if rows < 1 or columns < 1 or site.outputs % rows or site.inputs % columns:
                raise UserError(
                    f"krona: a factor of {rows} x {columns} does not divide {site.label}, a weight of {site.outputs} x {site.inputs}. Leave rows and columns out, or give divisors."
                )

    def create(self, weight, rng):
        outputs, inputs = weight.shape
        rows, columns = self.shape(outputs, inputs)
        a = torch.empty(rows, columns).uniform_(-1, 1, generator=rng) * columns**-0.5
        return {"a": a, "b": torch.zeros(outputs // rows, inputs // columns)}

    def effective(self, weight, params):
        return weight + self.scale * torch.kron(params["a"], params["b"])

    def forward(self, x, base, params, training):
        a, b = params["a"], params["b"]
        return base(x) + self.scale * (a @ x.unflatten(-1, (a.shape[1], -1)) @ b.T).flatten(-2)


def _divisor(n):
    """The largest divisor up to the square root."""
    return next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
