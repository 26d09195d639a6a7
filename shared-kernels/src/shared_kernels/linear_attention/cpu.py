"""linear_attention on CPUs: runs of chunks of 64 tokens, all their products in batched matrix products.

A run is a few chunks of one head, or of several heads where sequences are short; what it touches stays in the cache,
and calling torch costs little beside its work. Inside a run no chunk waits for another: the states that enter them are
one small matrix of decay powers times the chunks' own sums. Runs follow one another and hand on the state.

The backward pass is two sweeps. Left to right, d_query is the causal linear attention of (d_out, value, key) with the
state transposed; right to left, d_key and d_value share the gradient of the state. Nothing is kept in between.

Shapes: Z heads in a tile, R chunks in a run, C tokens in a chunk, D key width, E value width.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 64
_RUN = 300_000  # numbers that a run works on, per thread
_MOST = 16  # chunks in a run: what joins them grows with their square
_PIECE = 512  # tokens whose outer products are summed at once where order does not matter


class _Tile(NamedTuple):
    """A few heads of one sequence."""

    batch: int
    heads: slice
    tokens: slice
    sequence: int
    queries: int
    """That the tensor has, N."""

    def rows(self, tensor: Tensor) -> Tensor:
        """(B, H, N, width) -> (Z, n, width)."""
        return tensor[self.batch, self.heads, self.tokens]

    def of_keys(self, *tensors: Tensor) -> list[Tensor]:
        """The same of keys and values, which are as many as the queries or belong to one sequence."""
        alone = self.tokens.start == 0 and self.tokens.stop == self.queries
        return [t[self.batch, self.heads, slice(None) if alone else self.tokens] for t in tensors]


def _tiles(tensor: Tensor, cu_seqlens: Tensor | None, each: Callable[[int], int]) -> Iterator[_Tile]:
    """All heads of all sequences; `each` says how many heads make a tile of a sequence of so many tokens."""
    B, H, N = tensor.shape[:3]
    if cu_seqlens is None:
        spans = [(b, slice(0, N)) for b in range(B)]
    else:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends != sorted(ends) or ends[-1] > N:
            raise ValueError(f"cu_seqlens must rise from 0 to at most the {N} tokens, got {ends}")
        spans = [(0, slice(*pair)) for pair in pairwise(ends)]
    for i, (b, tokens) in enumerate(spans):
        step = max(1, each(tokens.stop - tokens.start))
        for h in range(0, H, step):
            yield _Tile(b, slice(h, min(h + step, H)), tokens, i, N)


class _Run(NamedTuple):
    """Neighbouring chunks of equal size."""

    first: int
    """Number of the first one."""
    start: int
    """Its first token."""
    chunks: int
    size: int

    def of(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """(Z, n, width) -> (Z * R, C, width); a view where memory and dtype allow."""
        return self.view(rows).to(dtype).reshape(-1, self.size, rows.shape[-1])

    def view(self, rows: Tensor) -> Tensor:
        """(Z, n, width) -> (Z, R, C, width)."""
        return rows[:, self.start : self.start + self.chunks * self.size].unflatten(1, (self.chunks, self.size))


def _runs(length: int, size: int, most: int) -> list[_Run]:
    """Whole chunks, at most so many at once, and the rest."""
    whole = length // size
    runs = [_Run(i, i * size, min(most, whole - i), size) for i in range(0, whole, most)]
    return [*runs, _Run(whole, whole * size, 1, length % size)] if length % size else runs


class _Powers(NamedTuple):
    """Powers of the decay that a run of R chunks of C tokens of Z heads needs; exponents are never negative.

    The first dimension is 1 where all heads have the same.
    """

    within: Tensor
    """(Z * R, C, C): token to token, times scale; 0 from later ones."""
    read: Tensor | None
    """(Z * R, C, 1): entering state to token; None if nothing decays."""
    write: Tensor | None
    """(Z * R, C, 1): token to leaving state."""
    across: Tensor
    """(Z, R, R): chunk to the states that enter those it comes before."""
    entering: Tensor
    """(Z, R, 1): the run's entering state to each chunk's."""
    leaving: Tensor
    """(Z, 1, R): each chunk to the run's leaving state."""
    whole: Tensor
    """(Z, 1, 1): the run's entering state to its leaving state."""

    def of(self, heads: slice, chunks: int, *, backwards: bool) -> "_Powers":
        """Those of a tile's heads. Going back, states enter chunks at their end."""
        own = _Powers._make(t if t is None or t.shape[0] == 1 else t[heads] for t in self)
        if own.whole.shape[0] > 1:
            rows = (t.repeat_interleave(chunks, 0) for t in (own.within, own.read, own.write) if t is not None)
            own = own._replace(**dict(zip(("within", "read", "write"), rows, strict=True)))
        if not backwards:
            return own
        across, entering, leaving = own.across.mT.contiguous(), own.entering.flip(1), own.leaving.flip(2)
        return own._replace(across=across, entering=entering, leaving=leaving)


