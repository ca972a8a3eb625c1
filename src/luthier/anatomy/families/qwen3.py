"""Qwen3: Llama's modules, and a norm on the query and key of each head."""

from dataclasses import replace

from luthier.anatomy.families.llama import FAMILY as LLAMA
from luthier.anatomy.family import Stack

ROLES = {**LLAMA.stacks[0].roles, "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}
FAMILY = replace(LLAMA, model_types=("qwen3",), name="qwen3", stacks=(Stack("layers", ROLES),))
