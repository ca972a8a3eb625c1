"""One measurement in a process of its own: `python benchmarks/arms.py '{"arm": "luthier", ...}'` prints one JSON object.

Training: arm (luthier | trainer), method (a name in RATES), data (a folder of train and validation rows with `text` and `label`), model,
epochs, steps (None: all of the epochs), seed; of trainer also precision (fp32 | bf16) and grouping (by length or not).
Encoding: arm (luthier_encode | sentence_transformers), data (a JSON list of texts), model, precision.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

BATCH = 32
LENGTH = 256
RATES = {"lora": 3e-3, "full": 1e-4, "head": 3e-3, "freeze(bottom=5)": 1e-4}  # of both sides: luthier's defaults at this size of model
OPEN = {"head": ("pooler", "classifier"), "freeze(bottom=5)": ("encoder.layer.5", "pooler", "classifier")}  # what learns in them, by name


def luthier(method: str, data: str, model: str, epochs: int, steps: int | None, seed: int) -> dict[str, Any]:
    """As the command line does it with these settings; the precision is luthier's own choice."""
    import luthier
    from luthier.verbs.console import Console

    times: list[float] = []

    class Watch(Console):
        @contextlib.contextmanager
        def progress(self, label: str, total: int | None = None, done: int = 0) -> Iterator[Callable[..., None]]:
            yield (lambda count, text="": times.append(time.perf_counter())) if label == "training" else (lambda count, text="": None)

    with tempfile.TemporaryDirectory() as folder:
        run = luthier.adapt(model, data, method=method, batch_size=BATCH, max_length=LENGTH, lr=RATES[method], seed=seed, epochs=epochs, max_steps=steps, baselines=False, out=f"{folder}/run", console=Watch(quiet=True))
        record = run.record.content
    return {"ends": times, "seconds": record["resources"]["seconds"], "precision": record["training"]["precision"], "accuracy": record["metrics"]["accuracy"]["value"]}


def trainer(method: str, data: str, model: str, epochs: int, steps: int | None, seed: int, precision: str, grouping: bool) -> dict[str, Any]:
    """transformers' Trainer with peft, as its documentation shows it."""
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments, set_seed

    times: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            times.append(time.perf_counter())

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = load_dataset("json", data_files={part: f"{data}/{part}.jsonl.gz" for part in ("train", "validation")})
    labels = sorted(set(rows["train"]["label"]))
    rows = rows.map(lambda row: {**tokenizer(row["text"], truncation=True, max_length=LENGTH), "labels": [labels.index(label) for label in row["label"]]}, batched=True, remove_columns=rows["train"].column_names)
    net = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(labels))
    if method == "lora":
        net = get_peft_model(net, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"))
    elif method in OPEN:
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(any(part in name for part in OPEN[method]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, per_device_eval_batch_size=64, num_train_epochs=epochs, max_steps=steps or -1, learning_rate=RATES[method], warmup_steps=0.1, weight_decay=0.01,
            bf16=precision == "bf16", train_sampling_strategy="group_by_length" if grouping else "random", use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, seed=seed,
        )  # fmt: skip
        fitted = Trainer(net, arguments, train_dataset=rows["train"], eval_dataset=rows["validation"], data_collator=DataCollatorWithPadding(tokenizer), callbacks=[Watch()], processing_class=tokenizer)
        seconds = fitted.train().metrics["train_runtime"]
        found = fitted.predict(rows["validation"])
    accuracy = float((found.predictions.argmax(-1) == found.label_ids).mean())
    return {"ends": times, "seconds": seconds, "precision": precision, "accuracy": accuracy}


def luthier_encode(data: str, model: str, precision: str) -> dict[str, Any]:
    import luthier

    encoder = luthier.Encoder.open(model, precision=precision)
    return _passes(lambda texts: encoder.embed(texts), data)


def sentence_transformers(data: str, model: str, precision: str) -> dict[str, Any]:
    """Its own `encode` as it comes, with mean pooling."""
    import torch
    from sentence_transformers import SentenceTransformer, models

    trunk = models.Transformer(model)
    encoder = SentenceTransformer(modules=[trunk, models.Pooling(trunk.get_word_embedding_dimension())], device="cpu")
    if precision == "bf16":
        encoder.to(torch.bfloat16)
    return _passes(lambda texts: encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False, normalize_embeddings=True).float().numpy(), data)


def _passes(encode: Callable[[list[str]], Any], data: str) -> dict[str, Any]:
    """Seconds of three passes over all texts after one to warm up, and the vectors of the first few."""
    with open(data, encoding="utf-8") as stream:
        texts = json.load(stream)
    found, seconds = encode(texts), []
    for _ in range(3):
        started = time.perf_counter()
        found = encode(texts)
        seconds.append(time.perf_counter() - started)
    return {"texts": len(texts), "seconds": seconds, "vectors": [[float(x) for x in row] for row in found[:20]]}


def main() -> None:
    given = json.loads(sys.argv[1])
    arm = {"luthier": luthier, "trainer": trainer, "luthier_encode": luthier_encode, "sentence_transformers": sentence_transformers}[given.pop("arm")]
    with contextlib.redirect_stdout(sys.stderr):
        found = arm(**given)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
