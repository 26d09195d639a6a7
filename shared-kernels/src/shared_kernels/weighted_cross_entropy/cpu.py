"""weighted_cross_entropy on CPUs: logits in tiles of 8 MiB, some tokens by a part of the vocabulary, one after another.

`forward` keeps a running maximum and sum per token. `backward` computes every tile again and turns it in place into the
gradient of its logits, then multiplies it with the part of the weight and the tokens it came from. `total` does all at
once, with tiles as wide as the vocabulary. Ignored tokens are left out before anything is computed. The vocabulary is
the outer loop, so that a part of a bfloat16 weight is widened once; hidden states carry log2(e), which saves a pass, as
`exp2` is several times faster than `exp`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_TOKENS, _VOCABULARY = 512, 4_096  # of a tile; smaller ones multiply slower, larger ones leave the cache
_SWEPT = 1 << 23  # logits at once where the whole vocabulary is needed, for as many tokens as that allows
_FEWEST = 64  # but not fewer tokens: with each of them the gradient of the weight is gone through once
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
    make = weight.new_empty if len(counted.rows) else weight.new_zeros  # written by the first tokens
    d_weight = make(weight.shape if weight_too else 0)
    d_bias = hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    for part, part_weight, part_bias in counted.parts():
        d_part = d_weight[part].to(counted.acc) if weight_too else None  # itself, if it is wide enough
        d_part_bias = None if bias is None else part_weight.new_zeros(len(part_weight))
        for some, logits in counted.tiles(part_weight, part_bias):
            d_logits = logits.sub_(top[some]).sub_(total[some]).exp2_()
            d_logits[counted.hits(some, part)] -= 1.0
            d_logits *= factor[some]
            if d_hidden is not None:
                d_hidden[some].addmm_(d_logits, part_weight)
            if d_part is not None:
                d_part.addmm_(d_logits.T, counted.hidden[some], beta=int(some.start > 0))
            if d_part_bias is not None:
                d_part_bias += d_logits.sum(0)
        if d_part is not None and d_part.dtype != d_weight.dtype:
            d_weight[part] = d_part
        if d_part_bias is not None:
            d_bias[part] = d_part_bias * _LOG2E
    d_all = hidden.new_zeros(hidden.shape if hidden_too else 0)
    if d_hidden is not None:
        d_all[counted.rows] = d_hidden.mul_(_LOG2E).to(hidden.dtype)
    return d_all, d_weight, d_bias


def total(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weights: Tensor,
    ignore_index: int,
    hidden_too: bool,
    weight_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of weighted losses, the losses, and the gradients of that sum, all in float32 or float64.

    Some tokens at a time with the whole vocabulary: their logits are turned into the gradients on the spot.
    """
    counted = _Counted(hidden, weight, bias, targets, ignore_index)
    _check_targets(counted.targets, len(weight), ignore_index)
    wide, factor = weight.to(counted.acc), token_weights[counted.rows, None]
    wide_bias = None if bias is None else bias.to(counted.acc) * _LOG2E
    own, d_hidden = counted.hidden.new_empty(len(counted.rows)), torch.empty_like(counted.hidden)
    make = wide.new_empty if len(counted.rows) else wide.new_zeros  # written by the first tokens
    d_weight, d_bias = make(wide.shape if weight_too else 0), wide.new_zeros(0 if bias is None else len(weight))
    step = max(_FEWEST, _SWEPT // len(weight))
    buffer = wide.new_empty(min(step, len(counted.rows)), len(weight))
    for start in range(0, len(counted.rows), step):
        some = slice(start, min(start + step, len(counted.rows)))
        logits = torch.mm(counted.hidden[some], wide.T, out=buffer[: some.stop - start])
        if wide_bias is not None:
            logits += wide_bias
        logits -= logits.amax(1, keepdim=True)
        at = (torch.arange(len(logits)), counted.targets[some])
        hit = logits[at]
        sums = logits.exp2_().sum(1)
        own[some] = (sums.log2() - hit) * _LN2
        d_logits = logits.mul_(factor[some] / sums[:, None])
        d_logits[at] -= factor[some, 0]
        if hidden_too:
            torch.mm(d_logits, wide, out=d_hidden[some])
        if weight_too:
            d_weight.addmm_(d_logits.T, counted.hidden[some], alpha=_LN2, beta=int(start > 0))
        if bias is not None:
            d_bias += d_logits.sum(0)
    losses, d_all = own.new_zeros(targets.shape), own.new_zeros(hidden.shape if hidden_too else 0)
    losses[counted.rows] = own
    if hidden_too:
        d_all[counted.rows] = d_hidden
    return torch.dot(own, factor[:, 0]), losses, d_all, d_weight, d_bias


def total_backward(d_total: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    return [torch.mul(d_total, d, out=d.new_empty(d.shape)) for d in gradients]
