"""What stands between the products of a block: norms, activations, dropout, and whatever else is local to a token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.compute.dropout import drawn, dropped
from luthier.compute.kernels import kernel, memory
from luthier.compute.tape import Given, Piece, Tape, Tensors, Wants
from luthier.methods.inserts import in_own_type

_aten = torch.ops.aten
Forward = Callable[[Tensor, Tensor], object]  # (x, where to write)
Backward = Callable[[Tensor, Tensor, Tensor], object]  # (gradient, x, where to write)
# the function, its kernel here, and those of torch forward and backward
ACTIVATIONS: tuple[tuple[Callable[[Tensor], Tensor], str, Forward, Backward], ...] = (
    (functional.gelu, "gelu", lambda x, out: _aten.gelu.out(x, out=out), lambda d, x, out: _aten.gelu_backward.grad_input(d, x, grad_input=out)),
    (
        lambda x: functional.gelu(x, approximate="tanh"),
        "gelu_tanh",
        lambda x, out: _aten.gelu.out(x, approximate="tanh", out=out),
        lambda d, x, out: _aten.gelu_backward.grad_input(d, x, approximate="tanh", grad_input=out),
    ),
    (functional.relu, "relu", lambda x, out: torch.clamp_min(x, 0, out=out), lambda d, x, out: _aten.threshold_backward.grad_input(d, x, 0, grad_input=out)),
    (functional.silu, "silu", lambda x, out: _aten.silu.out(x, out=out), lambda d, x, out: _aten.silu_backward.grad_input(d, x, grad_input=out)),
)


class Local(Piece):
    """Any module without memory or chance, by autograd: it runs once more in the backward pass, so that its input is all that is kept."""

    def __init__(self, module: nn.Module):
        self.module = module

    def tensors(self, given: Given) -> Tensors:
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


class Insert(nn.Module):
    """What a method put behind a module, in the type of the products as under autocast."""

    def __init__(self, body: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.body, self.in_bf16 = body, dtype == torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bf16):
            y = in_own_type(self.body, x)
        return y.clone() if y is x else y  # dropout may follow, in the memory of what it reads


class Inserted(Local):
    """An insert, which may draw: in the backward pass it draws the same again."""

    def __init__(self, module: Insert):
        super().__init__(module)

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        tape.keep(torch.get_rng_state() if tape.flows else None)
        return super().forward(x, tensors, wants, tape)

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        state, x = kept
        assert state is not None
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            return super().backward(d, (x,), tensors, wants, tape)


class LayerNorm(Piece):
    def __init__(self, module: nn.LayerNorm):
        self.module, self.eps = module, module.eps

    def tensors(self, given: Given) -> Tensors:
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


class RMSNorm(Local):
    """Of any name, as long as it is x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, module: nn.Module, eps: float):
        super().__init__(module)
        self.eps = eps


class Scale(Piece):
    """A learnt factor for each channel."""

    def __init__(self, module: nn.Module):
        (self.factor,) = module.parameters(recurse=False)

    def tensors(self, given: Given) -> Tensors:
        return (self.factor,)

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        (factor,) = tensors
        assert factor is not None
        tape.keep(x if wants[1] else None)
        return x * factor.to(x.dtype)

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        ((x,), (factor,)) = kept, tensors
        assert factor is not None
        return (d * factor.to(d.dtype) if wants[0] else None), ((d * x).sum(0, dtype=factor.dtype) if x is not None else None,)


class Activation(Piece):
    """By the kernel of that name where there is one, else by torch's."""

    def __init__(self, name: str, forward: Forward, backward: Backward):
        self.name, self.of_torch = name, (forward, backward)

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        y = torch.empty_like(x)
        if run := kernel(self.name, x.dtype):
            slopes = torch.empty_like(x) if tape.flows else None
            run(x.numel(), memory(x), memory(y), memory(slopes))
            tape.keep(slopes)
        else:
            self.of_torch[0](x, y)
            tape.keep(x)
        return y

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        (x,) = kept
        assert x is not None
        d = d.to(x.dtype)
        if kernel(self.name, x.dtype):
            return d * x, ()  # x are the slopes
        d_x = torch.empty_like(x)
        self.of_torch[1](d, x, d_x)
        return d_x, ()


