"""`Anatomy.of(model)`: blocks, sites and tensors by role; built from a config on the meta device where no weights are wanted."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.anatomy import cost, family, structure
from luthier.anatomy.cost import Workload
from luthier.anatomy.family import Family, Stack
from luthier.anatomy.structure import OWN as OWN
from luthier.anatomy.structure import brought, native
from luthier.errors import UserError, did_you_mean

# point -> the roles that its sublayer has to have, from one that reads the sublayer's input to the one whose product leaves it
POINTS = {
    "attention.out": ("attention.query", "attention.key", "attention.value", "attention.output"),
    "cross_attention.out": ("cross_attention.query", "cross_attention.key", "cross_attention.value", "cross_attention.output"),
    "mlp.out": ("mlp.up", "mlp.down"),
}
_Place = tuple[str, int | None, str | None]  # role, block, stack
_PART = re.compile(r"(.*)\[(\d+)/(\d+)\]")


@dataclass(frozen=True, eq=False)
class Site:
    """A place where a method can act.

    name             path of the module in the model
    role             `attention.query`, `mlp.up`, `norm`, `embeddings`, `head`, or a point such as `mlp.out`; "" for a module without one
    inputs, outputs  features; of a fused weight, the role's share
    rows             rows of the (out, in) weight that the role owns; None for all
    calls            how often one forward pass goes through the module (shared blocks: more than once)
    entry            of a point: the module whose input is the sublayer's input
    """

    name: str
    role: str
    module: nn.Module
    inputs: int
    outputs: int
    block: int | None = None
    stack: str | None = None
    rows: slice | None = None
    calls: int = 1
    entry: nn.Module | None = None

    @property
    def label(self) -> str:
        """What plans and messages call it; of a site in a block, the expression that names it alone."""
        place = f"{self.stack}." if self.stack else ""
        return f"{place}blocks[{self.block}].{self.role}" if self.block is not None else self.name


@dataclass(frozen=True, eq=False)
class NamedTensor:
    """A parameter, once, with the role of the module that it belongs to. part: weight | bias | other."""

    name: str
    parameter: nn.Parameter
    role: str
    part: str
    block: int | None = None
    stack: str | None = None


class _Roles:
    """Attribute access to the sites of one sublayer: `block.attention.query`."""

    def __init__(self, owner: str, sites: Mapping[str, Site]):
        self._owner, self._sites = owner, sites

    def __getattr__(self, name: str) -> Site:
        if name.startswith("_") or name not in self._sites:
            raise AttributeError(f"{self._owner} has no role {name!r}.{did_you_mean(name, self._sites)} It has: {', '.join(self._sites)}.")
        return self._sites[name]


class Block:
    """One block. index: its place in its stack; shared blocks have one module and several indices."""

    def __init__(self, index: int, name: str, module: nn.Module, stack: str | None, sites: dict[str, Site]):
        self.index, self.name, self.module, self.stack, self.sites = index, name, module, stack, sites

    def __getattr__(self, part: str) -> _Roles:
        sites: dict[str, Site] = self.__dict__.get("sites", {})  # a copy under construction has none yet
        inside = {role.partition(".")[2]: site for role, site in sites.items() if role.partition(".")[0] == part}
        if not inside:
            parts = sorted({role.partition(".")[0] for role in sites})
            raise AttributeError(f"the block has no {part!r}.{did_you_mean(part, parts)} It has: {', '.join(parts)}.")
        return _Roles(f"block {self.index}'s {part}", inside)

    def __repr__(self) -> str:
        return f"Block({self.index}, {self.name})"

    @property
    def parameter_names(self) -> list[str]:
        return [f"{self.name}.{name}" for name, _ in self.module.named_parameters() if not brought(name)]


class Anatomy:
    """A model by roles.

    model, config   the model (on the meta device where only a config was given) and its config
    family          the role map in use; "structure" where the roles were found by structure, "given" by an override
    architecture    encoder, decoder, encoder-decoder, vision
    trunk           the module without the task's head
    pooling         which token of a row the stock classification head reads: first, last
    """

    def __init__(self, model: nn.Module, role_map: Family):
        self.model = model
        self.config: Any = model.config
        self.map = role_map
        self.family, self.architecture, self.pooling = role_map.name, role_map.architecture, role_map.pooling
        self.trunk: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
        self.prefix = next(name for name, module in model.named_modules() if module is self.trunk)
        self.blocks: Sequence[Block] = self._blocks()
        if not self.blocks:
            paths = " or ".join(stack.blocks for stack in role_map.stacks)
            raise UserError(f"The role map {self.family!r} finds no blocks at {paths} in this {type(model).__name__}. Found {structure.describe(self.trunk)}.")

    @classmethod
    def of(cls, model_or_config: Any, roles: Mapping[str, str] | None = None, auto_class: str | None = None) -> Anatomy:
        """Roles of a model, or of a config (built on the meta device: no weights).

        roles       an override for an architecture without a role map: `{"blocks": "encoder.layers", "attention.query": "attn.q", ...}`
        auto_class  which head to build for a config (`AutoModelForCausalLM`); by default what its `architectures` names, else the bare trunk
        Raises UserError, with what was found, where the roles are not certain.
        """
        model = model_or_config if isinstance(model_or_config, nn.Module) else _on_meta(model_or_config, auto_class)
        if hasattr(model, "get_base_model"):  # peft's wrapper
            model = model.get_base_model()  # type: ignore[operator]
        config: Any = model.config
        if roles is not None:
            return cls(model, _given(roles, model))
        found = family.find(config.model_type)
        return cls(model, found or structure.infer(model))

    def __repr__(self) -> str:
        return f"Anatomy({self.family}, {self.architecture}, {len(self.blocks)} blocks, width {self.width}, {self.parameters:,} parameters)"

    @property
    def width(self) -> int:
        """Features of the residual stream."""
        return self.blocks[0].sites["attention.query"].inputs

    @functools.cached_property
    def embeddings(self) -> list[Site]:
        return self._outside(self.map.embeddings, "embeddings")

    @functools.cached_property
    def norms(self) -> list[Site]:
        """Every norm of the trunk that learns, known by its class; those of the blocks with their role there (`attention.norm`)."""
        inside = {site.name: site for block in reversed(self.blocks) for site in block.sites.values() if site.role not in POINTS}
        found = [(self._path(name), module) for name, module in native(self.trunk) if structure.is_norm(module)]
        return [inside.get(name) or self._site(name, module, "norm") for name, module in found]

    @functools.cached_property
    def pooler(self) -> list[Site]:
        return self._outside(self.map.pooler, "pooler")

    @functools.cached_property
    def head(self) -> list[Site]:
        """Modules with weights of their own that read the trunk: classifier, lm_head."""
        owners = {t.name.rpartition(".")[0] for t in self.tensors() if t.role == "head"}
        # a head whose weight is tied to the embeddings holds no tensor of its own
        tied = {name.rpartition(".")[0] for group in self.tied for name in group if self._is_head(name)}
        return [self._site(name, self.model.get_submodule(name), "head") for name, _ in self.model.named_modules() if name in owners | tied]

    @functools.cached_property
    def tied(self) -> list[tuple[str, ...]]:
        """Names of parameters that are one tensor."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        physical = {id(p) for p in self.model.parameters()}
        return [tuple(group) for key, group in names.items() if key in physical and len(group) > 1]

    def tensors(self) -> list[NamedTensor]:
        """Every parameter of the model once, with its role; modules that methods brought are left out."""
        places = self._places()
        out = []
        for name, parameter in self.model.named_parameters():
            if brought(name):
                continue
            owner, _, leaf = name.rpartition(".")
            role, block, stack = self._place(owner, name, places)
            out.append(NamedTensor(name, parameter, role, leaf if leaf in ("weight", "bias") else "other", block, stack))
        return out

    def sites(self, expression: str) -> list[Site]:
        """Sites that an expression names, in the order of the forward pass.

        Roles joined by `+` (`attention.query+attention.value`), wildcards (`mlp.*`: matrices, not points), block slices
        (`blocks[-2:].mlp.up`; of each stack), stacks (`decoder.cross_attention.value`), `norm`, `embeddings`, `head`, `pooler`,
        points (`attention.out`), exact module names or patterns of them. Raises UserError where a part matches nothing.
        """
        from luthier.anatomy.sites import match

        return match(self, expression)

    def cover(self, sites: Iterable[Site]) -> list[str]:
        """How many of the blocks that have a role are covered, by role: `attention.query: 6 of 6 blocks`."""
        chosen = Counter(_qualified(site) for site in sites if site.block is not None)
        have = Counter(_qualified(site) for block in self.blocks for site in block.sites.values())
        lines = [f"{role}: {count} of {have[role]} blocks" for role, count in chosen.items()]
        return lines + [site.label for site in sites if site.block is None]

    @functools.cached_property
    def parameters(self) -> int:
        """Numbers in the model, tied ones once."""
        return sum(p.numel() for name, p in self.model.named_parameters() if not brought(name))

    def macs(self, workload: Workload) -> int:
        """Multiply-accumulates of one forward pass's matrix products."""
        return cost.macs(self, workload)

    def memory(self, workload: Workload, trainable: int, reached: int | None = None, recompute: bool = False) -> int:
        """Bytes that one training step needs at its peak; the formula is in `cost.memory`."""
        return cost.memory(self, workload, trainable, reached, recompute)

    def _blocks(self) -> list[Block]:
        blocks: list[Block] = []
        for stack in self.map.stacks:
            try:
                modules = self.trunk.get_submodule(stack.blocks)
            except AttributeError:
                continue  # an encoder alone of an encoder-decoder
            listed = list(modules.named_children())
            calls = getattr(self.config, stack.repeat) if stack.repeat else 1
            for i, (name, module) in enumerate(listed * calls):
                blocks.append(self._block(i, self._path(f"{stack.blocks}.{name}"), module, stack, calls))
        missed = {id(m): name for name, m in native(self.trunk) if type(m) in {type(block.module) for block in blocks}}
        for block in blocks:
            missed.pop(id(block.module), None)
        if missed:
            raise UserError(f"The role map {self.family!r} reaches only some of the blocks of this {type(self.model).__name__}; it misses {', '.join(missed.values())}.")
        return blocks

    def _block(self, index: int, name: str, module: nn.Module, stack: Stack, calls: int) -> Block:
        sites: dict[str, Site] = {}
        for role in sorted(stack.roles, key=POINTS.__contains__):  # points last: they lean on the roles of their sublayer
            path, part, parts = _first_that_exists(module, stack.roles[role])
            if path is None:
                continue
            target, rows, entry = module.get_submodule(path), None, None
            if role in POINTS:
                self._require(sites, POINTS[role], name, stack)
                first, *_, last = (sites[needed] for needed in POINTS[role])
                entry, inputs, outputs = first.module, first.inputs, last.outputs
            else:
                inputs, outputs = _features(target, sites)
                outputs, whole = outputs // parts, outputs
                rows = slice(part * outputs, (part + 1) * outputs) if outputs < whole else None
            sites[role] = Site(f"{name}.{path}", role, target, inputs, outputs, index, stack.name, rows, calls, entry)
        if self.family == "given" and index == 0:  # a user's own paths must all lead somewhere
            self._require(sites, stack.roles, name, stack)
        return Block(index, name, module, stack.name, sites)

    def _require(self, sites: Mapping[str, Site], roles: Iterable[str], block: str, stack: Stack) -> None:
        missing = {role: stack.roles.get(role, "no path given") for role in roles if role not in sites}
        if missing:
            paths = ", ".join(f"{role} ({path})" for role, path in missing.items())
            near = structure.nearest(self.trunk, next(iter(missing.values())))
            raise UserError(f"The role map {self.family!r} does not fit this {type(self.model).__name__}: {block} has no module for {paths}.{near} Found {structure.describe(self.trunk)}.")

    def _outside(self, paths: tuple[str, ...], role: str) -> list[Site]:
        found = []
        for path in paths:
            try:
                module = self.trunk.get_submodule(path)
            except AttributeError:
                continue
            found.append(self._site(self._path(path), module, role))
        return found

    def _site(self, name: str, module: nn.Module, role: str) -> Site:
        inputs, outputs = _features(module, {})
        return Site(name, role, module, inputs, outputs)

    def _path(self, path: str) -> str:
        return f"{self.prefix}.{path}" if self.prefix else path

    def _places(self) -> dict[str, _Place]:
        """Module path -> role, block, stack."""
        places: dict[str, _Place] = {}
        for sites in (self.embeddings, self.pooler):
            places |= {site.name: (site.role, None, None) for site in sites}
        for block in reversed(self.blocks):  # of shared blocks, the first index is kept
            places[block.name] = ("other", block.index, block.stack)
            # a fused weight goes by its whole role, which its map names first
            for site in reversed([site for site in block.sites.values() if site.role not in POINTS]):
                places[site.name] = (site.role, block.index, block.stack)
        for site in self.norms:
            role, index, stack = _nearest(site.name, places) or ("other", None, None)
            if role == "other":
                places[site.name] = ("norm", index, stack)
        return places

    def _place(self, owner: str, name: str, places: Mapping[str, _Place]) -> _Place:
        return _nearest(owner, places) or (("head", None, None) if self._is_head(name) else ("other", None, None))

    def _is_head(self, name: str) -> bool:
        if self.trunk is not self.model:
            return not name.startswith(self.prefix + ".")
        top = name.partition(".")[0]
        known = [*self.map.embeddings, *self.map.pooler, *(stack.blocks for stack in self.map.stacks)]
        return all(path.partition(".")[0] != top for path in known)


