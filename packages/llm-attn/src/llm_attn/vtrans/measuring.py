"""What a small model is worth: its agreement with the original, its speed, its size on disk."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_attn.vtrans.objectives import cosines, mean_pooled
from llm_attn.vtrans.training import collate, to_device

NEIGHBOURS = 10


@torch.no_grad()
def perplexity(model: nn.Module, data: Sequence[Tensor], *, batch_size: int = 8) -> float:
    """exp of the mean loss of all tokens but each text's first."""
    total, count = 0.0, 0
    for batch in _batches(model, data, batch_size):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    return float(torch.tensor(total / count).exp())


@torch.no_grad()
def embeddings(model: nn.Module, data: Sequence[Tensor], *, batch_size: int = 32) -> Float[Tensor, "N K"]:
    """The mean-pooled last hidden state of each text."""
    found = []
    for batch in _batches(model, data, batch_size):
        found.append(mean_pooled(model(**batch).last_hidden_state, batch["attention_mask"].bool()).cpu())
    return torch.cat(found)


def embedding_agreement(own: Float[Tensor, "N K"], their: Float[Tensor, "N d"]) -> dict[str, float]:
    """How far two sets of embeddings, of any two widths, agree on which texts are alike.

    "rank correlation": Spearman's, of the cosines of all pairs. "neighbours": the share that the 10 nearest texts of
    each text have in common. ValueError for fewer than 12 texts.
    """
    if len(own) < NEIGHBOURS + 2:
        raise ValueError(
            f"agreement on the {NEIGHBOURS} nearest of a text takes {NEIGHBOURS + 2} texts, got {len(own)}"
        )
    ours, theirs = cosines(own), cosines(their)
    pairs = torch.triu_indices(len(own), len(own), 1)
    ranks = torch.stack([x[pairs[0], pairs[1]].argsort().argsort().double() for x in (ours, theirs)])
    near = [x.fill_diagonal_(-2).topk(NEIGHBOURS).indices for x in (ours, theirs)]
    common = (near[0][:, :, None] == near[1][:, None, :]).any(-1).float().mean()
    return {"rank correlation": float(torch.corrcoef(ranks)[0, 1]), "neighbours": float(common)}


@torch.no_grad()
def latency(models: Sequence[nn.Module], *, tokens: int, batch: int = 1, rounds: int = 15) -> list[float]:
    """Median seconds of one pass of each model over `batch` texts of `tokens` tokens; they take turns."""
    ids = torch.ones(batch, tokens, dtype=torch.long)
    times: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 2):
        for model, own in zip(models, times, strict=True):
            inputs: Any = ids.to(next(model.parameters()).device)
            start = time.perf_counter()
            model(input_ids=inputs)
            if turn > 1:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def weight_bytes(folder: Path | str) -> int:
    """Size of a checkpoint's weights on disk."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _batches(model: nn.Module, data: Sequence[Tensor], size: int) -> Any:
    pad = getattr(model.config, "pad_token_id", None) or 0
    for first in range(0, len(data), size):
        yield to_device(collate(data[first : first + size], pad), model)
