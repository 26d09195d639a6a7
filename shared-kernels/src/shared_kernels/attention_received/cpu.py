"""attention_received and attention_given on CPUs: all keys of a few rows per tile, so that one pass does.

The sums of a tile's rows are known as soon as its scores are, so no pass over the keys finds them first. Everything
else happens in place, in the tile and at most one more buffer of its size.
"""

import math

import torch
from torch import Tensor

from shared_kernels._score_tiles import HIDDEN, ScoreTiles, Tile, shift

_LOG2E, _LN2 = math.log2(math.e), math.log(2)
_TILE = 1 << 20  # scores; larger than where more happens to each of them
_SUMMED = 64  # rows that are summed in float32


def _tiles(query: Tensor, key: Tensor, bounds: Tensor | None, key_mask: Tensor | None, scale: float) -> ScoreTiles:
    return ScoreTiles(query, key, factor=scale * _LOG2E, bounds=bounds, key_mask=key_mask, size=_TILE)


def _weigh(tile: Tile, tiles: ScoreTiles, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Turns the scores of a tile, in place, into 2^(score - top).

    Returns what rows must be multiplied by to be probabilities, and their sums and tops. Without an LSE, probabilities
    sum to 1. To subtract an LSE from scores would round every one of them, as the sum of a row is not rounded.
    """
    top = shift(tile.scores, tiles.small)
    total = tile.scores.exp2_().sum(-1)
    if lse is None:
        return total.reciprocal().masked_fill_(total == 0, 0), total, top
    return torch.exp(top * _LN2 - lse[tile.heads, tile.rows]).masked_fill_(total == 0, 0), total, top


def forward(
    query: Tensor,
    key: Tensor,
    bounds: Tensor | None,
    key_mask: Tensor | None,
    row_weights: Tensor | None,
    lse: Tensor | None,
    first: int,
    last: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tiles = _tiles(query, key, bounds, key_mask, scale)
    heads, shape = query.shape[0] * query.shape[1], query.shape[:3]
    received = torch.zeros(heads, tiles.N, dtype=torch.float64)
    weights = None if row_weights is None else row_weights.flatten(0, 1)
    given = None if lse is None else lse.flatten(0, 1)
    found = tiles.query.new_empty((heads, shape[2]) if lse is None else (0,))
    for tile in tiles:
        share, total, top = _weigh(tile, tiles, given)
        if given is None:
            found[tile.heads, tile.rows] = torch.log2(total).add_(top).mul_(_LN2)
        if weights is not None:
            share = share * weights[tile.heads, tile.rows]
        _add_columns(received, tile, share)
    received = received.view(*shape[:2], tiles.N)[..., first:last].to(tiles.query.dtype).contiguous()
    return received, found.view(shape) if lse is None else found


def _add_columns(received: Tensor, tile: Tile, share: Tensor) -> None:
    """received (float64) += the sums of the tile's columns, its rows multiplied by their share."""
    if tile.scores.shape[0] > 1:
        received[tile.heads, tile.keys] += tile.scores.mul_(share[..., None]).sum(1)
        return
    target = received[tile.heads.start, tile.keys]
    # torch.mv sums row after row, so that errors grow with their number
    for rows, shares in zip(tile.scores[0].split(_SUMMED), share[0].split(_SUMMED), strict=True):
        target += torch.mv(rows.T, shares)


class _Gradients:
    """d query and d key, summed over tiles from the gradients of scores."""

    def __init__(self, tiles: ScoreTiles, query: Tensor, key: Tensor, scale: float) -> None:
        self.tiles, self.like, self.scale = tiles, (query, key), scale
        self.d_query, self.d_key = tiles.query.new_zeros(tiles.query.shape), tiles.key.new_zeros(tiles.key.shape)

    def add(self, tile: Tile, d_scores: Tensor, row_weights: Tensor) -> None:
        """`row_weights` (z, r) multiply d_scores."""
        weights = row_weights[..., None]
        self.d_query[tile.heads, tile.rows] = torch.bmm(d_scores, tile.key).mul_(weights * self.scale)
        # the query of a tile is scaled already
        self.tiles.add_to_keys(self.d_key, tile, d_scores, tile.query * (weights * _LN2))

    def result(self) -> tuple[Tensor, Tensor]:
        query, key = self.like
        return self.d_query.view(query.shape).to(query.dtype), self.d_key.view(key.shape).to(key.dtype)


def backward(
    d_received: Tensor,
    query: Tensor,
    key: Tensor,
    bounds: Tensor | None,
    key_mask: Tensor | None,
    row_weights: Tensor | None,
    lse: Tensor,
    first: int,
    last: int,
    scale: float,
    normalised: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _tiles(query, key, bounds, key_mask, scale)
    heads = query.shape[0] * query.shape[1]
    d_keys = tiles.query.new_zeros(heads, tiles.N)
    d_keys[:, first:last] = d_received.flatten(0, 1)
    weights = None if row_weights is None else row_weights.flatten(0, 1)
    given = None if normalised else lse.flatten(0, 1)
    paid = tiles.query.new_zeros(heads, query.shape[2])
    gradients, buffer = _Gradients(tiles, query, key, scale), torch.empty_like(tiles.buffer)
    for tile in tiles:
        share, _, _ = _weigh(tile, tiles, given)
        d_scores = buffer[: tile.scores.numel()].view(tile.scores.shape)
        torch.mul(tile.scores, d_keys[tile.heads, None, tile.keys], out=d_scores)
        spent = d_scores.sum(-1).mul_(share)
        paid[tile.heads, tile.rows] = spent
        if normalised:
            d_scores.addcmul_(tile.scores, spent[..., None], value=-1)
        gradients.add(tile, d_scores, share if weights is None else share * weights[tile.heads, tile.rows])
    return *gradients.result(), paid.view(query.shape[:3])


def given(
    query: Tensor,
    key: Tensor,
    bounds: Tensor | None,
    key_mask: Tensor | None,
    labels: Tensor | None,
    num_groups: int,
    entropy: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _tiles(query, key, bounds, key_mask, scale)
    heads, shape = query.shape[0] * query.shape[1], query.shape[:3]
    lse = tiles.query.new_empty(heads, shape[2])
    entropies = torch.empty_like(lse) if entropy else lse.new_empty(0)
    mass = lse.new_empty(*lse.shape, num_groups)
    members = _members(labels, num_groups, tiles)
    for tile in tiles:
        at = tile.heads, tile.rows
        top = shift(tile.scores, tiles.small and not entropy)
        shifted = tile.scores.clone() if entropy else None
        total = tile.scores.exp2_().sum(-1)
        if shifted is not None:
            spread = torch.log2(total) - shifted.mul_(tile.scores).sum(-1) / total
            entropies[at] = spread.mul_(_LN2).masked_fill_(total == 0, 0)
        if members is not None:
            sums = torch.bmm(tile.scores, _of_tile(members, tile, shape[1]))
            mass[at] = sums.div_(total[..., None]).masked_fill_((total == 0)[..., None], 0)
        lse[at] = torch.log2(total).add_(top).mul_(_LN2)
    return lse.view(shape), entropies.view(shape if entropy else 0), mass.view(*shape, num_groups)


def _members(labels: Tensor | None, num_groups: int, tiles: ScoreTiles) -> Tensor | None:
    """Which keys belong to which group, (B, N, G) of ones and zeros."""
    if labels is None:
        return None
    return (labels[..., None] == torch.arange(num_groups)).to(tiles.query.dtype)


def _of_tile(members: Tensor, tile: Tile, H: int) -> Tensor:
    return members[torch.arange(tile.heads.start, tile.heads.stop) // H, tile.keys]


def given_backward(
    d_scores: Tensor,
    d_entropy: Tensor | None,
    d_mass: Tensor,
    query: Tensor,
    key: Tensor,
    bounds: Tensor | None,
    key_mask: Tensor | None,
    labels: Tensor | None,
    lse: Tensor,  # noqa: ARG001 - sums of rows are at hand here, and not rounded by a logarithm
    entropy: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tiles = _tiles(query, key, bounds, key_mask, scale)
    constant, d_mass = d_scores.flatten(0, 1), d_mass.flatten(0, 1)
    if d_entropy is not None:
        entropy, d_entropy = entropy.flatten(0, 1), d_entropy.flatten(0, 1)
    members = _members(labels, d_mass.shape[-1], tiles)
    gradients, buffer = _Gradients(tiles, query, key, scale), torch.empty_like(tiles.buffer)
    for tile in tiles:
        at = tile.heads, tile.rows
        flow, offset = buffer[: tile.scores.numel()].view(tile.scores.shape), constant[at]
        shift(tile.scores, tiles.small and d_entropy is None)
        if d_entropy is None:
            flow.zero_()
        else:
            torch.mul(tile.scores, d_entropy[at][..., None], out=flow).mul_(-_LN2)
        total = tile.scores.exp2_().sum(-1)
        if d_entropy is not None:  # ln P + entropy, of which the first summand is left
            offset = offset - d_entropy[at] * (entropy[at] - total.log()).masked_fill_(total == 0, 0)
        if members is not None:
            flow.baddbmm_(d_mass[at], _of_tile(members, tile, query.shape[1]).mT)
        flow.add_(offset[..., None]).mul_(tile.scores)
        gradients.add(tile, flow, total.reciprocal().masked_fill_(total == 0, 0))
    return gradients.result()


def argmax(query: Tensor, key: Tensor, bounds: Tensor | None, key_mask: Tensor | None) -> Tensor:
    tiles = ScoreTiles(query, key, factor=1.0, bounds=bounds, key_mask=key_mask)
    places = torch.full((query.shape[0] * query.shape[1], query.shape[2]), -1)
    for tile in tiles:
        if tile.scores.shape[2] > 0:
            top, place = tile.scores.max(-1)
            places[tile.heads, tile.rows] = place.add_(tile.keys.start).masked_fill_(top < HIDDEN / 2, -1)
    return places.view(query.shape[:3])
