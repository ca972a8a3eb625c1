"""Our kernels against the same in float64, dropout included, and machines that cannot have them."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.compute import kernels
from luthier.compute.attention import Call
from luthier.compute.block import FusedBlock
from luthier.compute.joins import Join, KernelJoin, join
from luthier.compute.packed_attention import KernelAttention
from luthier.compute.packing import Packing
from luthier.compute.pieces import ACTIVATIONS, local
from luthier.compute.tape import Piece, Tape

needs_kernels = pytest.mark.skipif(not kernels.library(), reason="no kernels on this machine")
TYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest number
WIDTHS = (1, 16, 33, 384)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < TYPES[dtype], float(error)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers in every type."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.bfloat16).to(dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name,function", [(name, function) for function, name, *_ in ACTIVATIONS])
@pytest.mark.parametrize("count", [1, 31, 40_001])
def test_activations(count: int, name: str, function: nn.Module, dtype: torch.dtype) -> None:
    x = 4 * random(count, dtype=dtype)
    y, slopes, run, memory = torch.empty_like(x), torch.empty_like(x), kernels.kernel(name, dtype), kernels.memory
    assert run
    run(count, memory(x), memory(y), memory(slopes))
    exact = x.double().requires_grad_()
    expected = function(exact)
    close(y, expected, dtype)
    close(slopes, torch.autograd.grad(expected.sum(), exact)[0], dtype)


@needs_kernels
@pytest.mark.parametrize("name", kernels.ACTIVATIONS)
def test_activations_far_out_are_what_they_tend_to(name: str) -> None:
    x = torch.tensor([-1e20, -200.0, -30.0, 0.0, 30.0, 200.0, 1e20])
    y, run = torch.empty_like(x), kernels.kernel(name, x.dtype)
    assert run
    run(len(x), kernels.memory(x), kernels.memory(y), None)
    torch.testing.assert_close(y, x.clamp(min=0), rtol=1e-6, atol=1e-10)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_joins(p: float, kind: type[nn.Module], replaces: bool, width: int, dtype: torch.dtype) -> None:
    """Against the modules in float64, with the mask that the kernel itself shows where x is 0 and y is 1."""
    dropout, norm = nn.Dropout(p).train(), kind(width, eps=1e-3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1, 0.2)
    joined, rows = join([dropout], norm, replaces, dtype), 50
    assert isinstance(joined, KernelJoin)
    x, y = random(rows, width).requires_grad_(), random(rows, width, seed=1, dtype=dtype)

    def run(joined: Join, x: Tensor, y: Tensor) -> tuple[Tape, Tensor, Tensor]:
        tape = Tape(joined.pieces, [piece.tensors() for piece in joined.pieces], Packing.whole(rows, 1), None, None, flows=True, learns=True)
        torch.manual_seed(3)
        with torch.no_grad():
            return tape, *joined.forward(x, y, tape)

    mask = run(join([dropout], None, False, dtype), torch.zeros(rows, width), torch.ones(rows, width, dtype=dtype))[1].double()
    assert set(mask.unique().tolist()) <= {0.0, float(torch.tensor(1 / (1 - p)))}
    tape, past, h = run(joined, x, y)
    exact = [t.detach().double().requires_grad_() for t in (x, y, *norm.parameters())]
    total = exact[0] + exact[1] * mask
    normed = functional.layer_norm(total, (width,), exact[2], exact[3], 1e-3) if kind is nn.LayerNorm else functional.rms_norm(total, (width,), exact[2], 1e-3)
    expected = normed if replaces else total
    close(past, expected, torch.float32)
    close(h, normed, dtype)
    assert h.dtype == dtype and past.dtype == torch.float32
    d_past, d_h = random(rows, width, seed=4), random(rows, width, seed=5, dtype=dtype)
    tape.resume([*(t for own in tape.inputs.values() for t in own), *tape.kept])
    d_x, d_y = joined.backward(d_past, d_h, tape)
    wanted = torch.autograd.grad([expected, normed], exact, [d_past.double(), d_h.double()])
    if width > 1:  # a single number is its own mean: all is rounding
        close(d_x, wanted[0], torch.float32)  # type: ignore[arg-type]
        close(d_y, wanted[1], dtype)  # type: ignore[arg-type]
        for found, gradient in zip(tape.collect(), wanted[2:], strict=False):
            close(found, gradient, torch.float32)  # type: ignore[arg-type]


def reference(q: Tensor, k: Tensor, v: Tensor, call: Call, factors: Tensor | float) -> Tensor:
    """(T, heads, d), (S, groups, d) -> (T, heads * d); the queries are the last of the tokens"""
    k, v = (x.repeat_interleave(call.heads // call.groups, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * call.scale
    if call.causal:
        scores = scores.masked_fill(torch.ones(len(k), len(k), dtype=torch.bool).triu(1)[-len(q) :], -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1) * factors, v).flatten(1)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lengths", [[1], [7, 7, 3, 1], [70, 33, 16]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("heads,groups,width", [(2, 2, 8), (4, 2, 33), (3, 1, 16)])
def test_attention(heads: int, groups: int, width: int, pooled: bool, causal: bool, lengths: list[int], dtype: torch.dtype) -> None:
    packing = Packing.of(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    assert packing
    call = Call(nn.Dropout().eval(), heads, groups, width, 0.4, 0.0, causal, True)
    tokens = packing.ends(last=True) if pooled else None
    x = random(packing.tokens, (heads + 2 * groups) * width, dtype=dtype)
    found, gradient, d = through(KernelAttention(call, dtype), x, packing, tokens)
    assert not found[sum(lengths) :].any() or pooled
    exact = x.double().requires_grad_()
    answers = []
    for number, (first, length) in enumerate(packing.rows.tolist()):
        q, k, v = exact[first : first + length].view(length, -1, width).split([heads, groups, groups], 1)
        answers.append((number if pooled else slice(first, first + length), reference(q[-1:] if pooled else q, k, v, call, 1.0)))
    for place, answer in answers:
        close(found[place], answer[0] if pooled else answer, dtype)
    (expected,) = torch.autograd.grad([answer for _, answer in answers], exact, [d[place].double().view_as(answer) for place, answer in answers])
    close(gradient, expected, dtype)


def through(piece: Piece, x: Tensor, packing: Packing, tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, the gradient of x and the gradient of y that it is of"""
    tape = Tape([piece], [piece.tensors()], packing, tokens, None, flows=True, learns=True)
    y = tape.run(piece, x)
    d = random(*y.shape, seed=9, dtype=x.dtype)
    if tokens is None:
        d[packing.tokens - packing.spare :] = 0
    tape.resume(tape.kept)
    return y, tape.back(piece, d), d


