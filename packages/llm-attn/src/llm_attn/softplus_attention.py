"""Softplus attention (LSSA, LSSAR): weights that stay sharp when the text grows far beyond the training length.

Softmax flattens as keys are added. Here the score of a key is its cosine with the query, on a scale that grows with the
number of keys; softplus and the l1 norm make weights of it (LSSA), and a second stage keeps what exceeds the mean
weight of the row and raises it to a power (LSSAR). No parameters, no running maximum. It is a choice made before
training: a model that was trained with softmax attention gives nonsense with it. It costs more than softmax attention;
what it buys is loss at many times the training length.

Gao, Spratling and Gionfrida, "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language
Models", arXiv:2501.13428.
Left open there, decided here: N of a row counts the keys that the row may see, so that padding, packing, windows and
caches agree with the whole text; the first rows, whose threshold is 0, are those with N of at most 3, by count. Both
norms divide exactly: a row without keys gives 0, a row whose excess is nothing but rounding keeps the weights of the
first stage. Logarithms are natural. The host's own scale is left aside. Dropout acts after the last stage. Unit vectors
are made in float32 and rounded to the inputs' dtype; scores, sums and powers are float32, or float64 for float64.
`softmax_logn` is the control that reviewers of the paper asked for: softmax of the same scores.

Shapes: B batch, H query heads, Hkv key heads, Nq queries, Nk keys, D head width, E value width.
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llm_attn.transformers import saving
from llm_attn.transformers.door import (
    Handle,
    attention_layers,
    base_model,
    layer_config,
    left_out,
    open_door,
    register_attention,
)
from llm_attn.transformers.visibility import Visibility, dense_attention
from shared_kernels import l1_attention

Mode = Literal["softplus", "softmax_logn"]

NAME = "softplus"
CHUNK, FEWEST_ROWS = 1 << 18, 16
"""Weights of explicitly masked attention that exist at a time (batch, heads, rows, keys), of so many rows at least."""


@dataclass(frozen=True, kw_only=True)
class SoftplusConfig:
    """Settings of softplus attention."""

    power: float | None = 15.0
    """Power of the second stage (paper: 15 to extrapolate, 3 best at the training length); None for LSSA, one stage."""
    mode: Mode = "softplus"
    """"softplus", or "softmax_logn", the control: softmax of the same scores, without `power`."""

    def __post_init__(self) -> None:
        _check_power(self.power)
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")


def _check_power(power: float | None) -> None:
    if power is not None and not 1 <= power < math.inf:
        raise ValueError(f"power must be a number of at least 1, or None for one stage, got {power}")


def log_scale(count: Int[Tensor, "*rows"], head_dim: int) -> Float[Tensor, "*rows"]:
    """ln(d) ln(N), what the cosines of a row with N keys are multiplied by; 0 for rows without keys. float64."""
    return math.log(head_dim) * count.clamp_min(1).to(torch.float64).log()


def softplus_weights(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    seen: Bool[Tensor, "#B #1 Nq Nk"],
    *,
    power: float | None = 15.0,
) -> Float[Tensor, "B H Nq Nk"]:
    """The definition, as the whole map: float64 for float64 inputs, else float32.

        s_ij = softplus(ln(d) ln(N_i) cos(q_i, k_j)) M_ij,   a_ij = s_ij / sum_j s_ij           (power=None: these)
        u_ij = relu(N_i a_ij - [N_i > 3]) M_ij,              w_ij = u_ij^power / sum_j u_ij^power

    `seen` is M, N_i the number of keys that row i sees.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    count = seen.sum(-1, keepdim=True)
    z = log_scale(count, query.shape[-1]).to(wide) * cosines(query, key)
    s = torch.where(seen, F.softplus(z, threshold=80), 0)
    a = s / _or_one(s.sum(-1, keepdim=True))
    return a if power is None else _reweighted(a, count, power)


