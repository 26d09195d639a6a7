"""weighted_cross_entropy on GPUs: logits tile by tile with the softmax statistics or the gradient in the epilogue.

Forward, a program takes a block of tokens through one span of the vocabulary and leaves the softmax and the target's
logit of that span; torch joins the spans. Backward, the gradient of the logits is written for a few thousand tokens and
words at a time, in the dtype of the inputs, and torch multiplies it with weight and hidden states: kernels that
multiply themselves would either compute the logits once per slice of the width or add atomically. Sums stay float32.
"""

# mypy: disable-error-code=no-untyped-def
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import LN2, dot_precision, load_tile, no_float64, softmax_step, strided_rows, target

_TOKENS, _VOCABULARY = 4_096, 8_192  # of the gradients of logits in memory at a time
_SPAN = {"interpreter": 32}  # words that one program of the forward pass goes through
_TILES = {  # tokens, words, width, warps, stages
    "interpreter": (16, 16, 16, 4, 1),
    "sm_90": (128, 128, 64, 8, 3),
    "sm_100": (128, 128, 64, 8, 3),
    "gfx942": (128, 128, 32, 8, 2),
}
_SMALL = (128, 128, 32, 8, 3)  # also where rows of memory cannot be copied whole and pass through registers
_FLOAT32 = (64, 64, 32, 8, 3)  # operands are split into three parts