class Gated(Piece):
    """f(gate) * up of both side by side, by a kernel."""

    def __init__(self, name: str):
        self.name = f"gated_{name}"

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        tape.keep(x)
        rows, width = len(x), x.shape[1] // 2
        y, run = x.new_empty(rows, width), kernel(self.name, x.dtype)
        assert run
        run(rows, width, memory(x), None, memory(y))
        return y

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        (x,) = kept
        assert x is not None
        d, d_x, run = d.to(x.dtype), torch.empty_like(x), kernel(self.name, x.dtype)
        assert run
        run(*d.shape, memory(x), memory(d), memory(d_x))
        return d_x, ()


class Dropout(Piece):
    """In the memory of what it reads, which a linear layer has just written for it alone."""

    def __init__(self, module: nn.Dropout):
        self.module = module

    def forward(self, x: Tensor, tensors: Tensors, wants: Wants, tape: Tape) -> Tensor:
        if not (self.module.training and self.module.p):
            tape.keep(None)
            return x
        chance = drawn(x, self.module.p)
        tape.keep(chance)
        return dropped(x, chance, self.module.p, out=x)

    def backward(self, d: Tensor, kept: Tensors, tensors: Tensors, wants: Wants, tape: Tape) -> tuple[Tensor | None, Tensors]:
        (chance,) = kept
        return (d if chance is None else dropped(d.contiguous(), chance, self.module.p)), ()


def local(module: nn.Module) -> Piece:
    """The piece that computes what `module` does."""
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return LayerNorm(module)
    if type(module) is nn.Dropout:
        return Dropout(module)
    if isinstance(module, Insert):
        return Inserted(module)
    if not any(True for _ in module.parameters()):
        for function, name, forward, backward in ACTIVATIONS:
            if _equal(module, function):
                return Activation(name, forward, backward)
    if (eps := _rms_eps(module)) is not None:
        return RMSNorm(module, eps)
    if is_scale(module):
        return Scale(module)
    return Local(module)


def gated(activation: nn.Module, dtype: torch.dtype) -> Piece | None:
    """The piece for what an activation lets through, in this type; None where there is no kernel for it."""
    found = local(activation)
    return Gated(found.name) if isinstance(found, Activation) and kernel(f"gated_{found.name}", dtype) else None


def _equal(module: nn.Module, function: Callable[[Tensor], Tensor]) -> bool:
    """An activation is known by its values: it has many names."""
    x = torch.linspace(-12, 12, 480, dtype=torch.float64).view(2, 240)
    with torch.no_grad():
        found: Tensor = module(x)
    return found.shape == x.shape and torch.allclose(found, function(x), rtol=1e-9, atol=1e-12)


def is_scale(module: object) -> bool:
    """Whether, hooks aside, it multiplies each channel with a parameter: such modules have many names too, and are known by their values."""
    if not isinstance(module, nn.Module) or [p.dim() for p in module.parameters(recurse=False)] != [1]:
        return False
    (factor,) = module.parameters(recurse=False)
    x = torch.linspace(-2, 2, 2 * len(factor)).view(2, -1).to(factor)
    with torch.no_grad():
        found = module.forward(x)
    return isinstance(found, Tensor) and torch.equal(found, x * factor)


def _rms_eps(module: nn.Module) -> float | None:
    """The eps of a norm by root mean squares, which has many names too and is known by its values; None for any other module."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weights = list(module.parameters())
    if not isinstance(eps, float) or len(weights) != 1 or weights[0].dim() != 1:
        return None
    x = torch.randn(2, len(weights[0]), generator=torch.Generator().manual_seed(0)).to(weights[0])
    with torch.no_grad():
        found: Tensor = module(x)
        expected = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weights[0]
    return eps if found.shape == x.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6) else None