def _on_meta(config: Any, auto_class: str | None) -> nn.Module:
    named = (getattr(config, "architectures", None) or [None])[0]
    with torch.device("meta"):
        if auto_class is None and named and hasattr(transformers, named):
            return getattr(transformers, named)(config)
        return getattr(transformers, auto_class or "AutoModel").from_config(config, trust_remote_code=False)


def _given(roles: Mapping[str, str], model: nn.Module) -> Family:
    needed = [role for role in ("blocks", *structure.REQUIRED) if role not in roles]
    if needed:
        raise UserError(f"roles= lacks {', '.join(needed)}. Give each the path of its module inside a block, and `blocks` the path of their list.")
    inside = {role: path for role, path in roles.items() if role not in (*POINTS, "blocks", "embeddings", "architecture")}
    inside |= {"attention.out": roles.get("attention.out", roles["attention.output"]), "mlp.out": roles.get("mlp.out", roles["mlp.down"])}
    guess = structure.outside(model, roles["blocks"])
    architecture = roles.get("architecture", guess.architecture)
    embeddings = tuple(roles["embeddings"].split("+")) if "embeddings" in roles else guess.embeddings
    trunk: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
    lost = set(embeddings).difference(name for name, _ in trunk.named_modules())
    if lost:
        raise UserError(f"roles= looks for embeddings at {', '.join(sorted(lost))}, but this {type(trunk).__name__} has {', '.join(dict(trunk.named_children()))}.")
    return replace(guess, architecture=architecture, embeddings=embeddings, stacks=(Stack(roles["blocks"], inside),), name="given", pooling="last" if architecture == "decoder" else "first")