def _powers(log_decay: Tensor | None, like: Tensor, scale: float, run: _Run) -> _Powers:
    """Of all heads, or one for all if nothing decays; `within`, `read` and `write` for one chunk."""
    rate = like.new_zeros(1) if log_decay is None else log_decay

    def power(exponents: Tensor) -> Tensor:
        return torch.exp(rate.view(-1, *[1] * exponents.ndim) * exponents)

    token, chunk = (torch.arange(n, dtype=like.dtype) for n in (run.size, run.chunks))
    age, later = (token[:, None] - token).clamp(min=0), (chunk[:, None] - chunk - 1).clamp(min=0)
    return _Powers(
        within=power(age).tril() * scale,
        read=None if log_decay is None else power(token + 1)[..., None],
        write=None if log_decay is None else power(token.flip(0))[..., None],
        across=power(run.size * later).tril(-1),
        entering=power(run.size * chunk[:, None]),
        leaving=power(run.size * chunk.flip(0)[None]),
        whole=power(like.new_tensor([[float(run.size * run.chunks)]])),
    )


class _Decay:
    """The powers of every kind of run, computed once, and memory that runs use again while it is in the cache."""

    def __init__(self, log_decay: Tensor | None, like: Tensor, scale: float) -> None:
        self.log_decay, self.like, self.scale = log_decay, like, scale
        self.powers: dict[tuple[int, int], _Powers] = {}
        self.of_heads: dict[tuple[int, int, int, int, bool], _Powers] = {}
        self.memory: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def of(self, run: _Run, heads: slice, *, backwards: bool = False) -> _Powers:
        kind = (run.chunks, run.size)
        own = (*kind, heads.start, heads.stop, backwards)
        if own not in self.of_heads:
            if kind not in self.powers:
                self.powers[kind] = _powers(self.log_decay, self.like, self.scale, run)
            self.of_heads[own] = self.powers[kind].of(heads, run.chunks, backwards=backwards)
        return self.of_heads[own]

    def space(self, name: str, *shape: int) -> Tensor:
        """The same memory at each call with this name and shape, whatever is in it."""
        key = (name, shape)
        if key not in self.memory:
            self.memory[key] = self.like.new_empty(shape)
        return self.memory[key]

    def weighted(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """The rows if there are no weights."""
        return rows if weights is None else torch.mul(rows, weights, out=self.space("weighted", *rows.shape))

    def scores(self, a: Tensor, b: Tensor, within: Tensor) -> Tensor:
        """a_t . b_u with t's and u's distance decayed, 0 where u > t: (Z * R, C, C)."""
        return torch.bmm(a, b.mT, out=self.space("scores", *a.shape[:2], b.shape[1])).mul_(within)

    def states(self, key: Tensor, value: Tensor, state: Tensor, powers: _Powers, scale: float = 1.0) -> Tensor:
        """The states that enter the chunks, (Z * R, D, E); `state`, (Z, D, E), is moved over the run.

        Every chunk gives scale * key^T value.
        """
        Z, D, E = state.shape
        R = key.shape[0] // Z
        sums = torch.bmm(key.mT, value, out=self.space("sums", Z * R, D, E)).view(Z, R, D * E)
        if scale != 1:
            sums.mul_(scale)
        total = state.view(Z, 1, D * E)
        entered = torch.mul(powers.entering, total, out=self.space("entered", Z, R, D * E))
        entered.baddbmm_(powers.across.expand(Z, R, R), sums)
        total.mul_(powers.whole).baddbmm_(powers.leaving.expand(Z, 1, R), sums)
        return entered.view(Z * R, D, E)


def _put(rows: Tensor, run: _Run, a: Tensor, b: Tensor, c: Tensor, d: Tensor, scale: float = 1.0) -> None:
    """Write a b + scale c d, (Z * R, C, width), to the run's rows; straight away where memory and dtype allow."""
    target = run.view(rows)
    direct = target.shape[0] == 1 and rows.dtype == a.dtype
    part = torch.bmm(a, b, out=target[0]) if direct else torch.bmm(a, b)
    part.baddbmm_(c, d, alpha=scale)
    if not direct:
        target.copy_(part.view_as(target))


def _sweep(
    tile: _Tile, query: Tensor, key: Tensor, value: Tensor, state: Tensor, decay: _Decay, most: int, out: Tensor
) -> None:
    """Causal outputs of one tile; `state` (Z, D, E) is moved to the end of the sequence."""
    acc, (q, k, v, result) = state.dtype, (tile.rows(t) for t in (query, key, value, out))
    for run in _runs(q.shape[1], _CHUNK, most):
        powers = decay.of(run, tile.heads)
        Q, K, V = (run.of(t, acc) for t in (q, k, v))
        entered = decay.states(decay.weighted(K, powers.write), V, state, powers)
        scores, read = decay.scores(Q, K, powers.within), decay.weighted(Q, powers.read)
        _put(result, run, scores, V, read, entered, decay.scale)


def _sweep_back(
    tile: _Tile,
    inputs: tuple[Tensor, Tensor, Tensor],
    d_out: Tensor,
    d_state: Tensor,
    decay: _Decay,
    most: int,
    d_key: Tensor,
    d_value: Tensor,
) -> None:
    """Gradients of key and value of one tile; `d_state` (Z, D, E) is moved to the beginning of the sequence."""
    acc, (q, k, v, do, dk, dv) = d_state.dtype, (tile.rows(t) for t in (*inputs, d_out, d_key, d_value))
    for run in reversed(_runs(q.shape[1], _CHUNK, most)):
        powers = decay.of(run, tile.heads, backwards=True)
        Q, K, V, dO = (run.of(t, acc) for t in (q, k, v, do))
        left = decay.states(decay.weighted(Q, powers.read), dO, d_state, powers, decay.scale)
        for result, row, other, column, flow in ((dk, dO, V, Q, left.mT), (dv, Q, K, dO, left)):
            scores, written = decay.scores(row, other, powers.within), decay.weighted(other, powers.write)
            _put(result, run, scores.mT, column, written, flow)


def _plan(size: int, numbers: int) -> tuple[Callable[[int], int], int]:
    """Heads that make a tile of a sequence, and chunks in a run, if a chunk of `size` tokens works on so many."""
    most = max(1, min(_MOST, _RUN * torch.get_num_threads() // numbers))
    return lambda tokens: most // max(1, -(-tokens // size)), most


def _plan_causal(query: Tensor, value: Tensor) -> tuple[Callable[[int], int], int]:
    D, E = query.shape[3], value.shape[3]
    return _plan(_CHUNK, _CHUNK * (_CHUNK + 2 * D + 2 * E) + 2 * D * E)


def _begin(initial: Tensor | None, query: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A state for every sequence, (S, H, D, E), at least float32."""
    if initial is not None:
        return initial.clone(memory_format=torch.contiguous_format)
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, query.shape[1], query.shape[3], value.shape[3])
    return query.new_zeros(shape, dtype=torch.promote_types(query.dtype, torch.float32))


def _empty(cu_seqlens: Tensor | None, *like: Tensor) -> list[Tensor]:
    """Contiguous; rows past the last sequence are 0."""
    tensors = [torch.empty(t.shape, dtype=t.dtype) for t in like]
    for t in tensors if cu_seqlens is not None else ():
        t[:, :, int(cu_seqlens[-1]) :].zero_()  # type: ignore[index]
    return tensors


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    state_wanted: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    state = _begin(initial_state, query, value, cu_seqlens)
    (out,) = _empty(cu_seqlens, value)
    decay = _Decay(log_decay, state, scale)
    each, most = _plan_causal(query, value)
    for tile in _tiles(query, cu_seqlens, each):
        _sweep(tile, query, key, value, state[tile.sequence, tile.heads], decay, most, out)
    return out, state


def backward(
    d_out: Tensor,
    d_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    turned = _begin(None if initial_state is None else initial_state.mT, value, query, cu_seqlens)
    flow = _begin(d_state, query, value, cu_seqlens)
    d_query, d_key, d_value = _empty(cu_seqlens, query, key, value)
    decay = _Decay(log_decay, flow, scale)
    each, most = _plan_causal(query, value)
    for tile in _tiles(query, cu_seqlens, each):
        own = (tile.sequence, tile.heads)
        _sweep(tile, d_out, value, key, turned[own], decay, most, d_query)
        _sweep_back(tile, (query, key, value), d_out, flow[own], decay, most, d_key, d_value)
    return d_query, d_key, d_value, flow


class _Sets:
    """Which blocks of keys which blocks of queries see: by a mask, or all by all."""

    def __init__(self, tile: _Tile, mask: Tensor | None, block_q: int, block_k: int, dtype: torch.dtype) -> None:
        self.mask = None if mask is None else mask[tile.batch, tile.heads].to(dtype)
        self.block_q, self.block_k = (_PIECE, _PIECE) if mask is None else (block_q, block_k)

    def seen(self, of_keys: Tensor) -> Tensor:
        """Sums of what key blocks have, for each query block: (Z, blocks_k, ...) -> (Z, blocks_q or 1, ...)."""
        return self._sum(of_keys, self.mask)

    def seeing(self, of_queries: Tensor) -> Tensor:
        """The transpose: sums over the query blocks that see it, for each key block."""
        return self._sum(of_queries, None if self.mask is None else self.mask.mT)

    def _sum(self, parts: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return parts.sum(1, keepdim=True)
        return torch.bmm(mask, parts.flatten(2)).unflatten(2, parts.shape[2:])


def _pooled(key: Tensor, value: Tensor, size: int, most: int, dtype: torch.dtype) -> Tensor:
    """key^T value of every block of `size` tokens: (Z, n, D), (Z, n, E) -> (Z, blocks, D, E)."""
    Z, n, D = key.shape
    pooled = torch.empty(Z, -(-n // size), D, value.shape[2], dtype=dtype)
    for run in _runs(n, size, most):
        products = torch.bmm(run.of(key, dtype).mT, run.of(value, dtype))
        pooled[:, run.first : run.first + run.chunks] = products.unflatten(0, (Z, run.chunks))
    return pooled


def _of_blocks(states: Tensor, run: _Run) -> Tensor:
    """The states of a run's blocks, or the only one there is for each: (Z, R, D, E)."""
    some = states if states.shape[1] == 1 else states[:, run.first : run.first + run.chunks]
    return some.expand(-1, run.chunks, -1, -1)


def _applied(
    rows: Tensor,
    states: Tensor,
    size: int,
    most: int,
    out: Tensor,
    times: Tensor | None = None,
    plus: tuple[Tensor, Tensor] | None = None,
) -> None:
    """out = times * rows . state of the block of `size` tokens + plus, the product of a column and a row per block.

    Shapes: rows (Z, n, D), states (Z, blocks or 1, D, E), times (Z, n, 1), plus (Z, n, 1) and (Z, blocks or 1, 1, E).
    """
    for run in _runs(rows.shape[1], size, most):
        target = run.view(out)
        some = _of_blocks(states, run).reshape(-1, *states.shape[2:])
        part = torch.bmm(run.of(rows, states.dtype), some).view_as(target)
        if times is not None:
            part.mul_(run.view(times))
        if plus is not None:
            part.addcmul_(run.view(plus[0]), _of_blocks(plus[1], run))
        target.copy_(part)


def _summed(rows: Tensor, weight: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
    """Sums over blocks of tokens, weighted by (Z, n, 1): (Z, n, D) -> (Z, blocks, D, 1)."""
    ones = torch.ones((), dtype=dtype).expand(*rows.shape[:2], 1) if weight is None else weight
    return _pooled(rows, ones, size, 1 + rows.shape[1] // size, dtype)


def _plan_full(query: Tensor, value: Tensor, size: int) -> tuple[Callable[[int], int], int]:
    D, E = query.shape[3], value.shape[3]
    return _plan(size, size * (2 * D + 2 * E) + 2 * D * E)


def full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    block_mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    normalizer: str,
    eps: float,
    state_wanted: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    state = _begin(initial_state, query, value, cu_seqlens)
    acc, normalised = state.dtype, normalizer != "none"
    (out,) = _empty(cu_seqlens, query.new_empty(()).expand(*query.shape[:3], value.shape[3]))
    divisor = state.new_zeros(query.shape[:3] if normalised else (0,))
    each, most = _plan_full(query, value, _PIECE if block_mask is None else max(block_q, block_k))
    for tile in _tiles(query, cu_seqlens, each):
        q, (k, v) = tile.rows(query), tile.of_keys(key, value)
        sets = _Sets(tile, block_mask, block_q, block_k, acc)
        seen = sets.seen(_pooled(k, v, sets.block_k, most, acc))
        if block_mask is None:
            seen = state[tile.sequence, tile.heads].add_(seen[:, 0])[:, None]
        times = state.new_tensor(scale).expand(*q.shape[:2], 1)
        if normalised:
            own = tile.rows(divisor[..., None])
            _applied(q, sets.seen(_summed(k, None, sets.block_k, acc)), sets.block_q, most, own)
            own.add_(eps) if normalizer == "sum" else own.clamp_(min=eps)
            times = times / own
        _applied(q, seen, sets.block_q, most, tile.rows(out), times)
    return out, state if block_mask is None else state.new_empty(0), divisor


def full_backward(
    d_out: Tensor,
    d_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    state: Tensor,
    divisor: Tensor,
    cu_seqlens: Tensor | None,
    block_mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    normalizer: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every query, with w = scale / divisor and t = -(d_out . out) / divisor, 0 where the divisor is clamped:

    d_query = w d_out state^T + t sum^T; from it d_state = query^T (w d_out) and d_sum = query^T t, which sets of blocks
    hand to their keys: d_key = value d_state^T + d_sum^T, d_value = key d_state.
    """
    acc, flow = divisor.dtype, _begin(d_state, query, value, cu_seqlens)
    d_query, d_key, d_value = _empty(cu_seqlens, query, key, value)
    each, most = _plan_full(query, value, _PIECE if block_mask is None else max(block_q, block_k))
    for tile in _tiles(query, cu_seqlens, each):
        q, do, (k, v) = tile.rows(query), tile.rows(d_out).to(acc), tile.of_keys(key, value)
        sets = _Sets(tile, block_mask, block_q, block_k, acc)
        own, sums = (tile.sequence, tile.heads), None
        if out is not None:
            by, pull = tile.rows(divisor[..., None]), (do * tile.rows(out)).sum(-1, keepdim=True)
            pull.div_(by).neg_()
            if normalizer == "clamp":
                pull.masked_fill_(by <= eps, 0.0)
            total, d_total = _summed(k, None, sets.block_k, acc), _summed(q, pull, sets.block_q, acc)
            sums = (pull, sets.seen(total).mT), (by.new_ones(()).expand(*k.shape[:2], 1), sets.seeing(d_total).mT)
            do = do / by
        do = do * scale
        d_states = sets.seeing(_pooled(q, do, sets.block_q, most, acc))
        if block_mask is None:
            states, d_states = state[own][:, None], flow[own].add_(d_states[:, 0])[:, None]
        else:
            states = sets.seen(_pooled(k, v, sets.block_k, most, acc))
        _applied(do, states.mT, sets.block_q, most, tile.rows(d_query), None, sums and sums[0])
        dk, dv = tile.of_keys(d_key, d_value)
        _applied(v, d_states.mT, sets.block_k, most, dk, None, sums and sums[1])
        _applied(k, d_states, sets.block_k, most, dv)
    return d_query, d_key, d_value, flow if block_mask is None else state.new_empty(0)


def step(query: Tensor, key: Tensor, value: Tensor, state: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    q, k, v = (t.to(state.dtype) for t in (query, key, value))
    k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
    if log_decay is not None:
        state.mul_(torch.exp(log_decay)[:, None, None])
    state.addcmul_(k[..., None], v[..., None, :])
    return torch.matmul((q * scale)[..., None, :], state)[..., 0, :].to(query.dtype)
