"""Bottleneck adapters: a small network inserted after, or in parallel to, attention and feed-forward sublayers.

Houlsby et al. 2019 (arXiv 1902.00751, section 2.1), Pfeiffer et al. 2021 (arXiv 2005.00247, one adapter at the feed-forward sublayer),
He et al. 2022 (arXiv 2110.04366, scaled parallel adapter). With d the width and r = round(d / reduction):

    f(h) = scale * up(act(down(h)))  (+ h with residual)        down: d -> r, up: r -> d

sequential replaces a sublayer's output h by f(h) before the residual stream is added; parallel adds f of the sublayer's input to it.
Sequential needs the residual (it collapses without), parallel must not have it: these are the defaults. `up` starts at zero, so a fresh adapter changes nothing.
"""

from typing import Literal

import torch
from torch import nn

from luthier.methods import Card, Insert, UserError, method

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@method
class Adapter(Insert):
    """Train a bottleneck at each chosen sublayer; the model itself stays frozen."""

    reduction: float = 16.0
    sites: str = "mlp.out"
    mode: Literal["sequential", "parallel"] = "sequential"
    residual: bool | None = None
    scale: float = 1.0
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"

    aliases = {"reduction_factor": "reduction", "non_linearity": "activation", "scaling": "scale"}
    card = Card(
        name="adapter",
        use="train small bottlenecks between frozen sublayers",
        source="Houlsby et al. 2019, arXiv 1902.00751; He et al. 2022, arXiv 2110.04366",
        writes={"structure"},
        promises={"starts_at_base", "keeps_base", "resumes_exactly"},
        lr=1e-3,
        examples=("adapter(reduction=8)", "adapter(mode=parallel, sites=attention.out+mlp.out, reduction=4, scale=2)"),
    )

    @property
    def parallel(self):
        return self.mode == "parallel"

    def check(self, anatomy):
        if self.reduction <= 0:
            raise UserError(f"{self.card.name}: reduction={self.reduction:g} must be above 0: the width is divided by it.")
        for site in anatomy.sites(self.sites):
            if site.entry is None:
                raise UserError(f"{self.card.name}: {site.label} is a weight, not a point where a module can go. Use attention.out, mlp.out or both: sites=attention.out+mlp.out.")
            if round(site.outputs / self.reduction) < 1:
                raise UserError(f"{self.card.name}: reduction={self.reduction:g} leaves no neuron of a width of {site.outputs}. Give at most {site.outputs}.")

    def build(self, site):
        residual = not self.parallel if self.residual is None else self.residual
        return Bottleneck(site.outputs, round(site.outputs / self.reduction), ACTIVATIONS[self.activation](), residual, self.scale)


class Bottleneck(nn.Module):
    """(..., d) -> (..., d)"""

    def __init__(self, width: int, inner: int, activation: nn.Module, residual: bool, scale: float):
        super().__init__()
        self.down, self.activation, self.up = nn.Linear(width, inner), activation, nn.Linear(inner, width)
        self.residual, self.scale = residual, scale
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        change = self.scale * self.up(self.activation(self.down(hidden)))
        return hidden + change if self.residual else change


def _preset(name: str, use: str, source: str) -> Card:
    return Card(name=name, use=use, source=source, writes=Adapter.card.writes, promises=Adapter.card.promises, lr=Adapter.card.lr, examples=(f"{name}(reduction=4)",))


@method
class Houlsby(Adapter):
    """`adapter` as in Houlsby et al.: two in each block, one at attention and one at the feed-forward sublayer."""

    sites: str = "attention.out+mlp.out"
    card = _preset("houlsby", "adapter at attention and feed-forward", "Houlsby et al. 2019, arXiv 1902.00751, section 2.1")


@method
class Pfeiffer(Adapter):
    """`adapter` as in Pfeiffer et al.: one in each block, at the feed-forward sublayer."""

    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    card = _preset("pfeiffer", "adapter at the feed-forward sublayer only", "Pfeiffer et al. 2021, arXiv 2005.00247, section 3")


@method
class HeParallel(Adapter):
    """`adapter` as in He et al.: in parallel to the feed-forward sublayer, scaled by 4."""

    mode: Literal["sequential", "parallel"] = "parallel"
    scale: float = 4.0
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    reduction: float = 2.0
    card = _preset("he_parallel", "scaled adapter in parallel to the feed-forward sublayer", "He et al. 2022, arXiv 2110.04366, section 4")
