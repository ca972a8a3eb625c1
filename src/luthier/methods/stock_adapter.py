"""Writes an adapter folder that `peft.PeftModel.from_pretrained` opens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.methods.changes import Change
from luthier.methods.kinds import WeightChange

PREFIX = "base_model.model."
TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModel": "FEATURE_EXTRACTION",
}
OWN_HEAD = ("SEQ_CLS", "TOKEN_CLS")  # peft looks for the head in the adapter of these, whether it learnt or not


def write(folder: str | Path, config: Any, tensors: Mapping[str, Tensor], heads: Mapping[str, Tensor], base: str) -> None:
    """`tensors` by module name (`h.0.attn.c_attn.lora_A.weight`), `heads` the trained parameters outside the tuner."""
    config.base_model_name_or_path = base
    config.inference_mode = True
    if heads:
        config.modules_to_save = head_modules(heads)
    Path(folder).mkdir(parents=True, exist_ok=True)
    everything = {PREFIX + name.removeprefix(PREFIX): tensor for name, tensor in [*tensors.items(), *heads.items()]}
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in everything.items()}, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(folder))


def head_modules(names: Iterable[str]) -> list[str]:
    """The modules that peft has to keep whole: a head by its top name (as peft itself names heads), a pooler inside the trunk by its path."""
    return sorted({name.rpartition(".")[0] if "pooler" in name.split(".") else name.partition(".")[0] for name in names})


def low_rank(model: nn.Module, task_type: str | None) -> tuple[Any, dict[str, Tensor]] | None:
    """All weight changes of `model` as one stock LoRA (its config and tensors), or None where a change has no low-rank form.

    Several changes of one fused weight become one of their summed rank: their A are stacked, their B stand in their own rows.
    """
    import peft

    found: dict[str, tuple[Tensor, Tensor, nn.Module]] = {}
    for name, module in model.named_modules():
        own = [child for group in module.children() for child in group.children() if isinstance(child, Change)]
        if not own:
            continue
        outputs = module.weight.shape[0 if isinstance(module, nn.Linear) else 1]  # type: ignore[union-attr]
        a, b = [], []
        for change in own:
            method: WeightChange = change.method
            factors = method.factors(change)
            if factors is None:
                return None
            small, tall, scale = factors
            whole = torch.zeros(int(outputs), tall.shape[1], dtype=tall.dtype, device=tall.device)
            whole[change.rows or slice(None)] = scale * tall.detach()
            a.append(small.detach())
            b.append(whole)
        found[name] = torch.cat(a), torch.cat(b, dim=1), module
    if not found:
        return None
    ranks = {name: a.shape[0] for name, (a, _, _) in found.items()}
    common = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != common}
    # the scale is folded into B, so that alpha = r everywhere and methods of different scales share one adapter
    config = peft.LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=sorted(found),
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=all(isinstance(module, Conv1D) for _, _, module in found.values()),
        task_type=task_type,
    )
    tensors: dict[str, Tensor] = {}
    for name, (a, b, module) in found.items():
        embedding = isinstance(module, nn.Embedding)
        tensors[name + (".lora_embedding_A" if embedding else ".lora_A.weight")] = a
        tensors[name + (".lora_embedding_B" if embedding else ".lora_B.weight")] = b
    return config, tensors
