"""From gates to a smaller model: units that stay are copied into a new model of the host's own class.

A kept unit's mean is folded into the projections it multiplies, and pruned rows and columns are left out, so the small
model computes what the masked one does. Output and input embedding may be one matrix: it takes the hidden gate's mean,
and the final norm its inverse.

Dutta et al., arXiv:2406.05276. Decided here: a structure that the stock class can hold becomes a stock model, which
transformers loads by itself. Others become a model of `ragged_modeling`, whose checkpoint carries that file and loads
with `trust_remote_code=True`. A BERT's embeddings end with a norm; it takes the fold, so its masked-language head
needs no correction though it shares the matrix.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from llm_attn.transformers.door import base_model
from llm_attn.vtrans import ragged_modeling
from llm_attn.vtrans.door import Gates
from llm_attn.vtrans.families import Anatomy, kept_channels
from llm_attn.vtrans.structure import Structure, fits_stock

Folds = Callable[[str, int | None], Tensor | None]


def shrink(model: nn.Module, structure: Structure, *, gates: Gates | None = None) -> PreTrainedModel:
    """A new model of the structure's sizes; `model` is left as it is, gates that are at work in it too.

    gates: whose means are folded (None: units keep their size). ValueError where the structure is not this model's,
    and where a ragged structure has no class.
    """
    host = base_model(model)
    anatomy = Anatomy(host)
    _check(anatomy, structure)
    config = _config(anatomy, structure)
    build = type(host) if fits_stock(host, structure) is None else ragged_modeling.ragged_class(type(host).__name__)
    with torch.random.fork_rng(devices=[]):  # a new model draws its start, which is then overwritten
        small: PreTrainedModel = build(config, **_pooling(host))
    result = small.load_state_dict(_state(anatomy, structure, gates), strict=False)
    missing = set(result.missing_keys) - _tied_names(small)
    if missing or result.unexpected_keys:
        raise RuntimeError(f"shrinking left out {sorted(missing)} or invented {result.unexpected_keys}")
    small.tie_weights()
    if getattr(host, "generation_config", None) is not None:
        small.generation_config = deepcopy(host.generation_config)
    return small.to(dtype=host.dtype, device=host.device).eval()


def _pooling(host: PreTrainedModel) -> dict[str, bool]:
    return {"add_pooling_layer": False} if getattr(host, "pooler", 0) is None else {}


def _tied_names(model: PreTrainedModel) -> set[str]:
    own = {name for name, _ in model.named_parameters()}
    return set(model.state_dict()) - own


def _check(anatomy: Anatomy, structure: Structure) -> None:
    layers = len(anatomy.layers)
    given = (structure.hidden, *structure.heads, *structure.inter, structure.layers)
    limits = (anatomy.hidden, *[anatomy.heads] * layers, *[anatomy.inter] * layers, layers)
    fits = len(structure.heads) == len(structure.inter) == layers
    if not fits or any(kept and max(kept) >= limit for kept, limit in zip(given, limits, strict=True)):
        raise ValueError(
            f"the structure is of another model: this one has {layers} layers of {anatomy.heads} heads and "
            f"{anatomy.inter} feed-forward units, and {anatomy.hidden} channels"
        )
    if getattr(anatomy.config, "scale_attn_by_inverse_layer_idx", False) and len(structure.layers) < layers:
        raise ValueError("this GPT-2 scales attention by the number of the layer, so its layers cannot be dropped")


def _config(anatomy: Anatomy, structure: Structure) -> Any:
    config: Any = deepcopy(anatomy.config)
    counts = structure.counts
    first = structure.layers[0]
    config.hidden_size, config.num_hidden_layers = counts.hidden, len(structure.layers)
    setattr(config, anatomy.family.inter_name, max(counts.inter))
    even = fits_stock(anatomy.model, structure) is None
    heads = counts.heads[first] if even else 1
    config.num_attention_heads = heads * (anatomy.group if even else 1)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = heads
        config.head_dim = anatomy.head_dim
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in structure.layers]
    if not even:
        config.ragged = {
            "heads": [counts.heads[layer] for layer in structure.layers],
            "inter": [counts.inter[layer] for layer in structure.layers],
            "head_dim": anatomy.head_dim,
            "group": anatomy.group,
        }
    return config


def _state(anatomy: Anatomy, structure: Structure, gates: Gates | None) -> dict[str, Tensor]:
    fold = _folds(gates)
    state = {}
    for name, parameter in anatomy.model.named_parameters():
        layer = anatomy.layer_of(name)
        if layer is not None and layer not in structure.layers:
            continue
        state[_renumbered(anatomy, name, layer, structure)] = _cut(anatomy, structure, fold, name, parameter, layer)
    return state


def _cut(
    anatomy: Anatomy, structure: Structure, fold: Folds, name: str, parameter: Tensor, layer: int | None
) -> Tensor:
    tensor = parameter.detach()
    for dim, axis in enumerate(anatomy.axes(name)):
        kind = axis.rstrip("*/")
        if kind == "all":
            continue
        units, width = _units(anatomy, structure, kind, layer)
        units = units.to(tensor.device)
        tensor = tensor.index_select(dim, kept_channels(units, width) if kind != "qkv" else _thrice(anatomy, units))
        factor = fold(kind, layer)
        if factor is None or axis == kind or (axis.endswith("/") and not anatomy.tied):
            continue
        factor = factor[units].repeat_interleave(width).to(tensor.dtype)
        factor = 1 / factor if axis.endswith("/") else factor
        if kind == "hidden" and layer is not None and (of_layer := fold("layer", layer)) is not None:
            factor = factor * of_layer.to(tensor.dtype)
        tensor = tensor * factor.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
    return tensor.contiguous()


def _units(anatomy: Anatomy, structure: Structure, kind: str, layer: int | None) -> tuple[Tensor, int]:
    """Kept units along an axis, and how many channels each has."""
    if kind == "hidden" or layer is None:
        return torch.tensor(structure.hidden), 1
    if kind == "inter":
        return torch.tensor(structure.inter[layer]), 1
    width = anatomy.head_dim * (1 if kind == "key" else anatomy.group)
    return torch.tensor(structure.heads[layer]), width


def _thrice(anatomy: Anatomy, heads: Tensor) -> Tensor:
    one = kept_channels(heads, anatomy.head_dim)
    whole = anatomy.heads * anatomy.head_dim
    return torch.cat([one, one + whole, one + 2 * whole])


def _folds(gates: Gates | None) -> Folds:
    def fold(kind: str, layer: int | None) -> Tensor | None:
        if gates is None:
            return None
        if kind == "hidden":
            return _mean(gates.hidden)
        if kind == "layer":
            return None if gates.layer is None or layer is None else _mean(gates.layer[layer])
        return _mean((gates.inter if kind == "inter" else gates.heads)[layer or 0])

    return fold


def _mean(gate: Any) -> Tensor:
    mean: Tensor = gate.mu.detach() if gate.weighted else torch.ones_like(gate.mu)
    return mean


def _renumbered(anatomy: Anatomy, name: str, layer: int | None, structure: Structure) -> str:
    if layer is None:
        return name
    path = f"{anatomy.family.layers}."
    before, _, after = name.partition(path)
    return f"{before}{path}{structure.layers.index(layer)}.{after.partition('.')[2]}"


def load_shrunk(folder: Path | str) -> PreTrainedModel:
    """The model that `save_pretrained` wrote, stock or ragged, in eval mode, by classes that are installed here.

    FileNotFoundError where the folder holds no model.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no model in {folder}: give the folder that save_pretrained wrote")
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = config.architectures or []
    if not names:
        raise ValueError(f"{folder / 'config.json'} does not say what class it is of (architectures)")
    import transformers

    ragged = getattr(config, "ragged", None) is not None
    build = ragged_modeling.ragged_class(names[0]) if ragged else getattr(transformers, names[0])
    model: PreTrainedModel = build.from_pretrained(folder)
    return model.eval()
