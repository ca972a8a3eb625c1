"""Our kernels against the same in float64, dropout included, and machines that cannot have them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.compute import kernels
from luthier.compute.attention import Call
from luthier.compute.block import FusedBlock, Sublayer
from luthier.compute.fused import Fused
from luthier.compute.head_norms import head_norms
from luthier.compute.joins import Join, KernelJoin, join
from luthier.compute.packed_attention import KernelAttention
from luthier.compute.packing import Packing
from luthier.compute.pieces import ACTIVATIONS, local
from luthier.compute.tape import Given, Piece, Tape


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """More than there are rows of some tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


needs_kernels = pytest.mark.skipif(not kernels.library(), reason="no kernels on this machine")
TYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest number
WIDTHS = (1, 16, 33, 384)


def tape_of(pieces: Sequence[Piece], given: Given, flows: bool, learns: bool) -> Tape:
    return Tape(pieces, [piece.tensors(given) for piece in pieces], given, flows, learns)


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
        tape = tape_of(joined.pieces, Given(Packing.whole(rows, 1)), flows=True, learns=True)
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


def reference(q: Tensor, k: Tensor, v: Tensor, call: Call, factors: Tensor | float, added: Tensor | float = 0.0) -> Tensor:
    """(T, heads, d), (S, groups, d) -> (T, heads * d); the queries are the last of the tokens"""
    k, v = (x.repeat_interleave(call.heads // call.groups, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * call.scale + added
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


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lengths", [[1, 3], [70, 33, 16]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_attention_with_something_added_for_distances(pooled: bool, causal: bool, lengths: list[int], dtype: torch.dtype) -> None:
    """Whose gradient is a sum over all pairs of tokens that far apart."""
    packing, reach, heads, width = Packing.of(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]), max(lengths), 3, 8
    assert packing
    call = Call(nn.Dropout().eval(), heads, heads, width, 0.4, 0.0, causal, True)
    tokens = packing.ends(last=True) if pooled else None
    x, distances = random(packing.tokens, 3 * heads * width, dtype=dtype), functional.pad(random(heads, 2 * reach - 1, seed=3), (0, kernels.LANES))
    exact, added = x.double().requires_grad_(), distances.double().requires_grad_()
    with torch.no_grad():
        piece, given = KernelAttention(call, dtype), Given(packing, tokens, distances=distances.requires_grad_())
        tape = tape_of([piece], given, flows=True, learns=True)
        found = tape.run(piece, x)
        d = random(*found.shape, seed=9, dtype=dtype)
        tape.resume([*tape.inputs[piece], *tape.kept])
        gradient, of_distances = tape.back(piece, d), tape.collect()[1]
    answers, places = [], []
    for number, (first, length) in enumerate(packing.rows.tolist()):
        q, k, v = exact[first : first + length].view(length, 3, heads, width).unbind(1)
        apart = torch.arange(length) - torch.arange(length)[:, None] + reach - 1
        whole = reference(q, k, v, call, 1.0, added[:, apart])
        answers.append(whole[-1] if pooled else whole)
        places.append(number if pooled else slice(first, first + length))
    for place, answer in zip(places, answers, strict=True):
        close(found[place], answer, dtype)
    expected = torch.autograd.grad(answers, [exact, added], [d[place].double() for place in places])
    close(gradient, expected[0], dtype)
    close(of_distances, expected[1], dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("lengths,others", [([1], [4]), ([5, 2, 7, 7], [1, 40, 3, 40]), ([2, 2], [3, 3])], ids=str)
@pytest.mark.parametrize("pooled", [False, True])
def test_attention_to_the_tokens_of_another_stack(pooled: bool, lengths: list[int], others: list[int], dtype: torch.dtype) -> None:
    """Packed in an order of their own."""
    packing, by = (Packing.of(torch.arange(max(counts)) < torch.tensor(counts)[:, None]) for counts in (lengths, others))
    assert packing and by
    call, width = Call(nn.Dropout().eval(), 4, 2, 8, 0.4, 0.0, False, True), 32
    tokens = packing.ends(last=True) if pooled else None
    x, keys = random(len(lengths) if pooled else packing.tokens, width, dtype=dtype), random(by.tokens, width, seed=1, dtype=dtype)
    piece = KernelAttention(call, dtype, memory=Fused([]))
    with torch.no_grad():
        tape = tape_of([piece], Given(packing, tokens, encoded=keys.requires_grad_(), encoded_by=by), flows=True, learns=True)
        found = tape.run(piece, x)
        d = random(*found.shape, seed=9, dtype=dtype)
        tape.resume([*tape.inputs[piece], *tape.kept])
        gradient = tape.back(piece, d), tape.collect()[0]
    exact, answers, places = [x.double().requires_grad_(), keys.double().requires_grad_()], [], []
    order, theirs = (range(len(lengths)) if p.order is None else p.order.tolist() for p in (packing, by))
    for number, (first, length) in enumerate(packing.rows.tolist()):
        start, count = by.rows[list(theirs).index(order[number])].tolist()
        assert (length, count) == (lengths[order[number]], others[order[number]])
        place = slice(number, number + 1) if pooled else slice(first, first + length)
        k, v = exact[1][start : start + count].view(count, 2, 2, 8).unbind(1)
        answers.append(reference(exact[0][place].view(-1, 4, 8), k, v, call, 1.0))
        places.append(place)
    assert pooled or not found[sum(lengths) :].any()
    for place, answer in zip(places, answers, strict=True):
        close(found[place], answer, dtype)
    for one, other in zip(gradient, torch.autograd.grad(answers, exact, [d[place].double() for place in places]), strict=True):
        assert one is not None
        close(one, other, dtype)


def through(piece: Piece, x: Tensor, packing: Packing, tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, the gradient of x and the gradient of y that it is of"""
    tape = tape_of([piece], Given(packing, tokens), flows=True, learns=True)
    y = tape.run(piece, x)
    d = random(*y.shape, seed=9, dtype=x.dtype)
    if tokens is None:
        d[packing.tokens - packing.spare :] = 0
    tape.resume([*tape.inputs[piece], *tape.kept])
    return y, tape.back(piece, d), d


@needs_kernels
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_of_attention_is_the_same_on_the_way_back(causal: bool) -> None:
    """What drops is seen where values are the unit vectors, and then held against the gradients of all three."""
    lengths, width, p = [32, 16], 32, 0.3
    call = Call(nn.Dropout(p).train(), 2, 2, width, 0.3, p, causal, True)
    packing, piece = Packing.of(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]), KernelAttention(call, torch.float32)
    assert packing

    def split(x: Tensor) -> list[Tensor]:
        return [part.unflatten(1, (2, width)) for part in x.chunk(3, 1)]

    x = random(packing.tokens, 6 * width)
    plain = x.clone()
    for first, length in packing.rows.tolist():
        plain[first : first + length, 4 * width :] = torch.eye(length, width).repeat(1, 2)
    torch.manual_seed(1)
    used = through(piece, plain, packing, None)[0].unflatten(1, (2, width))
    torch.manual_seed(1)
    found, gradient, d = through(piece, x, packing, None)
    exact, answers, dropped = x.double().requires_grad_(), [], []
    for first, length in packing.rows.tolist():
        own = slice(first, first + length)
        q, k, v = split(exact[own])
        scores = torch.einsum("thd,shd->hts", q, k) * call.scale
        seen = torch.ones(length, length, dtype=torch.bool).tril() if causal else torch.ones(length, length, dtype=torch.bool)
        factors = (used[own, :, :length].transpose(0, 1).double() / scores.masked_fill(~seen, -torch.inf).softmax(-1).detach())[:, seen].round(decimals=4)
        assert set(factors.unique().tolist()) == {0.0, round(1 / (1 - p), 4)}
        dropped.append(factors == 0)
        mask = torch.zeros(2, length, length, dtype=torch.float64)
        mask[:, seen] = (factors > 0).double() / (1 - p)
        answers.append(reference(q, k, v, call, mask))
    share = torch.cat([one.flatten() for one in dropped]).double().mean()
    assert abs(float(share) - p) < 0.05
    if not causal:  # that two of these are the same is chance, of one in some hundreds
        masks = {tuple(row.tolist()) for one, length in zip(dropped, lengths, strict=True) for row in one.view(-1, length)[:, :16]}
        assert len(masks) > 2 * sum(lengths) - 8
    real = sum(lengths)
    close(found[:real], torch.cat(answers), torch.float32)
    close(gradient[:real], torch.autograd.grad(answers, exact, list(d[:real].double().split(lengths)))[0][:real], torch.float32)


@needs_kernels
def test_dropout_is_even_and_independent() -> None:
    """In rows, in columns, between neighbours and between draws."""
    shape, p = (400, 500), 0.1
    joined = join([nn.Dropout(p).train()], None, False, torch.float32)

    def mask() -> Tensor:
        tape = tape_of(joined.pieces, Given(Packing.whole(*shape)), flows=False, learns=False)
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
@pytest.mark.parametrize("replaces", [False, True])
def test_a_norm_may_learn_alone_and_be_the_last(replaces: bool) -> None:
    """Nothing that learns is below it, and nobody reads h."""
    norm = nn.LayerNorm(20)
    joined = join((), norm, replaces, torch.bfloat16, last=replaces)
    x, y, d = random(6, 20), random(6, 20, seed=1, dtype=torch.bfloat16), random(6, 20, seed=2)
    tape = tape_of(joined.pieces, Given(Packing.whole(6, 1)), flows=False, learns=True)
    with torch.no_grad():
        past, _ = joined.forward(x, y, tape)
    tape.resume([*norm.parameters(), *tape.kept])
    assert joined.backward(d, None if replaces else d.bfloat16(), tape) == (None, None)
    exact = norm(x + y.float())
    close(past, exact if replaces else x + y.float(), torch.float32)
    for found, expected in zip(tape.collect(), torch.autograd.grad(exact, list(norm.parameters()), d.bfloat16().float() if not replaces else d), strict=True):
        close(found, expected, torch.float32)  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(20)], ids=["bare", "normed"])
def test_nothing_may_join_yet(norm: nn.Module | None, dtype: torch.dtype) -> None:
    """Of the join that opens a block: what goes past is x itself, and its gradient the sum of both."""
    joined, x = join((), norm, False, dtype, first=True), random(6, 20).requires_grad_()
    d_past, d_h = random(6, 20, seed=1), random(6, 20, seed=2).to(dtype)
    tape = tape_of(joined.pieces, Given(Packing.whole(6, 1)), flows=True, learns=True)
    with torch.no_grad():
        past, h = joined.forward(x, None, tape)
    tape.resume([*(norm.parameters() if norm else (None, None)), *tape.kept])
    found, of_y = joined.backward(d_past, d_h, tape)
    exact = norm(x) if norm else x
    assert torch.equal(past, x)
    close(h, exact, dtype if norm else torch.float32)
    (expected,) = torch.autograd.grad((x * d_past).sum() + (exact * d_h.float()).sum(), x)
    assert found is not None and of_y is found
    close(found, expected, torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("learns", ["x", "weights", "both"])
@pytest.mark.parametrize("heads,groups,width", [(4, 2, 8), (3, 3, 20), (8, 1, 64)])
def test_norms_of_heads(heads: int, groups: int, width: int, learns: str, dtype: torch.dtype) -> None:
    """Queries and keys by their norms, values as they are."""
    norms = [nn.RMSNorm(width, eps=1e-5) for _ in range(2)]
    for number, norm in enumerate(norms):
        norm.weight.data = random(width, seed=5 + number)
    call = Call(nn.Module(), heads, groups, width, 1.0, 0.0, True, True)
    piece, x, d = head_norms(call, norms[0], norms[1], dtype), *(random(60, (heads + 2 * groups) * width, seed=seed, dtype=dtype) for seed in range(2))
    assert piece is not None
    tape, flows = tape_of([piece], Given(Packing.whole(60, 1)), flows=learns != "weights", learns=True), (learns != "weights", *[learns != "x"] * 2)
    tape.flows = True
    with torch.no_grad():
        y = piece.forward(x, piece.tensors(tape.given), flows, tape)
        d_x, of_weights = piece.backward(d, tuple(tape.kept), piece.tensors(tape.given), flows, tape)
    exact, weights = x.double().view(60, -1, width).requires_grad_(), [norm.weight.detach().double().requires_grad_() for norm in norms]
    parts = exact.split([heads, groups, groups], 1)
    expected = torch.cat([*(part * (part.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight for part, weight in zip(parts, weights, strict=False)), parts[2]], 1)
    close(y, expected.flatten(1), dtype)
    gradients = torch.autograd.grad(expected, [exact, *weights], d.double().view_as(expected))
    assert (d_x is not None) == flows[0] and all((found is not None) == flows[1] for found in of_weights)
    for found, wanted in zip((d_x, *of_weights), gradients, strict=True):
        if found is not None:
            close(found, wanted.flatten(1) if wanted.dim() > 1 else wanted, dtype)


@needs_kernels
@pytest.mark.parametrize("p", [1.0, 0.9999999])
def test_all_may_drop(p: float) -> None:
    joined, x = join([nn.Dropout(p).train()], None, False, torch.float32), random(4, 20)
    tape = tape_of(joined.pieces, Given(Packing.whole(4, 1)), flows=False, learns=False)
    assert torch.equal(joined.forward(x, torch.ones(4, 20), tape)[0], x)


def test_what_computes_otherwise_is_not_taken(tmp_path: Path) -> None:
    """The check of a build fails where its numbers are wrong."""
    compiler = kernels._compiler()
    if compiler is None:
        pytest.skip("no compiler on this machine")
    sources = [tmp_path / path.name for path in kernels.HERE.glob("*.[ch]*")]
    for path in sources:
        path.write_text((kernels.HERE / path.name).read_text(encoding="utf-8").replace("1 / totals[i]", "2 / totals[i]"), encoding="utf-8")
    built = tmp_path / "kernels.so"
    subprocess.run([compiler, *kernels.FLAGS, *(str(path) for path in sources if path.suffix == ".cpp"), "-o", str(built)], check=True)
    ended = subprocess.run([sys.executable, str(kernels.HERE / "check.py"), str(built)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "attention" in ended.stderr


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that knows of no kernels yet, and its cache folder."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    for function in (kernels._load, kernels.kernel, kernels._files):
        monkeypatch.setattr(kernels, function.__name__, functools.cache(function.__wrapped__))
    return tmp_path / "cache"


def script(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("hidden", ["compiler", "switch", "broken", "no program"])
def test_machines_without_kernels_do_without(hidden: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    if hidden == "compiler":
        monkeypatch.setattr(kernels, "_compiler", lambda: None)
    elif hidden == "switch":
        monkeypatch.setenv(kernels.SWITCH, "OFF")
    elif hidden == "broken":
        monkeypatch.setenv("CXX", script(tmp_path / "c++", "#!/bin/sh\necho 'x.cpp:1: error: no OpenMP here' >&2; exit 1\n"))
    else:
        monkeypatch.setenv("CXX", script(tmp_path / "c++", "not a program"))
    kernels.ensure(said.append)
    assert kernels.kernel("gelu", torch.float32) is None and kernels.outcome().startswith("none: ")
    if hidden == "broken":  # said once, and not tried again by the next process
        assert said[1:] == ["kernels: none: x.cpp:1: error: no OpenMP here"] and [path.suffix for path in fresh.iterdir()] == [".failed"]
        kernels._load.cache_clear()
        kernels.ensure(said.append)
        assert len(said) == 2 and "no OpenMP here (to try again, delete " in kernels.outcome()
    assert type(join([nn.Dropout()], nn.LayerNorm(4), True, torch.float32)) is Join
    block = FusedBlock(Join((), None, False), [Sublayer([local(nn.GELU())], Join((), None, False)), Sublayer([local(nn.Identity())], Join((), None, False))], False)
    x = random(3, 4)
    torch.testing.assert_close(block(x, Given(Packing.whole(3, 1))), 2 * (x + functional.gelu(x)))


@needs_kernels
@pytest.mark.parametrize("damage", [None, "cut", "read-only"])
def test_kernels_are_compiled_once(damage: str | None, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was cut short is built anew; where nothing can be kept, each process builds its own."""
    said: list[str] = []
    if damage == "read-only":
        monkeypatch.setenv("LUTHIER_CACHE", "/proc/none")
    kernels.ensure(said.append)
    assert len(said) == 1 and kernels.kernel("gelu", torch.float32) and ("this process only" in kernels.outcome()) == (damage == "read-only")
    if damage == "read-only":
        return
    (kept,) = fresh.iterdir()
    leftover = fresh / f"{kernels.BUILDING}old"
    leftover.mkdir()
    os.utime(leftover, (0, 0))
    whole = kept.read_bytes()
    if damage == "cut":
        kept.unlink()  # this process has it mapped
        kept.write_bytes(whole[:100])
    another = "from luthier.compute import kernels; kernels.ensure(print); print(bool(kernels.library()))"
    done = subprocess.run([sys.executable, "-c", another], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n" and kept.stat().st_size == len(whole) and leftover.exists() == (damage is None)


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_not_hidden(bad: float) -> None:
    """A training that diverges must be noticed."""
    for name in kernels.ACTIVATIONS:
        x = torch.tensor([bad, 1.0])
        y, run = torch.empty_like(x), kernels.kernel(name, x.dtype)
        assert run
        run(2, kernels.memory(x), kernels.memory(y), None)
        assert not y[0].isfinite() and y[1].isfinite()
    x = torch.zeros(4, 3 * 8)
    x[1, 0], x[:, 8] = bad, 1  # one query, and keys that it meets
    call = Call(nn.Dropout().eval(), 1, 1, 8, 1.0, 0.0, False, True)
    found = through(KernelAttention(call, x.dtype), x, Packing.whole(1, 4), None)[0]
    assert found[1].isnan().all() and found[[0, 2, 3]].isfinite().all()
    joined = join((), nn.LayerNorm(8), True, torch.bfloat16)
    tape = tape_of(joined.pieces, Given(Packing.whole(1, 4)), flows=False, learns=False)
    with torch.no_grad():
        found = joined.forward(x[:, :8], None, tape)[1]
    assert found[1].isnan().all() and found[0].isfinite().all()
