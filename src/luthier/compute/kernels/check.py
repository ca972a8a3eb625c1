"""Whether freshly compiled kernels run here and compute what they should: `python check.py kernels.so`, status 0 if so. Imports no torch, as it runs once for every build."""

from __future__ import annotations

import ctypes
import math
import struct
import sys

Floats = ctypes.c_float * 16
TOKENS, WIDTH = 3, 2


def main(path: str) -> None:
    kernels = ctypes.CDLL(path)
    wrong = [check.__name__ for check in (activation, norm, attention, cross_entropy, optimiser) if not check(kernels)]
    if wrong:
        sys.exit(f"wrong: {wrong}")


def activation(kernels: ctypes.CDLL) -> bool:
    x, y = Floats(*(i - 8.0 for i in range(16))), Floats()
    kernels.gelu_float32(ctypes.c_int64(16), x, y, None)
    return _near(y, [a * 0.5 * (1 + math.erf(a / math.sqrt(2))) for a in x])


def norm(kernels: ctypes.CDLL) -> bool:
    x, y, weight, bias = Floats(*(float(i * i % 7) for i in range(16))), Floats(), Floats(*[2.0] * 16), Floats(*[1.0] * 16)
    number, real = ctypes.c_int64, ctypes.c_double
    kernels.join_forward_float32(number(1), number(16), x, None, None, real(0), weight, bias, real(1e-5), number(1), None, y, None, None, None)
    mean = sum(x) / 16
    scale = (sum((a - mean) ** 2 for a in x) / 16 + 1e-5) ** -0.5
    return _near(y, [(a - mean) * scale * 2 + 1 for a in x])


def attention(kernels: ctypes.CDLL) -> bool:
    """In both types, as processors that multiply bfloat16 by pairs have instructions for it."""
    columns, number, real = 3 * WIDTH, ctypes.c_int64, ctypes.c_double
    row = (number * 6)(0, TOKENS, 0, TOKENS, 0, 0)
    halves = (ctypes.c_uint16 * (TOKENS * columns + 16))(*(_upper_half(math.sin(i)) for i in range(TOKENS * columns)))
    x, y, y_halves = (ctypes.c_float * len(halves))(*map(_of_upper_half, halves)), Floats(), (ctypes.c_uint16 * 16)()
    for run, start, out in ((kernels.attention_forward_float32, x, y), (kernels.attention_forward_bfloat16, halves, y_halves)):
        keys = ctypes.byref(start, WIDTH * ctypes.sizeof(start._type_))
        run(number(1), row, number(1), number(1), number(WIDTH), number(0), real(0.5), None, None, number(0), None, start, number(columns), keys, number(columns), None, real(0), out, None)
    at = [[list(x[t * columns + part * WIDTH : t * columns + (part + 1) * WIDTH]) for t in range(TOKENS)] for part in range(3)]
    expected = []
    for query in at[0]:
        weights = [math.exp(0.5 * sum(a * b for a, b in zip(query, key, strict=True))) for key in at[1]]
        expected += [sum(w * value[i] for w, value in zip(weights, at[2], strict=True)) / sum(weights) for i in range(WIDTH)]
    return _near(y, expected) and _near(Floats(*map(_of_upper_half, y_halves)), expected, 2**-7)


def cross_entropy(kernels: ctypes.CDLL) -> bool:
    x, losses, d = Floats(*(math.sin(i) * 3 for i in range(16))), Floats(), Floats()
    kernels.cross_entropy_float32(ctypes.c_int64(1), ctypes.c_int64(16), x, (ctypes.c_int64 * 1)(5), losses, d)
    total = sum(math.exp(a) for a in x)
    return _near(losses, [math.log(total) - x[5]] + [0.0] * 15) and _near(d, [math.exp(a) / total - (i == 5) for i, a in enumerate(x)])


def optimiser(kernels: ctypes.CDLL) -> bool:
    """The first step, in which both moments are those of the gradient alone."""
    lr, decay, scale, eps = 0.1, 0.01, 0.5, 1e-8
    start, d = [float(i) for i in range(16)], Floats(*(i - 7.5 for i in range(16)))
    value, mean, square, steps, row = Floats(*start), Floats(), Floats(), Floats(), (ctypes.c_uint8 * 1)()
    total, narrow = (ctypes.c_double * 1)(), (ctypes.c_uint8 * 1)(0)

    def each(x: object) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * 1)(ctypes.addressof(x) if x is not None else None)  # type: ignore[arg-type]

    one, width = (ctypes.c_int64 * 1)(1), (ctypes.c_int64 * 1)(16)
    kernels.squares_float32(ctypes.c_int64(1), width, each(d), narrow, total)
    kernels.adamw_float32(ctypes.c_int64(1), one, width, each(value), each(d), narrow, *map(each, (None, mean, square, steps, row)), *map(ctypes.c_double, (lr, decay, 0.9, 0.999, eps, scale)))
    expected = [a * (1 - lr * decay) - lr * math.copysign(1, b) for a, b in zip(start, d, strict=True)]
    return _near(value, expected) and _near(mean, [0.1 * scale * b for b in d]) and abs(total[0] - sum(b * b for b in d)) < 1e-3


def _near(found: ctypes.Array[ctypes.c_float], expected: list[float], within: float = 1e-5) -> bool:
    return all(abs(a - b) < within * max(1, abs(b)) for a, b in zip(found, expected, strict=False))


def _upper_half(x: float) -> int:
    """The bits of a bfloat16 near x."""
    (bits,) = struct.unpack("I", struct.pack("f", x))
    return int(bits) >> 16


def _of_upper_half(bits: int) -> float:
    return float(struct.unpack("f", struct.pack("I", bits << 16))[0])


if __name__ == "__main__":
    main(sys.argv[1])
