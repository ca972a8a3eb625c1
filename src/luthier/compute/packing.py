"""Rows without their padding: their tokens one after the other, rows of one length side by side."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the N real tokens of a padded batch (B, T) lie, the longest rows first.

    index   (N,): of each packed token, its place among the B * T padded ones; None where packed and padded are the same
    groups  (first token, number of rows, tokens of each) of the rows of one length
    """

    shape: tuple[int, int]
    index: Tensor | None
    groups: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, mask: Tensor) -> Packing | None:
        """Of an attention mask (B, T) of 1 and 0; None where a row has holes, starts with padding or has no token at all."""
        rows, width = mask.shape
        kept = mask != 0
        lengths = kept.sum(1)
        if not bool((kept == (torch.arange(width, device=mask.device) < lengths[:, None])).all()) or not bool(lengths.all()):
            return None
        if bool((lengths == width).all()):
            return cls.whole(rows, width)
        order = lengths.argsort(descending=True, stable=True)
        index = (order[:, None] * width + torch.arange(width, device=mask.device))[kept[order]]
        groups, first = [], 0
        for length, members in groupby(lengths[order].tolist()):
            count = len(list(members))
            groups.append((first, count, length))
            first += count * length
        return cls((rows, width), index, tuple(groups))

    @classmethod
    def whole(cls, rows: int, width: int) -> Packing:
        """Of a batch without padding."""
        return cls((rows, width), None, ((0, rows, width),))

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (N, d)"""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def unpack(self, x: Tensor) -> Tensor:
        """(N, d) -> (B, T, d), 0 at padding."""
        rows, width = self.shape
        flat = x if self.index is None else x.new_zeros(rows * width, x.shape[-1]).index_copy(0, self.index, x)
        return flat.view(rows, width, -1)
