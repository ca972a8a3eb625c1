"""The command line: each verb's flags, handed to the function of the same name. Errors that a user can mend end with exit code 2."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.errors import UserError, disk_is_full

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help="Fit a pretrained transformer to a job, and prove that it got better.")
runs_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List runs, compare two.")
app.add_typer(runs_app, name="runs")

Run = Annotated[Path, typer.Argument(help="a run folder")]
Base = Annotated[str | None, typer.Option(help="where the base model of an adapter run lies now")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the GPU where there is one")]
Columns = Annotated[str | None, typer.Option(help="role=column pairs, such as text=body,label=team")]
Where = Annotated[str | None, typer.Option(help="column=value pairs that rows must have, such as lang=swa")]
Encoding = Annotated[str | None, typer.Option(help="of text files; UTF-8")]
Precision = Annotated[str | None, typer.Option(help="auto, fp32, bf16 or int8, whose cost is measured on the rows; without it that of the run, or auto")]


@app.callback()
def root(debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False) -> None:
    if debug:
        os.environ["LUTHIER_DEBUG"] = "1"


def _adapt() -> None:
    """The flags of `adapt` are the fields of the recipe, and those of one call."""

    @app.command()
    def adapt(
        recipe: Annotated[Path | None, typer.Argument(help="a recipe.yaml; flags override it")] = None,
        model: Annotated[str | None, typer.Option(help="folder of a pretrained model, or a run to go on from")] = None,
        data: Annotated[str | None, typer.Option(help="a file, a folder with train/validation/test files, or python:FOLDER")] = None,
        task: Annotated[str | None, typer.Option(help="see `luthier tasks`; inferred from the columns")] = None,
        columns: Columns = None,
        text: Annotated[str | None, typer.Option(help="short for --columns text=...")] = None,
        text_pair: Annotated[str | None, typer.Option(help="short for --columns text_pair=...")] = None,
        label: Annotated[str | None, typer.Option(help="short for --columns label=...")] = None,
        where: Where = None,
        encoding: Encoding = None,
        group: Annotated[str | None, typer.Option(help="column whose values must not be on two sides of a split")] = None,
        train_rows: Annotated[int | None, typer.Option(help="use only so many training rows")] = None,
        method: Annotated[str | None, typer.Option(help="a stack, such as 'lora(r=8)' or 'reinit(top=1)|full'")] = None,
        epochs: Annotated[float | None, typer.Option(help="passes over the training rows; from their number")] = None,
        max_steps: Annotated[int | None, typer.Option(help="stop after so many steps")] = None,
        batch_size: Annotated[int | None, typer.Option(help="rows of one optimiser step; 32")] = None,
        micro_batch_size: Annotated[int | None, typer.Option(help="rows that go through the model at once; the result stays the same")] = None,
        micro_batch_tokens: Annotated[int | None, typer.Option(help="tokens that go through the model at once, padding included; the result stays the same")] = None,
        gradient_checkpointing: Annotated[bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="keep less for the way back and compute it again; the result stays the same")] = None,
        lr: Annotated[float | None, typer.Option(help="peak learning rate; from method and model size")] = None,
        warmup: Annotated[float | None, typer.Option(help="share of the steps in which the rate rises; 0.1")] = None,
        schedule: Annotated[str | None, typer.Option(help="linear, cosine, constant")] = None,
        weight_decay: Annotated[float | None, typer.Option(help="of matrices, by AdamW; 0.01")] = None,
        clip: Annotated[float | None, typer.Option(help="largest norm of the gradient; 1")] = None,
        dropout: Annotated[bool | None, typer.Option("--dropout/--no-dropout", help="the model's own dropout while it trains; off is faster on a CPU")] = None,
        reuse: Annotated[bool | None, typer.Option("--reuse/--no-reuse", help="run blocks below all that learns once for all passes, without dropout")] = None,
        max_length: Annotated[int | None, typer.Option(help="tokens of a row; what the model takes, at most 1024")] = None,
        option: Annotated[list[str] | None, typer.Option("--set", help="an option of the task, name=value (repeatable)")] = None,
        evaluate_every: Annotated[float | None, typer.Option(help="passes between two evaluations; 1")] = None,
        patience: Annotated[int | None, typer.Option(help="stop after so many evaluations without a better one")] = None,
        metric: Annotated[str | None, typer.Option(help="the validation metric that chooses the best checkpoint")] = None,
        save: Annotated[str | None, typer.Option(help="auto, adapter, merged, difference")] = None,
        precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16")] = None,
        baselines: Annotated[bool | None, typer.Option("--baselines/--no-baselines", help="measure cheap baselines beside the result")] = None,
        seed: Annotated[int | None, typer.Option(help="of new heads, row order, dropout and splits; 0")] = None,
        tensorboard: Annotated[bool | None, typer.Option("--tensorboard/--no-tensorboard", help="write TensorBoard files")] = None,
        out: Annotated[Path, typer.Option(help="the run folder")] = Path("run"),
        overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT once the new run is complete")] = False,
        resume: Annotated[bool, typer.Option("--resume", help="go on with the unfinished OUT.partial")] = False,
        device: Device = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="check and print the plan; load no weights, write nothing")] = False,
    ) -> None:
        """Adapt a pretrained model to rows; leaves a run folder."""
        given = {
            name: value
            for name, value in locals().items()
            if value is not None and name not in ("recipe", "columns", "where", "text", "text_pair", "label", "option", "out", "overwrite", "resume", "device", "dry_run")
        }
        roles = _pairs(columns, "--columns") | {role: name for role, name in (("text", text), ("text_pair", text_pair), ("label", label)) if name}
        if roles:
            given["columns"] = roles
        if where:
            given["where"] = _pairs(where, "--where")
        if option:
            given["options"] = {name: _value(text) for item in option for name, text in _pairs(item, "--set", split=False).items()}
        from luthier.recipe import Recipe

        if recipe is None and ("model" not in given or "data" not in given):
            missing = " and ".join(f"--{name}" for name in ("model", "data") if name not in given)
            raise UserError(f"{missing} missing. For example: luthier adapt --model ./minilm --data tickets.csv --out run")
        settings = Recipe.load(recipe, **given) if recipe else Recipe.build(**given)
        from luthier.verbs.adapt import adapt as verb

        verb(recipe=settings, out=out, overwrite=overwrite, resume=resume, device=device, dry_run=dry_run)


_adapt()


@app.command()
def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Option(help="a source; the run's own rows without it")] = None,
    split: Annotated[str, typer.Option(help="train, validation, test")] = "test",
    columns: Columns = None,
    where: Where = None,
    encoding: Encoding = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows at once")] = 64,
    base: Base = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure a run on rows, with 95 % intervals."""
    from luthier.verbs.evaluate import evaluate as verb

    found = verb(run, data, split=split, columns=_pairs(columns, "--columns"), where=_pairs(where, "--where") or None, encoding=encoding, batch_size=batch_size, base=base, device=device)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found['rows']} rows ({found['split']} of {found['data']})" + (f", {found['truncated']} of them longer than the run reads" if found["truncated"] else ""))
    for name, metric in found["metrics"].items():
        print(f"  {name:<20} {metric['value']:.4f}  [{metric['low']:.4f}, {metric['high']:.4f}]")


