"""What Affine-Scaled Attention adds to an attention layer: settings and weights; and a whole layer made with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llm_attn.affine_attention.formula import (
    NMode,
    Sight,
    affine_bias,
    check_bias,
    linear_clip,
    scale_and_shift,
    sight,
)

Scaling = Literal["affine", "sink", "softmax"]
Activation = Literal["linear_clip", "sigmoid"]
Scope = Literal["head", "layer"]
Init = Literal["normal", "zeros", "identity"]


@dataclass(frozen=True, kw_only=True)
class AffineConfig:
    """Settings of Affine-Scaled Attention and of the rivals in its paper."""

    scaling: Scaling = "affine"
    """"affine"; "sink", one learned logit of each head in the denominator; "softmax", the row as it is."""
    gate: bool = False
    """Gated Attention: the output times sigmoid(X W_g) before the output projection. After the scaling."""
    activation: Activation = "linear_clip"
    """phi: "linear_clip", clip(0.1 x + 0.5, 0, 1), or "sigmoid" (in the paper slightly worse)."""
    n_mode: NMode = "fixed"
    """What the bias is divided by: "fixed", `bias_length`; "row", keys that the row sees; "kv", keys of the call."""
    bias_length: int = 2048
    """N of n_mode="fixed": the length of the training (paper: 2048)."""
    ema_decay: float = 0.9
    """rho of the running mean (paper: 0.9)."""
    ema_init: float = 0.0
    """Where the running mean starts (paper: 0; 0.5 is the mean of alpha at the start)."""
    ema_scope: Scope = "head"
    """The running mean is of each "head", or of the whole "layer"."""
    init: Init = "normal"
    """W_a at the start: "normal" (the host's initializer_range), "zeros" (alpha is 0.5), or "identity" for pretrained
    models, an extension: zeros, alpha_ma 0.5 whatever `ema_init` says, and alpha, beta and the gate doubled for good,
    so that the first output is the softmax one exactly. The host's weights stay what they are."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("scaling", Scaling),
            ("activation", Activation),
            ("ema_scope", Scope),
            ("init", Init),
        ):
            if getattr(self, name) not in get_args(allowed):
                choices = ", ".join(get_args(allowed))
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        check_bias(self.n_mode, self.bias_length)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.ema_init <= 1:
            raise ValueError(f"ema_init must be in [0, 1] like alpha, got {self.ema_init}")
        if self.init == "identity" and self.scaling == "sink":
            raise ValueError('init="identity" cannot undo a sink, whose share is below 1; use scaling="affine"')

    @property
    def gain(self) -> float:
        """What alpha and beta, and the gate, are multiplied by: both start at a half, which identity doubles."""
        return 2.0 if self.init == "identity" else 1.0


@dataclass(frozen=True)
class AttentionCall:
    """What one attention call was given and made of it, for those who look: weights are factor * softmax + bias."""

    query: Tensor
    key: Tensor
    sight: Sight
    scale: float | None
    softcap: float | None
    factor: Float[Tensor, "B H Nq"]
    bias: Float[Tensor, "B H Nq"]


