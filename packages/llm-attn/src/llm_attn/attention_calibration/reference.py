"""The definition: calibration of a whole attention map, in plain torch; what the fast versions are held against.

The map P (B, H, Nq, Nk) has rows that sum to 1; a row's own key is number i + Nk - Nq.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_attn.attention_calibration.config import ACTConfig
from llm_attn.transformers.visibility import Visibility


def attention_map(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    visible: Visibility,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "B H Nq Nk"]:
    """Softmax over the visible keys; rows without keys are 0."""
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible.dense(query.shape[2], key.shape[2], query.device)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)


def find_sinks(
    attention: Float[Tensor, "B H Nq Nk"], visible: Visibility, config: ACTConfig
) -> Bool[Tensor, "B H Nq Nk"]:
    """Which keys are sinks for each row: c_j > tau, c_j the mean of column j over the rows that see it.

    All rows count for every row, or with `config.causal` those up to it.
    """
    (B, _, Nq, Nk), device = attention.shape, attention.device
    mask = visible.dense(Nq, Nk, device).expand(B, 1, Nq, Nk)
    own = torch.arange(Nk - Nq, Nk, device=device)
    real = mask[:, :, torch.arange(Nq, device=device), own]  # padding sees keys, but not itself
    counted = mask & real[..., None]
    first = torch.zeros(B, 1, 1, Nk, dtype=torch.bool, device=device)
    first[:, 0, 0, own] = real[:, 0] & (mask.sum(-1)[:, 0] == 1)
    received, rows = (attention * counted).cumsum(2), counted.cumsum(2)
    length = mask.sum(-1, keepdim=True)
    if not config.causal:
        received, rows = received[:, :, -1:], rows[:, :, -1:]
        length = (length * counted).amax(2, keepdim=True)  # of the text that a key is part of
    flagged = (received / rows.clamp(min=1) > config.threshold(length)) & (rows >= config.min_rows)
    if config.protect == "first_flagged":
        flagged = flagged & (flagged.cumsum(-1) > 1)
    else:
        flagged = flagged & ~first
    return flagged & mask


def calibrate_map(
    attention: Float[Tensor, "B H Nq Nk"], sinks: Bool[Tensor, "B H Nq Nk"], beta: float
) -> Float[Tensor, "B H Nq Nk"]:
    """A = beta P on sinks, and P (1 + (1 - beta) M / (1 - M)) elsewhere, M the row's mass on sinks.

    A row that sees nothing but sinks stays as it is.
    """
    on_sinks = (attention * sinks).sum(-1, keepdim=True)
    elsewhere = (attention * ~sinks).sum(-1, keepdim=True)
    alone = elsewhere == 0
    raised = 1 + (1 - beta) * on_sinks / elsewhere.masked_fill(alone, 1)
    return torch.where(alone, attention, attention * torch.where(sinks, beta, raised))
