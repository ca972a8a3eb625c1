"""Attention of a stock block that is given packed rows as if they were one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from luthier.compute.attention import Call
from luthier.compute.fused import Fused
from luthier.compute.kernels import kernel
from luthier.compute.packed_attention import KernelAttention
from luthier.compute.packing import Packing
from luthier.compute.tape import Given


def attend(packing: Packing, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (1, H, N, k), key and value (1, G, N, k) -> (1, N, H, k), each row by itself: by our kernel, on a GPU by torch's attention over jagged rows, else rows of one length at a time."""
    if query.is_cuda:
        return _jagged(packing, call, query, key, value)
    if query.device.type == "cpu" and kernel("attention_forward", query.dtype):
        joined = torch.cat([x[0].transpose(0, 1).flatten(1) for x in (query, key, value)], 1)
        return Fused([KernelAttention(call, query.dtype)])(joined, Given(packing)).view(1, -1, call.heads, call.width)
    return _by_length(packing, call, query, key, value)


def _by_length(packing: Packing, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (repeat_kv(x, call.heads // call.groups) for x in (key, value))
    answers = []
    for first, rows, length in packing.groups:
        own = (x[0, :, first : first + rows * length].unflatten(1, (rows, length)).transpose(0, 1) for x in (query, key, value))
        answers.append(scaled_dot_product_attention(*own, dropout_p=call.dropout, is_causal=call.causal, scale=call.scale).transpose(1, 2).flatten(0, 1))
    return _with_spare(torch.cat(answers), packing)


def _jagged(packing: Packing, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (repeat_kv(x, call.heads // call.groups) for x in (key, value))
    lengths = packing.rows[:, 1]
    offsets = pad(lengths.cumsum(0), (1, 0)).to(query.device, non_blocking=True)
    real, shortest, longest = packing.tokens - packing.spare, int(lengths.min()), int(lengths.max())
    own = (torch.nested.nested_tensor_from_jagged(x[0].transpose(0, 1)[:real].contiguous(), offsets, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2) for x in (query, key, value))
    return _with_spare(scaled_dot_product_attention(*own, dropout_p=call.dropout, is_causal=call.causal, scale=call.scale).transpose(1, 2).values(), packing)


def _with_spare(x: Tensor, packing: Packing) -> Tensor:
    """(tokens of rows, H, k) -> (1, N, H, k)"""
    return pad(x, (0, 0, 0, 0, 0, packing.spare))[None]
