"""What stands between the products of a block: norms, activations, dropout, and whatever else is local to a token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.compute.dropout import multipliers
from luthier.compute.tape import Piece, Tape, Tensors, Wants

_aten = torch.ops.aten
Forward = Callable[[Tensor, Tensor], object]  # (x, where to write)
Backward = Callable[[Tensor, Tensor, Tensor], object]  # (gradient, x, where to write)
# the function, its kernel forward and backward
KERNELS: tuple[tuple[Callable[[Tensor], Tensor], Forward, Backward], ...] = (
    (functional.gelu, lambda x, out: _aten.gelu.out(x, out=out), lambda d, x, out: _aten.gelu_backward.grad_input(d, x, grad_input=out)),
    (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda x, out: _aten.gelu.out(x, approximate="tanh", out=out),
        lambda d, x, out: _aten.gelu_backward.grad_input(d, x, approximate="tanh", grad_input=out),
    ),
    (functional.relu, lambda x, out: torch.clamp_min(x, 0, out=out), lambda d, x, out: _aten.threshold_backward.grad_input(d, x, 0, grad_input=out)),
    (functional.silu, lambda x, out: _aten.silu.out(x, out=out), lambda d, x, out: _aten.silu_backward.grad_input(d, x, grad_input=out)),
)


class Local(Piece):
    """Any module without memory or chance, by autograd: it runs once more in the backward pass, so that its input is all that is kept."""

    def __init__(self, module: nn.Module):
        self.module = module

    def tensors(self) -> Tensors:
        return tuple(self.module.parameters())

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        tape.keep(x)
        y: Tensor = self.module(x)
        return y

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        (x,) = kept
        assert x is not None
        with torch.enable_grad():
            read = x.detach().requires_grad_(wants[0])
            y = self.module(read)
        found = iter(torch.autograd.grad(y, [t for t, wanted in zip((read, *tensors), wants, strict=True) if wanted], d.to(y.dtype)))  # type: ignore[arg-type]
        d_x, *gradients = [next(found) if wanted else None for wanted in wants]
        return d_x, tuple(gradients)


class LayerNorm(Piece):
    def __init__(self, module: nn.LayerNorm):
        self.module = module

    def tensors(self) -> Tensors:
        return self.module.weight, self.module.bias

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        y, mean, inverse = torch.native_layer_norm(x, self.module.normalized_shape, *tensors, self.module.eps)  # type: ignore[arg-type]
        tape.keep(x, mean, inverse)
        return y

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        x, mean, inverse = kept
        assert x is not None
        d_x, *gradients = _aten.native_layer_norm_backward(d.to(x.dtype), x, self.module.normalized_shape, mean, inverse, *tensors, list(wants))
        return d_x, tuple(gradients)


class Activation(Piece):
    """By one of torch's kernels."""

    def __init__(self, forward: Forward, backward: Backward):
        self.kernels = forward, backward

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        tape.keep(x)
        y = torch.empty_like(x)
        self.kernels[0](x, y)
        return y

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        (x,) = kept
        assert x is not None
        d_x = torch.empty_like(x)
        self.kernels[1](d.to(x.dtype), x, d_x)
        return d_x, ()


class Dropout(Piece):
    """In the memory of what it reads, which a linear layer has just written for it alone."""

    def __init__(self, module: nn.Dropout):
        self.module = module

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        if not (self.module.training and self.module.p):
            tape.keep(None)
            return x
        factors = multipliers(x, self.module.p)
        tape.keep(factors)
        return x.mul_(factors)

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        (factors,) = kept
        if factors is None:
            return d, ()
        return d * factors if d.dtype == factors.dtype else d.to(factors.dtype).mul_(factors), ()


def local(module: nn.Module) -> Piece:
    """The piece that computes what `module` does."""
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return LayerNorm(module)
    if type(module) is nn.Dropout:
        return Dropout(module)
    if not any(True for _ in module.parameters()):
        for function, forward, backward in KERNELS:
            if _equal(module, function):
                return Activation(forward, backward)
    return Local(module)


def _equal(module: nn.Module, function: Callable[[Tensor], Tensor]) -> bool:
    """An activation is known by its values: it has many names."""
    x = torch.linspace(-12, 12, 480, dtype=torch.float64).view(2, 240)
    with torch.no_grad():
        found: Tensor = module(x)
    return found.shape == x.shape and torch.allclose(found, function(x), rtol=1e-9, atol=1e-12)
