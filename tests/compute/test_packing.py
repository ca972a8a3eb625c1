from __future__ import annotations

import pytest
import torch

from luthier.compute.packing import STEP, Packing

MASKS = {
    "equal rows": [[1, 1, 1], [1, 1, 1]],
    "unequal rows": [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]],
    "one row": [[1, 1, 1, 1, 1]],
    "rows of one token": [[1], [1]],
    "all padded somewhere": [[1, 1, 0], [1, 0, 0]],
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_packed_and_unpacked_only_padding_changes(name: str, dtype: torch.dtype) -> None:
    mask = torch.tensor(MASKS[name])
    packing = Packing.of(mask.to(dtype))
    x = torch.randn(*mask.shape, 5, dtype=torch.float64, requires_grad=True)
    assert packing is not None
    packed = packing.pack(x)
    assert packed.shape == (int(mask.sum()) + packing.spare, 5) and (packing.spare == 0 or len(packed) % STEP == 0)
    torch.testing.assert_close(packing.unpack(packed), x * mask[:, :, None])
    assert torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x)), (x,))


@pytest.mark.parametrize("name", MASKS)
def test_groups_cover_every_row_once(name: str) -> None:
    """Each group is rows of one length, whole and in a row, and the tokens of a row keep their order."""
    mask = torch.tensor(MASKS[name])
    packing = Packing.of(mask)
    assert packing is not None
    places = torch.arange(mask.numel()).view(mask.shape)
    seen = packing.pack(places[:, :, None])[:, 0].tolist()
    rows = []
    end = 0
    for first, count, length in packing.groups:
        assert first == end
        for start in range(first, first + count * length, length):
            row = seen[start] // mask.shape[1]
            rows.append(row)
            assert seen[start : start + length] == places[row, : int(mask[row].sum())].tolist()
        end = first + count * length
    assert sorted(rows) == list(range(len(mask))) and end == len(seen) - packing.spare
    assert len({length for *_, length in packing.groups}) == len(packing.groups)


@pytest.mark.parametrize("mask", [[[0, 1, 1], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]], [[1, 1, 1], [0, 0, 0]]], ids=["padded on the left", "a hole", "an empty row"])
def test_other_masks_are_left_to_the_model(mask: list[list[int]]) -> None:
    assert Packing.of(torch.tensor(mask)) is None


def test_packed_rows_come_in_few_numbers_and_waste_little() -> None:
    """Each number is a kernel that oneDNN builds and keeps."""
    numbers = set()
    for tokens in range(2, 4096):
        found = Packing.of((torch.arange(tokens) < torch.tensor([[tokens], [1]])).long())
        assert found and found.tokens == tokens + 1 + found.spare and found.spare < max(STEP, (tokens + 1) / 8)
        numbers.add(found.tokens)
    assert len(numbers) < 64
