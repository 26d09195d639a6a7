"""l1_attention on CPUs: all keys of a few rows per tile, so that both stages happen in the tile, in place.

One product gives the scores of a tile, and sums, largest excess and powers are known before the next; softmax's trick
of going on with a running maximum is not needed. Whole powers are products: x^15 is five of them.
"""

import math

import torch
from torch import Tensor

from shared_kernels._score_tiles import ScoreTiles, Tile

_LOG2E, _LN2 = math.log2(math.e), math.log(2)


class _Rows:
    """What does not change from tile to tile: scaled scores, values, and the constants of rows."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor | None,
        key_mask: Tensor | None,
        n_keys: Tensor,
        log_d: float,
    ) -> None:
        heads = query.shape[0] * query.shape[1]
        wide = n_keys.dtype
        count = n_keys[:, None].expand(query.shape[:3]).reshape(heads, -1)
        self.count, self.factor = count, log_d * count.clamp_min(1).log()
        scaled = query.to(torch.float64) * self.factor.view(*query.shape[:3], 1)
        self.tiles = ScoreTiles(scaled.to(wide), key.to(wide), factor=_LOG2E, bounds=bounds, key_mask=key_mask)
        if key_mask is not None:
            value = value.masked_fill(~key_mask[:, None, :, None], 0)
        self.value = value.to(wide).reshape(-1, *value.shape[2:])
        self.threshold = (count > 3).to(wide)

    def value_of(self, tile: Tile) -> Tensor:
        return self.tiles.of_heads(self.value, tile.heads)[:, tile.keys]

    def softplus(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Scores to base 2 into softplus of natural ones, in place; returns the sums of rows, and 1 over them or 0."""
        total = tile.scores.exp2_().log1p_().sum(-1)
        return total, total.reciprocal().masked_fill_(total == 0, 0)

    def excess(self, tile: Tile, inverse: Tensor) -> "_Excess":
        """Softplus into the excess over the row's mean relative to its largest, 0 to 1, in place."""
        s, at = tile.scores, (tile.heads, tile.rows)
        share, threshold = self.count[at] * inverse, self.threshold[at]
        largest = s.amax(-1) if s.shape[2] else torch.zeros_like(inverse)
        top = (largest * share).sub_(threshold).clamp_min_(0)
        flat = top <= 64 * torch.finfo(s.dtype).eps
        kept = s[flat] * inverse[flat][:, None] if bool(flat.any()) else None
        safe = top.masked_fill(flat, 1)
        s.mul_((share / safe)[..., None]).sub_((threshold / safe)[..., None]).clamp_min_(0)
        return _Excess(top, flat, kept)


class _Excess:
    """The largest excess of each row (z, r), which rows have none but by rounding, and those rows' first weights."""

    def __init__(self, top: Tensor, flat: Tensor, kept: Tensor | None) -> None:
        self.top, self.flat, self.kept = top, flat, kept


def _to_power(x: Tensor, power: float, spare: Tensor) -> Tensor:
    """x^power of numbers from 0 to 1, in x or in spare, whichever is returned; overwrites both."""
    whole = int(power)
    if whole != power or not 1 <= whole <= 64:
        return x.log2_().mul_(power).exp2_()
    if whole > 3 and whole % 3 == 0:
        torch.mul(x, x, out=spare).mul_(x)
        return _to_power(spare, whole // 3, x)
    if whole == 1:
        return x
    spare.copy_(x)
    for bit in f"{whole:b}"[1:]:
        spare.mul_(spare)
        if bit == "1":
            spare.mul_(x)
    return spare


def _lower_power(x: Tensor, power: float, spare: Tensor, other: Tensor) -> Tensor:
    """x^(power - 1) of numbers from 0 to 1, and 0 where x is 0; x stays, `spare` and `other` are overwritten.

    The result is `other`.
    """
    if power == 1:
        return torch.gt(x, 0, out=other)
    result = _to_power(other.copy_(x), power - 1, spare)
    return result if result is other else other.copy_(result)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    key_mask: Tensor | None,
    n_keys: Tensor,
    log_d: float,
    power: float | None,
) -> tuple[Tensor, Tensor]:
    shape, E = query.shape[:3], value.shape[3]
    if query.numel() == 0 or key.numel() == 0:
        return query.new_zeros(*shape, E), n_keys.new_zeros(3, *shape)
    rows = _Rows(query, key, value, bounds, key_mask, n_keys, log_d)
    out = query.new_empty(shape[0] * shape[1], shape[2], E)
    state = n_keys.new_zeros(3, *out.shape[:2])
    spare = torch.empty_like(rows.tiles.buffer if power is not None else rows.tiles.buffer[:0])
    for tile in rows.tiles:
        at = tile.heads, tile.rows
        total, inverse = rows.softplus(tile)
        state[0][at] = total
        weights = tile.scores
        if power is not None:
            excess = rows.excess(tile, inverse)
            weights = _to_power(weights, power, spare[: weights.numel()].view(weights.shape))
            total = weights.sum(-1)
            state[1][at], state[2][at] = excess.top, total
            inverse = total.reciprocal().masked_fill_(total == 0, 0)
            if excess.kept is not None:
                weights[excess.flat], inverse[excess.flat] = excess.kept, 1
        out[at] = torch.bmm(weights, rows.value_of(tile)).mul_(inverse[..., None])
    return out.view(*shape, E), state.view(3, *shape)


