"""Calibration that goes on after the prompt: each row is judged by what keys received from the rows up to it.

The state of a layer is one number for each calibrated head and key, and moves with the cache of keys and values. Rows
come in any number at a time: the result does not depend on where a text is cut into calls.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from llm_attn.attention_calibration.config import ACTConfig
from llm_attn.attention_calibration.counting import attention_rows, first_keys, flag_sinks, real_rows
from llm_attn.transformers.visibility import Visibility


@dataclass(frozen=True)
class SinkState:
    """What is known of the keys in the cache of one layer."""

    seen: int
    """Tokens so far, padding included; a sliding cache holds fewer."""
    received: Float[Tensor, "B h n"]
    """What each key received from all rows that count, summed."""
    rows: Int[Tensor, "B 1 n"]
    """How many rows these were."""
    first: Bool[Tensor, "B 1 #n"]
    """Keys that begin a text; those after the last of them may be missing."""
    sinks: Bool[Tensor, "B h n"]
    """Sinks of the last row."""
    flagged: Bool[Tensor, "B h n"]
    """Sinks of any row of the last call."""

    @staticmethod
    def empty(batch: int, heads: int, device: torch.device, dtype: torch.dtype = torch.float32) -> "SinkState":
        """Before the first token."""
        return SinkState(
            0,
            torch.zeros(batch, heads, 0, device=device, dtype=torch.promote_types(dtype, torch.float32)),
            torch.zeros(batch, 1, 0, dtype=torch.int64, device=device),
            torch.zeros(batch, 1, 0, dtype=torch.bool, device=device),
            *torch.zeros(2, batch, heads, 0, dtype=torch.bool, device=device),
        )

    def of_batch(self, change: Callable[[Tensor], Tensor]) -> "SinkState":
        """With rows of the batch chosen, repeated or reordered."""
        kept = (self.received, self.rows, self.first, self.sinks, self.flagged)
        return SinkState(self.seen, *(change(tensor) for tensor in kept))

    def extended(self, new: int, num_keys: int) -> "SinkState":
        """With room for `new` keys at the end, `num_keys` in all: a sliding cache has dropped the oldest."""
        old, have = num_keys - new, self.received.shape[-1]
        grow = (max(0, old - have), new)  # keys that were cached before the door was opened received nothing yet
        first = F.pad(self.first, (0, have - self.first.shape[-1]))
        kept = (self.received, self.rows, first, self.sinks)
        received, rows, first, sinks = (F.pad(tensor[..., max(0, have - old) :], grow) for tensor in kept)
        return SinkState(self.seen + new, received, rows, first, sinks, sinks)


def running_attention(
    query: Float[Tensor, "B h Nq D"],
    key: Float[Tensor, "B h Nk D"],
    value: Float[Tensor, "B h Nk E"],
    state: SinkState,
    config: ACTConfig,
    *,
    visible: Visibility | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "B h Nq E"], SinkState]:
    """Attention of the last Nq tokens, sinks calibrated, and the state that has counted them; all heads are calibrated.

    With `config.decode="frozen"` and a state that has seen tokens, its sinks are kept and nothing is counted.
    """
    visible = Visibility() if visible is None else visible
    scale = query.shape[3] ** -0.5 if scale is None else scale
    (B, _, Nq, _), Nk, device = query.shape, key.shape[2], query.device
    counting = not (config.decode == "frozen" and state.seen > 0)
    if counting and Nq == 1 and visible.plain and state.received.shape[-1] == Nk - 1 > 0:
        return _next_token(query, key, value, state, config, scale, softcap)
    state = state.extended(Nq, Nk)
    outs = []
    if counting:
        new = first_keys(visible, Nq, Nk, device)[:, None].expand(B, 1, Nk)
        state = replace(state, first=state.first | new, flagged=torch.zeros_like(state.sinks))
    real = real_rows(visible, Nq, Nk, device)[:, None]
    threshold = config.threshold(visible.counts(Nq, Nk, device))[:, None, :, None]
    for rows, attention, mask in attention_rows(query, key, visible, scale=scale, softcap=softcap):
        keys = attention.shape[-1]
        sinks = state.sinks[:, :, None, :keys]
        if counting:
            sinks, state = _count(state, attention.detach(), mask, real[..., rows, None], threshold[:, :, rows], config)
        outs.append(
            (_scale_sinks(attention, sinks, config.beta) @ value[:, :, :keys].to(attention.dtype)).to(value.dtype)
        )
    return torch.cat(outs, 2) if outs else query.new_zeros(*query.shape[:3], value.shape[3]), state


def _next_token(
    query: Tensor, key: Tensor, value: Tensor, state: SinkState, config: ACTConfig, scale: float, softcap: float | None
) -> tuple[Tensor, SinkState]:
    """`running_attention` of one row that sees all keys and begins no text: what generation does, in half the steps."""
    ((_, attention, _),) = attention_rows(query, key, Visibility(), scale=scale, softcap=softcap)
    received = F.pad(state.received, (0, 1)) + attention.detach()[:, :, 0]
    rows = F.pad(state.rows, (0, 1)) + 1
    sinks = flag_sinks(received, rows, config.threshold_at(key.shape[2]), state.first, config)
    out = _scale_sinks(attention, sinks[:, :, None], config.beta) @ value.to(attention.dtype)
    return out.to(value.dtype), SinkState(state.seen + 1, received, rows, state.first, sinks, sinks)


def _count(
    state: SinkState, attention: Tensor, mask: Tensor | None, real: Tensor, threshold: Tensor, config: ACTConfig
) -> tuple[Tensor, SinkState]:
    """The sinks of each row of a run, and the state after it."""
    keys = attention.shape[-1]
    counted = real.expand(*real.shape[:-1], keys) if mask is None else mask & real
    received = state.received[:, :, None, :keys] + (attention * real).cumsum(2)
    rows = state.rows[:, :, None, :keys] + counted.cumsum(2)
    sinks = flag_sinks(received, rows, threshold, state.first[:, :, None, :keys], config)
    if mask is not None:
        sinks = sinks & mask
    after = [
        torch.cat([of_last[:, :, -1], before[..., keys:]], -1)
        for of_last, before in ((received, state.received), (rows, state.rows), (sinks, state.sinks))
    ]
    flagged = torch.cat([state.flagged[..., :keys] | sinks.any(2), state.flagged[..., keys:]], -1)
    return sinks, SinkState(state.seen, after[0], after[1], state.first, after[2], flagged)


def _scale_sinks(attention: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """As `reference.calibrate_map`: beta P, and elsewhere (1 - beta) / (1 - M) P more; mass that underflows is none."""
    others = attention.masked_fill(sinks, 0)
    mass, tiny = others.sum(-1, keepdim=True), torch.finfo(attention.dtype).tiny
    calibrated = torch.addcmul(attention * beta, others, (1 - beta) / mass.clamp(min=tiny))
    return torch.where(mass > tiny, calibrated, attention)
