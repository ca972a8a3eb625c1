"""Each piece of a block has the gradient of what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Dinov2Config
from transformers.activations import ACT2FN
from transformers.models.dinov2.modeling_dinov2 import Dinov2LayerScale

from luthier.compute import kernels, products
from luthier.compute.attention import Call
from luthier.compute.block import FusedBlock, Sublayer
from luthier.compute.dropout import drawn, dropped
from luthier.compute.joins import Join
from luthier.compute.packed_attention import PackedAttention
from luthier.compute.packing import Packing
from luthier.compute.pieces import Activation, Dropout, LayerNorm, Local, RMSNorm, Scale, local
from luthier.compute.products import Linear
from luthier.compute.tape import Given, Piece, Tape
from luthier.contract.tiny import tiny_model
from luthier.methods.engine import install
from luthier.methods.stack import parse

needs_kernels = pytest.mark.skipif(not kernels.library(), reason="no kernels on this machine")
PACKING = Packing.of(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]))
assert PACKING


def linear(width: int, out: int) -> nn.Linear:
    """In whose output a piece may write, as behind every linear layer of a block."""
    module = nn.Linear(width, out, dtype=torch.float64).requires_grad_(False)
    rng = torch.Generator().manual_seed(2)
    nn.init.normal_(module.weight, generator=rng)
    return module


def through(x: torch.Tensor, *pieces: Piece, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """2 (x + pieces(x)) of packed rows, with the same numbers drawn each time."""
    torch.manual_seed(0)
    bare = Join((), None, False)
    return FusedBlock(bare, [Sublayer(pieces, bare), Sublayer([local(nn.Identity())], bare)], causal=False)(x, Given(PACKING, tokens))


def rows(width: int) -> torch.Tensor:
    assert PACKING
    return torch.randn(PACKING.tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize(
    "name,kernel", [("gelu", True), ("gelu_new", True), ("gelu_pytorch_tanh", True), ("relu", True), ("silu", True), ("quick_gelu", False), ("tanh", False)]
)
def test_an_activation_is_known_by_what_it_computes(name: str, kernel: bool) -> None:
    module, before, x = ACT2FN[name], linear(6, 6), rows(6)
    piece = local(module)
    assert type(piece) is (Activation if kernel else Local)
    found, expected = through(x, local(before), piece), 2 * (x + module(before(x)))
    torch.testing.assert_close(found, expected)
    seed = torch.randn_like(found)
    torch.testing.assert_close(torch.autograd.grad(found, x, seed), torch.autograd.grad(expected, x, seed))


@pytest.mark.parametrize(
    "module,kind", [(nn.LayerNorm(6), LayerNorm), (nn.LayerNorm(6, bias=False), LayerNorm), (nn.RMSNorm(6, eps=1e-5), RMSNorm), (nn.RMSNorm(6), Local), (nn.Dropout(0.4), Dropout), (Dinov2LayerScale(Dinov2Config(hidden_size=6)), Scale)], ids=str
)
@pytest.mark.parametrize("learns", [True, False])
def test_gradients_against_differences(module: nn.Module, kind: type[Piece], learns: bool) -> None:
    piece = local(module.double().train().requires_grad_(learns))
    assert type(piece) is kind
    before = local(linear(6, 6))
    assert torch.autograd.gradcheck(lambda x, *_: through(x, before, piece), (rows(6), *module.parameters()))


def test_an_activation_of_another_shape_is_none_of_the_kernels() -> None:
    assert type(local(nn.GLU())) is Local


@pytest.mark.skipif(products._mkldnn is None, reason="this torch has no oneDNN")
def test_only_weights_that_stay_are_laid_out_and_answer_as_the_plain_ones_do() -> None:
    module = linear(48, 96).float()
    frozen, plain = Linear([module], torch.bfloat16, learning=True), Linear([module], torch.bfloat16, learning=True)
    plain.laid_out = None
    assert frozen.laid_out is not None and Linear([linear(48, 96).requires_grad_()], torch.bfloat16, learning=True).laid_out is None
    narrow, outcomes = linear(96, 48).bfloat16(), []
    for piece in (frozen, plain):
        x = rows(48).detach().float().requires_grad_()
        y = through(x, piece, local(narrow))
        outcomes.append((y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))))
    assert frozen.laid_out.keys() == {"forward", "backward"}
    torch.testing.assert_close(*outcomes, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_against_differences(pooled: bool, causal: bool) -> None:
    piece = PackedAttention(Call(nn.Dropout().train(), heads=2, groups=2, width=2, scale=0.7, dropout=0.3, causal=causal, plain=True))
    assert PACKING
    tokens = PACKING.ends(last=True) if pooled else None
    project = local(linear(4, 12))

    def seen(x: torch.Tensor) -> torch.Tensor:
        return through(x, project, piece, tokens=tokens)[: len(x) - PACKING.spare]  # type: ignore[union-attr]

    assert torch.autograd.gradcheck(seen, (rows(4),))


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=needs_kernels)])
def test_low_rank_changes_drop_what_they_read_each_its_own(dtype: torch.dtype) -> None:
    """Against the formula with the masks that were drawn, and its gradients by autograd."""
    attention = install(tiny_model("bert"), parse("lora(r=2, dropout=0.4)")).model.encoder.layer[0].attention.self.train().to(dtype)  # type: ignore[union-attr, operator]
    modules = [attention.query, attention.key, attention.value]
    changes = [change for module in (attention.query, attention.value) for change in module.changes()]
    rng = torch.Generator().manual_seed(1)
    for change in changes:
        for name in change.names:
            change[name].data.copy_(torch.randn(change[name].shape, generator=rng))
    piece, x = Linear(modules, dtype, learning=True), torch.randn(40, 32, generator=rng).to(dtype).requires_grad_()
    tensors = piece.tensors(Given(PACKING))  # type: ignore[arg-type]
    tape = Tape([piece], [tensors], Given(PACKING), flows=True, learns=True)  # type: ignore[arg-type]
    with torch.no_grad():
        y = tape.run(piece, x)
        masks = [dropped(torch.ones_like(x), chance, 0.4) for chance in tape.kept[-2:]]  # type: ignore[arg-type]
    low = [(x * mask) @ change["a"].T @ change["b"].T * 8 for mask, change in zip(masks, changes, strict=True)]
    expected = torch.cat([nn.functional.linear(x, m.weight, m.bias) for m in modules], 1) + torch.cat([low[0], torch.zeros_like(low[0]), low[1]], 1)
    assert not torch.equal(*masks) and all(abs(float((mask == 0).double().mean()) - 0.4) < 0.05 for mask in masks)
    torch.testing.assert_close(y, expected)
    d = torch.randn(y.shape, generator=rng).to(dtype)
    tape.resume([*tensors, *tape.kept])
    with torch.no_grad():
        found = [tape.back(piece, d), *tape.collect()]
    wanted = torch.autograd.grad(expected, [x, *(change[name] for change in changes for name in ("a", "b"))], d)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 33, 100_003])
def test_what_is_dropped_is_dropped_again(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(count).to(dtype)
    chance = drawn(x, 0.25)
    once, mask = dropped(x, chance, 0.25), dropped(torch.ones(count), chance, 0.25)
    assert set(mask.unique().tolist()) <= {0.0, float(torch.tensor(1 / 0.75))} and (count < 1000 or abs(float((mask == 0).float().mean()) - 0.25) < 0.01)
    torch.testing.assert_close(once, (x.float() * mask).to(dtype))
    assert torch.equal(dropped(x, chance, 0.25, out=x), once) and torch.equal(x, once)
