"""One trial, run as a script in a process of its own: `python trial.py fp32|bf16|int8`. Prints one JSON object; a crash is an answer too."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the largest entry, or of the norm
HEAD = 32  # width of an attention head
SECONDS = 0.25  # for one speed


def main(kind: str) -> None:
    _leave_no_core_file()
    torch.manual_seed(0)
    if kind == "int8":
        int8 = _int8()
        reason = wrong_whole_products(int8) if int8.exists else "this torch has no int8 kernels of oneDNN for this processor"
        flops = {} if reason else {"onednn": speed_in_int8(int8)}
    else:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
        reason = wrong_products(dtype) or wrong_training(dtype)
        flops = {} if reason else speeds(dtype)
    print(json.dumps({"sound": not reason, "flops": flops, "reason": reason}))


def wrong_products(dtype: torch.dtype) -> str:
    """Products of odd and even sizes and their gradients against float64; empty where they agree."""
    for rows, inputs, outputs in ((7, 33, 65), (512, 384, 384), (31, 384, 1536)):
        x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs) * inputs**-0.5
        found, expected = (_product(x.to(t).requires_grad_(), w.to(t).requires_grad_(), dtype) for t in (torch.float32, torch.float64))
        for name, got, want in zip(("a product", "the gradient of an input", "the gradient of a weight"), found, expected, strict=True):
            error = float((got.double() - want).abs().max() / want.abs().max())
            if not error < TOLERANCE[dtype]:
                return f"{name} is wrong by {error:.1e}"
    return ""


def wrong_whole_products(int8: Any) -> str:
    """Products of rounded numbers, the largest that there are among them, against float64; empty where they agree."""
    for rows, inputs, outputs in ((1, 33, 65), (512, 384, 384), (31, 1536, 384)):
        x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        x[0], w[0] = 1, 1  # every number the largest: what is added up in 16 bits on the way overflows
        (rounded_x, of_x), (rounded_w, of_w) = int8.rounded(x), int8.rounded(w)
        want = (rounded_x.double() @ rounded_w.double().T) * of_x.double() * of_w.double().T
        error = float((int8.Product(w, None)(x).double() - want).abs().max() / want.abs().max())
        if not error < TOLERANCE[torch.float32]:
            return f"a product is wrong by {error:.1e}"
    return ""


def _product(x: Tensor, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    with _autocast(x, dtype):
        y = functional.linear(x, w)
    return y.detach(), *torch.autograd.grad(y.pow(2).sum(), (x, w))


def wrong_training(dtype: torch.dtype) -> str:
    """The gradients of two encoder blocks on padded rows against float64; empty where they agree."""
    x, weights = torch.randn(3, 29, 2 * HEAD), block_weights(2 * HEAD)
    keep = torch.arange(29) < torch.tensor([[29], [17], [3]])
    found, expected = (training_step(x.to(t), [w.to(t) for w in weights], keep, dtype) for t in (torch.float32, torch.float64))
    for got, want in zip(found, expected, strict=True):
        error = float((got.double() - want).norm() / want.norm())
        if not error < TOLERANCE[dtype]:
            return f"a gradient of an encoder block is wrong by {error:.1e}"
    return ""


def block_weights(width: int) -> list[Tensor]:
    """qkv, output, up and down of one block, each (out, in)."""
    return [torch.randn(outputs, inputs) * inputs**-0.5 for outputs, inputs in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))]


def training_step(x: Tensor, weights: list[Tensor], keep: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The gradients of the weights of two blocks that share them, for x (rows, tokens, width) whose padding `keep` marks as False."""
    weights = [w.detach().requires_grad_() for w in weights]
    with _autocast(x, dtype):
        out = block(block(x, weights, keep), weights, keep)
    return torch.autograd.grad((out * keep[:, :, None]).pow(2).mean(), weights)


def block(x: Tensor, weights: list[Tensor], keep: Tensor) -> Tensor:
    rows, tokens, width = x.shape
    qkv, output, up, down = weights
    q, k, v = (part.view(rows, tokens, -1, HEAD).transpose(1, 2) for part in functional.linear(functional.layer_norm(x, (width,)), qkv).chunk(3, dim=-1))
    seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
    x = x + functional.linear(seen.transpose(1, 2).reshape(rows, tokens, width), output)
    return x + functional.linear(functional.gelu(functional.linear(functional.layer_norm(x, (width,)), up)), down)


def speeds(dtype: torch.dtype) -> dict[str, float]:
    """FLOP per second by route (`training` on one core); with fp32 also `bandwidth`, bytes per second."""
    rows, width = 1024, 384
    x, w = torch.randn(rows, 2 * width).to(dtype), torch.randn(4 * width, 2 * width).to(dtype)
    flop = 2 * rows * x.shape[1] * w.shape[0]
    with torch.inference_mode():
        found = {"linear": flop / fastest(lambda: functional.linear(x, w))}
        if dtype == torch.float32 and torch.backends.mkldnn.is_available():
            found["onednn"] = flop / fastest(lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
    if dtype == torch.float32:
        source, target = torch.ones(16_000_000), torch.empty(16_000_000)
        found["bandwidth"] = 2 * source.numel() * 4 / fastest(lambda: target.copy_(source))
    # the types are compared by processor time on one core, which other programs that run meanwhile change little
    torch.set_num_threads(1)
    batch, weights = torch.randn(4, rows // 8, width), block_weights(width)
    keep = torch.arange(rows // 8) < torch.linspace(rows // 16, rows // 8, 4)[:, None]
    tokens = batch[..., 0].numel()
    products = 2 * (tokens * sum(weight.numel() for weight in weights) + 2 * tokens * batch.shape[1] * width)  # of two blocks, forward
    found["training"] = 3 * 2 * products / fastest(lambda: training_step(batch, weights, keep, dtype), time.process_time)
    return found


def speed_in_int8(int8: Any) -> float:
    """FLOP per second of the products that `speeds` takes."""
    x, product = torch.randn(1024, 768), int8.Product(torch.randn(1536, 768), None)
    with torch.inference_mode():
        return 2 * x.numel() * 1536 / fastest(lambda: product(x))


def fastest(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of the rounds that fit into SECONDS, at least three, after one to warm up."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def _int8() -> Any:
    """What computes in int8 later, without the packages around it: they would set the cap under which this trial was not started."""
    spec = importlib.util.spec_from_file_location("int8", Path(__file__).parents[1] / "compute" / "int8.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _autocast(x: Tensor, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """As training does it; the float64 reference stays as it is."""
    return torch.autocast("cpu", dtype) if dtype == torch.bfloat16 and x.dtype == torch.float32 else contextlib.nullcontext()


def _leave_no_core_file() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(sys.argv[1])
