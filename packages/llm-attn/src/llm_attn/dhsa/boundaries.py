"""Where chunks end: from a predictor's logits, or without training.

A boundary is a place 0 <= b <= L; chunk c is the tokens from boundaries[c] up to, not with, boundaries[c + 1]. Rows of
a batch with fewer boundaries repeat the last, which makes chunks without tokens.

arXiv:2510.24606, section 3; logits, thresholds and suppression as in the authors' released code. Decided here: where
nothing passes the threshold the text is one chunk (the code fails); of equal logits the earlier token comes first;
"keyshift" has no threshold, its logit being 1 minus the cosine between the mean keys left and right of a place;
sentences are not limited in number, since the limit would leave the end of a text uncut.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SENTENCE_ENDS = (".", "!", "?", ";", ":", "\n", "。", "！", "？", "；")  # noqa: RUF001 - full-width ones are meant


def spaced_peaks(
    logits: Float[Tensor, "L"],
    candidates: Bool[Tensor, "L"],
    *,
    distance: int,
    max_count: int | None = None,
    forced: int | None = None,
) -> list[int]:
    """Candidates taken from the highest logit down, each more than `distance` from all taken before; ascending.

    `forced` is taken first, whatever its logit, and nothing behind it; it counts towards `max_count`.
    """
    order = logits.masked_fill(~candidates, -torch.inf).sort(descending=True, stable=True).indices
    blocked = bytearray((~candidates).to(torch.uint8).tolist())
    limit = len(blocked) if max_count is None else max_count
    taken: list[int] = []
    if forced is not None:
        blocked[max(0, forced - distance) :] = b"\x01" * (len(blocked) - max(0, forced - distance))
        taken.append(forced)
    for place in order[: int(candidates.sum())].tolist():
        if len(taken) >= limit:
            break
        if not blocked[place]:
            low, high = max(0, place - distance), min(len(blocked), place + distance + 1)
            blocked[low:high] = b"\x01" * (high - low)
            taken.append(place)
    return sorted(taken)


def boundaries_from_logits(
    logits: Float[Tensor, "B L"],
    *,
    threshold: float | None = 1.1,
    distance: int = 8,
    max_count: int | None = None,
    window: int = 4,
    instruction_tokens: int = 0,
) -> Int[Tensor, "B M+1"]:
    """Boundaries behind tokens with high logits: above `threshold`, spaced, at most `max_count`, and the two ends.

    Places with less than `window` tokens on either side are none. With `instruction_tokens` there is a boundary where
    the last so many tokens begin, and none among them.
    """
    L = logits.shape[1]
    place = torch.arange(L, device=logits.device)
    inside = (place >= window - 1) & (place < L - window)
    forced = L - instruction_tokens if 0 < instruction_tokens < L else None
    rows = []
    for row in logits.float():
        candidates = inside & row.isfinite() if threshold is None else inside & (row > threshold)
        taken = spaced_peaks(row, candidates, distance=distance, max_count=max_count, forced=forced)
        ends = [place + 1 for place in taken]
        rows.append([0, *ends, L] if not ends or ends[-1] != L else [0, *ends])
    return stack_boundaries(rows, logits.device)


def stack_boundaries(rows: list[list[int]], device: torch.device) -> Int[Tensor, "B M+1"]:
    """Rows of unlike length as one tensor, int64."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=device)


def uniform_boundaries(batch: int, length: int, chunk_size: int, device: torch.device) -> Int[Tensor, "B M+1"]:
    """Every `chunk_size` tokens, and the end."""
    starts = torch.arange(0, length, chunk_size, device=device)
    return torch.cat([starts, starts.new_tensor([length])]).expand(batch, -1)


def keyshift_logits(key: Float[Tensor, "B Hkv L D"], *, window: int = 4) -> Float[Tensor, "B L"]:
    """1 - cos(mean key of the last `window` tokens, mean key of the next), all heads side by side; float32.

    Places with fewer tokens on a side get -1, below all others.
    """
    B, _, L, _ = key.shape
    logits = key.new_full((B, L), -1.0, dtype=torch.float32)
    if 2 * window > L:
        return logits
    heads = key.detach().transpose(1, 2).flatten(2).float()
    means = torch.nn.functional.avg_pool1d(heads.mT, window, stride=1).mT  # (B, L - window + 1, C)
    left, right = means[:, :-window], means[:, window:]
    logits[:, window - 1 : L - window] = 1 - torch.nn.functional.cosine_similarity(left, right, dim=-1)
    return logits


def punctuation_logits(ids: Int[Tensor, "B L"], sentence_ends: tuple[int, ...]) -> Float[Tensor, "B L"]:
    """1 at tokens that end a sentence, -1 elsewhere."""
    ends = torch.isin(ids, torch.tensor(sentence_ends, device=ids.device))
    return ends.float() * 2 - 1


def punctuation_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens whose text ends a sentence or a line, of any tokenizer of transformers."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    special = set(tokenizer.all_special_ids)
    return tuple(i for i, text in enumerate(texts) if i not in special and text.rstrip(" ").endswith(SENTENCE_ENDS))