def cosines(query: Float[Tensor, "B H Nq D"], key: Float[Tensor, "B Hkv Nk D"]) -> Float[Tensor, "B H Nq Nk"]:
    """Cosine of every query with every key; float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    key = unit(key).to(wide).repeat_interleave(query.shape[1] // key.shape[1], 1)
    return unit(query).to(wide) @ key.mT


def unit(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """Each row divided by its length, in its own dtype; a row of zeros stays one."""
    wide = torch.promote_types(x.dtype, torch.float32)  # in half precision the bound below would itself be 0
    return F.normalize(x.to(wide), dim=-1, eps=1e-12).to(x.dtype)


def _reweighted(a: Tensor, count: Tensor, power: float) -> Tensor:
    u = torch.relu(count * a - (count > 3).to(a.dtype))
    # homogeneous of degree 0: relative to its largest, as a constant, no power overflows and nothing changes
    top = u.detach().amax(-1, keepdim=True) if u.shape[-1] else u.sum(-1, keepdim=True)
    flat = top <= 64 * torch.finfo(a.dtype).eps
    y = (u / top.masked_fill(flat, 1)) ** power
    return torch.where(flat, a, y / _or_one(y.sum(-1, keepdim=True)))


def _or_one(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, 1)


def softplus_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    *,
    power: float | None = 15.0,
    causal: bool = True,
    window: int | None = None,
    key_mask: Bool[Tensor, "B Nk"] | None = None,
    mask: Bool[Tensor, "#B 1 Nq Nk"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H Nq E"]:
    """o_i = sum_j w_ij v_j with the weights of `softplus_weights`, without the map of all queries and keys.

    `causal` counts from the end: query i sees keys up to i + Nk - Nq, with `window` only the last so many of those,
    with `key_mask` only keys that are True. `mask` is for what these cannot say; then it says everything and the others
    are left at their defaults. Query and key need not be of unit length.

    Without `mask` and `dropout` all of it is one kernel. With either, weights are made for some rows at a time, and
    once more for the gradient: memory is in proportion to the tokens too, but it is slower. Raises TypeError or
    ValueError on inputs that do not fit each other or are out of range.
    """
    _check_power(power)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if mask is not None and (window is not None or key_mask is not None):
        raise ValueError("mask says everything that a row may see; give it alone, or window and key_mask without it")
    if mask is None and dropout == 0:
        if key_mask is not None and key_mask.shape == (key.shape[0], key.shape[2]):
            key = key.masked_fill(~key_mask[:, None, :, None], 0)  # one that is NaN would have a length that is NaN
        # l1_attention checks the inputs
        return l1_attention(unit(query), unit(key), value, power=power, causal=causal, window=window, key_mask=key_mask)
    if mask is None:
        mask = _seen(query, key, causal=causal, window=window, key_mask=key_mask)
    return _masked_attention(query, key, value, mask, power, dropout)


def _seen(query: Tensor, key: Tensor, *, causal: bool, window: int | None, key_mask: Tensor | None) -> Tensor:
    sizes = query.shape[2], key.shape[2]
    if causal:
        return Visibility(window=window, key_mask=key_mask).dense(*sizes, query.device)
    if window is not None:
        raise ValueError("window needs causal=True: it counts back from the last key that a row sees")
    everything = torch.ones(1, 1, *sizes, dtype=torch.bool, device=query.device)
    return everything if key_mask is None else everything & key_mask[:, None, None]


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, power: float | None, dropout: float
) -> Tensor:
    """By the definition, some rows at a time."""
    _check_inputs(query, key, value)
    (B, H, Nq, _), Nk = query.shape, key.shape[2]
    if mask.shape[1:] != (1, Nq, Nk) or mask.shape[0] not in (1, B) or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (1 or {B}, 1, {Nq}, {Nk}), got {mask.dtype} {tuple(mask.shape)}")
    if Nq == 0:
        return query.new_zeros(B, H, 0, value.shape[3])
    # a key that no row sees has no influence, not even one that is NaN
    unseen = ~mask.any(2)[..., None]
    key, value = key.masked_fill(unseen, 0), value.masked_fill(unseen, 0)
    rows = max(FEWEST_ROWS, CHUNK // max(1, B * H * Nk))
    chunks = zip(query.split(rows, 2), mask.split(rows, 2), strict=True)
    return torch.cat(
        [checkpoint(_some_rows, q, key, value, m, power, dropout, use_reentrant=False) for q, m in chunks], 2
    )


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """What the kernel checks where it runs."""
    if query.ndim != 4 or key.ndim != 4 or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        wanted = "(batch, heads, tokens, head_dim), alike in batch and head_dim"
        raise ValueError(f"query and key must be {wanted}, got {tuple(query.shape)} and {tuple(key.shape)}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        heads = f"{query.shape[1]} and {key.shape[1]}"
        raise ValueError(f"heads of query must be a multiple of those of key, got {heads}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be {tuple(key.shape[:3])} and its width, like key, got {tuple(value.shape)}")


def _some_rows(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, power: float | None, dropout: float) -> Tensor:
    weights = F.dropout(softplus_weights(query, key, seen, power=power), dropout)
    return (weights @ value.to(weights.dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)).to(query.dtype)


def softmax_logn_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    visible: Visibility | None = None,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "B H Nq E"]:
    """The control: w_i = softmax over j of ln(d) ln(N_i) cos(q_i, k_j). Causal unless `visible` says otherwise."""
    visible = Visibility() if visible is None else visible
    count = visible.counts(query.shape[2], key.shape[2], query.device)[:, None, :, None]
    scaled = unit(query) * log_scale(count, query.shape[-1]).to(query.dtype)
    return dense_attention(scaled, unit(key), value, visible, scale=1.0, dropout=dropout)


# ---- the door


def apply_softplus(
    model: nn.Module, config: SoftplusConfig | None = None, *, layers: list[int] | None = None
) -> Handle:
    """Gives a transformers model softplus attention in the decoder layers `layers` (None: all), to be trained with it.

    Works in whatever chooses its attention through transformers' AttentionInterface, with caches, padding, packing and
    sliding windows. Models that cap scores or have sinks are refused when they run. Warns if the model's weights were
    loaded: unless they were trained with softplus attention, what comes out is nonsense.
    """
    host = base_model(model)
    handle = _open(model, SoftplusConfig() if config is None else config, layers=layers)
    if host.config.name_or_path:
        _warn_of_checkpoint(host.config.name_or_path)
    return handle


def _open(model: nn.Module, config: SoftplusConfig, *, layers: list[int] | None = None) -> Handle:
    if not isinstance(config, SoftplusConfig):
        raise TypeError(f"config must be a SoftplusConfig, got {type(config).__name__}")
    return open_door(model, NAME, config, layers=layers)


def _warn_of_checkpoint(path: str) -> None:
    warnings.warn(
        f"softplus attention was switched on for weights loaded from '{path}'. It does not improve a model that was "
        "trained with softmax attention, it breaks it. If these weights were trained with softplus attention, all is "
        "well; a model that apply_softplus was called on saves that, and loads without this warning.",
        stacklevel=3,
    )


def set_softplus_power(model: nn.Module, power: float | None) -> None:
    """Changes the power of a model that `apply_softplus` was called on: 1 or more, or None for one stage (LSSA).

    It acts from the next forward pass on and is what `save_pretrained` writes. ValueError if the door is not open.
    """
    host: Any = base_model(model)
    if NAME not in saving.open_doors(host):
        raise ValueError("the model has no softplus attention whose power could be set; call apply_softplus first")
    doors = host.llm_attn_doors
    config = replace(doors[NAME].config, power=power)
    host.llm_attn_doors = {**doors, NAME: replace(doors[NAME], config=config)}
    layers: dict[int, Any] = attention_layers(host)
    for layer in layers.values():
        if not left_out(layer, NAME):
            layer.llm_attn = {**layer.llm_attn, NAME: config}


def _attention(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    *,
    scale: float | None,  # noqa: ARG001 - cosines have their own
    dropout: float,
) -> Tensor:
    config = layer_config(layer, NAME, None)
    if config is None:  # chosen by attn_implementation alone
        config = SoftplusConfig()
        path = getattr(getattr(layer, "config", None), "name_or_path", "")
        if path and not torch.compiler.is_compiling():
            _warn_of_checkpoint(path)
    if config.mode == "softmax_logn":
        return softmax_logn_attention(query, key, value, visible, dropout=dropout)
    return softplus_attention(
        query,
        key,
        value,
        power=config.power,
        window=visible.window,
        key_mask=visible.key_mask,
        mask=visible.mask,
        dropout=dropout,
    )


register_attention(NAME, _attention)
saving.register_door(NAME, SoftplusConfig, _open)
