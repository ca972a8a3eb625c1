"""A bridge to the tuners of the peft library: it adds, trains and saves their parameters in its own way and format.

Where peft can inject a tuner into the model's modules, the model stays the object that it was; where it cannot (prompt
learning, tuners with state shared between layers), the model is wrapped by `get_peft_model`.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import did_you_mean
from luthier.methods import Bridge, Card, NeedsWeights, UserError, method
from luthier.methods.settings import spell
from luthier.methods.stock_adapter import head_modules, write

SHORT = {"prefix": "prefix_tuning", "prompt": "prompt_tuning", "ia3": "ia3"}
VARIANTS = {"pissa": ("lora", {"init_lora_weights": "pissa"}), "dora": ("lora", {"use_dora": True}), "rslora": ("lora", {"use_rslora": True})}


@method
class Peft(Bridge):
    """Train a tuner of peft, named by `type` (`vera`, `pissa`, `prefix`, ...); all further settings are those of its own config class."""

    type: str
    sites: str = "attention.query+attention.value"
    options: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), metadata={"own": True})  # filled from the further settings

    card = Card(
        name="peft",
        use="train any tuner of the peft library, saved in its format",
        source="peft; the tuner's own paper",
        writes={"weights", "structure"},
        promises={"reloads_in_stock_transformers", "resumes_exactly"},
        lr=3e-3,
        examples=("peft(type=vera, r=16)", "peft(type=pissa, r=4)", "peft(type=prefix, num_virtual_tokens=4)"),
        gaps={
            f"peft(type=prefix, num_virtual_tokens=4):{architecture}": "transformers gives past keys and values to language models only"
            for architecture in ("bert", "roberta", "albert", "distilbert", "t5", "vit", "dinov2")
        },
    )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]):
        if not isinstance(settings.get("type"), str):
            raise UserError(f"peft: type must be given, one of: {', '.join(_types())}. For example: peft(type=vera).")
        own = {key: value for key, value in settings.items() if key in ("type", "sites")}
        options = {key: value for key, value in settings.items() if key not in own}
        made = super().from_settings(own)
        fields = {f.name for f in dataclasses.fields(_config_class(made.type)) if f.init}
        for key in options:
            if key not in fields:
                raise UserError(f"peft: {made.type} has no setting {key!r}.{did_you_mean(key, fields)} Its config class is {_config_class(made.type).__name__}.")
        return dataclasses.replace(made, options=tuple(options.items()))

    def settings(self):
        return {key: value for key, value in super().settings().items() if key != "options"} | dict(self.options)

    def __str__(self):
        return f"peft({', '.join(f'{key}={spell(value)}' for key, value in self.settings().items())})"

    def attach(self, anatomy, task_type, new_heads):
        import peft

        config_class = _config_class(self.type)
        fields = {f.name for f in dataclasses.fields(config_class) if f.init}
        settings = dict(VARIANTS.get(self.type, ("", {}))[1]) | dict(self.options)
        sites = anatomy.sites(self.sites)
        if "target_modules" in fields:
            settings.setdefault("target_modules", sorted({site.name for site in sites}))
        if "fan_in_fan_out" in fields and all(isinstance(site.module, Conv1D) for site in sites):
            settings.setdefault("fan_in_fan_out", True)
        if self.type == "ia3":
            settings.setdefault("feedforward_modules", [])
        if self.type in ("prefix", "prefix_tuning") and not anatomy.model.can_generate():  # type: ignore[operator]
            raise UserError(f"peft: prefix tuning goes through past keys and values, which transformers gives to language models only; this is a {type(anatomy.model).__name__}. Use lora or adapter.")
        try:
            config = config_class(**settings)
            if _injects(config):
                return peft.inject_adapter_in_model(config, anatomy.model)
            config.task_type = task_type
            if "modules_to_save" in fields and new_heads:
                config.modules_to_save = head_modules(new_heads)
            return peft.get_peft_model(anatomy.model, config)
        except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError, RuntimeError) as error:
            if any(p.is_meta for p in anatomy.model.parameters()):
                raise NeedsWeights from error
            raise UserError(f"peft: {self.type} refuses this {anatomy.family} model: {(str(error) or repr(error)).splitlines()[0]}") from error

    def learns(self, model: nn.Module):
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def save(self, model, folder, base, new_heads):
        import peft

        if isinstance(model, peft.PeftModel):
            model.peft_config["default"].base_model_name_or_path = base
            model.save_pretrained(folder)
            return
        config = model.peft_config["default"]  # type: ignore[index]
        tensors = peft.get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
        heads = {name: parameter for name, parameter in model.named_parameters() if name in new_heads}
        write(folder, config, tensors, heads, base)


def _types() -> list[str]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return sorted({kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} | set(VARIANTS))


def _config_class(name: str) -> type:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = VARIANTS[name][0] if name in VARIANTS else SHORT.get(name, name)
    by_name = {t.value.lower(): config for t, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if isinstance(t, PeftType)}
    if kind.lower() not in by_name:
        raise UserError(f"peft: there is no type {name!r}.{did_you_mean(name.lower(), [*_types(), *SHORT])} Known: {', '.join(_types())}.")
    return by_name[kind.lower()]


def _injects(config: Any) -> bool:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt or tuner is None or inspect.isabstract(tuner):
        return False
    return not getattr(tuner, "uses_shared_state", False) and config.peft_type.value != "SHADOW"
