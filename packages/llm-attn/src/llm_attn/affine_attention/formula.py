"""The functions of Affine-Scaled Attention on tensors, each beside its definition as a whole map of weights.

Shapes: B batch, H query heads, Hkv key heads, Nq queries, Nk keys, D head width, E value width.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from llm_attn.transformers.visibility import Visibility, dense_attention
from shared_kernels import attention_given

NMode = Literal["fixed", "row", "kv"]


def linear_clip(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """phi(x) = clip(0.1 x + 0.5, 0, 1): 0 up to -5, 1 from 5 on."""
    return torch.clamp(0.1 * x + 0.5, 0, 1)


def affine_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    alpha: Float[Tensor, "B H Nq"],
    alpha_ma: Float[Tensor, "#H"],
    *,
    n_mode: NMode = "fixed",
    bias_length: int = 2048,
    causal: bool = True,
    window: int | None = None,
    key_mask: Bool[Tensor, "B Nk"] | None = None,
    mask: Bool[Tensor, "#B 1 Nq Nk"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H Nq E"]:
    """o_i = alpha_i softmax_i V + beta_i * sum of the values that row i sees,  beta_i = (alpha_ma - alpha_i) / N.

    N is `bias_length` with n_mode="fixed", the keys that row i sees with "row", Nk with "kv". `alpha_ma` is the running
    mean of alpha, of each head or (1,) of all; no gradient is taken of it here if it needs none.

    `causal` counts from the end: query i sees keys up to i + Nk - Nq, with `window` only the last so many of those,
    with `key_mask` only keys that are True. `mask` is for what these cannot say; then it says everything and the others
    are left at their defaults. Rows that see no key give 0.

    Costs SDPA, one sum along the values and one multiply-add; sums are float32 at least. Raises ValueError on inputs
    that do not fit each other.
    """
    _check_inputs(query, key, value)
    _check_alpha(query, alpha, alpha_ma)
    seen = sight(key, query.shape[2], causal=causal, window=window, key_mask=key_mask, mask=mask)
    bias = affine_bias(alpha, alpha_ma, seen, n_mode=n_mode, bias_length=bias_length)
    attended = seen.attend(query, key, value, scale=scale, dropout=dropout)
    return scale_and_shift(attended, alpha, bias, seen.sum_values(value))


def affine_weights(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    alpha: Float[Tensor, "B H Nq"],
    alpha_ma: Float[Tensor, "#H"],
    *,
    n_mode: NMode = "fixed",
    bias_length: int = 2048,
    seen: Bool[Tensor, "#B 1 Nq Nk"],
    scale: float | None = None,
) -> Float[Tensor, "B H Nq Nk"]:
    """The definition, as the whole map: alpha_i softmax_ij + beta_i where `seen`, 0 elsewhere; no distribution."""
    count = seen.sum(-1)
    lengths = {"fixed": torch.tensor(bias_length), "row": count.clamp_min(1), "kv": torch.tensor(key.shape[2])}
    beta = (alpha_ma[:, None] - alpha) / lengths[n_mode]
    softmax = masked_scores(query, key, seen, scale=scale).softmax(-1).masked_fill(~seen, 0)
    return alpha[..., None] * softmax + beta[..., None] * seen


def sink_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    sink: Float[Tensor, "H"],
    *,
    causal: bool = True,
    window: int | None = None,
    key_mask: Bool[Tensor, "B Nk"] | None = None,
    mask: Bool[Tensor, "#B 1 Nq Nk"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H Nq E"]:
    """Softmax attention with one more logit s of each head, whose value is 0: softmax_i V * sigmoid(lse_i - s).

    The log-sum-exp costs a second product of queries and keys. Other arguments as in `affine_attention`.
    """
    _check_inputs(query, key, value)
    if sink.shape != (query.shape[1],):
        raise ValueError(f"sink must be ({query.shape[1]},), one logit of each head, got {tuple(sink.shape)}")
    seen = sight(key, query.shape[2], causal=causal, window=window, key_mask=key_mask, mask=mask)
    attended = seen.attend(query, key, value, scale=scale, dropout=dropout)
    share = torch.sigmoid(seen.log_sum_exp(query, key, scale=scale) - sink[:, None])
    return (attended * share[..., None]).to(attended.dtype)


def sink_weights(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    sink: Float[Tensor, "H"],
    *,
    seen: Bool[Tensor, "#B 1 Nq Nk"],
    scale: float | None = None,
) -> Float[Tensor, "B H Nq Nk"]:
    """The definition, as the whole map: softmax over the keys and the sink, without the sink's column."""
    scores = masked_scores(query, key, seen, scale=scale)
    column = sink[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def prefix_value_sum(
    value: Float[Tensor, "B Hkv Nk E"],
    *,
    num_queries: int | None = None,
    causal: bool = True,
    window: int | None = None,
    key_mask: Bool[Tensor, "B Nk"] | None = None,
    mask: Bool[Tensor, "#B 1 Nq Nk"] | None = None,
) -> tuple[Float[Tensor, "B Hkv Nq E"], Int[Tensor, "#B Nq"]]:
    """The sum of the values that each row sees, float32 at least, and how many they are.

    A running sum for causal rows, the difference of two with a window or where the rows of `mask` see intervals of keys
    (packed texts); any other `mask` costs a product with the values. `num_queries` is Nk unless given; other arguments
    as in `affine_attention`. Differentiable in value.
    """
    Nq = value.shape[2] if num_queries is None else num_queries
    seen = sight(value, Nq, causal=causal, window=window, key_mask=key_mask, mask=mask)
    sums = seen.sum_values(value)
    return sums.expand(*sums.shape[:2], Nq, -1), seen.counts().expand(-1, Nq)


# ---- what rows see


@dataclass(frozen=True)
class Sight:
    """What `num_queries` rows see of `num_keys` keys: what `visible` says, or, where that is None, every real key."""

    num_queries: int
    num_keys: int
    device: torch.device
    visible: Visibility | None
    key_mask: Bool[Tensor, "B Nk"] | None = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        dropout: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Softmax attention; rows without keys give 0."""
        if self.visible is not None:
            return dense_attention(query, key, value, self.visible, scale=scale, dropout=dropout, softcap=softcap)
        mask = None if self.key_mask is None else self.key_mask[:, None, None]
        grouped = query.shape[1] != key.shape[1]
        attend = F.scaled_dot_product_attention
        out = attend(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped)
        return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0)

    def counts(self) -> Int[Tensor, "#B #Nq"]:
        """How many keys each row sees."""
        if self.visible is not None:
            return self.visible.counts(self.num_queries, self.num_keys, self.device)
        if self.key_mask is not None:
            return self.key_mask.sum(-1, keepdim=True)
        return torch.full((1, 1), self.num_keys, device=self.device)

    def sum_values(self, value: Tensor) -> Float[Tensor, "B Hkv #Nq E"]:
        """The sum of the values that each row sees, float32 at least."""
        wide = torch.promote_types(value.dtype, torch.float32)
        visible, key_mask = self.visible, self.key_mask
        if visible is not None and visible.mask is not None:
            return _sum_of_mask(value, visible.mask, wide)
        if visible is not None:
            key_mask = visible.key_mask
        if key_mask is not None:
            value = value.masked_fill(~key_mask[:, None, :, None], 0)
        if visible is None:
            return value.sum(2, keepdim=True, dtype=wide)
        return _sum_to_each_row(value, self.num_queries, visible.window, wide)

    def dense(self) -> Bool[Tensor, "#B 1 Nq Nk"]:
        """All of it as one mask."""
        if self.visible is not None:
            return self.visible.dense(self.num_queries, self.num_keys, self.device)
        if self.key_mask is not None:
            return self.key_mask[:, None, None].expand(-1, 1, self.num_queries, -1)
        return torch.ones(1, 1, self.num_queries, self.num_keys, dtype=torch.bool, device=self.device)

    def log_sum_exp(
        self, query: Tensor, key: Tensor, *, scale: float | None, softcap: float | None = None
    ) -> Float[Tensor, "B H Nq"]:
        """Of the scores of each row, -inf without keys."""
        if softcap is not None or (self.visible is not None and self.visible.mask is not None):
            return masked_scores(query, key, self.dense(), scale=scale, softcap=softcap).logsumexp(-1)
        causal = self.visible is not None
        window = None if self.visible is None else self.visible.window
        key_mask = self.key_mask if self.visible is None else self.visible.key_mask
        return attention_given(query, key, "lse", causal=causal, window=window, key_mask=key_mask, scale=scale)

    def real_tokens(self) -> Bool[Tensor, "#B Nq"] | None:
        """Which rows are tokens, not padding; None if all are. A token sees itself, and padding is seen by nobody."""
        first = self.num_keys - self.num_queries
        if self.visible is not None and self.visible.mask is not None:
            return self.visible.mask[:, 0].diagonal(offset=first, dim1=-2, dim2=-1)
        key_mask = self.key_mask if self.visible is None else self.visible.key_mask
        return None if key_mask is None else key_mask[:, first:]


def sight(
    keys: Float[Tensor, "B Hkv Nk _"],
    num_queries: int,
    *,
    causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    mask: Tensor | None,
) -> Sight:
    """The arguments that say what rows see, checked and put together."""
    B, _, Nk, _ = keys.shape
    if mask is not None:
        if window is not None or key_mask is not None:
            raise ValueError("mask says all that a row may see; give it alone, or window and key_mask without it")
        if mask.dtype != torch.bool or mask.shape[1:] != (1, num_queries, Nk) or mask.shape[0] not in (1, B):
            given = f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"mask must be bool (1 or {B}, 1, {num_queries}, {Nk}), got {given}")
        return Sight(num_queries, Nk, keys.device, Visibility(mask=mask))
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (B, Nk)):
        raise ValueError(f"key_mask must be bool ({B}, {Nk}), got {key_mask.dtype} {tuple(key_mask.shape)}")
    if window is not None and not causal:
        raise ValueError("window needs causal=True: it counts back from the last key that a row sees")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not causal:
        return Sight(num_queries, Nk, keys.device, None, key_mask)
    return Sight(num_queries, Nk, keys.device, Visibility(window=window, key_mask=key_mask))


def _sum_to_each_row(value: Tensor, num_queries: int, window: int | None, wide: torch.dtype) -> Tensor:
    """Causal: the sum of the values up to each of the last rows, of the last `window` if there is one."""
    before = value.shape[2] - num_queries  # keys of earlier calls
    if window is not None:
        value = value[:, :, max(0, before - window + 1) :]
    if num_queries == 1:
        return value.sum(2, keepdim=True, dtype=wide)
    if window is None and before > 0:
        earlier = value[:, :, :before].sum(2, keepdim=True, dtype=wide)
        return earlier + value[:, :, before:].cumsum(2, dtype=wide)
    sums = value.cumsum(2, dtype=wide)
    if window is not None and window < sums.shape[2]:
        sums = sums - F.pad(sums[:, :, :-window], (0, 0, window, 0))
    sums = F.pad(sums, (0, 0, max(0, -before), 0))  # more rows than keys: the first see none
    return sums[:, :, sums.shape[2] - num_queries :]


def _sum_of_mask(value: Tensor, mask: Tensor, wide: torch.dtype) -> Tensor:
    # looking at the mask is a choice by value, which a compiled graph cannot make
    bounds = None if torch.compiler.is_compiling() else _intervals(mask[:, 0])
    if bounds is None:
        with torch.autocast(value.device.type, enabled=False):  # it would round the sums
            return mask.to(wide) @ value.to(wide)
    sums = F.pad(value.cumsum(2, dtype=wide), (0, 0, 1, 0))
    first, past_last = (_rows_of(sums, bound) for bound in bounds)
    return past_last - first


def _rows_of(sums: Tensor, rows: Tensor) -> Tensor:
    return sums.gather(2, rows[:, None, :, None].expand(*sums.shape[:2], -1, sums.shape[3]))


def _intervals(mask: Bool[Tensor, "B Nq Nk"]) -> tuple[Tensor, Tensor] | None:
    """First key of each row and the one past its last; None unless every row sees consecutive keys."""
    if mask.shape[-1] == 0:
        return None
    count = mask.sum(-1)
    begins = mask[..., 1:] & ~mask[..., :-1]
    if bool((begins.sum(-1) + mask[..., 0] > 1).any()):
        return None
    first = mask.to(torch.uint8).argmax(-1)
    return first, first + count


# ---- parts of the formula


def affine_bias(
    alpha: Float[Tensor, "B H Nq"], alpha_ma: Float[Tensor, "#H"], seen: Sight, *, n_mode: NMode, bias_length: int
) -> Float[Tensor, "B H Nq"]:
    """beta_i = (alpha_ma - alpha_i) / N."""
    check_bias(n_mode, bias_length)
    if n_mode == "kv" and seen.num_queries != seen.num_keys:
        raise ValueError(
            'n_mode="kv" divides by the keys of this call, so a token means one thing in a prefill and another in '
            f'decoding; got {seen.num_queries} queries and {seen.num_keys} keys. Use "fixed" or "row", or no cache'
        )
    difference = alpha_ma[:, None] - alpha
    if n_mode == "row":
        return difference / seen.counts()[:, None].clamp_min(1)
    # an empty call has no key and no row: any N serves
    return difference / (bias_length if n_mode == "fixed" else max(1, seen.num_keys))


def scale_and_shift(
    attended: Float[Tensor, "B H Nq E"],
    factor: Float[Tensor, "B H Nq"],
    bias: Float[Tensor, "B H Nq"],
    sums: Float[Tensor, "B Hkv #Nq E"],
) -> Float[Tensor, "B H Nq E"]:
    """factor * attended + bias * sums, in the dtype of `attended`; query heads of a group share their sums."""
    groups = (sums.shape[1], attended.shape[1] // sums.shape[1])
    grouped, factor, bias = (t.unflatten(1, groups) for t in (attended, factor[..., None], bias[..., None]))
    return torch.addcmul(factor * grouped, bias, sums.unsqueeze(2)).flatten(1, 2).to(attended.dtype)


def masked_scores(
    query: Tensor, key: Tensor, seen: Bool[Tensor, "#B 1 Nq Nk"], *, scale: float | None, softcap: float | None = None
) -> Float[Tensor, "B H Nq Nk"]:
    """scale q_i . k_j, capped if asked for, -inf where not seen; float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    key = key.to(wide).repeat_interleave(query.shape[1] // key.shape[1], 1)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(wide) @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -torch.inf)


def check_bias(n_mode: str, bias_length: int) -> None:
    """Raises ValueError on another mode and on a length below 1."""
    if n_mode not in get_args(NMode):
        raise ValueError(f"n_mode must be one of {', '.join(get_args(NMode))}, got {n_mode!r}")
    if bias_length < 1:
        raise ValueError(f"bias_length must be at least 1, got {bias_length}")


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, tokens, head_dim), got {tuple(tensor.shape)}")
    (B, H, _, D), (_, Hkv, Nk, _) = query.shape, key.shape
    if (key.shape[0], key.shape[3]) != (B, D) or value.shape[:3] != (B, Hkv, Nk):
        raise ValueError(
            f"key must be ({B}, Hkv, Nk, {D}) for query {tuple(query.shape)}, and value (B, Hkv, Nk, E) like key, got "
            f"key {tuple(key.shape)} and value {tuple(value.shape)}"
        )
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"key must have a number of heads that divides the {H} of query, got {Hkv}")


def _check_alpha(query: Tensor, alpha: Tensor, alpha_ma: Tensor) -> None:
    H = query.shape[1]
    if alpha.shape != query.shape[:3]:
        raise ValueError(
            f"alpha must be {tuple(query.shape[:3])}, one for each head and query, got {tuple(alpha.shape)}"
        )
    if alpha_ma.shape not in ((H,), (1,)):
        raise ValueError(f"alpha_ma must be ({H},), one for each head, or (1,), got {tuple(alpha_ma.shape)}")