class _Gradients:
    """d query, d key and d value, summed over tiles."""

    def __init__(self, rows: _Rows, like: tuple[Tensor, Tensor, Tensor]) -> None:
        self.rows, self.like = rows, like
        tiles = rows.tiles
        self.d_query, self.d_key = tiles.query.new_zeros(tiles.query.shape), tiles.key.new_zeros(tiles.key.shape)
        self.d_value = rows.value.new_zeros(rows.value.shape)

    def add_value(self, tile: Tile, weights: Tensor, d_out: Tensor) -> None:
        self.rows.tiles.add_to_keys(self.d_value, tile, weights, d_out)

    def add_scores(self, tile: Tile, d_scores: Tensor) -> None:
        at = tile.heads, tile.rows
        self.d_query[at] = torch.bmm(d_scores, tile.key).mul_(self.rows.factor[at][..., None])
        self.rows.tiles.add_to_keys(self.d_key, tile, d_scores, tile.query * _LN2)  # scaled already

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.like
        made = ((self.d_query, query), (self.d_key, key), (self.d_value, value))
        return tuple(t.view(like.shape).to(like.dtype) for t, like in made)  # type: ignore[return-value]


def backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,  # noqa: ARG001 - known anew once the scores of a tile are
    bounds: Tensor | None,
    key_mask: Tensor | None,
    n_keys: Tensor,
    log_d: float,
    power: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """With d w_ij = d_out_i . v_j, D_i its mean by weight and t_ij = w_ij / u_ij:

    d a_ij = N_i power t_ij (d w_ij - D_i), and d s_ij = (d a_ij - sum_k d a_ik a_ik) / sum_k s_ik, so that keys below
    the mean get a gradient too.
    """
    if query.numel() == 0 or key.numel() == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    rows = _Rows(query, key, value, bounds, key_mask, n_keys, log_d)
    wide = n_keys.dtype
    d_out = d_out.to(wide).flatten(0, 1)
    gradients = _Gradients(rows, (query, key, value))
    spares = [torch.empty_like(rows.tiles.buffer) for _ in range(2 if power is None else 3)]
    for tile in rows.tiles:
        at, shape = (tile.heads, tile.rows), tile.scores.shape
        slope, flow, *others = (spare[: tile.scores.numel()].view(shape) for spare in spares)
        # of softplus, from the same power of e; 0 where the key is not seen
        torch.exp2(tile.scores, out=slope)
        torch.add(slope, 1, out=flow)
        slope.div_(flow)
        _, inverse = rows.softplus(tile)
        if power is None:
            gradients.add_value(tile, tile.scores, d_out[at] * inverse[..., None])
            _differences(rows, tile, inverse, d_out[at], flow).mul_(inverse[..., None])
        else:
            _reweighted(rows, tile, inverse, power, d_out[at], gradients, flow, others[0])
        gradients.add_scores(tile, flow.mul_(slope))
    return gradients.result()


def _differences(rows: _Rows, tile: Tile, normal: Tensor, d_out: Tensor, out: Tensor) -> Tensor:
    """d w_ij - D_i; the tile holds weights up to their row's factor `normal`, and is overwritten."""
    torch.bmm(d_out, rows.value_of(tile).mT, out=out)
    # not d_out . out, of which the output was rounded to its dtype
    return out.sub_(tile.scores.mul_(out).sum(-1).mul_(normal)[..., None])


def _reweighted(
    rows: _Rows,
    tile: Tile,
    inverse: Tensor,
    power: float,
    d_out: Tensor,
    gradients: _Gradients,
    flow: Tensor,
    spare: Tensor,
) -> None:
    """d softplus of a tile into `flow`, and its d value; the tile holds softplus, `inverse` is 1 over its sums."""
    at = tile.heads, tile.rows
    excess = rows.excess(tile, inverse)
    lower = _lower_power(tile.scores, power, flow, spare)
    weights = tile.scores.mul_(lower)
    total = weights.sum(-1)
    normal = total.reciprocal().masked_fill_(total == 0, 0)
    if excess.kept is not None:
        weights[excess.flat], normal[excess.flat] = excess.kept, 1
    gradients.add_value(tile, weights, d_out * normal[..., None])
    slope = power * normal / excess.top.masked_fill(excess.flat, 1)
    differences = _differences(rows, tile, normal, d_out, flow)
    kept = differences[excess.flat] if excess.kept is not None else None
    torch.mul(differences, lower, out=flow)
    mean = flow.sum(-1).mul_(slope).mul_(rows.threshold[at])
    flow.mul_((rows.count[at] * slope * inverse)[..., None]).sub_((mean * inverse)[..., None])
    if kept is not None:
        flow[excess.flat] = kept * inverse[excess.flat][:, None]
