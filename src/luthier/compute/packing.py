"""Rows without their padding: their tokens one after the other, rows of one length side by side."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from luthier.compute.kernels import LANES

STEP = 32  # the number of packed tokens is a multiple of it, of twice as much beyond 512, and of a thirty-second to a sixteenth of itself where that is more: oneDNN builds and keeps a kernel for every new number of rows, which costs as much time as the product itself, and memory


@dataclass(frozen=True)
class Packing:
    """Where the N real tokens of a padded batch (B, T) lie, the longest rows first.

    index   (N,): of each packed token, its place among the B * T padded ones; None where packed and padded are the same
    order   (B,): of each packed row, which one of the batch it is; None where they are in the same order
    groups  (first token, number of rows, tokens of each) of the rows of one length
    spare   tokens behind the last row that belong to none: copies that nobody reads
    """

    shape: tuple[int, int]
    index: Tensor | None
    groups: tuple[tuple[int, int, int], ...]
    spare: int = 0
    order: Tensor | None = None

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
        behind = spare(first)
        return cls((rows, width), torch.cat([index, index[:1].expand(behind)]), tuple(groups), behind, order)

    @classmethod
    def whole(cls, rows: int, width: int) -> Packing:
        """Of a batch without padding."""
        return cls((rows, width), None, ((0, rows, width),))

    @property
    def tokens(self) -> int:
        """N"""
        first, rows, length = self.groups[-1]
        return first + rows * length + self.spare

    @functools.cached_property
    def rows(self) -> Tensor:
        """(B, 2): of each packed row, its first token and how many it has."""
        return torch.tensor([(first + row * length, length) for first, rows, length in self.groups for row in range(rows)], dtype=torch.int64).view(-1, 2)

    @functools.cached_property
    def all_queries(self) -> Tensor:
        """`queries` of all tokens: every block but the last asks for the same."""
        return _queries(self.rows, self.rows, self.rows[:, 0])

    def queries(self, tokens: Tensor) -> Tensor:
        """(B, 6): of each packed row the first of its keys, how many, the first of its queries, how many, where their answers go, and how many weights of one head come before its own.

        tokens  one of each row, whose queries are the only ones
        """
        return _queries(self.rows, torch.stack([tokens, torch.ones_like(tokens)], 1), torch.arange(len(tokens)))

    def crossing(self, keys: Packing, one: bool) -> Tensor:
        """`queries` where keys are those of the same rows of another stack. one: only one token of each row is left, in the order of packed rows."""
        rows, places = keys.rows, torch.arange(len(keys.rows))
        if keys.order is not None:
            rows = rows[keys.order.argsort()]
        if self.order is not None:
            rows = rows[self.order]
        asked = torch.stack([places, torch.ones_like(places)], 1) if one else self.rows
        return _queries(rows, asked, asked[:, 0])

    def ends(self, last: bool) -> Tensor:
        """(B,): of each packed row, where its first or last token is."""
        first, length = self.rows.unbind(1)
        return first + length - 1 if last else first

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (N, d), with the spare ones"""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def unpack(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(N, d) -> (B, T, d), 0 at padding. tokens: the packed tokens that x holds, in their order; the others are 0 too."""
        rows, width = self.shape
        index = self.index
        if tokens is None and index is None:
            return x.view(rows, width, -1)
        if tokens is not None:
            index = tokens if index is None else index[tokens]
        elif self.spare:
            index, x = index[: -self.spare], x[: -self.spare]  # type: ignore[index]
        return x.new_zeros(rows * width, x.shape[-1]).index_copy(0, index, x).view(rows, width, -1)  # type: ignore[arg-type]


def _queries(keys: Tensor, asked: Tensor, answers: Tensor) -> Tensor:
    """keys, asked: (B, 2), the first and how many; answers: (B,)"""
    weights = asked[:, 1] * (keys[:, 1] + LANES - 1).div(LANES, rounding_mode="floor") * LANES
    return torch.cat([keys, asked, answers[:, None], (weights.cumsum(0) - weights)[:, None]], 1)


def spare(tokens: int) -> int:
    """How many more are computed than these, so that their number is one of a few."""
    return -tokens % max(STEP * (1 + (tokens > 512)), 2 ** tokens.bit_length() // 32)
