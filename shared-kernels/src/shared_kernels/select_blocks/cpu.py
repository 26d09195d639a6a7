"""select_blocks on CPUs: the cut of each row by `topk` or a sort, everything else by comparison with the cut.

Rows go through in chunks, so that the int64 positions which torch's sorts return never exist for all of them.
"""

import torch
from torch import Tensor

_CHUNK = 262_144  # scores


def forward(scores: Tensor, forced: Tensor | None, topk: int, topp: float | None) -> tuple[Tensor, Tensor]:
    *rows, n = scores.shape
    width = topk if forced is None and topp is None else n
    indices, counts = torch.full((*rows, width), -1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    if indices.numel() == 0:
        return indices, counts
    step = max(1, _CHUNK // n)
    lists = indices.view(-1, width).split(step), counts.view(-1).split(step)
    kept = None if forced is None else forced.reshape(-1, n).split(step)
    for i, (part, listed, count) in enumerate(zip(scores.reshape(-1, n).split(step), *lists, strict=True)):
        keep = _best(part, topk, topp)
        if kept is not None:
            keep |= kept[i]
        torch.sum(keep, 1, dtype=torch.int32, out=count)
        inside = torch.arange(width, dtype=torch.int32) < count[:, None]
        listed.masked_scatter_(inside, keep.nonzero()[:, 1].int())
    return indices, counts


def _best(scores: Tensor, topk: int, topp: float | None) -> Tensor:
    """Which of each row are its best, ties to the left."""
    finite = scores.nan_to_num(nan=-torch.inf, posinf=torch.finfo(scores.dtype).max, neginf=-torch.inf)
    if topp is None:
        if topk == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        cut = torch.topk(finite, topk, sorted=False).values.amin(1, keepdim=True)
        wanted = torch.tensor(topk)
    else:
        ranked = torch.sort(finite, descending=True).values
        within = torch.softmax(ranked, 1).cumsum(1) <= topp
        wanted = (within.sum(1, keepdim=True) + 1).clamp_(topk, ranked.shape[1])
        cut = ranked.gather(1, wanted - 1)
    above, ties = finite > cut, finite == cut
    room = wanted - above.sum(1, keepdim=True, dtype=torch.int32)
    above |= ties & (ties.cumsum(1, dtype=torch.int32) <= room)
    return above.logical_and_(finite > -torch.inf)
