"""The arms that luthier is measured against: transformers' Trainer with peft, and sentence-transformers, as their documentation shows them."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from given import CLASSES, RATES, Clock, Enough, padded, passes, pictures, random_model, random_rows

OPEN = {"head": ("pooler", "classifier"), "freeze(bottom=5)": ("encoder.layer.5", "pooler", "classifier")}  # what learns in them, by name


def trainer(task: str, method: str, data: str, model: str, batch: int, max_length: int, epochs: int, steps: int | None, seed: int, precision: str, batches: str) -> dict[str, Any]:
    """batches: of rows at random, grouped by length, or flattened into one row without padding."""
    from transformers import AutoTokenizer, set_seed

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    net, rows, collate = {"text-classification": _classification, "text-generation": _generation}[task](data, model, tokenizer, max_length, batches)
    if method == "lora":
        net = _lora(net, ["query", "value"], task_type="SEQ_CLS")
    elif method in OPEN:
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(any(part in name for part in OPEN[method]))
    tokens: list[int] = []

    def counted(features: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(row["input_ids"]) for row in features))
        return collate(features)

    fitted, found = _train(net, rows["train"], counted, steps, precision, num_train_epochs=epochs, per_device_train_batch_size=batch, learning_rate=RATES[method], seed=seed, train_sampling_strategy="group_by_length" if batches == "grouped" else "random")
    if steps:
        return {**found, "tokens": tokens[:steps]}
    answers = fitted.predict(rows["validation"])
    return {**found, "accuracy": float((answers.predictions.argmax(-1) == answers.label_ids).mean())}


def trainer_on_pictures(method: str, model: str, batch: int, side: int, steps: int, seed: int, precision: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForImageClassification, default_data_collator, set_seed

    set_seed(seed)
    net = _lora(AutoModelForImageClassification.from_pretrained(model, num_labels=CLASSES, dtype=torch.float32), ["q_proj", "v_proj"], modules_to_save=["classifier"])
    return _train(net, pictures(side), default_data_collator, steps, precision, per_device_train_batch_size=batch, learning_rate=RATES[method], seed=seed)[1]


def trainer_on_random_net(net: str, method: str, batch: int, steps: int, seed: int, device: str, precision: str, batches: str) -> dict[str, Any]:
    import torch
    from transformers import DataCollatorWithFlattening, set_seed

    if batches == "flattened" and "llama" not in net:
        raise SystemExit("transformers flattens rows of decoders alone")
    set_seed(seed)
    model, collate, tokens = random_model(net, device), DataCollatorWithFlattening() if batches == "flattened" else padded, list[int]()
    if method == "lora":
        model = _lora(model, *((["query", "value"],) if "bert" in net else (["q_proj", "v_proj"],)), task_type="SEQ_CLS" if "bert" in net else "CAUSAL_LM")

    def counted(features: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(row["input_ids"]) for row in features))
        return collate(features)

    found = _train(model, random_rows(net, steps * batch), counted, steps, precision, device, per_device_train_batch_size=batch, learning_rate=RATES[method], seed=seed, train_sampling_strategy="group_by_length" if batches == "grouped" else "random")[1]
    return {**found, "tokens": tokens[:steps], **({"peak_mb": torch.cuda.max_memory_allocated() / 2**20} if device == "cuda" else {})}


def _lora(net: Any, places: list[str], **more: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(net, LoraConfig(r=8, lora_alpha=16, target_modules=places, **more))


def _classification(data: str, model: str, tokenizer: Any, max_length: int, batches: str) -> tuple[Any, Any, Any]:
    """The model, its rows, and what makes a batch of some of them."""
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

    rows = _read(data)
    labels = sorted(set(rows["train"]["label"]))
    rows = rows.map(lambda row: {**tokenizer(row["text"], truncation=True, max_length=max_length), "labels": [labels.index(label) for label in row["label"]]}, batched=True, remove_columns=rows["train"].column_names)
    return AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(labels)), rows, DataCollatorWithPadding(tokenizer)


def _generation(data: str, model: str, tokenizer: Any, max_length: int, batches: str) -> tuple[Any, Any, Any]:
    from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, DataCollatorWithFlattening

    rows = _read(data)
    rows = rows.map(lambda row: {"input_ids": [[*ids, tokenizer.eos_token_id][:max_length] for ids in tokenizer(row["text"])["input_ids"]]}, batched=True, remove_columns=rows["train"].column_names)
    return AutoModelForCausalLM.from_pretrained(model), rows, DataCollatorWithFlattening() if batches == "flattened" else DataCollatorForLanguageModeling(tokenizer, mlm=False)


def _read(data: str) -> Any:
    from datasets import load_dataset

    return load_dataset("json", data_files={part: f"{data}/{part}.jsonl.gz" for part in ("train", "validation")})


def _train(net: Any, rows: Any, collate: Callable[[list[Any]], Any], steps: int | None, precision: str, device: str = "cpu", **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The Trainer after training, and what was seen of it."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock, seconds = Clock(steps), None

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            clock()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_eval_batch_size=64, max_steps=steps or -1, warmup_steps=0.1, weight_decay=0.01, bf16=precision == "bf16",
            use_cpu=device == "cpu", save_strategy="no", report_to=[], disable_tqdm=True, **settings,
        )  # fmt: skip
        fitted = Trainer(net, arguments, train_dataset=rows, data_collator=collate, callbacks=[Watch()])
        with contextlib.suppress(Enough):
            seconds = fitted.train().metrics["train_runtime"]
    return fitted, {"ends": clock.ends, "seconds": seconds, "precision": precision}


def openvino(data: str, model: str) -> dict[str, Any]:
    """sentence-transformers' OpenVINO backend in int8, with what it sets by itself, calibrated on some of the same texts."""
    from sentence_transformers import SentenceTransformer, models
    from sentence_transformers.backend import export_static_quantized_openvino_model

    with tempfile.TemporaryDirectory() as folder:
        trunk = models.Transformer(model, backend="openvino", model_kwargs={"export": True})
        whole = SentenceTransformer(modules=[trunk, models.Pooling(trunk.get_embedding_dimension())], device="cpu", backend="openvino")
        whole.save_pretrained(f"{folder}/model")
        (Path(folder) / "texts").mkdir()
        with open(data, encoding="utf-8") as stream, open(f"{folder}/texts/train.jsonl", "w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in json.load(stream)[::5])
        export_static_quantized_openvino_model(whole, None, f"{folder}/model", dataset_name=f"{folder}/texts", dataset_config_name="default", dataset_split="train", column_name="text")
        encoder = SentenceTransformer(f"{folder}/model", device="cpu", backend="openvino", model_kwargs={"file_name": "openvino_model_qint8_quantized.xml"})
        return {**passes(lambda texts: encoder.encode(texts, show_progress_bar=False, normalize_embeddings=True), data), "precision": "int8"}


def sentence_transformers(data: str, model: str, precision: str) -> dict[str, Any]:
    """Its own `encode` as it comes, with mean pooling."""
    import torch
    from sentence_transformers import SentenceTransformer, models

    trunk = models.Transformer(model)
    encoder = SentenceTransformer(modules=[trunk, models.Pooling(trunk.get_word_embedding_dimension())], device="cpu")
    if precision == "bf16":
        encoder.to(torch.bfloat16)
    return {**passes(lambda texts: encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False, normalize_embeddings=True).float().numpy(), data), "precision": precision}
