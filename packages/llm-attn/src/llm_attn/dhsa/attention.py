"""Exact attention over listed keys, and DHSA of a prompt and of one more token.

`listed_attention` is the definition, in plain torch. `dhsa_attention` runs a prompt: keys are chosen for each block of
queries, all heads together, and each head attends to them; the last tokens, usually the question, attend to everything.
`dhsa_decode` runs one token after a prompt.

arXiv:2510.24606, sections 3.3 and 3.4. Decided here: where the budget holds all that may be read, attention is dense,
the host's own. Sliding-window layers choose within the last `window` keys of a block's last query, all of which every
query of the block may see; so a block's earlier queries read some keys less than their own window, as in the authors'
code. On a CPU without gradients, keys that all heads share are gathered once for all heads, and torch's dense kernel
runs on them: faster by a quarter than `sparse_attention`, which serves everything else. Capped scores (Gemma 2) and
blocks of unequal length take the definition.

Shapes: as in `selection`.
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_attn.dhsa.config import DHSAConfig
from llm_attn.dhsa.selection import KeyLists, Reach, fill_budget, select_keys, shared_heads
from llm_attn.transformers.visibility import Visibility, dense_attention
from shared_kernels import sparse_attention

TILE = 1 << 23
"""Numbers of keys, values or masks that exist gathered at a time."""


def listed_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    lists: KeyLists,
    *,
    block_size: int = 128,
    edges: Int[Tensor, "B nq+1"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H Nq E"]:
    """Softmax over {j listed for the block of query i, j <= i + Nk - Nq}; a query that sees none gives 0."""
    (B, H, Nq, D), (Hkv, Nk) = query.shape, key.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = [[*range(0, Nq, block_size), Nq]] * B if edges is None else edges.tolist()
    outs = []
    for b in range(B):
        parts = []
        for block, (low, high) in enumerate(zip(rows[b], rows[b][1:], strict=False)):
            if low == high:
                continue
            index = lists.indices[b, :, block].long()  # (Hl, n)
            count = lists.counts[b, :, block, None, None]
            seen = (torch.arange(index.shape[1], device=index.device) < count) & (
                index[:, None] <= torch.arange(low, high, device=index.device)[:, None] + Nk - Nq
            )
            index, seen = (t.repeat_interleave(Hkv // len(t), 0) for t in (index.clamp(min=0), seen))
            k, v = (t[b].gather(1, index[..., None].expand(-1, -1, t.shape[3])) for t in (key, value))
            q = query[b, :, low:high].unflatten(0, (Hkv, H // Hkv))
            scores = (q.to(wide) @ k.to(wide)[:, None].mT) * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).masked_fill(~seen[:, None], 0)
            parts.append((weights @ v.to(wide)[:, None]).flatten(0, 1).to(query.dtype))
        outs.append(torch.cat(parts, 1))
    return torch.stack(outs)


def gathered_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    lists: KeyLists,
    *,
    block_size: int,
    scale: float | None,
) -> Float[Tensor, "B H Nq E"]:
    """`listed_attention` of lists that all heads share: keys gathered for some blocks at a time, then torch's SDPA."""
    B, H, Nq, _ = query.shape
    out = query.new_empty(B, H, Nq, value.shape[3])
    for b in range(B):
        keys, values = (t[b].transpose(0, 1).contiguous() for t in (key, value))  # (Nk, Hkv, D): one row, all heads
        indices, lengths = lists.indices[b, 0], lists.counts[b, 0].tolist()
        block = 0
        while block < len(lengths):
            stop = _piece(lengths, block, keys[0].numel() + values[0].numel() + 2 * block_size)
            rows = slice(block * block_size, min(stop * block_size, Nq))
            index = indices[block:stop, : max(lengths[block:stop])]
            out[b, :, rows] = _attend_blocks(query[b, :, rows], keys, values, index, rows, Nq, block_size, scale)
            block = stop
    return out


def _piece(lengths: list[int], start: int, numbers: int) -> int:
    """The end of a run of blocks whose gathered keys fit the tile; lengths rise to the budget and stay there."""
    stop = start + 1
    while stop < len(lengths) and (stop + 1 - start) * lengths[stop] * numbers <= TILE:
        stop += 1
    return stop


