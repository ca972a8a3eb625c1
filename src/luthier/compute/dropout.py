"""Dropout whose random numbers cost little: sixteen bits an element, four elements from one draw of torch's stream."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

from luthier.compute.kernels import kernel, memory

LEVELS = 2**16


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element of x with probability p, rounded to 1/65,536, and scale the others so that the mean stays."""
    return _Dropout.apply(x, p) if p else x  # type: ignore[no-any-return]


def multipliers(like: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in the shape and type of `like`."""
    count = like.numel()
    # the whole range of int64: its default leaves the sign bit out, which is the highest bit of every fourth number
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device).random_(-(2**63), None)
    dropped = min(max(round(p * LEVELS), 0), LEVELS)
    if dropped == LEVELS:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    numbers = bits.view(torch.int16)[:count].view(like.shape)
    kept = numbers.ge_(dropped - LEVELS // 2)  # 0 or 1 in place: torch compares numbers into numbers several times as fast as into bools
    factor = LEVELS / (LEVELS - dropped)
    if like.dtype.itemsize == 2:  # the factor's own bits, or none
        return kept.mul_(_bits(factor, like.dtype)).view(like.dtype)
    return kept.to(like.dtype).mul_(factor)


def drawn(like: Tensor, p: float) -> Tensor:
    """By chance, which elements of a tensor like this one are dropped, for `dropped`: seeds where a kernel makes the mask of them each time, else the mask."""
    return seeds() if kernel("drop", like.dtype) else multipliers(like, p)


def dropped(x: Tensor, chance: Tensor, p: float, out: Tensor | None = None) -> Tensor:
    """x with those elements at 0 and the others scaled, which is its own gradient's way too. out: where to write, which may be x"""
    if run := kernel("drop", x.dtype):
        x = x.contiguous()
        out = torch.empty_like(x) if out is None else out
        run(x.numel(), memory(x), memory(chance), p, memory(out))
        return out
    return torch.mul(x, chance, out=out)


def seeds() -> Tensor:
    """(2,) int32 from torch's stream: what a kernel makes a mask of, and the same mask again."""
    return torch.empty(2, dtype=torch.int32).random_()


@functools.cache
def _bits(x: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(x, dtype=dtype).view(torch.int16))


class _Dropout(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        factors = multipliers(x, p)
        ctx.save_for_backward(factors)
        return x * factors

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (factors,) = ctx.saved_tensors
        return gradient * factors, None
