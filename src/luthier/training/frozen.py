"""What lies below everything that learns answers a row alike in every pass: it is computed once, kept, and read again."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier import machine
from luthier.data.batch import Batch

MEMORY = 0.25  # share of the free memory that may be filled; beyond it a file is
DISK = 0.5  # share of the free disk
SAME = 1e-4  # of outputs with kept and with computed states, float32


class FrozenTrunk:
    """The leading blocks of a model, in which and below which nothing learns.

    blocks  in the order in which the forward pass goes through them

    States are found by what the model reads (token ids and types of a row), so that nobody has to say which row a batch
    holds, and a text is kept once however often and wherever it occurs. Used as a context, within which the model
    reads the states of rows that are kept and computes those of others.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]):
        self.model, self.blocks = model, list(blocks)
        self.places: dict[bytes, int] = {}
        self.kept: Tensor | None = None  # (tokens, d)
        self.file: Path | None = None
        self._filled, self._size = 0, 0
        self._filling: list[bytes] | None = None
        self._read: Tensor | None = None  # (B, T, d) of the forward pass that is under way

    def below(self, batch: Batch) -> list[nn.Module]:
        """The modules that a forward pass on `batch` is done with when it leaves the last of the blocks: no dropout is due there."""
        done: list[nn.Module] = []
        later: set[int] = set()
        left = False

        def seen(module: nn.Module, *_: Any) -> None:
            nonlocal left
            later.add(id(module)) if left else done.append(module)
            left = left or module is self.blocks[-1]

        hooks = [module.register_forward_hook(seen) for module in self.model.modules()]
        try:
            with torch.no_grad():
                self.model(**_texts(batch)[0].inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return [module for module in done if id(module) not in later]

    def agrees(self, batch: Batch) -> bool:
        """Whether the model answers alike with kept states, which is tried rather than believed of every architecture."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                expected = [_answer(self.model, text) for text in _texts(batch)]
                with self:
                    self._start(sum(text.tokens for text in _texts(batch)), None)
                    self._fill(_texts(batch))
                    found = [_answer(self.model, text) for text in _texts(batch)]
        except _Unsupported:
            return False
        finally:
            self.clear()
            self.model.train(training)
        return all(bool((a - b).abs().max() <= SAME * b.abs().max().clamp(min=1)) for a, b in zip(found, expected, strict=True))

    def keep(self, tokens: int, batches: Iterable[Batch], folder: Path, progress: Callable[[int], None] = lambda rows: None) -> bool:
        """Fill from `batches` that hold at most `tokens` tokens in all; False, with nothing kept, where neither memory nor the disk of `folder` has room."""
        training = self.model.training
        self.model.eval()
        self._start(tokens, folder)
        try:
            with torch.no_grad():
                left = iter(batches)
                first = next(left)
                self.model(**_texts(first)[0].inputs)  # who prepares the model does so in its first pass, and before its blocks are wrapped
            with torch.no_grad(), self:
                for batch in itertools.chain([first], left):
                    if not self._fill(_texts(batch)):
                        self.clear()
                        return False
                    progress(len(batch.rows))
        finally:
            self.model.train(training)
        return True

    def clear(self) -> None:
        self.places, self.kept, self._filled = {}, None, 0
        if self.file:
            self.file.unlink(missing_ok=True)
            self.file = None

    def __enter__(self) -> FrozenTrunk:
        self._hook = self.model.register_forward_pre_hook(self._look_up, with_kwargs=True)
        self._own = [block.__dict__.get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = functools.partial(self._forward, block, block.forward)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        for block, own in zip(self.blocks, self._own, strict=True):
            del block.forward
            if own is not None:
                block.forward = own

    def _start(self, tokens: int, folder: Path | None) -> None:
        self.file = folder / "frozen.bin" if folder else None
        self.clear()  # of a run that was killed, too
        self._size, self._folder = tokens, folder

    def _fill(self, texts: Sequence[Batch]) -> bool:
        for text in texts:
            self._filling = _keys(text.inputs)
            try:
                self.model(**text.inputs)
            except _Left:
                pass
            except _NoRoom:
                return False
            finally:
                self._filling = None
        return True

    def _look_up(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._read = None
        keys = _keys(kwargs) if self._filling is None and self.kept is not None else None
        if keys is None or not all(key in self.places for key in keys):
            return
        assert self.kept is not None
        ids = kwargs["input_ids"]
        lengths = kwargs["attention_mask"].sum(1).cpu()
        starts = torch.tensor([self.places[key] for key in keys])
        steps = torch.arange(ids.shape[1])
        # what a row's padding reads does not matter, as long as it is there
        places = starts[:, None] + torch.minimum(steps[None], lengths[:, None] - 1)
        self._read = self.kept[places].to(ids.device, non_blocking=True)

    def _forward(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        last = block is self.blocks[-1]
        if self._read is not None:
            return self._read if last else (args[0] if args else kwargs["hidden_states"])
        found = forward(*args, **kwargs)
        if not isinstance(found, Tensor):
            if self._filling is not None:
                raise _Unsupported
        elif last and self._filling is not None:
            self._store(found, self._filling, args, kwargs)
            raise _Left
        return found

    def _store(self, states: Tensor, keys: list[bytes], args: Any, kwargs: Any) -> None:
        if self.kept is None:
            self.kept = self._room(states)
        for row, key in enumerate(keys):
            if key not in self.places:
                length = len(key) // _WIDTH
                self.kept[self._filled : self._filled + length] = states[row, :length].to(self.kept.device)
                self.places[key] = self._filled
                self._filled += length

    def _room(self, states: Tensor) -> Tensor:
        shape = (self._size, states.shape[-1])
        needed = shape[0] * shape[1] * states.element_size()
        if needed <= MEMORY * machine.memory().available or self._folder is None:
            return torch.empty(shape, dtype=states.dtype)
        if needed > DISK * machine.free_disk(self._folder):
            raise _NoRoom
        self.file = self._folder / "frozen.bin"
        return torch.from_file(str(self.file), shared=True, size=shape[0] * shape[1], dtype=states.dtype).view(shape)


class _Left(Exception):
    """The forward pass has left the frozen blocks, and what follows is not needed."""


class _NoRoom(Exception): ...


class _Unsupported(Exception):
    """A block hands on more than hidden states."""


_WIDTH = 16  # bytes of a key for each token: its id and its type


def _keys(inputs: dict[str, Any]) -> list[bytes] | None:
    """What identifies each row to the model; None where something else is read than tokens padded on the right."""
    if not {"input_ids", "attention_mask"} <= set(inputs):
        return None
    mask = inputs["attention_mask"].cpu().numpy()
    if (np.diff(mask, axis=1) > 0).any() or not mask[:, 0].all():
        return None
    ids = inputs["input_ids"].cpu().numpy().astype(np.int64)
    types = inputs["token_type_ids"].cpu().numpy().astype(np.int64) if "token_type_ids" in inputs else np.zeros_like(ids)
    both = np.stack([ids, types], axis=-1)
    return [row[:length].tobytes() for row, length in zip(both, mask.sum(1), strict=True)]


def _texts(batch: Batch) -> list[Batch]:
    return list(batch.parts.values()) or [batch]


def _answer(model: nn.Module, text: Batch) -> Tensor:
    found = model(**text.inputs)
    out = (found.logits if hasattr(found, "logits") else found.last_hidden_state).float()
    return out * text.mask.unsqueeze(-1) if out.shape[:2] == text.mask.shape else out
