"""weighted_cross_entropy on CPUs: logits in tiles of 8 MiB, some tokens by a part of the vocabulary, one after another.

The forward pass keeps a running maximum and sum per token. Backward every tile is computed again and turned in place
into the gradient of its logits, then multiplied with the part of the weight and the tokens it came from. Ignored tokens
are left out before anything is computed. The vocabulary is the outer loop, so that a part of a bfloat16 weight is
widened once; hidden states carry log2(e), which saves a pass, as `exp2` is several times faster than `exp`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_TOKENS, _VOCABULARY = 512, 4_096  # of a tile; smaller ones multiply slower, larger ones leave the cache
_LOG2E = 1.4426950408889634
_LN2 = 0.6931471805599453


class _Counted:
    """The tokens that count, their targets, and the tiles of their logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int) -> None:
        self.acc = torch.promote_types(hidden.dtype, torch.float32)
        self.weight, self.bias = weight, bias
        self.rows = (targets != ignore_index).nonzero().squeeze(1)
        self.targets = targets[self.rows]
        self.hidden = hidden[self.rows].to(self.acc).mul_(_LOG2E)
        self.buffer = self.hidden.new_empty(min(_TOKENS, len(self.rows)) * min(_VOCABULARY, len(weight)))

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Parts of the vocabulary: which, and their rows of weight and bias, the latter to base 2."""
        for start in range(0, len(self.weight), _VOCABULARY):
            part = slice(start, min(start + _VOCABULARY, len(self.weight)))
            bias = None if self.bias is None else self.bias[part].to(self.acc) * _LOG2E
            yield part, self.weight[part].to(self.acc), bias

    def tiles(self, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Tokens, and their logits (t, v) to base 2, which the next ones will overwrite."""
        for start in range(0, len(self.rows), _TOKENS):
            some = slice(start, min(start + _TOKENS, len(self.rows)))
            shape = (some.stop - start, len(weight))
            logits = torch.mm(self.hidden[some], weight.T, out=self.buffer[: shape[0] * shape[1]].view(shape))
            yield some, logits if bias is None else logits.add_(bias)

    def hits(self, some: slice, part: slice) -> tuple[Tensor, Tensor]:
        """Rows and columns of a tile at which a token has its target."""
        columns = self.targets[some] - part.start
        rows = ((columns >= 0) & (columns < part.stop - part.start)).nonzero().squeeze(1)
        return rows, columns[rows]


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    counted = _Counted(hidden, weight, bias, targets, ignore_index)
    _check_targets(counted.targets, len(weight), ignore_index)
    top = counted.hidden.new_full(counted.rows.shape, -torch.inf)
    total, hit = torch.zeros_like(top), torch.zeros_like(top)
    for part, part_weight, part_bias in counted.parts():
        for some, logits in counted.tiles(part_weight, part_bias):
            rows, columns = counted.hits(some, part)
            hit[some][rows] = logits[rows, columns]
            new_top = torch.maximum(top[some], logits.amax(1))
            total[some] *= torch.exp2(top[some] - new_top)
            total[some] += logits.sub_(new_top[:, None]).exp2_().sum(1)
            top[some] = new_top
    total.log2_()
    losses, softmax = counted.hidden.new_zeros(targets.shape), counted.hidden.new_zeros(2, *targets.shape)
    losses[counted.rows] = (top - hit + total) * _LN2
    softmax[:, counted.rows] = torch.stack([top, total])
    return losses, softmax


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        given = f"{int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"targets must lie in [0, {vocabulary}) or be ignore_index, {ignore_index}, got {given}")


def backward(
    d_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softmax: Tensor,
    ignore_index: int,
    hidden_too: bool,
    weight_too: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, which are empty where they are not asked for or there is none."""
    counted = _Counted(hidden, weight, bias, targets, ignore_index)
    factor = d_losses[counted.rows, None] * _LN2  # what the hidden states of the products have too much
    top, total = softmax[:, counted.rows].unsqueeze(-1)
    d_hidden = torch.zeros_like(counted.hidden) if hidden_too else None
    d_weight = weight.new_empty(weight.shape if weight_too else 0)
    d_bias = hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    for part, part_weight, part_bias in counted.parts():
        d_part = torch.zeros_like(part_weight) if weight_too else None
        d_part_bias = None if bias is None else part_weight.new_zeros(len(part_weight))
        for some, logits in counted.tiles(part_weight, part_bias):
            d_logits = logits.sub_(top[some]).sub_(total[some]).exp2_()
            d_logits[counted.hits(some, part)] -= 1.0
            d_logits *= factor[some]
            if d_hidden is not None:
                d_hidden[some].addmm_(d_logits, part_weight)
            if d_part is not None:
                d_part.addmm_(d_logits.T, counted.hidden[some])
            if d_part_bias is not None:
                d_part_bias += d_logits.sum(0)
        if d_part is not None:
            d_weight[part] = d_part
        if d_part_bias is not None:
            d_bias[part] = d_part_bias * _LOG2E
    d_all = hidden.new_zeros(hidden.shape if hidden_too else 0)
    if d_hidden is not None:
        d_all[counted.rows] = d_hidden.mul_(_LOG2E).to(hidden.dtype)
    return d_all, d_weight, d_bias
