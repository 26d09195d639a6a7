"""How a model with doors is saved and comes back: the methods, their settings and their weights.

`save_pretrained` of such a model writes `config.json` with the model type "llm_attn", which holds the host's own type
and the list of methods. After `import llm_attn`, `AutoModelForCausalLM.from_pretrained` gives the host's class with the
doors open and their weights in place; where llm_attn is not imported, transformers says that it does not know the type,
instead of loading a model that silently lacks its method.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

MODEL_TYPE = "llm_attn"


@dataclass(frozen=True)
class Door:
    """How a saved method is opened again: its config class, and `apply(model, config, layers=...)`."""

    config_class: type
    apply: Callable[..., Any]


@dataclass(frozen=True)
class _Open:
    config: Any
    layers: tuple[int, ...] | None


_DOORS: dict[str, Door] = {}
_SAVING_CLASSES: dict[type, type] = {}


def register_door(name: str, config_class: type, apply: Callable[..., Any]) -> None:
    """Lets models that run the method `name` be loaded: `apply(model, config_class(**saved), layers=...)`.

    `config_class` is a dataclass whose fields JSON can hold.
    """
    _DOORS[name] = Door(config_class, apply)


def open_doors(host: PreTrainedModel) -> tuple[str, ...]:
    """Names of the methods at work in the model."""
    return tuple(getattr(host, "llm_attn_doors", {}))


def remember(host: Any, name: str, config: Any, layers: tuple[int, ...] | None) -> Callable[[], None]:
    """Has the model write the method when it is saved; returns what undoes that."""
    if not open_doors(host):
        host.__class__ = _saving_class(type(host))
    host.llm_attn_doors = {**getattr(host, "llm_attn_doors", {}), name: _Open(config, layers)}

    def forget() -> None:
        host.llm_attn_doors = {k: v for k, v in host.llm_attn_doors.items() if k != name}
        if not host.llm_attn_doors:
            del host.llm_attn_doors
            host.__class__ = type(host).__mro__[2]

    return forget


class _SavesDoors:
    llm_attn_doors: dict[str, _Open]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers' own; the methods at work go into config.json."""
        if kwargs.get("push_to_hub"):
            raise ValueError("save a model with llm-attn methods to a folder, then upload that folder")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            _write_methods(Path(save_directory) / "config.json", self.llm_attn_doors)


def _saving_class(host_class: type) -> type:
    if host_class in _SAVING_CLASSES:
        return _SAVING_CLASSES[host_class]
    # the host's name and module, so that transformers, which looks at both, sees the host
    names = {
        "__module__": host_class.__module__,
        "__qualname__": host_class.__qualname__,
        "__doc__": host_class.__doc__,
    }
    return _SAVING_CLASSES.setdefault(host_class, type(host_class.__name__, (_SavesDoors, host_class), names))


def _write_methods(path: Path, doors: dict[str, _Open]) -> None:
    config = json.loads(path.read_text())
    methods = [{"name": name, "layers": door.layers, "config": asdict(door.config)} for name, door in doors.items()]
    config[MODEL_TYPE] = {"model_type": config["model_type"], "methods": methods}
    config["model_type"] = MODEL_TYPE
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(config, indent=2))
    temporary.replace(path)


class LlmAttnConfig(PreTrainedConfig):
    """Stands in config.json for a host's configuration with methods; see `LlmAttnForCausalLM`."""

    model_type = MODEL_TYPE


class LlmAttnForCausalLM(PreTrainedModel):
    """What `AutoModelForCausalLM` finds for the model type "llm_attn"; loading it gives the host's own class."""

    config_class = LlmAttnConfig

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> PreTrainedModel:
        """The host model with its methods and their weights. ValueError on a method that this version does not know."""
        kwargs.pop("config", None)
        raw, _ = PreTrainedConfig.get_config_dict(path)
        saved = raw.pop(MODEL_TYPE)
        _check_known(saved["methods"])
        config = CONFIG_MAPPING[saved["model_type"]].from_dict({**raw, "model_type": saved["model_type"]})
        host_class = AutoModelForCausalLM._model_mapping[type(config)]
        model, ours = _load_host(host_class, path, config, *args, **kwargs)
        of_host = set(model.state_dict())
        for method in saved["methods"]:
            door = _DOORS[method["name"]]
            door.apply(model, door.config_class(**method["config"]), layers=method["layers"])
        _load_weights(model, Path(path), ours, set(model.state_dict()) - of_host)
        return model


def _check_known(methods: list[dict[str, Any]]) -> None:
    unknown = [method["name"] for method in methods if method["name"] not in _DOORS]
    if unknown:
        raise ValueError(f"the saved model runs {', '.join(unknown)}; this llm-attn knows {', '.join(sorted(_DOORS))}")


def _load_host(host_class: type, path: Any, config: Any, *args: Any, **kwargs: Any) -> tuple[PreTrainedModel, set[str]]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the methods' weights are unexpected to the host, and are loaded below
    try:
        model, found = host_class.from_pretrained(path, *args, config=config, output_loading_info=True, **kwargs)  # type: ignore[attr-defined]
    finally:
        transformers_logging.set_verbosity(verbosity)
    if found["missing_keys"] or found["mismatched_keys"]:
        wrong = sorted(found["missing_keys"]) or sorted(found["mismatched_keys"])
        raise ValueError(f"{path} lacks weights of the host model, or has them in other shapes: {wrong[0]}")
    return model, set(found["unexpected_keys"])


def _load_weights(model: nn.Module, path: Path, given: set[str], needed: set[str]) -> None:
    if given != needed:
        raise ValueError(f"{path} and the methods in its config.json disagree about the weight {min(given ^ needed)}")
    weights = {}
    for file in _weight_files(path) if needed else []:
        with safe_open(file, "pt") as tensors:
            weights.update({name: tensors.get_tensor(name) for name in needed & set(tensors.keys())})
    model.load_state_dict(weights, strict=False)


def _weight_files(path: Path) -> list[str]:
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [cached_file(path, "model.safetensors")]
    shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [cached_file(path, shard) for shard in shards]


AutoConfig.register(MODEL_TYPE, LlmAttnConfig, exist_ok=True)
AutoModelForCausalLM.register(LlmAttnConfig, LlmAttnForCausalLM, exist_ok=True)
