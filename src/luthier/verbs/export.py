"""`luthier export`: a finished run in another form, refused where it would answer differently."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier import compute
from luthier.data.batch import Batch
from luthier.errors import UserError
from luthier.methods import loading, saving
from luthier.runs import RunFolder
from luthier.tasks.base import Features, encode_texts, hidden_states, padded
from luthier.verbs.run import Run, load

TEXTS = ("The quick brown fox jumps over the lazy dog.", "Yes", "What is the capital of the country with the longest coast?")


def export(run: Run | str | Path, *, out: str | Path, save: str = "merged", base: str | Path | None = None, overwrite: bool = False, console: Any = None) -> Path:
    """Write the run's model, merged in float32, as a stock transformers folder. Returns the folder.

    Raises UserError, with nothing written, where a method cannot be merged or the merged outputs differ by more than 1e-4.
    """
    from luthier.verbs.console import Console

    run = load(run.path, base or run.base, "cpu") if isinstance(run, Run) else load(run, base, "cpu")
    if save != "merged":
        raise UserError(f"save={save!r}: a finished run can be exported as 'merged'; other forms are chosen when it is trained (adapt --save).")
    folder = RunFolder(out)
    folder.check(overwrite=overwrite, reads=(run.path, *([run.base] if run.base else loading.chain(run.path)), run.record.content["model"]["path"]))
    compute.ready((console or Console()).say)
    before = _answers(run.model, run)
    model = loading.load_plain(run.path, type(run.task).auto_class, run.task.configure, run.base)
    difference = saving.difference(before, _answers(model, run))
    if not difference <= saving.TOLERANCE:
        raise UserError(f"Merging changes outputs by {difference:.1e}, more than {saving.TOLERANCE:g}: refused, nothing was written.")
    folder.start(overwrite=overwrite)
    try:
        saving.save_stock(model, folder.partial)
        run.tokenizer.save_pretrained(str(folder.partial))
        run.task.companions(folder.partial, run.record.data["max_length"])
        return folder.finish()
    except BaseException:
        shutil.rmtree(folder.partial)
        raise
    finally:
        folder.release()


@torch.no_grad()
def _answers(model: nn.Module, run: Run) -> Tensor:
    """On a few sentences of unequal length, as the model reads them: logits, or hidden states where there is no head."""
    features = [Features(encode_texts(run.tokenizer, text, None, run.record.data["max_length"])[0]) for text in TEXTS]
    batch = Batch(padded(features, run.tokenizer))
    return hidden_states(model, batch) if type(run.task).auto_class == "AutoModel" else loading.first_output(model(**batch.inputs))
