"""Products of whole numbers: each row of a weight and each token is rounded to 8 bits by a scale of its own, so that a huge number spoils its own row only.

The products are oneDNN's, as torch's inductor calls them. This file needs torch alone: the machine's trial runs it by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST = 127
ZERO = 128  # stands for 0: oneDNN has fast kernels for x that is never negative
PIECE = 1 << 19  # numbers that are rounded together: what stands between stays in the processor's cache, and memory is not asked for again and again
TINY = torch.finfo(torch.float32).tiny  # a scale, where a row is all zeros

_onednn = torch.ops.onednn if torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise") else None
exists = _onednn is not None


class Product:
    """x (..., in) -> (..., out) = x @ weight^T + bias, of frozen weight (out, in) and bias (out). Gradients do not pass.

    kernel  (name, type) -> what rounds and scales in one pass over memory, or None, where torch does it in several
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kernel: Callable[[str, torch.dtype], Callable[..., None] | None] = lambda name, dtype: None):
        assert _onednn is not None
        self._round, self._spread = kernel("round_rows", torch.float32), kernel("spread_rows", torch.float32)
        with torch.inference_mode(False), torch.no_grad():
            whole, scales = rounded(weight)
            self.weight = _onednn.qlinear_prepack(whole, None)
            self.scales, self.zeros = scales.flatten(), torch.zeros(len(weight), dtype=torch.int64)
            self.bias = None if bias is None else bias.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        assert _onednn is not None
        whole, scales = self._rounded(x.reshape(-1, x.shape[-1]))
        y: Tensor = _onednn.qlinear_pointwise(whole, 1.0, ZERO, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], "")
        if self._spread is not None:
            self._spread(*y.shape, scales.data_ptr(), None if self.bias is None else self.bias.data_ptr(), y.data_ptr())
        else:
            y.mul_(scales)
            if self.bias is not None:
                y.add_(self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `rounded`, but unsigned: with 128 for zero."""
        if self._round is None:
            whole, scales = rounded(x)
            return whole.view(torch.uint8).bitwise_xor_(ZERO), scales
        x = x.float().contiguous()
        whole, scales = torch.empty_like(x, dtype=torch.uint8), x.new_empty(len(x), 1)
        self._round(*x.shape, x.data_ptr(), whole.data_ptr(), scales.data_ptr())
        return whole, scales


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(whole, scales) with x (n, d) ~ whole * scales: int8 from -127 to 127, and float32 (n, 1)."""
    x = x.float().contiguous()
    whole, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), 1)
    rows = max(1, PIECE // x.shape[1])
    for part, to, scale in zip(x.split(rows), whole.split(rows), scales.split(rows), strict=True):
        torch.maximum(part.amax(1, keepdim=True), part.amin(1, keepdim=True).neg_(), out=scale).div_(LARGEST).clamp_(min=TINY)
        to.copy_(torch.mul(part, scale.reciprocal()).round_())
    return whole, scales
