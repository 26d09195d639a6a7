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
    first: Bool[Tensor, "B 1 n"]
    """Keys that begin a text."""
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

        def fit(tensor: Tensor) -> Tensor:
            return F.pad(tensor[..., max(0, have - old) :], grow)

        return replace(self.of_batch(fit), seen=self.seen + new)


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
    frozen = config.decode == "frozen" and state.seen > 0
    state = state.extended(Nq, Nk)
    state = replace(state, flagged=state.sinks if frozen else torch.zeros_like(state.sinks))
    if not frozen:
        new = first_keys(visible, Nq, Nk, device)[:, None].expand(B, 1, Nk)
        state = replace(state, first=state.first | new)
    real = real_rows(visible, Nq, Nk, device)[:, None]
    length = visible.counts(Nq, Nk, device)[:, None, :, None]
    outs = []
    for rows, attention, mask in attention_rows(query, key, visible, scale=scale, softcap=softcap):
        if not frozen:
            sinks, state = _count(state, attention.detach(), mask, real[..., rows], length[:, :, rows], config)
        else:
            sinks = state.sinks[:, :, None, : attention.shape[-1]]
        calibrated = _scale_sinks(attention, sinks, config.beta)
        outs.append((calibrated @ value[:, :, : attention.shape[-1]].to(attention.dtype)).to(value.dtype))
    return torch.cat(outs, 2) if outs else query.new_zeros(*query.shape[:3], value.shape[3]), state


def _count(
    state: SinkState, attention: Tensor, mask: Tensor | None, real: Tensor, length: Tensor, config: ACTConfig
) -> tuple[Tensor, SinkState]:
    """The sinks of each row of a run, and the state after it."""
    keys = attention.shape[-1]
    real = real[..., None]
    counted = real.expand(*real.shape[:-1], keys) if mask is None else mask & real
    received = state.received[:, :, None, :keys] + (attention * real).cumsum(2)
    rows = state.rows[:, :, None, :keys] + counted.cumsum(2)
    sinks = flag_sinks(received, rows, length, state.first[:, :, None, :keys], config)
    if mask is not None:
        sinks = sinks & mask
    after = [
        torch.cat([of_last[:, :, -1], before[..., keys:]], -1)
        for of_last, before in ((received, state.received), (rows, state.rows), (sinks, state.sinks))
    ]
    flagged = torch.cat([state.flagged[..., :keys] | sinks.any(2), state.flagged[..., keys:]], -1)
    return sinks, SinkState(state.seen, after[0], after[1], state.first, after[2], flagged)


def _scale_sinks(attention: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """As `reference.calibrate_map`; mass on others that underflows counts as none."""
    elsewhere = attention.masked_fill(sinks, 0).sum(-1, keepdim=True)
    on_sinks = attention.sum(-1, keepdim=True) - elsewhere
    alone = elsewhere <= torch.finfo(attention.dtype).tiny
    raised = 1 + (1 - beta) * on_sinks / elsewhere.masked_fill(alone, 1)
    return torch.where(alone, attention, attention * torch.where(sinks, beta, raised))