@needs_kernels
def test_dropout_of_attention_is_the_same_on_the_way_back() -> None:
    """What drops is seen where values are the unit vectors, and then held against the gradients of all three."""
    length, width, p = 24, 32, 0.3
    call = Call(nn.Dropout(p).train(), 2, 2, width, 0.3, p, False, True)
    packing, piece = Packing.whole(2, length), KernelAttention(call, torch.float32)

    def split(x: Tensor) -> list[Tensor]:
        return [part.unflatten(1, (2, width)) for part in x.chunk(3, 1)]

    x = random(packing.tokens, 6 * width)
    plain = x.clone()
    plain[:, 4 * width :] = torch.eye(length, width).repeat(2, 2)
    torch.manual_seed(1)
    used = through(piece, plain, packing, None)[0].unflatten(1, (2, width))[..., :length]
    torch.manual_seed(1)
    found, gradient, d = through(piece, x, packing, None)
    exact, answers, share = x.double().requires_grad_(), [], []
    for row in range(2):
        own = slice(row * length, (row + 1) * length)
        q, k, v = split(exact[own])
        weights = (torch.einsum("thd,shd->hts", q, k) * call.scale).softmax(-1)
        factors = (used[own].transpose(0, 1).double() / weights.detach()).round(decimals=4)
        assert set(factors.unique().tolist()) == {0.0, round(1 / (1 - p), 4)}
        share.append(float((factors == 0).double().mean()))
        answers.append(reference(q, k, v, call, (factors > 0).double() / (1 - p)))
    assert abs(sum(share) / 2 - p) < 0.05 and share[0] != share[1]
    close(found, torch.cat(answers), torch.float32)
    close(gradient, torch.autograd.grad(answers, exact, list(d.double().chunk(2)))[0], torch.float32)


