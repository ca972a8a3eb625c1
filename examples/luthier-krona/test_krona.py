"""What luthier asks of every method, and the one thing that is KronA's own: its product, against a slow reference."""

from typing import Any

import pytest
import torch
from luthier_krona import KronA

from luthier.contract import cases
from luthier.methods.kinds import Linear


@pytest.mark.parametrize("case", cases("krona"), ids=str)
def test_contract(case):
    case.run()


def test_the_change_is_a_kronecker_product_written_out():
    rng = torch.Generator().manual_seed(0)
    weight = torch.zeros(6, 8)
    a, b, x = (torch.randn(*shape, generator=rng) for shape in ((2, 4), (3, 2), (5, 8)))
    slow = torch.zeros(6, 8)
    for i in range(6):
        for j in range(8):
            slow[i, j] = 3 * a[i // 3, j // 2] * b[i % 3, j % 2]
    krona = KronA(rows=2, columns=4, scale=3)
    params: Any = {"a": a, "b": b}
    torch.testing.assert_close(krona.effective(weight, params), slow)
    torch.testing.assert_close(krona.forward(x, Linear(weight, None, lambda z: z @ weight.T), params, False), x @ slow.T)


def test_the_smallest_factors_are_chosen_and_the_product_can_have_full_rank():
    params = KronA().create(torch.empty(384, 384), torch.Generator().manual_seed(0))
    assert params["a"].shape == (16, 16) and params["b"].shape == (24, 24)
    change = torch.kron(params["a"], torch.eye(24))
    assert torch.linalg.matrix_rank(change) == 384
