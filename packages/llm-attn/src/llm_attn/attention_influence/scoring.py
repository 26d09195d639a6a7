"""The influence score of documents: how much their loss rises without the retrieval heads, in proportion (eq. 5).

The intact and the masked model are one pass: they share the layers below the first masked head, and from there on run
side by side on a batch of twice as many rows. The losses come from the hidden states without logits in memory, summed
per document.

Decided here: the loss of a document is the mean over its predicted tokens. A document longer than the context is cut
into windows of that length, without overlap, whose losses are summed before the one division; a token that begins every
text begins every window, and is not predicted. Documents of fewer than two tokens have no score (NaN).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_attn.attention_influence.masking import HeadMaskingConfig, Heads, Replacement, apply_head_masking
from llm_attn.attention_influence.retrieval import first_token
from llm_attn.transformers.door import base_model, decoder_layers
from shared_kernels import weighted_cross_entropy

_IGNORED = -100
_CAPPED_AT_ONCE = 1024  # tokens whose logits are in memory where the model caps them
_UNSUPPORTED = ("logits_scaling", "logit_scale", "logits_soft_cap")


def influence_score(base: Float[np.ndarray, "n"], masked: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """(masked - base) / base of losses (eq. 5); NaN where one is NaN, or both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (masked - base) / base


@dataclass(frozen=True)
class InfluenceScores:
    """Of n documents: tokens (without the one that begins every text), both mean losses, and the score."""

    tokens: Int[np.ndarray, "n"]
    base: Float[np.ndarray, "n"]
    masked: Float[np.ndarray, "n"]

    @property
    def score(self) -> Float[np.ndarray, "n"]:
        """Eq. 5; NaN for documents of fewer than two tokens."""
        return influence_score(self.base, self.masked)


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How documents are scored."""

    context: int | None = None
    """Tokens of a window, the one that begins every text included; None is the model's `max_position_embeddings`."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding included; a window that is longer is a batch of its own."""
    replacement: Replacement = "mean"
    """What a masked head gives, see `HeadMaskingConfig`."""

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 2:
            raise ValueError(f"context must be at least 2 tokens, got {self.context}")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {self.batch_tokens}")


class _Window(NamedTuple):
    document: int
    ids: tuple[int, ...]