@triton.jit
def _logits(
    hidden, weight, bias, rows, words, T, V, D, stride_hidden, stride_weight,
    BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of rows (of tokens; negative ones are not read) and words, -inf beyond the vocabulary."""
    logits = tl.zeros((rows.shape[0], words.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        h = load_tile(hidden, rows, columns, stride_hidden, T, D)
        w = load_tile(weight, words, columns, stride_weight, V, D)
        logits = tl.dot(h, tl.trans(w), logits, input_precision=PRECISION)
    if HAS_BIAS:
        logits += tl.load(bias + words, mask=words < V, other=0.0).to(tl.float32)[None, :]
    return tl.where((words < V)[None, :], logits * 1.4426950408889634, float("-inf"))


@triton.jit
def weighted_cross_entropy_fwd_kernel(
    hidden, weight, bias, targets, tops, totals, hits, T, V, D, stride_hidden, stride_weight, ignore_index,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    aim = tl.load(targets + rows, mask=rows < T, other=ignore_index)
    read = tl.where(aim == ignore_index, -1, rows)
    top, total = tl.full((BLOCK_T,), float("-inf"), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    found = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, SPAN, BLOCK_V):
        words = tl.program_id(1) * SPAN + start + tl.arange(0, BLOCK_V)
        logits = _logits(
            hidden, weight, bias, read, words, T, V, D, stride_hidden, stride_weight, BLOCK_D, HAS_BIAS, PRECISION
        )
        found += tl.sum(tl.where(words[None, :] == aim[:, None], logits, 0.0), 1)
        top, total, _, _ = softmax_step(logits, top, total)
    at = tl.program_id(1).to(tl.int64) * T + rows
    tl.store(tops + at, top, mask=rows < T)
    tl.store(totals + at, total, mask=rows < T)
    tl.store(hits + at, found, mask=rows < T)


@triton.jit
def weighted_cross_entropy_bwd_kernel(
    hidden, weight, bias, targets, top, total, d_losses, d_logits, first_word, T, V, D,
    stride_hidden, stride_weight, stride_out, ignore_index,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    words = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    aim = tl.load(targets + rows, mask=rows < T, other=ignore_index)
    counted = aim != ignore_index
    logits = _logits(
        hidden, weight, bias, tl.where(counted, rows, -1), words, T, V, D, stride_hidden, stride_weight,
        BLOCK_D, HAS_BIAS, PRECISION,
    )  # fmt: skip
    own_top = tl.load(top + rows, mask=counted, other=0.0)[:, None]
    own_total = tl.load(total + rows, mask=counted, other=0.0)[:, None]
    factor = tl.load(d_losses + rows, mask=counted, other=0.0)
    hit = (first_word + words)[None, :] == aim[:, None]
    shares = (tl.exp2(logits - own_top - own_total) - tl.where(hit, 1.0, 0.0)) * factor[:, None]
    inside = (rows < T)[:, None] & (words < V)[None, :]
    out = d_logits + rows.to(tl.int64)[:, None] * stride_out + words[None, :]
    tl.store(out, tl.where(counted[:, None], shares, 0.0).to(d_logits.dtype.element_ty), mask=inside)


class _Launch(NamedTuple):
    """Tile sizes and constants for the kernels on one kind of GPU."""

    tokens: int
    words: int
    span: int
    constants: dict[str, object]


def _launch(hidden: Tensor, bias: Tensor | None) -> _Launch:
    no_float64(hidden)
    device, tile = target(hidden), _TILES.get(target(hidden), _SMALL)
    if device != "interpreter" and hidden.dtype == torch.float32:
        tile = _FLOAT32
    elif device != "interpreter" and hidden.shape[1] % 16:
        tile = min(tile, _SMALL)
    tokens, words, width, warps, stages = tile
    constants = {
        "BLOCK_T": tokens, "BLOCK_V": words, "BLOCK_D": width, "HAS_BIAS": bias is not None,
        "PRECISION": dot_precision(hidden), "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return _Launch(tokens, words, _SPAN.get(device, 4_096), constants)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    (T, D), V = hidden.shape, weight.shape[0]
    launch, acc = _launch(hidden, bias), torch.float32
    if T == 0:
        return hidden.new_empty(0, dtype=acc), hidden.new_empty((2, 0), dtype=acc)
    hidden, weight, targets = strided_rows(hidden), strided_rows(weight), targets.contiguous()
    tops, totals, hits = hidden.new_empty((3, triton.cdiv(V, launch.span), T), dtype=acc)
    weighted_cross_entropy_fwd_kernel[(triton.cdiv(T, launch.tokens), len(tops))](
        hidden, weight, targets if bias is None else bias.contiguous(), targets, tops, totals, hits, T, V, D,
        hidden.stride(0), weight.stride(0), ignore_index, SPAN=launch.span, **launch.constants,
    )  # fmt: skip
    top, ignored = tops.amax(0), targets == ignore_index
    total = (totals * torch.exp2(tops - top)).sum(0).log2()
    unknown = ((targets < 0) | (targets >= V)) & ~ignored
    losses = ((top - hits.sum(0) + total) * LN2).masked_fill(unknown, torch.nan)
    return losses.masked_fill(ignored, 0.0), torch.stack([top, total]).masked_fill(ignored, 0.0)


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
    (T, D), V = hidden.shape, weight.shape[0]
    launch, ignored = _launch(hidden, bias), (targets == ignore_index)[:, None]
    d_hidden = hidden.new_zeros((T, D) if hidden_too else 0, dtype=torch.float32)
    d_weight = weight.new_empty((V, D) if weight_too else 0)
    d_bias = hidden.new_zeros(0 if bias is None else V, dtype=torch.float32)
    hidden, weight, targets = strided_rows(hidden), strided_rows(weight), targets.contiguous()
    clean = hidden.masked_fill(ignored, 0.0) if weight_too else hidden  # 0 times NaN would be NaN
    for word in range(0, V, _VOCABULARY):
        part = weight[word : word + _VOCABULARY]
        d_part = part.new_zeros(part.shape if weight_too else 0, dtype=torch.float32)
        for token in range(0, T, _TOKENS):
            some = slice(token, min(token + _TOKENS, T))
            d_logits = hidden.new_empty((some.stop - some.start, len(part)))
            grid = (triton.cdiv(len(d_logits), launch.tokens), triton.cdiv(len(part), launch.words))
            weighted_cross_entropy_bwd_kernel[grid](
                hidden[some], part, targets if bias is None else bias[word : word + _VOCABULARY].contiguous(),
                targets[some], softmax[0, some], softmax[1, some], d_losses[some].contiguous(), d_logits, word,
                *d_logits.shape, D,
                hidden.stride(0), weight.stride(0), len(part), ignore_index, **launch.constants,
            )  # fmt: skip
            if hidden_too:
                d_hidden[some] += d_logits @ part
            if weight_too:
                d_part += d_logits.T @ clean[some]
            if bias is not None:
                d_bias[word : word + _VOCABULARY] += d_logits.sum(0, dtype=torch.float32)
        if weight_too:
            d_weight[word : word + _VOCABULARY] = d_part
    return d_hidden.to(hidden.dtype), d_weight, d_bias if bias is None else d_bias.to(bias.dtype)


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
    """One after the other: logits that are kept for both would have to be rounded to the dtype of the inputs."""
    losses, softmax = forward(hidden, weight, bias, targets, ignore_index)
    gradients = backward(token_weights, hidden, weight, bias, targets, softmax, ignore_index, hidden_too, weight_too)
    d_hidden, d_weight, d_bias = (d.float() for d in gradients)
    return torch.dot(losses, token_weights), losses, d_hidden, d_weight, d_bias


def total_backward(d_total: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    return [torch.mul(d_total, d, out=d.new_empty(d.shape)) for d in gradients]
