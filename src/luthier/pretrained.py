"""A folder with a pretrained model: checked, described without its weights, and loaded. Nothing of it is executed and nothing is fetched."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from luthier.errors import UserError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack")
CODE = ("auto_map", "custom_pipelines")  # what a folder names to have its own code run
Configure = Callable[[Any], None]


@dataclass(frozen=True)
class Pretrained:
    """A stock model folder: `config.json`, safetensors, and most often a tokenizer."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> Pretrained:
        """Raises UserError for what is no model folder, or one whose weights are pickles."""
        folder = Path(path)
        if not folder.exists():
            raise UserError(f"There is no model at {path}. Give a folder that holds config.json and *.safetensors; luthier does not download models.")
        if not folder.is_dir():
            raise UserError(f"{path} is a file; a model is a folder that holds config.json and *.safetensors.")
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise UserError(f"{path} is no model folder: config.json is missing. It holds: {found}.")
        if (folder / "adapter_config.json").is_file() and not (folder / "luthier.json").is_file():
            raise UserError(f"{path} holds an adapter (adapter_config.json), which transformers would put on its model unasked. Give the folder of the model alone, or merge the adapter into it by peft.")
        if not list(folder.glob("*.safetensors")):
            pickles = [p.name for pattern in PICKLES for p in folder.glob(pattern)]
            if pickles:
                raise UserError(
                    f"{path} holds its weights as {pickles[0]}, a pickle, which can run code when it is opened; luthier does not. If you trust its author, convert it once: "
                    f'python -c "from transformers import AutoModel as M; M.from_pretrained({str(path)!r}).save_pretrained({str(path) + "-safe"!r})"'
                )
            raise UserError(f"{path} has a config.json but no weights (*.safetensors).")
        return cls(folder)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the stored tensors, from the files' headers."""
        found: dict[str, tuple[int, ...]] = {}
        for file in self.path.glob("*.safetensors"):
            found |= stored_shapes(file)
        return found

    @functools.cached_property
    def sha256(self) -> str:
        """Of config and weights, in the order of their names."""
        digest = hashlib.sha256()
        for file in [self.path / "config.json", *sorted(self.path.glob("*.safetensors"))]:
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def config(self) -> Any:
        try:
            settings = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.path / 'config.json'} is not valid JSON: {error}") from None
        try:
            _refuse_kernels(self.path, settings)
            return _completed(transformers.AutoConfig.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False))
        except (ValueError, KeyError, OSError) as error:
            if "auto_map" in settings:
                raise UserError(f"{self.path} asks to run code of its own ({settings['auto_map']}), which luthier never does. Use a model whose architecture transformers has.") from None
            raise UserError(f"{self.path / 'config.json'}: transformers {transformers.__version__} does not know model_type={settings.get('model_type')!r}: {str(error).splitlines()[0]}") from None

    def meta(self, auto_class: str, configure: Configure | None = None) -> tuple[nn.Module, tuple[str, ...]]:
        """The model on the meta device (no weights are read), and the names of the parameters that this folder will not fill."""
        config = self.config()
        if configure:
            configure(config)
        with torch.device("meta"):
            model = _class(auto_class, config, self.path)(config, **self._build_settings(auto_class, config))
        prefix = model.base_model_prefix + "."
        have = {name.removeprefix(prefix): shape for name, shape in self.shapes.items()}
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        trunk = {id(p) for p in model.base_model.parameters()}  # a bare trunk is its own
        new = [
            name
            for name, p in model.named_parameters()
            if have.get(name.removeprefix(prefix)) != tuple(p.shape) and name not in tied and (id(p) not in trunk or "pooler" in name.split("."))
        ]
        return model, tuple(new)

    def load(self, auto_class: str, configure: Configure | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[str, ...]]:
        """The model with its weights, in eval mode, and the names of the parameters that the folder does not fill: new heads, drawn from `seed`."""
        config = self.config()
        if configure:
            configure(config)
        model_class = _class(auto_class, config, self.path)
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                model, info = model_class.from_pretrained(
                    str(self.path), config=config, dtype=dtype, output_loading_info=True, use_safetensors=True, local_files_only=True, trust_remote_code=False, ignore_mismatched_sizes=True, **self._build_settings(auto_class, config)
                )
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(f"{self.path}: its weights cannot be loaded as {model_class.__name__}: {str(error).splitlines()[0]}") from error
        missing = set(info["missing_keys"]) | {str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]}
        expected = set(self.meta(auto_class, configure)[1])
        lost = sorted(missing - expected)
        if lost:
            raise UserError(f"{self.path} does not fill {len(lost)} weights of {model_class.__name__}, which would stay random: {', '.join(lost[:4])}. Is it the model that its config.json names?")
        return model.eval(), tuple(name for name, _ in model.named_parameters() if name in missing)

    def tokenizer(self) -> Any:
        try:
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many types here, all for one reason
            raise UserError(f"{self.path} has no tokenizer that transformers can open ({str(error).splitlines()[0]}). Copy the tokenizer files of the model into the folder.") from error
        for pointer in CODE:
            tokenizer.init_kwargs.pop(pointer, None)
        return tokenizer

    def _build_settings(self, auto_class: str, config: Any) -> dict[str, Any]:
        """A pooler that the folder does not hold and a bare trunk does not need is not created."""
        takes_pooler = "add_pooling_layer" in inspect.signature(_class(auto_class, config, self.path).__init__).parameters
        return {"add_pooling_layer": False} if auto_class == "AutoModel" and takes_pooler and not any("pooler" in name.split(".") for name in self.shapes) else {}


def _refuse_kernels(path: Path, settings: Any) -> None:
    """An attention named `owner/repository` is code that transformers would fetch as soon as the model is built."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            if name.lstrip("_") in ("attn_implementation", "experts_implementation") and "/" in str(value):
                raise UserError(f"{path / 'config.json'} asks for code from elsewhere ({name}: {value}), which luthier never fetches. Take that line out of the file.")
            _refuse_kernels(path, value)


def _completed(config: Any) -> Any:
    """Without pointers to code of a stranger, which would be written into every run; an encoder-decoder starts its target with padding
    (T5's convention) where its config does not say with what."""
    for pointer in CODE:
        if hasattr(config, pointer):
            delattr(config, pointer)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None)
    return config


def can(config: Any, auto_class: str) -> bool:
    """Whether transformers has this head for the architecture of `config`."""
    return type(config) in getattr(transformers, auto_class)._model_mapping


def _class(auto_class: str, config: Any, path: Path) -> Any:
    mapping = getattr(transformers, auto_class)._model_mapping
    if type(config) not in mapping:
        raise UserError(f"{path} is a {config.model_type} model, and transformers has no {auto_class.removeprefix('AutoModel') or 'bare model'} head for it. `luthier tasks` lists the other tasks.")
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header. Raises UserError where there is no such file, or it is broken."""
    if not file.is_file():
        raise UserError(f"{file} is missing. Copy it from the original folder.")
    return {name: tuple(entry["shape"]) for name, entry in _header(file).items() if name != "__metadata__"}


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > 100_000_000:
                raise ValueError("header too long")
            header = json.loads(stream.read(size))
            ends = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            if 8 + size + ends != file.stat().st_size:
                raise ValueError(f"{file.stat().st_size} bytes instead of {8 + size + ends}")
            return header
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{file} is not a safetensors file ({error}). It may be incomplete: copy it again.") from None


class quiet:
    """transformers' progress bars and its report of new heads, which the plan states better, are held back."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level, self.bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bar:
            logging.enable_progress_bar()
