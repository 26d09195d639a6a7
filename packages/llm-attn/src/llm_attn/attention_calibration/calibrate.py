"""Calibration of a whole prompt, in two passes of ordinary attention and one over the scores.

With N the keys that are no sinks and M a row's mass on sinks, the calibrated row (see `reference.calibrate_map`)

    out = (1 - beta M) / (1 - M) * sum_N P v  +  beta * sum_S P v,        sum_S P v = plain output - sum_N P v

needs, beyond the plain output, only sum_N P v and 1 - M = sum_N P. Both come out of one more attention over the same
scores whose values are zero at sinks, with a column that is one elsewhere. Neither difference amplifies an error: the
first term is a ratio of sums of like terms, the second a difference that is not divided.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from llm_attn.attention_calibration.config import ACTConfig
from llm_attn.attention_calibration.counting import attention_sums, first_keys, flag_sinks, longest, rows_that_see
from llm_attn.transformers.visibility import Visibility, dense_attention


def calibrated_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    config: ACTConfig,
    *,
    heads: Sequence[int] | None = None,
    visible: Visibility | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H Nq E"]:
    """Causal attention of a prompt with the sinks of `heads` (None: all) calibrated; other heads are untouched.

    Keys are judged by all rows; `running_attention` judges rows by those up to them. `visible` is causal alone unless
    given. Where no head has a sink, this is the plain output. Differentiable in query, key and value, the choice of
    sinks held fixed. ValueError on heads that do not exist.
    """
    visible = Visibility() if visible is None else visible
    scale = query.shape[3] ** -0.5 if scale is None else scale
    chosen = check_heads(range(query.shape[1]) if heads is None else heads, query)
    out = dense_attention(query, key, value, visible, scale=scale, softcap=softcap)
    if config.beta == 1 or not chosen or query.shape[2] == 0:
        return out
    parts = of_heads(query, key, value, chosen)
    sinks = prompt_sinks(*parts[:2], visible, config, scale=scale, softcap=softcap)[0]
    return calibrate_known_sinks(
        query, key, value, out, sinks, config.beta, heads=chosen, visible=visible, scale=scale, softcap=softcap
    )


def prompt_sinks(
    query: Float[Tensor, "B h Nq D"],
    key: Float[Tensor, "B h Nk D"],
    visible: Visibility,
    config: ACTConfig,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Bool[Tensor, "B h Nk"], Float[Tensor, "B h Nk"]]:
    """Sinks of each head, and what each key receives from all rows, summed."""
    shape = query.shape[2], key.shape[2], query.device
    with torch.no_grad():
        sums = attention_sums(query, key, visible, scale=scale, softcap=softcap)
        rows, length = rows_that_see(visible, *shape)[:, None], longest(visible, *shape)[:, None]
        first = first_keys(visible, *shape)[:, None]
        return flag_sinks(sums, rows, config.threshold(length), first, config), sums


def calibrate_known_sinks(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    out: Float[Tensor, "B H Nq E"],
    sinks: Bool[Tensor, "B h Nk"],
    beta: float,
    *,
    heads: Sequence[int],
    visible: Visibility,
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "B H Nq E"]:
    """The plain output `out`, with the attention of `heads` on their sinks scaled by beta.

    Heads without a sink in the whole batch are left out of the second pass; if that is all of them, `out` comes back.
    """
    if not torch.compiler.is_compiling():  # a graph cannot depend on what is found
        found = sinks.any(-1).any(0).tolist()
        heads, sinks = [head for head, any_sink in zip(heads, found, strict=True) if any_sink], sinks[:, found]
        if not heads:
            return out
    index = torch.tensor(heads, device=out.device)
    parts = of_heads(query, key, value, heads)
    plain = out.index_select(1, index)
    changed = _with_scaled_sinks(*parts, plain, sinks, beta, visible, scale=scale, softcap=softcap)
    return out.index_copy(1, index, changed)


def _with_scaled_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plain: Tensor,
    sinks: Tensor,
    beta: float,
    visible: Visibility,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    E, wide = value.shape[3], torch.promote_types(plain.dtype, torch.float32)
    # query and key grow by zeros as value grows by a column: fused kernels want one head_dim, a multiple of 8
    more = 8 - E % 8
    others = ~sinks[..., None]
    ones = F.pad(others.to(value.dtype), (0, more - 1))
    values = torch.cat([value.masked_fill(~others, 0), ones], -1)
    both = dense_attention(
        F.pad(query, (0, more)), F.pad(key, (0, more)), values, visible, scale=scale, softcap=softcap
    )
    both = both.to(wide)
    elsewhere, mass = both[..., :E], both[..., E : E + 1]
    alone = mass <= torch.finfo(wide).tiny  # nothing but sinks in sight
    raised = (1 - beta * (1 - mass)) / mass.masked_fill(alone, 1)
    changed = raised * elsewhere + beta * (plain.to(wide) - elsewhere)
    kept = alone | ~sinks.any(-1)[..., None, None]
    return torch.where(kept, plain, changed.to(plain.dtype))


def of_heads(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    heads: Sequence[int],
) -> tuple[Float[Tensor, "B h Nq D"], Float[Tensor, "B h Nk D"], Float[Tensor, "B h Nk E"]]:
    """The chosen query heads, and the keys and values of each."""
    H, Hkv = query.shape[1], key.shape[1]
    if len(heads) == H == Hkv:
        return query, key, value
    index = torch.tensor(list(heads), device=query.device)
    shared = index // (H // Hkv)
    return query.index_select(1, index), key.index_select(1, shared), value.index_select(1, shared)


def check_heads(heads: Sequence[int], query: Float[Tensor, "B H Nq D"]) -> tuple[int, ...]:
    """The heads in order. ValueError if one does not exist or comes twice."""
    H, chosen = query.shape[1], tuple(sorted(heads))
    if len(set(chosen)) < len(chosen) or (chosen and not 0 <= chosen[0] <= chosen[-1] < H):
        raise ValueError(f"heads must be some of 0 to {H - 1}, each once, got {list(heads)}")
    return chosen
