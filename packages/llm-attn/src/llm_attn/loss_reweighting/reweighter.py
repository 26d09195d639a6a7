"""LossReweighter: the losses of this rank's samples in, the loss to call backward on out.

The losses of all data-parallel ranks are gathered, detached; weights are made of all of them; and each rank returns

    world_size * sum over its own samples of  w_i * l_i,

so that gradients averaged over ranks, as DDP and FSDP do, are those of  sum_i w_i l_i  over the global batch.

Sow et al., arXiv:2502.06733. Decided here: ranks index the gathered losses by their place in the data-parallel group
(the authors' FSDP code uses the local rank, which is wrong on several machines); ranks may have different numbers of
samples; samples without a token that counts take no part; the plain loss of the warm-up is the mean over all tokens of
the global batch where numbers of tokens are given, as the plain Trainer has it, and over samples otherwise.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from llm_attn.loss_reweighting.config import LossReweightingConfig, Scope, Strategy, temperature_at
from llm_attn.loss_reweighting.weights import Extremes, loss_extremes, loss_weights


class _Batch(NamedTuple):
    """The samples of all ranks: losses, numbers of tokens, and which are this rank's."""

    losses: Float[Tensor, "n"]
    num_tokens: Float[Tensor, "n"]
    own: slice


class LossReweighter:
    """Reweights the samples of each batch by their losses; a plain function but for the averages of `scope="ema"`.

    `LossReweighter("linupper", r=0.4, warmup_steps=1000)` and `LossReweighter(LossReweightingConfig(...))`; keywords
    replace fields of a config.

    last_weights: of all samples of the last batch, in the order of ranks; None before the first.
    """

    def __init__(
        self,
        config: LossReweightingConfig | Strategy | None = None,
        *,
        r: float | None = None,
        warmup_steps: int | None = None,
        scope: Scope | None = None,
    ) -> None:
        if isinstance(config, str):
            config = LossReweightingConfig(strategy=config)
        given = {"r": r, "warmup_steps": warmup_steps, "scope": scope}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.config = replace(config or LossReweightingConfig(), **changes)
        self.last_weights: Tensor | None = None
        self._extremes: Extremes | None = None
        self._nonfinite: Tensor | int = 0

    @property
    def nonfinite_losses(self) -> int:
        """How many samples were left out so far, of all ranks, because their loss was NaN or infinite."""
        return int(self._nonfinite)

    def temperature(self, step: int) -> float | None:
        """r of an optimiser step, None for the plain loss."""
        config = self.config
        return temperature_at(step, r=config.r, warmup_steps=config.warmup_steps, warmup_r=config.warmup_r)

    def __call__(
        self,
        losses: Float[Tensor, "m"],
        *,
        step: int,
        num_tokens: Int[Tensor, "m"] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of this rank, with gradient through `losses` and none through the weights.

        losses: the mean loss of each of this rank's samples, of one micro-batch.
        step: optimiser steps done. num_tokens: of each sample; a sample of 0 takes no part.
        group: the data-parallel ranks; None: all, where torch.distributed is initialised (as everywhere in torch).

        Divide by the number of micro-batches under gradient accumulation; for `scope="window"` see `factors`.
        ValueError on losses that are no vector or do not fit `num_tokens`.
        """
        factors = self.factors(losses, step=step, num_tokens=num_tokens, group=group)
        return self.weighted_sum(losses, factors, group=group)

    @torch.no_grad()
    def factors(
        self,
        losses: Float[Tensor, "m"],
        *,
        step: int,
        num_tokens: Int[Tensor, "m"] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Float[Tensor, "m"]:
        """What each of this rank's losses is multiplied with; over all ranks these factors sum to 1.

        For `scope="window"`: give the losses of all micro-batches of the step, from a pass without gradients, split
        what comes back as they were, and call backward on `weighted_sum` of each micro-batch, undivided.
        """
        if losses.dim() != 1 or (num_tokens is not None and num_tokens.shape != losses.shape):
            shape = None if num_tokens is None else tuple(num_tokens.shape)
            raise ValueError(
                f"losses and num_tokens must be vectors of one length, a number per sample, got {tuple(losses.shape)} "
                f"and {shape}"
            )
        r = self.temperature(step)
        batch = _gather(losses.detach(), num_tokens, group)
        counted = batch.num_tokens > 0
        self._nonfinite = self._nonfinite + (counted & ~batch.losses.isfinite()).sum()
        usable = batch.losses.masked_fill(~counted, torch.nan)
        weights = self._plain(usable, batch, num_tokens is not None) if r is None else self._reweighted(usable, r)
        self.last_weights = weights
        own = weights[batch.own]
        if r is not None and self.config.length_weighted:
            tokens = batch.num_tokens[batch.own]
            own = own * tokens * (len(tokens) / tokens.sum().clamp(min=1))
        return own

    def weighted_sum(
        self, losses: Float[Tensor, "m"], factors: Float[Tensor, "m"], *, group: dist.ProcessGroup | None = None
    ) -> Float[Tensor, ""]:
        """world_size * sum_i factors_i * losses_i; a loss of factor 0 does not count, whatever it is."""
        ranks = dist.get_world_size(group) if _distributed() else 1
        return ranks * (factors * losses.masked_fill(factors == 0, 0.0)).sum()

    def _plain(self, losses: Tensor, batch: _Batch, over_tokens: bool) -> Tensor:
        finite = losses.isfinite()
        shares = finite * (batch.num_tokens if over_tokens else 1.0)
        return shares / shares.sum().clamp(min=1)

    def _reweighted(self, losses: Tensor, r: float) -> Tensor:
        config = self.config
        extremes = loss_extremes(losses, quantile=config.quantile)
        if config.scope == "ema":
            extremes = self._extremes = _averaged(self._extremes, extremes, config.ema_decay)
        return loss_weights(losses, strategy=config.strategy, r=r, extremes=extremes)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain numbers; the same on all ranks."""
        extremes = None if self._extremes is None else [float(value) for value in self._extremes]
        return {"extremes": extremes, "nonfinite_losses": self.nonfinite_losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        low_high = state["extremes"]
        self._extremes = None if low_high is None else tuple(torch.tensor(low_high, dtype=torch.float64))
        self._nonfinite = state["nonfinite_losses"]


def _averaged(old: Extremes | None, new: Extremes, decay: float) -> Extremes:
    if old is None:
        return new
    low, high = (_average(before.to(now), now, decay) for before, now in zip(old, new, strict=True))
    return low, high


def _average(old: Tensor, new: Tensor, decay: float) -> Tensor:
    """A batch without any finite loss has no range (NaN) and changes nothing."""
    return torch.where(new.isnan(), old, torch.where(old.isnan(), new, decay * old + (1 - decay) * new))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gather(losses: Tensor, num_tokens: Tensor | None, group: dist.ProcessGroup | None) -> _Batch:
    """Numbers travel in float32 at least; ranks with fewer samples are filled up, since all must send as much."""
    wide = torch.promote_types(losses.dtype, torch.float32)
    own = torch.stack(
        [losses.to(wide), torch.ones_like(losses, dtype=wide) if num_tokens is None else num_tokens.to(wide)]
    )
    m = own.shape[1]
    if not _distributed() or dist.get_world_size(group) == 1:
        return _Batch(own[0], own[1], slice(0, m))
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("this process is not in the group that was given: give its own data-parallel group")
    sizes = [torch.zeros(1, dtype=torch.int64, device=losses.device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([m], device=losses.device), group=group)
    numbers = [int(size) for size in sizes]
    sent = torch.nn.functional.pad(own, (0, max(numbers) - m))
    received = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(received, sent, group=group)
    every = torch.cat([part[:, :number] for part, number in zip(received, numbers, strict=True)], 1)
    first = sum(numbers[:rank])
    return _Batch(every[0], every[1], slice(first, first + m))