def _attend_blocks(
    query: Float[Tensor, "H rows D"],
    key: Float[Tensor, "Nk Hkv D"],
    value: Float[Tensor, "Nk Hkv E"],
    index: Int[Tensor, "blocks n"],
    rows: slice,
    num_queries: int,
    block_size: int,
    scale: float | None,
) -> Float[Tensor, "H rows E"]:
    blocks, n = index.shape
    place = torch.arange(rows.start, rows.start + blocks * block_size) + len(key) - num_queries
    seen = (index[:, None] <= place.view(blocks, block_size, 1)) & (index >= 0)[:, None]
    chosen = index.clamp(min=0).reshape(-1)
    k, v = (t.index_select(0, chosen).unflatten(0, (blocks, n)).transpose(1, 2) for t in (key, value))
    short = blocks * block_size - query.shape[1]
    q = torch.nn.functional.pad(query, (0, 0, 0, short)).unflatten(1, (blocks, block_size)).transpose(0, 1)
    mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill_(~seen, -torch.inf)[:, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(0, 1).flatten(1, 2)[:, : query.shape[1]]


def attend_lists(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    lists: KeyLists,
    *,
    block_size: int,
    edges: Int[Tensor, "B nq+1"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H Nq E"]:
    """`listed_attention` by the fastest way there is for these inputs."""
    if softcap is not None or edges is not None:
        return listed_attention(
            query, key, value, lists, block_size=block_size, edges=edges, scale=scale, softcap=softcap
        )
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if query.device.type == "cpu" and not gradients and lists.indices.shape[1] == 1 and block_size > 1:
        return gathered_attention(query, key, value, lists, block_size=block_size, scale=scale)
    shape = (block_size, 1)
    out = sparse_attention(query, key, value, *lists, block_size=shape, causal=True, scale=scale)
    return cast(Tensor, out)


def covers(config: DHSAConfig, num_keys: int, window: int | None) -> bool:
    """Whether the budget holds every key that a query may see, so that attention is dense."""
    return config.budget >= (num_keys if window is None else min(window, num_keys))


def dhsa_attention(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    boundaries: Int[Tensor, "B M+1"],
    config: DHSAConfig | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "B H Nq E"]:
    """DHSA of a prompt, or of more of it: query i of Nq stands at key i + Nk - Nq, causal.

    `boundaries` cut the keys, from 0 to Nk. `window` is that of a sliding-window layer, `softcap` the bound of scores
    that are capped. Differentiable in query, key and value; which keys are chosen is not. Raises ValueError on
    boundaries that do not fit the keys.
    """
    config = DHSAConfig() if config is None else config
    return dhsa_prefill(query, key, value, boundaries, config, scale=scale, softcap=softcap, window=window)[0]


def dhsa_prefill(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    boundaries: Int[Tensor, "B M+1"],
    config: DHSAConfig,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    lists: KeyLists | None = None,
) -> tuple[Float[Tensor, "B H Nq E"], KeyLists | None]:
    """`dhsa_attention`, and what was read (None: everything). `lists` of another layer are read here too."""
    Nq, Nk = query.shape[2], key.shape[2]
    tail = min(config.instruction_tokens, Nq)
    if covers(config, Nk, window) or tail == Nq:
        return dense_attention(query, key, value, Visibility(window), scale=scale, softcap=softcap), None
    check_boundaries(boundaries, key)
    q, k, v = query[:, :, : Nq - tail], key[:, :, : Nk - tail], value[:, :, : Nk - tail]
    edges = None
    if config.query_chunks == "boundary":
        edges = (boundaries - (Nk - Nq)).clamp(0, Nq - tail)
    if lists is None:
        lists = _lists(q, k, boundaries, config, edges, window)
    out = attend_lists(q, k, v, lists, block_size=config.block_size, edges=edges, scale=scale, softcap=softcap)
    if tail:
        last = _attend_all(query[:, :, Nq - tail :], key, value, window, scale, softcap)
        out = torch.cat([out, last], 2)
    return out, lists


def _attend_all(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Dense attention of a few queries, one head of each group at a time, so that no key is copied for its group."""
    heads = query.unflatten(1, (key.shape[1], -1)).unbind(2)
    outs = [dense_attention(q, key, value, Visibility(window), scale=scale, softcap=softcap) for q in heads]
    return torch.stack(outs, 2).flatten(1, 2)


def _lists(
    query: Tensor, key: Tensor, boundaries: Tensor, config: DHSAConfig, edges: Tensor | None, window: int | None
) -> KeyLists:
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        return select_keys(
            query,
            key,
            boundaries,
            budget=config.budget,
            block_size=config.block_size,
            edges=edges,
            window=window,
            local_tokens=config.always_local,
            global_tokens=config.global_tokens,
            pooling=config.pooling,
            per_kv_head=config.per_kv_head,
        )


def dhsa_decode(
    query: Float[Tensor, "B H 1 D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    boundaries: Int[Tensor, "B M+1"],
    vectors: Float[Tensor, "B Hl M D"],
    config: DHSAConfig,
    *,
    covered: int,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Float[Tensor, "B H 1 E"], KeyLists]:
    """DHSA of the newest token: its key is the last of Nk.

    `boundaries` cut the first `covered` keys into chunks with `vectors` (`chunk_keys`); what was generated since is
    read whole, as are the last `local_tokens` and the first `global_tokens`, and scored chunks fill the rest of the
    budget.
    """
    Nk = key.shape[2]
    first = 0 if window is None else max(0, Nk - window)
    latest = min(max(config.local_tokens, Nk - covered), Nk - first)
    budget = max(config.budget, latest + config.global_tokens)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        scores = shared_heads(query, vectors.shape[1]) @ vectors.mT  # one query: every pooling leaves it as it is
        reach = Reach(*(torch.full((1, 1), end, device=key.device) for end in (first, Nk)))
        lists = fill_budget(
            scores,
            boundaries,
            reach,
            budget=budget,
            local_tokens=latest,
            global_tokens=config.global_tokens,
            width=min(budget, Nk - first),
        )
    return attend_lists(query, key, value, lists, block_size=1, scale=scale, softcap=softcap), lists


def check_boundaries(boundaries: Int[Tensor, "B M+1"], key: Float[Tensor, "B Hkv Nk D"]) -> None:
    """ValueError unless there are boundaries for every row, from 0 to the last key, ascending."""
    B, Nk = key.shape[0], key.shape[2]
    if boundaries.ndim != 2 or boundaries.shape[0] != B or boundaries.shape[1] < 2:
        raise ValueError(
            f"boundaries must be ({B}, chunks + 1) for keys {tuple(key.shape)}, got {tuple(boundaries.shape)}"
        )
    wrong = (boundaries[:, 0] != 0) | (boundaries[:, -1] != Nk) | (boundaries.diff() < 0).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"boundaries must ascend from 0 to {Nk}, the number of keys; row {row} does not")