class AffineScale(nn.Module):
    """alpha, its running mean, and what else the settings ask for, of one attention layer.

    alpha_proj: (C -> H), no bias. alpha_ma: running mean of alpha, a float32 buffer in the state dict whatever dtype
    the module is converted to. sink: (H,). gate_proj: (C -> H * E). Only those exist that the settings need.
    """

    alpha_ma: Tensor

    no_weight_decay = frozenset({"sink"})

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        config: AffineConfig | None = None,
        *,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        self.config = AffineConfig() if config is None else config
        self.observer: Callable[[AttentionCall], None] | None = None
        if self.config.scaling == "affine":
            self.alpha_proj = nn.Linear(hidden_size, num_heads, bias=False)
            start = 0.5 if self.config.init == "identity" else self.config.ema_init
            entries = num_heads if self.config.ema_scope == "head" else 1
            self.register_buffer("alpha_ma", torch.full((entries,), start, dtype=torch.float32))
        elif self.config.scaling == "sink":
            self.sink = nn.Parameter(torch.zeros(num_heads))
        if self.config.gate:
            self.gate_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        for projection in self.children():
            deviation = initializer_range if self.config.init == "normal" else 0.0
            nn.init.normal_(projection.weight, std=deviation)  # type: ignore[arg-type]

    def alpha(self, hidden_states: Float[Tensor, "B Nq C"]) -> Float[Tensor, "B H Nq"]:
        """phi(X W_a), float32 at least."""
        logits = self.alpha_proj(hidden_states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
        return linear_clip(logits) if self.config.activation == "linear_clip" else torch.sigmoid(logits)

    def forward(
        self,
        attended: Float[Tensor, "B H Nq E"],
        query: Float[Tensor, "B H Nq D"],
        key: Float[Tensor, "B Hkv Nk D"],
        value: Float[Tensor, "B Hkv Nk E"],
        hidden_states: Float[Tensor, "B Nq C"],
        seen: Sight,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "B H Nq E"]:
        """The softmax output `attended` of these queries, scaled, shifted and gated as the settings say."""
        factor, bias = self._coefficients(attended, query, key, hidden_states, seen, scale=scale, softcap=softcap)
        if self.observer is not None:
            nothing = torch.zeros_like(factor) if bias is None else bias
            self.observer(AttentionCall(query, key, seen, scale, softcap, factor, nothing))
        if bias is not None:
            out = scale_and_shift(attended, factor, bias, seen.sum_values(value))
        else:
            out = (attended * factor[..., None]).to(attended.dtype)
        if self.config.gate:
            opened = torch.sigmoid(self.gate_proj(hidden_states)).unflatten(-1, (out.shape[1], -1)).transpose(1, 2)
            out = out * (self.config.gain * opened).to(out.dtype)
        return out

    def _coefficients(
        self,
        attended: Tensor,
        query: Tensor,
        key: Tensor,
        hidden_states: Tensor,
        seen: Sight,
        *,
        scale: float | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Factor of the softmax and bias of the keys, (B, H, Nq) each; None where there is no bias."""
        if self.config.scaling == "softmax":
            return attended.new_ones(attended.shape[:3]), None
        if self.config.scaling == "sink":
            lse = seen.log_sum_exp(query, key, scale=scale, softcap=softcap)
            return torch.sigmoid(lse - self.sink[:, None]), None
        alpha = self.alpha(hidden_states)
        if self.training and not _running_backward():
            self._move_mean(alpha.detach(), seen.real_tokens())
        alpha_ma = self.alpha_ma.clone()  # the buffer moves on before this graph is walked back
        config = self.config
        bias = affine_bias(alpha, alpha_ma, seen, n_mode=config.n_mode, bias_length=config.bias_length)
        return (alpha, bias) if config.gain == 1 else (config.gain * alpha, config.gain * bias)

    @torch.no_grad()
    def _move_mean(self, alpha: Float[Tensor, "B H Nq"], real: Bool[Tensor, "#B Nq"] | None) -> None:
        """alpha_ma = rho alpha_ma + (1 - rho) mean of alpha over tokens (eq. 8); left alone if that is not finite."""
        if real is None:
            mean = alpha.mean((0, 2))
        else:
            real = real[:, None].expand(alpha.shape[0], 1, -1)
            mean = alpha.masked_fill(~real, 0).sum((0, 2)) / real.sum()  # no token: 0 / 0
        if self.config.ema_scope == "layer":
            mean = mean.mean(0, keepdim=True)
        moved = torch.lerp(mean.to(self.alpha_ma.dtype), self.alpha_ma, self.config.ema_decay)
        self.alpha_ma.copy_(torch.where(moved.isfinite(), moved, self.alpha_ma))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AffineScale":
        """Conversions of the module; the running mean is moved but never rounded to less than float32."""
        before = getattr(self, "alpha_ma", None)
        super()._apply(fn, recurse)
        if before is not None and self.alpha_ma.dtype != torch.promote_types(self.alpha_ma.dtype, torch.float32):
            known = self.alpha_ma if before.is_meta else before
            self.alpha_ma = known.to(self.alpha_ma.device, torch.float32)
        return self


def _running_backward() -> bool:
    """Whether this is the second run of a forward pass, which activation checkpointing makes inside the backward."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class AffineScaledAttention(nn.Module):
    """Self-attention of a vision transformer with the scaling: takes the place of timm's `Attention`.

    Its arguments are timm's, of those that most models use, and so are parameter names and `forward`: weights load from
    that class with `strict=False`, which leaves those of `affine` to be trained. With `AffineConfig(init="identity")`
    the output is timm's until they are.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        *,
        config: AffineConfig | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads = {num_heads}, got {dim}")
        self.num_heads, self.attn_drop = num_heads, attn_drop
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = norm_layer(head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = norm_layer(head_dim) if qk_norm else nn.Identity()
        self.affine = AffineScale(dim, num_heads, head_dim, config)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Float[Tensor, "B N C"], attn_mask: Bool[Tensor, "#B 1 N N"] | None = None, is_causal: bool = False
    ) -> Float[Tensor, "B N C"]:
        """x through attention; `attn_mask` is True where a token may look, and says everything if it is given."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        seen = sight(key, x.shape[1], causal=is_causal, window=None, key_mask=None, mask=attn_mask)
        dropout = self.attn_drop if self.training else 0.0
        attended = seen.attend(query, key, value, scale=None, dropout=dropout)
        out: Any = self.affine(attended, query, key, value, x, seen)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
