"""Linear layers in the type of the products: frozen weights are cast once for a run, layers that read the same input are one product, and a low-rank change is never multiplied out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier import machine
from luthier.compute import int8
from luthier.compute.dropout import drawn, dropped
from luthier.compute.kernels import kernel
from luthier.compute.tape import Given, Piece, Tape, Tensors, Wants
from luthier.methods.changes import Change, Changed, site_weight

ROWS = 512  # for which a weight is laid out: the rows that it meets first would make a run depend on how it was cut
_mkldnn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") else None


@dataclass(frozen=True)
class _Place:
    """Of a low-rank change: its first row among all outputs, its scale and rank, the share of its inputs that it drops, and whether it does now."""

    start: int
    scale: float
    rank: int
    p: float
    drops: bool


class Linear(Piece):
    """x (N, in) -> (N, out) = x @ weight^T + bias + (x @ down^T) @ up^T: the outputs of `modules`, which read the same input, side by side.

    down (R, in) and up (out, R) are those of all low-rank changes together; a change may drop some of what its part of `down` reads.

    dtype     of the products; None: that of the model. int8: weights and tokens are rounded for them, and no gradient passes
    learning  whether what is open for training changes from one call to the next
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype | None, learning: bool):
        self.modules = list(modules)
        self.rounds, self.dtype = dtype == torch.int8, type_around(dtype, modules[0])
        self.sizes = [len(site_weight(module, None)) for module in self.modules]
        own = [p for module in self.modules for p in (module.weight, module.bias) if p is not None]
        whole = [p for _, change in self._changes() if not change.is_low_rank for p in change.parameters()]
        self.changing = learning and any(p.requires_grad for p in (*own, *whole))  # type: ignore[union-attr]
        self.kept: tuple[Tensor | None, Tensor | None] | None = None
        self.rounded: int8.Product | None = None
        # float32 by another library has other last bits, which a run that goes on elsewhere would notice
        onednn = _mkldnn is not None and (self.dtype == torch.bfloat16 or (self.dtype == torch.float32 and not learning and machine.onednn_is_faster()))
        self.laid_out: dict[str, Tensor] | None = {} if onednn and not self.changing else None

    def tensors(self, given: Given) -> Tensors:
        """Where they change from call to call, the weights (out, in) and then the biases (out) of all modules, in their own type; of each low-rank change its factors a (r, in) and b (some rows, r)."""
        if self.kept is None and not self.changing:
            with torch.inference_mode(False), torch.no_grad():
                self.kept = self._joined(*self._own())
                if self.rounds:
                    self.rounded, self.kept = int8.Product(*self.kept, kernel), (None, None)
        self.places: list[_Place] = []  # of each low-rank change
        factors: list[Tensor] = []
        for start, change in self._changes():
            if (found := change.method.factors(change)) is not None:
                a, b, scale = found
                self.places.append(_Place(start, scale, len(a), p := change.method.input_dropout, change.training and p > 0))
                factors += a, b
        weights, biases = self._own() if self.changing else ((), ())
        return *weights, *biases, *factors

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        weights, biases, factors = self._split(tensors)
        weight, bias = self.kept or self._joined(weights, biases)
        read = x.to(self.dtype)
        down, up = self._low_rank(factors)
        y = self._product(read, weight, bias)
        low, chances = None, [drawn(read, place.p) if place.drops else None for place in self.places]
        if down is not None and up is not None:
            lows = [(read if chance is None else dropped(read, chance, place.p)) @ own.T for _, own, place, chance in self._of_changes(None, down, chances)]
            low = lows[0] if len(lows) == 1 else torch.cat(lows, 1)
            y.addmm_(low, up.T)
        of_factors = any(self._split(wants[1:])[2])
        tape.keep(read if any(wants[1:]) else None, low if of_factors else None, weight, down, up, *chances)
        return y

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        read, low, weight, down, up, *chances = kept
        assert weight is not None
        of_x, (of_weights, of_biases, of_factors) = wants[0], self._split(wants[1:])
        weights, biases, factors = self._split(tensors)
        d = d.to(self.dtype)
        d_low = d @ up if up is not None and (of_x or any(of_factors)) else None
        d_x = None
        if of_x:
            d_x = d @ weight if self.laid_out is None else self._by_layout("backward", d, weight.T, None)
            if d_low is not None and down is not None:
                for d_own, own, place, chance in self._of_changes(d_low, down, chances):
                    if chance is None:
                        d_x.addmm_(d_own, own)
                    else:
                        d_x.add_(dropped(d_own @ own, chance, place.p))
        d_weights = self._each(d.T @ read, weights, of_weights) if any(of_weights) and read is not None else [None] * len(weights)
        d_biases = self._each(d.sum(0), biases, of_biases) if any(of_biases) else [None] * len(biases)
        d_factors: Sequence[Tensor | None] = [None] * len(factors)
        if any(of_factors) and d_low is not None and low is not None and read is not None:
            assert down is not None
            d_down = [d_own.T @ (read if chance is None else dropped(read, chance, place.p)) for d_own, _, place, chance in self._of_changes(d_low, down, chances)]
            d_factors = self._apart(d_down[0] if len(d_down) == 1 else torch.cat(d_down), d.T @ low, factors)
        return d_x, (*d_weights, *d_biases, *d_factors)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.rounded is not None:
            return self.rounded(x)
        assert weight is not None
        return nn.functional.linear(x, weight, bias) if self.laid_out is None else self._by_layout("forward", x, weight, bias)

    def _by_layout(self, direction: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight^T + bias with the weight as oneDNN's kernels want it, which they otherwise bring about in every product: a tenth to a quarter of its time."""
        assert self.laid_out is not None and _mkldnn is not None
        if direction not in self.laid_out:
            self.laid_out[direction] = _mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        return _mkldnn._linear_pointwise.default(x, self.laid_out[direction], bias, "none", [], "")  # type: ignore[no-any-return]

    def _changes(self) -> list[tuple[int, Change]]:
        """(first row among all outputs, change)"""
        return [(part.start + (change.rows.start if change.rows else 0), change) for part, module in zip(self._parts(), self.modules, strict=True) if isinstance(module, Changed) for change in module.changes()]

    def _own(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weight and bias of each module, with the changes that are no products of their own."""
        weights = []
        for module in self.modules:
            weight = site_weight(module, None)
            for change in module.changes() if isinstance(module, Changed) else ():
                if not change.is_low_rank:
                    rows = change.rows or slice(0, len(weight))
                    changed = change.method.effective(weight[rows], change.cast(weight))
                    weight = torch.cat([weight[: rows.start], changed, weight[rows.stop :]]) if change.rows else changed
            weights.append(weight)
        return weights, [module.bias for module in self.modules]  # type: ignore[misc]

    def _joined(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Side by side, in the type of the products; what is so already is not copied."""
        if len(weights) == 1 and weights[0].dtype == self.dtype:
            return weights[0], None if biases[0] is None else biases[0].to(self.dtype)
        joined = weights[0].new_empty(sum(self.sizes), weights[0].shape[1], dtype=self.dtype)
        bias = None if all(own is None for own in biases) else joined.new_zeros(len(joined))
        for weight, own, part in zip(weights, biases, self._parts(), strict=True):
            joined[part] = weight
            if own is not None and bias is not None:
                bias[part] = own
        return joined, bias

    def _split(self, of_each: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """What belongs to the weights, the biases and the factors."""
        count = len(self.modules) if self.changing else 0
        return of_each[:count], of_each[count : 2 * count], of_each[2 * count :]

    def _parts(self) -> list[slice]:
        """The rows of each module."""
        ends = list(itertools.accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def _each(self, d: Tensor, own: Sequence[Tensor | None], wants: Sequence[bool]) -> list[Tensor | None]:
        """The part of each module, in the type that it takes its gradients in, where it is wanted. Where not all are, in memory of its own: a part would keep the whole."""
        copy = not all(wants)
        return [d[part].to(_gradient_type(x), copy=copy) if x is not None and wanted else None for part, x, wanted in zip(self._parts(), own, wants, strict=True)]

    def _low_rank(self, factors: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        """`down` and `up` from the factors of each change"""
        if not factors:
            return None, None
        downs = [a for a in factors[::2] if a is not None]
        down = torch.cat(downs).to(self.dtype)
        up, at = torch.zeros(sum(self.sizes), len(down), dtype=self.dtype), 0
        for a, b, place in zip(downs, factors[1::2], self.places, strict=True):
            assert b is not None
            up[place.start : place.start + len(b), at : at + len(a)] = b.to(torch.promote_types(self.dtype, torch.float32)) * place.scale
            at += len(a)
        return down, up

    def _of_changes(self, d_low: Tensor | None, down: Tensor, chances: Sequence[Tensor | None]) -> Iterator[tuple[Any, Tensor, _Place, Tensor | None]]:
        """The part of each low-rank change, or all of them as one where none drops any of its inputs."""
        ranks = [place.rank for place in self.places]
        if all(chance is None for chance in chances):
            yield d_low, down, self.places[0], None
            return
        of_each = [None] * len(ranks) if d_low is None else d_low.split(ranks, 1)
        yield from zip(of_each, down.split(ranks), self.places, chances, strict=True)

    def _apart(self, d_down: Tensor, d_up: Tensor, factors: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients of the factors of each change, from those of `down` and `up`"""
        found, at = [], 0
        for a, b, place in zip(factors[::2], factors[1::2], self.places, strict=True):
            assert a is not None and b is not None
            found += [d_down[at : at + len(a)].to(a.dtype), d_up[place.start : place.start + len(b), at : at + len(a)].to(b.dtype) * place.scale]
            at += len(a)
        return found


def type_around(dtype: torch.dtype | None, module: nn.Module) -> torch.dtype:
    """The type of what goes into products of `dtype` and comes out of them; of whole numbers, that of the module's weights."""
    return next(module.parameters()).dtype if dtype in (None, torch.int8) else dtype  # type: ignore[return-value]


def _gradient_type(x: Tensor) -> torch.dtype:
    """See `compute.prepared`: narrow."""
    return (getattr(x, "grad_dtype", None) if x.is_leaf else None) or x.dtype
