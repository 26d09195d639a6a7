"""Sparse attention of visual tokens that also read text: key blocks from a list, and every valid text token.

In joint attention (Flux, SD3, HunyuanVideo, CogVideoX, Mochi) image and text tokens are one sequence. Every sparse
method here treats them alike: text is always read in full, text queries attend densely, and only the attention of
visual tokens to visual tokens is sparse. Both parts return their log-sum-exp, so that they join into exactly the
softmax over both.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from shared_kernels import BlockLists, TransposedLists, merge_states, sparse_attention

_ROWS = 128


@dataclass(frozen=True)
class TextKeys:
    """Keys and values of the text tokens. valid: which are text and not padding; None if all are."""

    key: Float[Tensor, "B H T D"]
    value: Float[Tensor, "B H T E"]
    valid: Bool[Tensor, "B T"] | None = None

    @property
    def counts(self) -> Int[Tensor, "B"]:
        """Valid tokens of each sample."""
        if self.valid is None:
            return torch.full((self.key.shape[0],), self.key.shape[2], device=self.key.device)
        return self.valid.sum(1)

    def lists(self, query_blocks: int) -> BlockLists:
        """The valid tokens, as lists of single keys for every query block: (B, 1, query_blocks, T)."""
        B, T = self.key.shape[0], self.key.shape[2]
        if self.valid is None:
            tokens = torch.arange(T, device=self.key.device, dtype=torch.int32).expand(B, T)
        else:
            tokens = (~self.valid).to(torch.uint8).argsort(dim=1, stable=True).to(torch.int32)
        counts = self.counts.to(torch.int32)[:, None, None].expand(B, 1, query_blocks)
        return BlockLists(tokens[:, None, None].expand(B, 1, query_blocks, T).contiguous(), counts.contiguous())


def attend_blocks(
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S E"],
    lists: BlockLists,
    *,
    block_size: tuple[int, int],
    text: TextKeys | None = None,
    scale: float | None = None,
    row_scale: Float[Tensor, "B H nq"] | None = None,
    row_bias: Float[Tensor, "B H nq E"] | None = None,
    transposed: TransposedLists | None = None,
) -> Float[Tensor, "B H S E"]:
    """Softmax attention of visual queries over the listed blocks of visual keys and all valid text.

    The rows of query block n come out as row_scale[n] * out + row_bias[n]. Differentiable in all of them.
    """
    parts = query, key, value, lists.indices, lists.counts
    if text is None or text.key.shape[2] == 0:
        return output_of(sparse_attention(
            *parts, block_size=block_size, scale=scale, row_scale=row_scale, row_bias=row_bias, transposed=transposed
        ))  # fmt: skip
    out, lse = sparse_attention(*parts, block_size=block_size, scale=scale, transposed=transposed, return_lse=True)
    of_text = text.lists(lists.indices.shape[2])
    text_out, text_lse = sparse_attention(
        query, text.key, text.value, of_text.indices, of_text.counts,
        block_size=(block_size[0], 1), scale=scale, return_lse=True,
    )  # fmt: skip
    out, _ = merge_states(out, lse, text_out, text_lse)
    if row_scale is not None:
        out = out * spread(row_scale[..., None], block_size[0], query.shape[2]).to(out.dtype)
    if row_bias is not None:
        out = out + spread(row_bias, block_size[0], query.shape[2]).to(out.dtype)
    return out


def output_of(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The output of an op that was not asked for more."""
    return out if isinstance(out, Tensor) else out[0]


def spread(of_blocks: Float[Tensor, "B H nq E"], block_size: int, tokens: int) -> Float[Tensor, "B H S E"]:
    """What a block has, at each of its tokens."""
    return of_blocks.repeat_interleave(block_size, 2)[:, :, :tokens]


def attend_all(
    query: Float[Tensor, "B H n D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S E"],
    text: TextKeys,
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H n E"]:
    """Dense attention of any queries, such as those of text, over all visual keys and the valid text."""
    keys, values = torch.cat([key, text.key], 2), torch.cat([value, text.value], 2)
    mask = None
    if text.valid is not None:
        mask = F.pad(text.valid, (key.shape[2], 0), value=True)[:, None, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)


def attend_with_lse(
    query: Float[Tensor, "B H n D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S E"],
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H n E"], Float[Tensor, "B H n"]]:
    """Dense attention and the log-sum-exp of its scores, without the map."""
    blocks = -(-query.shape[2] // _ROWS)
    everything = torch.zeros(query.shape[0], 1, blocks, 1, dtype=torch.int32, device=query.device)
    size = (_ROWS, max(key.shape[2], 1))
    out, lse = sparse_attention(query, key, value, everything, block_size=size, scale=scale, return_lse=True)
    return out, lse


def block_sizes(tokens: int, block_size: int, like: Tensor) -> Float[Tensor, "N"]:
    """Tokens of each block: the last may have fewer."""
    starts = torch.arange(0, tokens, block_size, device=like.device)
    return (tokens - starts).clamp(max=block_size).to(torch.promote_types(like.dtype, torch.float32))


def listed_blocks(lists: BlockLists, num_blocks: int) -> Bool[Tensor, "B Hl nq nk"]:
    """The lists as a mask."""
    indices, counts = lists
    held = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # what does not hold goes to a column of its own
    column = torch.where(held, indices, num_blocks).long()
    mask = torch.zeros(*counts.shape, num_blocks + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, column, True)[..., :num_blocks]


def density(lists: BlockLists, num_blocks: int) -> Float[Tensor, ""]:
    """Share of the blocks that are listed."""
    return lists.counts.double().mean() / num_blocks