def _first_that_exists(module: nn.Module, spelling: str) -> tuple[str | None, int, int]:
    """`a|b[1/3]` -> the first path that the block has, and which part of it of how many."""
    for path in spelling.split("|"):
        match = _PART.fullmatch(path)
        bare, part, parts = (match[1], int(match[2]), int(match[3])) if match else (path, 0, 1)
        try:
            module.get_submodule(bare)
        except AttributeError:
            continue
        return bare, part, parts
    return None, 0, 1


def _features(module: nn.Module, sites: Mapping[str, Site]) -> tuple[int, int]:
    """Inputs and outputs of a module; of one without a matrix (norm, dropout, scale), the width twice."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Conv2d):
        return module.in_channels * module.kernel_size[0] * module.kernel_size[1], module.out_channels
    own = [p for p in module.parameters(recurse=False) if p.dim() == 1]
    width = own[0].shape[0] if own else next((site.inputs for site in sites.values() if site.role == "attention.query"), 0)
    return width, width


def _nearest(path: str, places: Mapping[str, _Place]) -> _Place | None:
    """The place of a module, or of the innermost one around it that has one."""
    while path:
        if path in places:
            return places[path]
        path = path.rpartition(".")[0]
    return None


def _qualified(site: Site) -> str:
    return f"{site.stack}.{site.role}" if site.stack else site.role