class InfluenceScorer:
    """Scores texts with one model and one set of masked heads. Batches hold windows of similar length, padded right.

    The same texts give the same numbers, to rounding, in whatever order and company they come. The model is as it was
    after every call.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        heads: Heads,
        config: ScoringConfig | None = None,
    ) -> None:
        config = ScoringConfig() if config is None else config
        self.model, self.tokenizer, self.config = base_model(model), tokenizer, config
        self.masking = HeadMaskingConfig(heads=heads, replacement=config.replacement)
        self.context = config.context or self.model.config.get_text_config(decoder=True).max_position_embeddings
        self.first = first_token(tokenizer)
        _check_head(self.model)
        apply_head_masking(self.model, self.masking).remove()  # refuses heads that the model does not have

    def score(self, texts: Sequence[str]) -> InfluenceScores:
        """Scores of the texts, in their order."""
        # token by token a long text would warn that it is longer than the model's context: it is cut below
        documents = [self.tokenizer.encode(t, add_special_tokens=False, verbose=False) if t else [] for t in texts]
        return self.score_tokens(documents)

    def score_tokens(self, documents: Sequence[Sequence[int]]) -> InfluenceScores:
        """As `score`, of token ids without the token that begins every text."""
        sums, predicted = np.zeros((2, len(documents))), np.zeros(len(documents), dtype=np.int64)
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        for batch in self._batches(documents):
            ids, targets = _padded(batch)
            losses = pair_losses(self.model, self.masking, ids, targets)
            owners = np.array([window.document for window in batch])
            np.add.at(sums.T, owners, losses.double().cpu().numpy().T)
            np.add.at(predicted, owners, (targets != _IGNORED).sum(-1).numpy())
        with np.errstate(divide="ignore", invalid="ignore"):
            base, masked = np.where((predicted > 0) & (lengths > 1), sums / predicted, math.nan)
        return InfluenceScores(lengths, base, masked)

    def _batches(self, documents: Sequence[Sequence[int]]) -> Iterator[list[_Window]]:
        windows = [w for number, document in enumerate(documents) for w in self._windows(number, document)]
        windows.sort(key=lambda window: (len(window.ids), window.document))
        batch: list[_Window] = []
        for window in windows:
            if batch and (len(batch) + 1) * len(window.ids) > self.config.batch_tokens:
                yield batch
                batch = []
            batch.append(window)
        if batch:
            yield batch

    def _windows(self, number: int, document: Sequence[int]) -> Iterator[_Window]:
        if len(document) < 2:
            return
        room = self.context - len(self.first)
        for start in range(0, len(document), room):
            ids = self.first + tuple(document[start : start + room])
            if len(ids) > 1:  # one token alone predicts nothing
                yield _Window(number, ids)


def _padded(batch: Sequence[_Window]) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N-1"]]:
    """Ids padded to the right, where no token sees it, and what is to be predicted of them."""
    longest = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    targets = torch.full((len(batch), longest - 1), _IGNORED)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        targets[row, : len(window.ids) - 1] = ids[row, 1 : len(window.ids)]
    return ids, targets


@torch.inference_mode()
def pair_losses(
    model: PreTrainedModel, masking: HeadMaskingConfig, ids: Int[Tensor, "B N"], targets: Int[Tensor, "B N-1"]
) -> Float[Tensor, "2 B"]:
    """Summed losses of each row without and with the heads masked; `targets` are what tokens 1 to N - 1 should be.

    All rows are looked at both ways, whatever `masking.rows` says. Targets of -100 do not count. Padding must be on the
    right.
    """
    ids, targets = ids.to(model.device), targets.to(model.device)
    B = ids.shape[0]
    if not masking.heads:
        losses = summed_losses(model, _hidden(model, ids), targets)
        return torch.stack([losses, losses])
    masking = replace(masking, rows="second half")
    with apply_head_masking(model, masking), _doubled_from(decoder_layers(model)[min(masking.heads)]):
        hidden = _hidden(model, ids)
    return summed_losses(model, hidden, targets.repeat(2, 1)).view(2, B)


def _hidden(model: Any, ids: Tensor) -> Float[Tensor, "B N C"]:
    return model.get_decoder()(ids, use_cache=False).last_hidden_state


@contextmanager
def _doubled_from(layer: nn.Module) -> Iterator[None]:
    """Has this layer, and so all after it, work on every row twice; what comes with the rows has a batch of one."""

    def double(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0].repeat(2, 1, 1), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].repeat(2, 1, 1)}

    hook = layer.register_forward_pre_hook(double, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def summed_losses(
    model: PreTrainedModel, hidden: Float[Tensor, "B N C"], targets: Int[Tensor, "B N-1"]
) -> Float[Tensor, "B"]:
    """Cross-entropy of each row's targets, summed, from what the decoder gives; float32 at least.

    Memory grows with tokens and with the vocabulary, not with their product.
    """
    B, C = hidden.shape[0], hidden.shape[-1]
    head: Any = model.get_output_embeddings()
    flat, wanted = hidden[:, :-1].reshape(-1, C), targets.reshape(-1)
    owners = torch.arange(B, device=hidden.device).repeat_interleave(targets.shape[1])
    cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    if cap is not None:
        return _capped(head, flat, wanted, owners, B, cap)
    return weighted_cross_entropy(
        flat, head.weight, wanted, bias=head.bias, ignore_index=_IGNORED,
        reduction="segment_sum", segment_ids=owners, num_segments=B,
    )  # fmt: skip


def _capped(head: nn.Module, hidden: Tensor, targets: Tensor, owners: Tensor, rows: int, cap: float) -> Tensor:
    total = torch.zeros(rows, device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    pieces = (each.split(_CAPPED_AT_ONCE) for each in (hidden, targets, owners))
    for some, wanted, owner in zip(*pieces, strict=True):
        logits = cap * torch.tanh(head(some).to(total.dtype) / cap)
        losses = nn.functional.cross_entropy(logits, wanted, ignore_index=_IGNORED, reduction="none")
        total.index_add_(0, owner, losses)
    return total


def _check_head(model: PreTrainedModel) -> None:
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} has no output layer to get losses from: load a causal language model")
    scaled = [name for name in _UNSUPPORTED if getattr(model.config, name, None) not in (None, 1, 1.0)]
    if scaled:
        raise ValueError(f"{type(model).__name__} scales its logits ({scaled[0]}), which scoring does not support")
