"""Attention by plain products on the processor, under transformers' attention interface.

torch's own attention takes a route for dropout that keeps every intermediate, and one for bf16 whose backward is slow;
on rows of ordinary length both cost several times what the four products do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import create_position_bias_mask, repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from luthier.compute.dropout import multipliers

NAME = "luthier"
HARMLESS = ("position_ids", "cache_position", "use_cache")  # arguments of a model that reach its attention and change nothing there
LONGEST = 384  # keys; beyond it torch's own route, which never holds all weights at once, is faster in bf16


@dataclass(frozen=True)
class Call:
    """How a model asked for attention: by which module, with what dropout in training.

    groups   heads of keys and values
    width    of a head
    plain    whether it was nothing but softmax(scale * q @ k^T) @ v, causal or not
    shifted  except for something that was added to the scores for positions
    """

    module: nn.Module
    heads: int
    groups: int
    width: int
    scale: float
    dropout: float
    causal: bool
    plain: bool
    shifted: bool = False


Answers = Callable[[Call, Tensor, Tensor, Tensor], Tensor]
_heard: list[Any] | None = None
_instead: Answers | None = None


@contextlib.contextmanager
def listening(to: list[Any]) -> Iterator[None]:
    """Inside, every call for attention is added to the list."""
    global _heard
    _heard = to
    try:
        yield
    finally:
        _heard = None


@contextlib.contextmanager
def instead(answers: Answers) -> Iterator[None]:
    """Inside, this computes all attention, from queries, keys and values as the model gives them; no mask is looked at."""
    global _instead
    before, _instead = _instead, answers
    try:
        yield
    finally:
        _instead = before


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, k), key (B, G, S, k), value (B, G, S, v) -> (B, T, H, v), as transformers' own `sdpa` computes it.

    attention_mask  (B, 1 or H, T, S): bool, True where a query sees a key, or added to the scores
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if _heard is not None or _instead is not None:
        simple = key.shape == value.shape and all(x is None or x is False or name in HARMLESS for name, x in kwargs.items())
        call = Call(module, query.shape[1], key.shape[1], query.shape[3], scale, dropout, causal, simple, position_bias is not None and bool(position_bias.any()))
        if _instead is not None:
            return _instead(call, query, key, value), None
        _heard.append(call)  # type: ignore[union-attr]
    if not plain_is_faster(query, key, dropout):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, position_bias=position_bias, **kwargs)  # type: ignore[return-value]
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if position_bias is not None:
        bias = create_position_bias_mask(position_bias, attention_mask, causal, query, key)
    elif causal:
        bias = _added(torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(), query.dtype)[None, None]
    else:
        bias = None if attention_mask is None else _added(attention_mask, query.dtype)
    return plain(query, key, value, bias, scale, dropout), None


def plain_is_faster(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Measured on rows of 8 to 512 tokens: in float32 torch's fused route wins wherever it may be taken, which it may not with dropout."""
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16):
        return False
    return dropout > 0 or (query.dtype == torch.bfloat16 and key.shape[2] <= LONGEST)


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(scale * query @ key^T + bias) @ value, with heads (B, H, ., .) in and (B, T, H, v) out."""
    return _Attention.apply(query, key, value, bias, scale, dropout)  # type: ignore[no-any-return]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers added to the scores. A row that sees nothing gets equal weights, as everywhere in transformers."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


class _Attention(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout: float) -> Tensor:
        batch, heads, length, _ = query.shape
        q, k, v = (x.reshape(batch * heads, *x.shape[2:]) for x in (query, key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        if bias is not None:
            scores.view(batch, heads, length, -1).add_(bias)
        weights = torch.softmax(scores, -1)
        factors = multipliers(weights, dropout) if dropout else None
        used = weights if factors is None else weights * factors
        ctx.save_for_backward(q, k, v, weights, factors)
        ctx.scale, ctx.shape, ctx.bias = scale, (batch, heads), None if bias is None else (bias.shape, bias.dtype)
        return torch.bmm(used, v).view(batch, heads, length, -1).transpose(1, 2)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, weights, factors = ctx.saved_tensors
        wants = ctx.needs_input_grad
        g = gradient.transpose(1, 2).reshape(*q.shape[:2], -1)
        d_value = torch.bmm((weights if factors is None else weights * factors).transpose(1, 2), g) if wants[2] else None
        d_weights = torch.bmm(g, v.transpose(1, 2))
        if factors is not None:
            d_weights.mul_(factors)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_bias = d_scores.view(*ctx.shape, *d_scores.shape[1:]).sum_to_size(ctx.bias[0]).to(ctx.bias[1]) if wants[3] else None
        d_scores = d_scores * ctx.scale if wants[3] else d_scores.mul_(ctx.scale)  # the gradient of a bias may be the same memory
        d_query = torch.bmm(d_scores, k) if wants[0] else None
        d_key = torch.bmm(d_scores.transpose(1, 2), q) if wants[1] else None
        split = (None if d is None else d.view(*ctx.shape, *d.shape[1:]) for d in (d_query, d_key, d_value))
        return *split, d_bias, None, None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
