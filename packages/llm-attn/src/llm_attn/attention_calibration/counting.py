"""What each key receives from the rows that see it, how many these are, and which keys that makes sinks.

Shapes: h calibrated heads; leading b is B, or 1 where all of the batch is alike.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_attn.attention_calibration.config import ACTConfig
from llm_attn.transformers.visibility import Visibility
from shared_kernels import attention_received

_BLOCK = 1 << 20  # scores that are in memory at a time


class Rows(NamedTuple):
    """A run of query rows, and their attention to the keys up to the last one that any of them may see."""

    rows: slice
    attention: Float[Tensor, "B h R keys"]
    visible: Bool[Tensor, "#B 1 R keys"] | None
    """None is all."""


def attention_rows(
    query: Float[Tensor, "B h Nq D"],
    key: Float[Tensor, "B h Nk D"],
    visible: Visibility,
    *,
    scale: float,
    softcap: float | None = None,
) -> Iterator[Rows]:
    """The attention map, a run of rows at a time, in float32 at least."""
    (B, h, Nq, _), Nk = query.shape, key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide) * scale, key.to(wide)
    step = max(1, _BLOCK // max(1, B * h * Nk))
    for start in range(0, Nq, step):
        stop = min(start + step, Nq)
        upto = Nk - Nq + stop
        scores = query[:, :, start:stop] @ key[:, :, :upto].mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if stop - start == 1 and visible.plain:
            yield Rows(slice(start, stop), scores.softmax(-1), None)
            continue
        mask = _of_rows(visible, start, stop, upto).dense(stop - start, upto, query.device)
        lowest = torch.finfo(wide).min  # not -inf: rows without keys would be NaN
        attention = scores.masked_fill(~mask, lowest).softmax(-1) * mask
        yield Rows(slice(start, stop), attention, mask)


def _of_rows(visible: Visibility, start: int, stop: int, upto: int) -> Visibility:
    return Visibility(
        visible.window,
        None if visible.key_mask is None else visible.key_mask[:, :upto],
        None if visible.mask is None else visible.mask[:, :, start:stop, :upto],
    )


def real_rows(visible: Visibility, num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "b Nq"]:
    """Rows that are no padding: they see their own key."""
    if visible.mask is not None:
        return visible.mask[:, 0].diagonal(num_keys - num_queries, -2, -1)
    if visible.key_mask is not None:
        return visible.key_mask[:, num_keys - num_queries :]
    return torch.ones(1, num_queries, dtype=torch.bool, device=device)


def first_keys(visible: Visibility, num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "b Nk"]:
    """Keys that begin a text: their own row sees nothing else."""
    own = real_rows(visible, num_queries, num_keys, device)
    alone = own & (visible.counts(num_queries, num_keys, device) == 1)
    return torch.nn.functional.pad(alone, (num_keys - num_queries, 0))


def rows_that_see(visible: Visibility, num_queries: int, num_keys: int, device: torch.device) -> Int[Tensor, "b Nk"]:
    """For every key, the number of rows that see it and are no padding."""
    real = real_rows(visible, num_queries, num_keys, device)
    if visible.mask is not None:
        return (visible.mask[:, 0] & real[..., None]).sum(-2)
    before = torch.nn.functional.pad(real.cumsum(-1), (1, 0))  # (b, Nq + 1)
    first = torch.arange(num_queries - num_keys, num_queries, device=device)  # row whose own key it is
    last = torch.full_like(first, num_queries) if visible.window is None else first + visible.window
    seen = before[:, last.clamp(0, num_queries)] - before[:, first.clamp(0, num_queries)]
    return seen if visible.key_mask is None else seen * visible.key_mask


def longest(visible: Visibility, num_queries: int, num_keys: int, device: torch.device) -> Int[Tensor, "b #Nk"]:
    """For every key, the most keys that a row sees which sees it: the length of its text, or the window."""
    counts = visible.counts(num_queries, num_keys, device) * real_rows(visible, num_queries, num_keys, device)
    if visible.mask is None:
        return counts.amax(-1, keepdim=True)
    return torch.where(visible.mask[:, 0], counts[..., None], 0).amax(-2)


def attention_sums(
    query: Float[Tensor, "B h Nq D"],
    key: Float[Tensor, "B h Nk D"],
    visible: Visibility,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "B h Nk"]:
    """What each key receives from all rows that are no padding, in float32 at least, without the map."""
    (B, h, Nq, _), Nk = query.shape, key.shape[2]
    real = real_rows(visible, Nq, Nk, query.device)
    if visible.mask is None and softcap is None:
        weights = None if visible.key_mask is None else real[:, None].to(query.dtype)
        return attention_received(
            query, key, row_weights=weights, causal=True, window=visible.window, key_mask=visible.key_mask, scale=scale
        )
    sums = query.new_zeros(B, h, Nk, dtype=torch.promote_types(query.dtype, torch.float32))
    for rows, attention, _ in attention_rows(query, key, visible, scale=scale, softcap=softcap):
        weights = real[:, None, None, rows].to(attention.dtype)
        sums[..., : attention.shape[-1]] += (weights @ attention).squeeze(2)
    return sums


def flag_sinks(
    received: Float[Tensor, "*batch Nk"],
    rows: Int[Tensor, "*batch Nk"],
    threshold: Float[Tensor, "*batch Nk"] | float,
    first: Bool[Tensor, "*batch upto"],
    config: ACTConfig,
) -> Bool[Tensor, "*batch Nk"]:
    """Keys that received more than tau from each of the rows that saw them, on average, less the protected one.

    `first` says of the keys up to the last protected one, or of all, whether they begin a text.
    """
    flagged = received > rows * threshold
    if config.min_rows > 1:
        flagged = flagged & (rows >= config.min_rows)
    if config.protect == "first_flagged":
        return flagged & (flagged.cumsum(-1) > 1)
    flagged[..., : first.shape[-1]].masked_fill_(first, False)
    return flagged
