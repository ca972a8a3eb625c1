"""The arms of luthier. Its number type is its own choice, except where an arm of encoding names one."""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from given import CLASSES, RATES, Clock, Enough, memory_mb, padded, passes, pictures, random_model, random_rows

import luthier  # before torch, whose cap it sets

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")
OPTIMISER = ("kernel squares", "kernel adamw")


def adapt(task: str, method: str, data: str, model: str, batch: int, max_length: int, epochs: int, steps: int | None, seed: int) -> dict[str, Any]:
    """As the command line does it with these settings."""
    clock = Clock(steps)
    settings: dict[str, Any] = {"task": task, "method": method, "batch_size": batch, "max_length": max_length, "lr": RATES[method], "seed": seed, "epochs": epochs, "max_steps": steps, "baselines": False, "console": _watched_by(clock)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = luthier.adapt(model, data, out=f"{folder}/run", **settings)
        except Enough:
            job = luthier.adapt(model, data, out=f"{folder}/plan", dry_run=True, **settings)
            return {"ends": clock.ends, "precision": job.precision, "tokens": _tokens(job)[:steps]}
        assert isinstance(run, luthier.Run)
        record = run.record.content
    return {"ends": clock.ends, "seconds": record["resources"]["seconds"], "precision": record["training"]["precision"], "accuracy": record["metrics"]["accuracy"]["value"]}


def profile(task: str, method: str, data: str, model: str, batch: int, max_length: int, epochs: int, steps: int, seed: int) -> dict[str, Any]:
    """Where the time of a step goes, after a quarter of them to warm up: by torch's profiler, with a mark around each kernel of ours."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from luthier import machine

    warm_up, watch = steps // 4, profiler(activities=[ProfilerActivity.CPU])

    class Profiled(Clock):
        def __call__(self, *_: Any, **__: Any) -> None:
            if len(self.ends) == warm_up:
                watch.start()
            try:
                super().__call__()
            except Enough:
                watch.stop()
                raise

    _mark_kernels()
    clock = Profiled(steps)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        luthier.adapt(model, data, out=f"{folder}/run", task=task, method=method, batch_size=batch, max_length=max_length, lr=RATES[method], seed=seed, epochs=epochs, max_steps=steps, baselines=False, console=_watched_by(clock))
    seconds = clock.ends[-1] - clock.ends[warm_up]
    shares = dict.fromkeys(("products", "attention", "other kernels", "optimiser", "other operations of torch"), 0.0)
    for event in watch.key_averages():
        kind = _kind(event.key)
        if kind:
            shares[kind] += event.self_cpu_time_total / 1e6 / seconds
    return {"shares": {**shares, "Python and waiting": 1 - sum(shares.values())}, "ms": 1000 * seconds / (steps - warm_up - 1), "precision": machine.choose_precision("auto", "cpu")[0]}


def _kind(event: str) -> str | None:
    if event in PRODUCTS:
        return "products"
    if event.startswith("kernel "):
        return "optimiser" if event in OPTIMISER else "attention" if "attention" in event else "other kernels"
    return "other operations of torch" if event.startswith(("aten::", "mkldnn::")) else None


def _mark_kernels() -> None:
    import torch

    from luthier.compute import kernels

    plain = kernels.kernel

    def marked(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
        run = plain(name, dtype)

        def marked_run(*arguments: Any) -> None:
            with torch.profiler.record_function(f"kernel {name}"):
                run(*arguments)  # type: ignore[misc]

        return marked_run if run else None

    importlib.import_module("luthier.training.trainer")
    for module in list(sys.modules.values()):
        if getattr(module, "kernel", None) is plain:
            module.kernel = marked


def _watched_by(clock: Clock) -> Any:
    """A console that says nothing, and calls the clock at the end of each step."""
    from luthier.verbs.console import Console

    class Watch(Console):
        @contextlib.contextmanager
        def progress(self, label: str, total: int | None = None, done: int = 0) -> Iterator[Callable[..., None]]:
            yield clock if label == "training" else lambda count, text="": None

    return Watch(quiet=True)


def _tokens(job: Any) -> list[int]:
    """Of each batch of the first pass, padding aside: which rows it holds is fixed by seed and pass."""
    from luthier.training.batching import epoch_batches

    lengths = [row.length for row in job.features["train"]]
    return [sum(lengths[row] for row in rows) for rows in epoch_batches(lengths, job.recipe.batch_size, job.recipe.seed, 0)]


def apply_to_pictures(method: str, model: str, batch: int, side: int, steps: int, seed: int) -> dict[str, Any]:
    """`luthier.apply` in a loop of one's own, as it has no task for pictures."""
    import torch
    from transformers import AutoModelForImageClassification, default_data_collator

    torch.manual_seed(seed)
    net = luthier.apply(AutoModelForImageClassification.from_pretrained(model, num_labels=CLASSES, dtype=torch.float32), method, seed=seed)
    return _loop(net, torch.utils.data.DataLoader(pictures(side), batch, shuffle=True, collate_fn=default_data_collator), RATES[method], steps)  # type: ignore[arg-type]


def apply_to_random_bert(method: str, width: int, length: int, batch: int, steps: int, seed: int) -> dict[str, Any]:
    """Steps over rows of one length, of a random encoder of four blocks with heads of 64."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    before = memory_mb("VmRSS")
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=1000, hidden_size=width, num_hidden_layers=4, num_attention_heads=width // 64, intermediate_size=4 * width, max_position_embeddings=512)
    net = luthier.apply(BertForSequenceClassification(config), method, seed=seed)
    ids = torch.randint(1000, (batch, length))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch) % 2}
    return {**_loop(net, [rows], 1e-4, steps), "before_mb": before, "trainable": sum(p.numel() for p in net.parameters() if p.requires_grad)}


def apply_to_random_net(net: str, method: str, batch: int, steps: int, seed: int, device: str) -> dict[str, Any]:
    """A loop of one's own over batches of like length, as luthier makes them."""
    import torch

    from luthier.training.batching import epoch_batches

    model, rows = random_model(net, device), random_rows(net, steps * batch)
    chosen = epoch_batches([len(row["input_ids"]) for row in rows], batch, seed, 0)
    batches = [{name: x.to(device) for name, x in padded([rows[i] for i in some]).items()} for some in chosen]
    found = _loop(luthier.apply(model, method, seed=seed), batches, RATES[method], steps, device)
    return {**found, "tokens": [sum(len(rows[i]["input_ids"]) for i in some) for some in chosen], **({"peak_mb": torch.cuda.max_memory_allocated() / 2**20} if device == "cuda" else {})}


def _loop(net: Any, batches: Iterable[dict[str, Any]], rate: float, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Over and over the batches by luthier's routes, with torch's optimiser and clipping, as a loop of one's own has them and Trainer too."""
    import torch

    from luthier import compute, machine

    precision = machine.choose_precision("auto", device)[0]
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, fused=True)
    clock = Clock(steps)
    net.train()
    with contextlib.suppress(Enough), compute.prepared(net, device, precision):
        while True:
            for batch in batches:
                with compute.autocast(device, precision):
                    loss = net(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learning, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                clock()
    return {"ends": clock.ends, "precision": precision}


def encode(data: str, model: str, precision: str, onednn: bool = True) -> dict[str, Any]:
    """onednn: whether it may be chosen for products in float32; otherwise they take torch's usual library."""
    from luthier import machine

    if not onednn:
        machine.onednn_is_faster = lambda: False
    encoder = luthier.Encoder.open(model, precision=precision)
    return {**passes(lambda texts: encoder.embed(texts), data), "precision": precision}
