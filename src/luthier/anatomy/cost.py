"""What a model costs, from its shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.anatomy.structure import is_norm, native

if TYPE_CHECKING:
    from luthier.anatomy.anatomy import Anatomy, Block

# heads that read every position; others read one of each row
EVERY_POSITION = ("TokenClassification", "CausalLM", "MaskedLM", "LMHead", "PreTraining", "ConditionalGeneration", "QuestionAnswering", "MaskedImageModeling")
SPELLED_OUT = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # activations made of several tensor operations
DROPOUT = ("hidden_dropout_prob", "resid_pdrop", "dropout_rate", "dropout")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout", "dropout_rate")


@dataclass(frozen=True)
class Workload:
    """batch rows of `length` tokens; `targets` tokens on the decoder's side of an encoder-decoder (0: as many). Vision models take their length from the config."""

    batch: int = 1
    length: int = 128
    targets: int = 0


def macs(anatomy: Anatomy, workload: Workload) -> int:
    """Multiply-accumulates of the matrix products of one forward pass: linear layers, attention scores and their weighted sums."""
    length, targets = _lengths(anatomy, workload)
    total = sum(_block_macs(block, *_seen(block, length, targets)) for block in anatomy.blocks)
    outside = {module: site.role for site in [*anatomy.embeddings, *anatomy.pooler, *anatomy.head] for _, module in native(site.module)}
    total += sum(_matrix(module) * _positions(anatomy, role, length, targets) for module, role in outside.items())
    return workload.batch * total


def memory(anatomy: Anatomy, workload: Workload, trainable: int, reached: int | None = None, recompute: bool = False) -> int:
    """Bytes of one training step in float32 whose gradients go through the last `reached` blocks, or all of them:

        4 P + 12 T + 4 B (what the blocks keep + 3 x logits)

    P: parameters; T: trainable ones (gradient, Adam's two moments); B: rows. For each token a block keeps the input and output of every
    norm (and what lies between, where the norm is spelled out in tensor operations), query, key, value and heads of every attention, the
    input of every learnt scale, a dropout mask a sublayer, and of the feed-forward's inner width 2 vectors (4 if gated; 3 more where
    the activation is spelled out). Each head keeps its matrix of tokens x tokens unless attention is fused, and three where probabilities
    are dropped out, which is never fused on a CPU. Logits are held with the logarithm of their softmax and their gradient.
    With `recompute` (gradient checkpointing) a block keeps its input alone, and one block at a time all of this.
    """
    length, targets = _lengths(anatomy, workload)
    of_blocks, inputs = [0], 0
    for block in anatomy.blocks[len(anatomy.blocks) - (len(anatomy.blocks) if reached is None else reached) :]:
        own, other = _seen(block, length, targets)
        of_blocks.append(own * _vectors(anatomy, block) + _attention_matrices(anatomy, block, own, other))
        inputs += own * anatomy.width
    kept = inputs + max(of_blocks) if recompute else sum(of_blocks)
    head = {module for site in anatomy.head for _, module in native(site.module)}
    kept += sum(3 * _outputs(module) * _positions(anatomy, "head", length, targets) for module in head)
    return 4 * anatomy.parameters + 12 * trainable + 4 * workload.batch * kept


def _lengths(anatomy: Anatomy, workload: Workload) -> tuple[int, int]:
    if anatomy.architecture == "vision":
        size, patch = (side if isinstance(side, (tuple, list)) else (side, side) for side in (anatomy.config.image_size, anatomy.config.patch_size))
        length = (size[0] // patch[0]) * (size[1] // patch[1]) + 1
        return length, length
    return workload.length, workload.targets or workload.length


def _seen(block: Block, length: int, targets: int) -> tuple[int, int]:
    """Tokens that go through the block, and tokens that its cross attention reads."""
    return (targets if block.stack == "decoder" else length), length


def _block_macs(block: Block, own: int, other: int) -> int:
    total = own * sum(_product(block, f"mlp.{part}") for part in ("gate", "up", "down"))
    for role, seen in (("attention", own), ("cross_attention", other)):
        if f"{role}.query" in block.sites:
            total += own * (_product(block, f"{role}.query") + _product(block, f"{role}.output"))
            total += seen * (_product(block, f"{role}.key") + _product(block, f"{role}.value"))
            total += 2 * own * seen * block.sites[f"{role}.query"].outputs  # scores, and the weighted sum of values
    return total


def _product(block: Block, role: str) -> int:
    site = block.sites.get(role)
    return site.inputs * site.outputs if site else 0


def _matrix(module: nn.Module) -> int:
    return module.weight.numel() if isinstance(module, (nn.Linear, Conv1D, nn.Conv2d)) else 0


def _outputs(module: nn.Module) -> int:
    return _matrix(module) and (module.out_features if isinstance(module, nn.Linear) else module.weight.shape[1 if isinstance(module, Conv1D) else 0])  # type: ignore[union-attr, index]


def _positions(anatomy: Anatomy, role: str, length: int, targets: int) -> int:
    """How many positions of a row go through a module outside the blocks."""
    every = anatomy.architecture == "decoder" or any(word in type(anatomy.model).__name__ for word in EVERY_POSITION)
    if role == "pooler" or (role == "head" and not every):
        return 1
    if anatomy.architecture == "vision":
        return length - 1  # patches, without the class token
    return targets if role == "head" else length


def _vectors(anatomy: Anatomy, block: Block) -> int:
    """Numbers that a block keeps of each of its tokens."""
    sites, width = block.sites, anatomy.width
    norms = 0
    for _, module in native(block.module):
        if is_norm(module):
            weight: Any = module.weight
            norms += weight.shape[0] * (2 if isinstance(module, nn.LayerNorm) else 3)
    parts = {role.rpartition(".")[0] for role in sites if role.endswith(".query")}
    attention = sum(2 * sites[f"{part}.query"].outputs + sites[f"{part}.key"].outputs + sites[f"{part}.value"].outputs for part in parts)
    scales = sum(width for role in sites if role.endswith(".scale"))
    masks = width * (len(parts) + 1) if _setting(anatomy, DROPOUT) else 0
    spelled_out = _setting(anatomy, ("activation_function", "hidden_act", "dense_act_fn")) in SPELLED_OUT
    inner = sites["mlp.up"].outputs * ((4 if "mlp.gate" in sites else 2) + (3 if spelled_out else 0))
    return norms + attention + scales + masks + inner


def _attention_matrices(anatomy: Anatomy, block: Block, own: int, other: int) -> int:
    heads = _setting(anatomy, ("num_attention_heads", "num_heads", "n_head", "n_heads")) or 1
    each = 3 if _setting(anatomy, ATTENTION_DROPOUT) else int(anatomy.config._attn_implementation == "eager")
    return each * heads * own * (own + (other if "cross_attention.query" in block.sites else 0))


def _setting(anatomy: Anatomy, names: tuple[str, ...]) -> Any:
    """The first of some spellings that the config has."""
    return next((value for name in names if (value := getattr(anatomy.config, name, None)) is not None), None)
