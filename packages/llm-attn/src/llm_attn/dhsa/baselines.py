"""What DHSA is measured against: patterns of fixed blocks at the same budget of keys, and a window with a sink.

The second version of the paper ships kernels for blocks of fixed size with four ways to choose them; here they are
lists for `sparse_attention`. Prefill only, as released: a token that is decoded attends to everything.

arXiv:2510.24606v2 and its released code: "topk", "a_shape", "vertical_slash", "block_vertical_slash"; "window" is the
attention sink of arXiv:2309.17453. Decided here: nothing but what a query block may see is chosen; the key blocks that
overlap the query block count as its most recent one; the last tokens of a prompt attend to everything, as in DHSA, so
that patterns differ in nothing else; sliding-window layers run dense.

Shapes: B batch, H query heads, Hkv key heads, Nq queries, Nk keys, D head width, nq and nk blocks.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_attn.dhsa.sequences import Part, by_sequence
from llm_attn.transformers.door import Handle, layer_config, open_door, register_attention
from llm_attn.transformers.saving import register_door
from llm_attn.transformers.visibility import Visibility, dense_attention
from shared_kernels import BlockLists, choose_blocks, select_blocks, sparse_attention

Pattern = Literal["topk", "a_shape", "vertical_slash", "block_vertical_slash", "window"]
NAME = "fixed_blocks"


@dataclass(frozen=True, kw_only=True)
class FixedBlocksConfig:
    """Settings of attention over blocks of fixed size."""

    pattern: Pattern = "topk"
    """How blocks are chosen; see `fixed_block_lists`."""
    budget: int = 1024
    """Keys that each query reads; texts up to this length run dense."""
    block_q: int = 128
    """Queries that share a list."""
    block_k: int = 32
    """Keys in a block."""
    instruction_tokens: int = 64
    """Last tokens of a prompt, which attend to everything."""

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern must be one of {', '.join(get_args(Pattern))}, got {self.pattern!r}")
        if min(self.block_q, self.block_k) < 1 or self.block_q % self.block_k:
            raise ValueError(f"block_q must be a multiple of block_k, got {self.block_q} and {self.block_k}")
        least = self.block_q + self.block_k
        if self.budget < least:
            raise ValueError(f"budget must be at least block_q + block_k = {least}, got {self.budget}")
        if self.instruction_tokens < 0:
            raise ValueError(f"instruction_tokens must be at least 0, got {self.instruction_tokens}")


def fixed_block_lists(
    query: Float[Tensor, "B H N D"], key: Float[Tensor, "B Hkv N D"], config: FixedBlocksConfig
) -> tuple[BlockLists, tuple[int, int]]:
    """Lists for `sparse_attention` of a prompt, and their block size.

    topk: the k = budget / block_k blocks with the highest product of mean query and mean key, for each head.
    a_shape: the first block and the query block's own are among the k, the others as in topk.
    vertical_slash: single keys, half of the budget columns and half diagonals, by what the last query block attends to.
    block_vertical_slash: the same by blocks.
    window: the first block and the k - 1 latest.
    """
    topk, size = config.budget // config.block_k, (config.block_q, config.block_k)
    if config.pattern == "topk":
        return select_blocks(query, key, block_size=size, topk=topk, causal=True), size
    if config.pattern == "vertical_slash":
        return _vertical_slash(query, key, config), (1, 1)
    scores = _block_scores(query, key, config)
    return choose_blocks(scores, topk=topk), size


def _block_scores(query: Tensor, key: Tensor, config: FixedBlocksConfig) -> Tensor:
    """(B, heads, nq, nk): +inf where a block is always read, -inf where it cannot be seen."""
    N = query.shape[2]
    nq, nk = -(-N // config.block_q), -(-N // config.block_k)
    per = config.block_q // config.block_k
    row, column = torch.arange(nq, device=query.device)[:, None], torch.arange(nk, device=query.device)
    own, seen = column // per == row, column // per <= row
    if config.pattern == "window":
        scores = column.float().expand(1, 1, nq, nk).repeat(query.shape[0], 1, 1, 1)
    elif config.pattern == "a_shape":
        blocks = [_block_means(t, size) for t, size in ((query, config.block_q), (key, config.block_k))]
        scores = blocks[0] @ blocks[1].repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    else:
        scores = _lines_of_blocks(query, key, config, row, column)
    forced = own | (column == 0) if config.pattern != "block_vertical_slash" else own
    return scores.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)


def _block_means(x: Tensor, size: int) -> Tensor:
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).sum(3)
    ends = torch.arange(padded.shape[2], device=x.device) * size
    return padded / (x.shape[2] - ends).clamp(max=size)[:, None]


def _last_rows(query: Tensor, key: Tensor, config: FixedBlocksConfig) -> Float[Tensor, "B H rows N"]:
    """What the last query block attends to, all keys."""
    rows = query[:, :, -config.block_q :].float()
    N, groups = key.shape[2], query.shape[1] // key.shape[1]
    scores = rows @ key.float().repeat_interleave(groups, 1).mT * query.shape[3] ** -0.5
    last = torch.arange(N - rows.shape[2], N, device=key.device)[:, None]
    return scores.masked_fill(torch.arange(N, device=key.device) > last, -torch.inf).softmax(-1)


def _lines(weights: Float[Tensor, "B H rows N"]) -> tuple[Float[Tensor, "B H N"], Float[Tensor, "B H N"]]:
    """Attention on each column, and on each diagonal by its distance from the query."""
    rows, N = weights.shape[2:]
    distance = torch.arange(N - rows, N, device=weights.device)[:, None] - torch.arange(N, device=weights.device)
    slashes = weights.new_zeros((*weights.shape[:2], N))
    seen = (distance >= 0).expand_as(weights)
    index = distance.clamp(min=0).expand_as(weights).flatten(2)
    return weights.sum(2), slashes.scatter_add_(2, index, weights.masked_fill(~seen, 0).flatten(2))


def _lines_of_blocks(query: Tensor, key: Tensor, config: FixedBlocksConfig, row: Tensor, column: Tensor) -> Tensor:
    """Blocks on the best columns and diagonals get 1 plus their place in the order, others -inf."""
    nk, per = column.shape[0], config.block_q // config.block_k
    half = max(1, config.budget // config.block_k // 2)
    sums = [
        torch.nn.functional.pad(line, (0, -line.shape[2] % config.block_k)).unflatten(2, (nk, -1)).sum(3)
        for line in _lines(_last_rows(query, key, config))
    ]
    # a diagonal of blocks: so many blocks before the query block's last one
    distance = ((row + 1) * per - 1 - column).clamp(min=0)
    kept = [torch.zeros_like(s).scatter_(2, s.topk(min(half, nk), -1).indices, 1.0) for s in sums]
    on_column, on_diagonal = kept[0][:, :, None], kept[1][:, :, distance.clamp(max=nk - 1)]
    return torch.where((on_column + on_diagonal) > 0, on_column + on_diagonal, -torch.inf)


def _vertical_slash(query: Tensor, key: Tensor, config: FixedBlocksConfig) -> BlockLists:
    N = key.shape[2]
    half = config.budget // 2
    columns, slashes = (line.topk(min(half, N), -1).indices for line in _lines(_last_rows(query, key, config)))
    place = torch.arange(N, device=key.device)[:, None]
    vertical = columns[:, :, None].expand(-1, -1, N, -1).masked_fill(columns[:, :, None] > place, N)
    diagonal = place - slashes[:, :, None]
    on_column = torch.zeros(*columns.shape[:2], N, dtype=torch.bool, device=key.device).scatter_(2, columns, True)
    twice = on_column.gather(2, diagonal.clamp(min=0).flatten(2)).view_as(diagonal)
    diagonal = diagonal.masked_fill((diagonal < 0) | twice, N)
    lists = torch.cat([vertical, diagonal], -1)
    # the first rows have no more keys than the budget
    lists = torch.where(place < lists.shape[3], torch.arange(lists.shape[3], device=key.device), lists)
    lists = lists.masked_fill(lists > place, N).sort(-1).values
    counts = (lists < N).sum(-1, dtype=torch.int32)
    return BlockLists(lists.masked_fill(lists == N, -1).int(), counts)


def _attention(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    *,
    scale: float | None,
    dropout: float,
    softcap: float | None = None,
) -> Tensor:
    config = layer_config(layer, NAME, FixedBlocksConfig())

    def run(_: Part, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        N = k.shape[2]
        if q.shape[2] != N or config.budget >= N or window is not None:
            return dense_attention(q, k, v, Visibility(window), scale=scale, softcap=softcap)
        with torch.no_grad():
            lists, size = fixed_block_lists(q, k, config)
        out = cast(Tensor, sparse_attention(q, k, v, *lists, block_size=size, causal=True, scale=scale))
        tail = min(config.instruction_tokens, N)
        last = dense_attention(q[:, :, N - tail :], k, v, Visibility(), scale=scale) if tail else out[:, :, :0]
        return torch.cat([out[:, :, : N - tail], last], 2)

    if softcap is not None:
        raise ValueError("fixed_blocks does not cap scores (softcap); use it with another model")
    if dropout:
        raise ValueError(f"fixed_blocks has no attention dropout, got {dropout}; set attention_dropout=0")
    return by_sequence(query, key, value, visible, run, scale=scale, softcap=softcap)


def apply_fixed_blocks(model: nn.Module, config: FixedBlocksConfig | None = None, *, layers: Any = None) -> Handle:
    """Runs prompts with blocks of fixed size in the layers `layers` (None: all) of a transformers model."""
    return open_door(model, NAME, FixedBlocksConfig() if config is None else config, layers=layers)


register_attention(NAME, _attention, softcap=True)
register_door(NAME, FixedBlocksConfig, apply_fixed_blocks)