@needs_kernels
def test_dropout_is_even_and_independent() -> None:
    """In rows, in columns, between neighbours and between draws."""
    shape, p = (400, 500), 0.1
    joined = join([nn.Dropout(p).train()], None, False, torch.float32)

    def mask() -> Tensor:
        tape = Tape(joined.pieces, [(None, None)], Packing.whole(*shape), None, None, flows=False, learns=False)
        return (joined.forward(torch.zeros(shape), torch.ones(shape), tape)[0] == 0).double()

    torch.manual_seed(0)
    masks = [mask() for _ in range(5)]
    spread = (p * (1 - p)) ** 0.5
    for one in masks:
        assert abs(float(one.mean()) - p) < 5 * spread / one.numel() ** 0.5
        for axis, count in ((0, shape[0]), (1, shape[1])):
            assert float((one.mean(axis) - p).abs().max()) < 5 * spread / count**0.5
    away = (masks[0] - p) / spread
    others = [away.roll(1, 1), away.roll(1, 0), away.roll(16, 1), *((other - p) / spread for other in masks[1:])]
    for other in others:
        assert abs(float((away * other).mean())) < 5 / away.numel() ** 0.5


@needs_kernels
@pytest.mark.parametrize("p", [1.0, 0.9999999])
def test_all_may_drop(p: float) -> None:
    joined, x = join([nn.Dropout(p).train()], None, False, torch.float32), random(4, 20)
    tape = Tape(joined.pieces, [(None, None)], Packing.whole(4, 1), None, None, flows=False, learns=False)
    assert torch.equal(joined.forward(x, torch.ones(4, 20), tape)[0], x)


def test_what_computes_otherwise_is_not_taken(tmp_path: Path) -> None:
    """The check of a build fails where its numbers are wrong."""
    compiler = kernels._compiler()
    if compiler is None:
        pytest.skip("no compiler on this machine")
    sources = [tmp_path / path.name for path in kernels.HERE.glob("*.[ch]*")]
    for path in sources:
        text = (kernels.HERE / path.name).read_text(encoding="utf-8")
        path.write_text(text.replace("highest - std::log(inverse)", "0").replace("const float inverse = 1 / sum(total)", "const float inverse = 2 / sum(total)"), encoding="utf-8")
    built = tmp_path / "kernels.so"
    subprocess.run([compiler, *kernels.FLAGS, *(str(path) for path in sources if path.suffix == ".cpp"), "-o", str(built)], check=True)
    ended = subprocess.run([sys.executable, str(kernels.HERE / "check.py"), str(built)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "attention" in ended.stderr


@pytest.mark.parametrize("hidden", ["compiler", "switch", "broken"])
def test_machines_without_kernels_do_without(hidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    if hidden == "compiler":
        monkeypatch.setattr(kernels, "_compiler", lambda: None)
    elif hidden == "switch":
        monkeypatch.setenv(kernels.SWITCH, "off")
    else:
        monkeypatch.setattr(kernels, "_compiler", lambda: "false")
    for function in (kernels._load, kernels.kernel, kernels._file):
        monkeypatch.setattr(kernels, function.__name__, functools.cache(function.__wrapped__))
    assert kernels.kernel("gelu", torch.float32) is None and kernels.outcome().startswith("none: ")
    assert type(join([nn.Dropout()], nn.LayerNorm(4), True, torch.float32)) is Join
    block = FusedBlock((Join((), None, False), Join((), None, False), Join((), None, False)), [local(nn.GELU())], [local(nn.Identity())], False)
    x = random(3, 4)
    torch.testing.assert_close(block(x, Packing.whole(3, 1)), 2 * (x + functional.gelu(x)))
