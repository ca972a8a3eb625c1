"""Site expressions: `blocks[6:].attention.query+mlp.*`."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.anatomy.structure import linears, native
from luthier.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from luthier.anatomy.anatomy import Anatomy, Block, Site

_TERM = re.compile(r"(?:(encoder|decoder)\.)?(?:blocks\[([^\]]*)\]\.)?(.+)")
OUTSIDE = ("embeddings", "norm", "pooler", "head")


def match(anatomy: Anatomy, expression: str) -> list[Site]:
    """Raises UserError for a part that matches nothing, with what this model has."""
    found: dict[tuple[str, str, int | None], Site] = {}
    for term in expression.split("+"):
        sites = _match_term(anatomy, term.strip())
        if not sites:
            raise UserError(_nothing(anatomy, term.strip()))
        for site in sites:
            found.setdefault((site.name, site.role, site.block), site)
    order = {site: i for i, block in enumerate(anatomy.blocks) for site in block.sites.values()}
    return sorted(found.values(), key=lambda site: order.get(site, -1 if site.role == "embeddings" else len(anatomy.blocks)))


def _match_term(anatomy: Anatomy, term: str) -> list[Site]:
    from luthier.anatomy.anatomy import POINTS

    parsed = _TERM.fullmatch(term)
    if not parsed:
        return []
    stack, piece, role = parsed.groups()
    if role in OUTSIDE and stack is None and piece is None:
        return anatomy.norms if role == "norm" else _with_weight(anatomy, {"embeddings": anatomy.embeddings, "pooler": anatomy.pooler, "head": anatomy.head}[role])
    blocks = [block for block in anatomy.blocks if stack is None or block.stack == stack]
    if piece is not None:
        blocks = _slice(anatomy, blocks, piece, term)
    chosen = [site for block in blocks for site in block.sites.values() if fnmatch.fnmatchcase(site.role, role)]
    if role.endswith("*"):
        chosen = [site for site in chosen if site.role not in POINTS and isinstance(site.module, (nn.Linear, Conv1D))]
    if "*" in role:
        chosen = [site for site in chosen if not _part_of_fused(chosen, site)]
    return chosen or ([] if piece else _by_name(anatomy, term))


def _part_of_fused(chosen: list[Site], site: Site) -> bool:
    """`attention.*` takes a fused weight whole, not its thirds again."""
    return site.rows is not None and any(other.rows is None and other.name == site.name for other in chosen)


def _slice(anatomy: Anatomy, blocks: list[Block], piece: str, term: str) -> list[Block]:
    """`piece` of the blocks of each stack."""
    stacks = dict.fromkeys(block.stack for block in blocks)
    if len(stacks) > 1:
        return [picked for stack in stacks for picked in _slice(anatomy, [block for block in blocks if block.stack == stack], piece, term)]
    if len({block.name for block in blocks}) < len(blocks):
        raise UserError(f"sites={term!r}: the {len(blocks)} blocks of this {anatomy.family} are one set of weights and cannot be taken apart. Leave blocks[{piece}] out.")
    try:
        numbers = [int(part) if part.strip() else None for part in piece.split(":")]
        picked = blocks[slice(*numbers)] if ":" in piece else [blocks[int(piece)]]
    except (ValueError, IndexError):
        raise UserError(f"sites={term!r}: blocks[{piece}] is no choice among the {_count(blocks)}. Write blocks[0], blocks[2:] or blocks[-2:].") from None
    if not picked:
        raise UserError(f"sites={term!r}: blocks[{piece}] is empty; the {_count(blocks)} are numbered from 0.")
    return picked


def _count(blocks: list[Block]) -> str:
    return f"{len(blocks)} {blocks[0].stack} blocks" if blocks[0].stack else f"{len(blocks)} blocks"


def _with_weight(anatomy: Anatomy, sites: list[Site]) -> list[Site]:
    """Modules with a matrix of their own, else with a norm's vector: embeddings and heads are often containers."""
    out = []
    for site in sites:
        leaves = [(name, m) for name, m in native(site.module) if isinstance(m, (nn.Linear, nn.Embedding, Conv1D, nn.Conv2d, nn.LayerNorm))]
        matrices = [(name, m) for name, m in leaves if not isinstance(m, nn.LayerNorm)] or leaves
        out += [anatomy._site(f"{site.name}.{name}" if name else site.name, m, site.role) for name, m in matrices] or [site]
    return out


def _by_name(anatomy: Anatomy, pattern: str) -> list[Site]:
    """Exact names, their endings (`c_proj`) and patterns; of modules with a role, that site."""
    by_module: dict[int, Site] = {}
    for block in anatomy.blocks:
        for site in block.sites.values():
            if site.rows is None and site.entry is None:
                by_module.setdefault(id(site.module), site)
    out = []
    for name, module in native(anatomy.model):
        if name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern):
            if id(module) in by_module:
                out.append(by_module[id(module)])
            elif isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or name == pattern:
                out.append(anatomy._site(name, module, ""))
    return out


def _nothing(anatomy: Anatomy, term: str) -> str:
    linear = Counter(name.rpartition(".")[2] for name in linears(anatomy.model))
    roles = list(dict.fromkeys(role for block in anatomy.blocks for role in block.sites))
    modules = ", ".join(f"{name} ({count})" for name, count in linear.most_common(10))
    return (
        f"sites={term!r} matches no module of this {anatomy.family}, so nothing would be trained.{did_you_mean(term, [*roles, *OUTSIDE, *linear])}\n"
        f"  linear modules here: {modules}\n"
        f"  roles here: {', '.join(roles)}, {', '.join(OUTSIDE)}"
    )
