"""What int8 costs on the rows that it is asked for: some of them are run in fp32 too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier import machine
from luthier.data.rows import Rows
from luthier.verbs.encoder import Encoder
from luthier.verbs.run import Run

ROWS = 64  # that are run both ways


def sample(count: int) -> list[int]:
    """Up to `ROWS` of so many rows, at even distances, the same each time."""
    return sorted({i * count // ROWS for i in range(ROWS)})


def of_vectors(encoder: Encoder, texts: Sequence[str], part: str) -> str:
    """One line on the vectors of some of `texts`."""
    found = encoder.likeness([texts[i] for i in sample(len(texts))], part)
    return f"int8: cosine with the vector in fp32 {found.mean():.4f} on average, {found.min():.4f} at worst, on {len(found)} of these texts" + _slow(encoder.device)


def of_answers(run: Run, rows: Rows, batch_size: int = 64) -> str:
    """One line on the answers to some of the (typed) rows: how many are the same, and by how much numbers in those differ."""
    some = rows.take(sample(len(rows)))
    answers, exact = (run.at(precision).answers(some, 1, batch_size) for precision in ("int8", "fp32"))
    pairs = [(_apart(a), _apart(b)) for a, b in zip(answers, exact, strict=True)]
    same = [(numbers, others) for (numbers, words), (others, expected) in pairs if words == expected]
    changes = [abs(a - b) for numbers, others in same for a, b in zip(numbers, others, strict=True)]
    told = [f"{len(same)} of {len(some)} of these rows get the answer of fp32"] if any(words for _, (_, words) in pairs) else []
    told += [f"numbers differ by at most {max(changes):.4g}" + ("" if told else f" on {len(some)} of these rows")] if changes else []
    return "int8: " + ", ".join(told) + _slow(run.device)


def _apart(answer: Any) -> tuple[list[float], list[Any]]:
    """The numbers of an answer, and all else in it."""
    if isinstance(answer, float):
        return [answer], []
    if not isinstance(answer, (Mapping, list)):
        return [], [answer]
    parts = [_apart(part) for part in (answer.values() if isinstance(answer, Mapping) else answer)]
    return [number for numbers, _ in parts for number in numbers], [word for _, words in parts for word in words]


def _slow(device: str) -> str:
    why = machine.choose_precision("int8", device)[1]
    return "" if why == "given" else f"; {why}"
