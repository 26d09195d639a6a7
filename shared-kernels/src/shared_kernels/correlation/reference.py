"""The definition of correlation in plain torch; the oracle of its tests."""

import torch
from torch import Tensor


def correlation(
    source: Tensor,
    target: Tensor,
    values: Tensor,
    *,
    softmax: str = "row",
    temperature: float = 0.02,
    normalize: bool = True,
    eps: float = 1e-5,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `shared_kernels.correlation`."""
    acc = torch.promote_types(source.dtype, torch.float32)
    x, of_x = _counting(source.to(acc), source_mask)
    y, of_y = _counting(target.to(acc), target_mask)
    if softmax == "column":
        x, of_x, y, of_y = y, of_y, x, of_x
    v = values.to(acc).expand(y.shape[0], -1, -1).masked_fill(~of_y[..., None], 0)
    if normalize:
        x, y = (t / (torch.linalg.vector_norm(t, dim=-1, keepdim=True) + eps) for t in (x, y))
    logits = x @ y.mT / temperature
    if softmax == "dual":
        rows, columns = log_sum(logits, of_y[:, None, :]), log_sum(logits.mT, of_x[:, None, :])
        rows, columns = (t.masked_fill(t == -torch.inf, 0) for t in (rows, columns))
        logits = 2 * logits - rows[:, :, None] - columns[:, None, :]
    lse = log_sum(logits, of_y[:, None, :])
    weight = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).masked_fill(~of_y[:, None, :], 0)
    out = (weight @ v).masked_fill(~of_x[..., None], 0).to(values.dtype)
    return (out, lse.masked_fill(~of_x, -torch.inf)) if return_lse else out


def _counting(features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features with zeros for those that do not count, and which do."""
    if mask is None:
        mask = features.new_ones(features.shape[:-1], dtype=torch.bool)
    return features.masked_fill(~mask[..., None], 0), mask


def log_sum(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension where the mask is True; -inf, with gradient 0, where it never is."""
    if logits.shape[-1] == 0:
        return logits.sum(-1) - torch.inf
    nothing = ~mask.any(-1, keepdim=True)
    return logits.masked_fill(~mask & ~nothing, -torch.inf).logsumexp(-1).masked_fill(nothing[..., 0], -torch.inf)