@app.command()
def predict(
    run: Run,
    data: Annotated[str, typer.Option(help="a file, or - for standard input (a text or a JSON object a line)")] = "-",
    out: Annotated[Path | None, typer.Option(help="csv, tsv, jsonl(.gz) or parquet; standard output without it")] = None,
    top: Annotated[int, typer.Option(min=1, help="so many labels with their scores")] = 1,
    columns: Columns = None,
    where: Where = None,
    encoding: Encoding = None,
    precision: Precision = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows at once")] = 64,
    base: Base = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
) -> None:
    """Add predictions to every row of a file; an interrupted one goes on where it stopped."""
    from luthier.verbs.predict import predict as verb

    verb(run, data, out=out, top=top, columns=_pairs(columns, "--columns"), where=_pairs(where, "--where") or None, encoding=encoding, precision=precision, batch_size=batch_size, base=base, device=device, overwrite=overwrite)


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help="a run folder of sentence-similarity, or a stock model folder")],
    data: Annotated[str, typer.Option(help="a file of texts")],
    out: Annotated[Path, typer.Option(help="vectors.npy (n, d), or rows and vectors as .parquet")],
    part: Annotated[str, typer.Option(help="document or query: which of the model's prefixes the texts get")] = "document",
    column: Annotated[str | None, typer.Option(help="the column of texts")] = None,
    where: Where = None,
    encoding: Encoding = None,
    precision: Precision = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts at once")] = 64,
    base: Base = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
) -> None:
    """Write the vector of every text of a file; an interrupted one goes on where it stopped."""
    from luthier.verbs.embed import embed as verb

    verb(model, data, out=out, part=part, column=column, where=_pairs(where, "--where") or None, encoding=encoding, precision=precision, batch_size=batch_size, base=base, device=device, overwrite=overwrite)


