"""Where a row's tokens lie in a batch changes nothing that is read off it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.batch import Batch, pad

ROWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=5)


def batch(rows: list[list[int]], side: str) -> tuple[Batch, torch.Tensor]:
    """The batch, and hidden states (B, T, 1) that are the tokens themselves where there are any and noise elsewhere."""
    ids = pad(rows, 0, side)
    mask = pad([[1] * len(row) for row in rows], 0, side)
    hidden = torch.where(mask.bool(), ids.double(), torch.full(ids.shape, 1e6, dtype=torch.double)).unsqueeze(-1)
    return Batch({"input_ids": ids, "attention_mask": mask}, rows=tuple(range(len(rows)))), hidden


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, side=st.sampled_from(["left", "right"]))
def test_what_is_read_off_a_row_is_its_own(rows: list[list[int]], side: str) -> None:
    made, hidden = batch(rows, side)
    assert made.mask.shape[1] == max(map(len, rows)) and made.tokens == sum(map(len, rows))
    assert [ids[m.bool()].tolist() for ids, m in zip(made.inputs["input_ids"], made.mask, strict=True)] == rows
    assert made.first(hidden).flatten().tolist() == [row[0] for row in rows]
    assert made.last(hidden).flatten().tolist() == [row[-1] for row in rows]
    torch.testing.assert_close(made.mean(hidden).flatten(), torch.tensor([sum(row) / len(row) for row in rows], dtype=torch.double))


def test_parts_count_and_move_with_the_batch() -> None:
    whole = Batch(parts={"query": batch([[1, 2]], "right")[0], "document": batch([[1, 2, 3]], "left")[0]}, rows=(4,))
    assert whole.tokens == 5
    moved = whole.to("meta")
    assert moved.rows == (4,) and all(part.mask.is_meta for part in moved.parts.values()) and not whole.parts["query"].mask.is_meta


def test_empty_rows_are_padding_alone() -> None:
    assert pad([[], [1]], 7).tolist() == [[7], [1]] and pad([[], [1, 2]], 7, "left").tolist() == [[7, 7], [1, 2]]
    with pytest.raises(ValueError):
        pad([], 0)
