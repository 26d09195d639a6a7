"""Lightning Attention: causal attention without softmax that forgets at a fixed rate, at the same cost for every token.

A head adds up key^T value of all tokens in one (D, E) state, which decays by exp(-slope) at each token, and reads it
with the query: o_t = q_t S_t, S_t = exp(-slope) S_(t-1) + k_t^T v_t. Sequences are computed in chunks, whose tokens see
each other directly and all before through the state, and are continued from their state in constant time and memory.

Qin et al., "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", ICML 2024,
arXiv:2405.17381; the algorithm and its backward pass are those of arXiv:2401.04658. The chunks are computed by
`shared_kernels.linear_attention`. The model of these papers is `llm_attn.transnormer`.

Decided here:
- Slopes are those of the released weights (ALiBi's, scaled down linearly over the layers; MiniMax-01 has the same up to
  1e-6); decay="paper" gives the formula of the paper. With one layer, where the released code divides by zero, the
  slopes are ALiBi's. They are constants: learned ones made the authors' training diverge.
- Scores are not divided by sqrt(D) and nothing normalises a row; a norm after the heads are merged does. Padding is
  taken out by zeroing keys and values; the state decays over it all the same.
- As attention of a softmax architecture (`attn_implementation="lightning"`), query and key pass through silu after the
  host has rotated them, scores keep the host's scale, and a norm without weights over all heads follows. The host's
  cache of keys stays, so decoding is right but not constant in memory: that needs TransNormerLLM or MiniMax. Weights
  trained with softmax mean nothing to it: it is to train with.

Shapes: B batch, H heads, N tokens, D key width, E value width, S sequences.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from llm_attn.transformers import saving
from llm_attn.transformers.door import Handle, base_model, layer_config, open_door, register_attention
from llm_attn.transformers.visibility import Visibility
from shared_kernels import linear_attention, linear_attention_step

Decay = Literal["alibi", "paper"]

NAME = "lightning"
BLOCK = 128
"""Queries of a sliding window whose scores exist at a time."""


def decay_slopes(
    num_heads: int, *, layer: int = 0, num_layers: int = 1, decay: Decay = "alibi", device: torch.device | None = None
) -> Float[Tensor, "H"]:
    """Slope of each head in one layer, float32: a token's weight falls by exp(-slope) with each later token.

    "alibi": 2^(-8 (h + 1) / H) times 1 - layer / (num_layers - 1) + 1e-5; for numbers of heads that are no power of
    two, those of the next smaller power and then every other one of the next larger.
    "paper": 8 h / H (1 - layer / num_layers).
    """
    if num_heads < 1 or not 0 <= layer < num_layers:
        raise ValueError(
            f"decay_slopes needs num_heads >= 1 and 0 <= layer < num_layers, got {num_heads}, {layer} and {num_layers}"
        )
    if decay == "alibi":
        factor = 1 - layer / (num_layers - 1) + 1e-5 if num_layers > 1 else 1.0
        slopes = [slope * factor for slope in _alibi(num_heads)]
    elif decay == "paper":
        slopes = [8 * head / num_heads * (1 - layer / num_layers) for head in range(num_heads)]
    else:
        raise ValueError(f"decay must be 'alibi' or 'paper', got {decay!r}")
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def _alibi(heads: int) -> list[float]:
    """Press et al., arXiv:2108.12409."""
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes if power == heads else slopes + _alibi(2 * power)[0::2][: heads - power]


class DecaySlopes(nn.Module):
    """The slopes of one layer. They stay float32 when the model is cast, and are not in the checkpoint."""

    slopes: Float[Tensor, "H"]

    def __init__(self, num_heads: int, *, layer: int, num_layers: int, decay: Decay = "alibi") -> None:
        super().__init__()
        self.num_heads, self.layer, self.num_layers, self.decay = num_heads, layer, num_layers, decay
        self.register_buffer("slopes", self.computed(), persistent=False)

    def computed(self, device: torch.device | None = None) -> Float[Tensor, "H"]:
        """The slopes anew, for whoever lost the buffer: a cast rounds it, the meta device drops it."""
        return decay_slopes(
            self.num_heads, layer=self.layer, num_layers=self.num_layers, decay=self.decay, device=device
        )

    def forward(self) -> Float[Tensor, "H"]:
        """(H,)"""
        return self.slopes

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self.slopes = self.computed(self.slopes.device)  # bfloat16 slopes would be wrong in the third digit
        return self

    def extra_repr(self) -> str:
        """What a printed model shows."""
        return f"{self.num_heads} heads, layer {self.layer} of {self.num_layers}, {self.decay}"


def lightning_attention(
    query: Float[Tensor, "B H N D"],
    key: Float[Tensor, "B Hkv N D"],
    value: Float[Tensor, "B Hkv N E"],
    slopes: Float[Tensor, "H"],
    *,
    scale: float = 1.0,
    initial_state: Float[Tensor, "S H D E"] | None = None,
    return_state: bool = False,
    cu_seqlens: Int32[Tensor, "S+1"] | None = None,
) -> Float[Tensor, "B H N E"] | tuple[Float[Tensor, "B H N E"], Float[Tensor, "S H D E"]]:
    """o_t = scale * sum over u <= t of exp(-slope (t - u)) (q_t . k_u) v_u, from `initial_state` on; eq. 3 and 4.

    The state is what `return_state` gave after earlier tokens. With `cu_seqlens` (B = 1), S sequences lie end to end
    and know nothing of each other. Differentiable in all but the slopes, also through the state. Errors are those of
    `shared_kernels.linear_attention`.
    """
    options: dict[str, Any] = {"log_decay": -slopes, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    return linear_attention(query, key, value, causal=True, scale=scale, return_state=return_state, **options)


def continue_lightning_attention(
    query: Float[Tensor, "B H N D"],
    key: Float[Tensor, "B Hkv N D"],
    value: Float[Tensor, "B Hkv N E"],
    slopes: Float[Tensor, "H"],
    state: Float[Tensor, "B H D E"] | None,
    *,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "B H N E"], Float[Tensor, "B H D E"]]:
    """Output and state of further tokens after those in `state`, which may be overwritten; None: these are the first.

    One token is a step, several are chunks: reading a prompt in parts costs no more than reading it at once.
    """
    if state is not None and query.shape[2] == 1 and not torch.is_grad_enabled():
        return linear_attention_step(query, key, value, state, log_decay=-slopes, scale=scale), state
    return lightning_attention(query, key, value, slopes, scale=scale, initial_state=state, return_state=True)  # type: ignore[return-value]


def lightning_attention_quadratic(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    slopes: Float[Tensor, "H"],
    *,
    scale: float = 1.0,
    mask: Bool[Tensor, "#B 1 Nq Nk"] | None = None,
) -> Float[Tensor, "B H Nq E"]:
    """The definition, by all scores at once: the reference, and what takes any mask (True: the query sees the key).

    Without a mask it is causal, and the last query sees all keys. The distance that counts is to the last key a query
    sees, which is the query's own token wherever masks are causal. A query that sees nothing gives 0.
    """
    Nq, Nk = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(Nq, Nk, dtype=torch.bool, device=query.device).tril(Nk - Nq)[None, None]
    acc = torch.promote_types(query.dtype, torch.float32)
    place = torch.arange(Nk, device=query.device, dtype=acc)
    last = place.masked_fill(~mask, 0).amax(-1, keepdim=True) if Nk else place.new_zeros(())
    decay = torch.exp(-slopes.to(acc)[:, None, None] * (last - place).clamp(min=0)).masked_fill(~mask, 0)
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.to(acc).repeat_interleave(repeats, 1) for t in (key, value))
    return (scale * (query.to(acc) @ key.mT) * decay @ value).to(query.dtype)


class LightningAttention(nn.Module):
    """Lightning Attention as a layer for one's own model: silu on query, key and value, norm, sigmoid gate of low rank.

    This is the layer that the authors ship beside their kernels; the one of TransNormerLLM, with a raw gate, is in
    `llm_attn.transnormer`. Wants to know its place, since slopes differ from layer to layer.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, *, layer: int = 0, num_layers: int = 1, decay: Decay = "alibi"
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}")
        self.num_heads = num_heads
        self.decay = DecaySlopes(num_heads, layer=layer, num_layers=num_layers, decay=decay)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        self.norm = nn.LayerNorm(hidden_size)
        rank = hidden_size // num_heads
        self.gate = nn.Sequential(nn.Linear(hidden_size, rank, bias=False), nn.Linear(rank, hidden_size, bias=False))

    def forward(
        self,
        x: Float[Tensor, "B N W"],
        state: Float[Tensor, "B H D D"] | None = None,
        *,
        mask: Bool[Tensor, "B N"] | None = None,
        cu_seqlens: Int32[Tensor, "S+1"] | None = None,
    ) -> tuple[Float[Tensor, "B N W"], Float[Tensor, "S H D D"]]:
        """Output, and the state to pass with the tokens that follow. `mask` is False at padding.

        Without gradients, a call with one token overwrites the state given. With `cu_seqlens` sequences begin anew.
        """
        if state is not None and cu_seqlens is not None:
            raise ValueError("state and cu_seqlens do not go together: packed sequences begin anew")
        projected = (F.silu(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in projected)
        if mask is not None:
            key, value = _without_padding(key, value, mask)
        slopes = self.decay()
        if cu_seqlens is None:
            out, state = continue_lightning_attention(query, key, value, slopes, state)
        else:
            out, state = lightning_attention(query, key, value, slopes, return_state=True, cu_seqlens=cu_seqlens)
        return self.out_proj(torch.sigmoid(self.gate(x)) * self.norm(out.transpose(1, 2).flatten(2))), state


def _without_padding(key: Tensor, value: Tensor, mask: Tensor) -> list[Tensor]:
    """Both, since 0 times NaN is NaN."""
    return [t.masked_fill(~mask[:, None, :, None], 0) for t in (key, value)]


# ---- the door


@dataclass(frozen=True, kw_only=True)
class LightningConfig:
    """Lightning Attention in place of the softmax attention of an architecture."""

    decay: Decay = "alibi"
    """Rule of the slopes, see `decay_slopes`."""
    activation: Literal["silu", "none"] = "silu"
    """What queries and keys pass through, after the host has turned them by their positions."""
    norm_eps: float | None = 1e-6
    """Of the norm over all heads together; None: no norm, and scores grow with the length."""

    def __post_init__(self) -> None:
        if self.decay not in get_args(Decay):
            raise ValueError(f"decay must be one of {', '.join(get_args(Decay))}, got {self.decay!r}")
        if self.activation not in ("silu", "none"):
            raise ValueError(f"activation must be silu or none, got {self.activation!r}")
        if self.norm_eps is not None and not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, or None for no norm, got {self.norm_eps}")


def apply_lightning(
    model: nn.Module, config: LightningConfig | None = None, *, layers: Sequence[int] | None = None
) -> Handle:
    """Gives a transformers model Lightning Attention in the decoder layers `layers` (None: all), to be trained with it.

    Works in whatever chooses its attention through transformers' AttentionInterface, with caches, padding, packing and
    sliding windows; layers left out keep softmax, which makes a hybrid. No weights are added. Warns if the model's
    weights were loaded: unless they were trained with Lightning Attention, what comes out is nonsense.
    """
    host = base_model(model)
    handle = _open(model, LightningConfig() if config is None else config, layers=layers)
    if host.config.name_or_path:
        _warn_of_checkpoint(host.config.name_or_path)
    return handle


def _open(model: nn.Module, config: LightningConfig, *, layers: Sequence[int] | None = None) -> Handle:
    if not isinstance(config, LightningConfig):
        raise TypeError(f"config must be a LightningConfig, got {type(config).__name__}")
    return open_door(model, NAME, config, layers=layers)


def _warn_of_checkpoint(path: str) -> None:
    warnings.warn(
        f"Lightning Attention was switched on for weights loaded from '{path}'. Weights trained with softmax attention "
        "give nonsense with it until they are trained further. A model that apply_lightning was called on saves that, "
        "and loads without this warning.",
        stacklevel=3,
    )


def _attention(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    *,
    scale: float | None,
    dropout: float,
) -> Tensor:
    if dropout:
        raise ValueError("Lightning Attention has no weights to drop: set attention_dropout=0 in the model's config")
    config = layer_config(layer, NAME, None)
    if config is None:  # chosen by attn_implementation alone
        config = LightningConfig()
        path = getattr(getattr(layer, "config", None), "name_or_path", "")
        if path and not torch.compiler.is_compiling():
            _warn_of_checkpoint(path)
    number, depth = cast(int, layer.layer_idx), cast(PreTrainedConfig, layer.config).num_hidden_layers
    slopes = decay_slopes(query.shape[1], layer=number, num_layers=depth, decay=config.decay, device=query.device)
    if config.activation == "silu":
        query, key = F.silu(query), F.silu(key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = visible_attention(query, key, value, slopes, visible, scale=scale)
    if config.norm_eps is None:
        return out
    merged = F.rms_norm(out.transpose(1, 2).flatten(2), (out.shape[1] * out.shape[3],), eps=config.norm_eps)
    return merged.unflatten(-1, (out.shape[1], -1)).transpose(1, 2)


def visible_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    slopes: Float[Tensor, "H"],
    visible: Visibility,
    *,
    scale: float = 1.0,
) -> Float[Tensor, "B H Nq E"]:
    """Lightning Attention of the last Nq of Nk tokens over the keys that each may see.

    In proportion to the tokens, times the window if there is one; only `visible.mask` costs queries times keys.
    """
    Nq, Nk = query.shape[2], key.shape[2]
    if visible.mask is not None or Nq == 1:
        mask = visible.dense(Nq, Nk, query.device)
        return lightning_attention_quadratic(query, key, value, slopes, scale=scale, mask=mask)
    if visible.key_mask is not None:
        key, value = _without_padding(key, value, visible.key_mask)
    if visible.window is not None:
        return _windowed(query, key, value, slopes, visible.window, scale)
    state, earlier = None, Nk - Nq
    if earlier:
        state = _state(key[:, :, :earlier], value[:, :, :earlier], slopes)
        key, value = key[:, :, earlier:], value[:, :, earlier:]
    return lightning_attention(query, key, value, slopes, scale=scale, initial_state=state)  # type: ignore[return-value]


def _state(key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The state after these tokens."""
    acc = torch.promote_types(key.dtype, torch.float32)
    age = torch.arange(key.shape[2] - 1, -1, -1, device=key.device, dtype=acc)
    key, value = (t.to(acc).repeat_interleave(len(slopes) // key.shape[1], 1) for t in (key, value))
    return (key * torch.exp(-slopes.to(acc)[:, None] * age)[..., None]).mT @ value


def _windowed(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, window: int, scale: float) -> Tensor:
    """Some queries at a time, with the keys that any of them sees."""
    Nq, before = query.shape[2], key.shape[2] - query.shape[2]
    parts = []
    for start in range(0, Nq, BLOCK):
        end = min(start + BLOCK, Nq)
        seen = slice(max(0, before + start - window + 1), before + end)
        mask = Visibility(window=window).dense(end - start, seen.stop - seen.start, query.device)
        rows, keys, values = query[:, :, start:end], key[:, :, seen], value[:, :, seen]
        parts.append(lightning_attention_quadratic(rows, keys, values, slopes, scale=scale, mask=mask))
    return torch.cat(parts, 2) if parts else query.new_zeros(*query.shape[:3], value.shape[3])


register_attention(NAME, _attention)
saving.register_door(NAME, LightningConfig, _open)