@app.command()
def search(
    run: Run,
    words: Annotated[list[str], typer.Argument(help="the question")],
    over: Annotated[str, typer.Option(help="a source, such as python:FOLDER or docs.csv")],
    top: Annotated[int, typer.Option(min=1, help="how many answers")] = 5,
    columns: Columns = None,
    encoding: Encoding = None,
    base: Base = None,
    device: Device = None,
) -> None:
    """Find the rows of a source that answer a question, with an embedding run."""
    from luthier.verbs.search import search as verb

    for hit in verb(run, over=over, words=" ".join(words), top=top, columns=_pairs(columns, "--columns"), encoding=encoding, base=base, device=device)[0]:
        print(f"{hit.score:.3f}  {hit.row.where}  {hit.row.get('name') or ''}".rstrip() + f"\n       {' '.join(hit.text.split())[:120]}")


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="the new folder")],
    save: Annotated[str, typer.Option(help="merged")] = "merged",
    base: Base = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
) -> None:
    """Write a run as a stock model folder, checked on probe inputs."""
    from luthier.verbs.export import export as verb

    print(verb(run, out=out, save=save, base=base, overwrite=overwrite))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="show the card of one")] = None) -> None:
    """The methods there are, or the card of one."""
    from luthier.verbs.catalogue import method_card, method_table

    print(method_card(name) if name else method_table())


@app.command()
def tasks() -> None:
    """The tasks there are, and the columns each reads."""
    from luthier.verbs.catalogue import task_table

    print(task_table())


@app.command()
def contract(
    method: Annotated[str | None, typer.Argument(help="a method, by name")] = None,
    everything: Annotated[bool, typer.Option("--all", help="every method")] = False,
) -> None:
    """Run the contract suite: what every method promises, on tiny models of every architecture."""
    from luthier.contract import run

    if method is None and not everything:
        raise UserError("Name a method, or give --all.")
    raise typer.Exit(run(method))


@app.command()
def doctor(
    again: Annotated[bool, typer.Option("--again", help="measure anew")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """What this machine can do, what was chosen, and what luthier never does."""
    from luthier.verbs.doctor import doctor as verb
    from luthier.verbs.doctor import lines

    facts = verb(again)
    print(json.dumps(facts) if as_json else "\n".join(lines(facts)))


@runs_app.command("list")
def list_runs(folder: Annotated[Path, typer.Argument(help="where to look")] = Path(".")) -> None:
    """The finished runs below a folder, newest first."""
    from luthier.verbs.catalogue import run_table

    print(run_table(folder))


@runs_app.command("compare")
def compare_runs(
    first: Run,
    second: Run,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Two runs on the same test rows: metrics, the paired difference, cost, and what differs in their recipes."""
    from luthier.runs.compare import compare
    from luthier.verbs.catalogue import comparison

    found = compare(first, second)
    print(json.dumps(found) if as_json else comparison(found))


def _pairs(text: str | None, flag: str, split: bool = True) -> dict[str, str]:
    found: dict[str, str] = {}
    for piece in (text.split(",") if split else [text]) if text else []:
        name, equals, value = piece.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise UserError(f"{flag}: cannot read {piece!r}; write name=value" + (", several separated by commas." if split else "."))
        found[name.strip()] = value.strip() if split else value  # a prefix ends in a blank
    return found


def _value(text: str) -> Any:
    """A number or true/false where the text is one; other text stays as it is, to its last blank."""
    from luthier.methods.settings import read

    value = read(text)
    return text if value == text.strip() else value


def main() -> None:
    """Run the command line and leave with its exit status: 0, 1 (a check failed), 2 (a mistake that the user can mend), typer's own 130 (interrupted)."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        _leave(f"luthier: {error}", error.status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if disk_is_full(error):
            _leave("luthier: the disk is full. What was complete is kept; make room, then go on with --resume.", 2)
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            _leave(f"luthier: {error.filename} cannot be opened: {error.strerror}.", 2)
        raise


def _leave(message: str, status: int) -> None:
    if os.environ.get("LUTHIER_DEBUG"):
        raise
    print(message, file=sys.stderr)
    sys.exit(status)
