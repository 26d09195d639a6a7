"""linear_attention on GPUs: one kernel for every causal pass, one for sums already made, one for their scan.

`sweep`: one program per head and tile of E, one chunk of tokens after another, the state in registers. All gradients
are causal linear attention of other tensors in other order, so the same kernel gives them:

    d_query = sweep(d_out, value, key)          from the initial state, transposed
    d_key   = sweep back(value, d_out, query)   from the gradient of the final state, transposed
    d_value = sweep back(key, query, d_out)     from the gradient of the final state; ends in that of the initial one

Where heads are few, sequences are cut into segments, for three phases: the sums of every segment, their scan, and all
segments at once from the states that enter them. Without order the sweep only sums, and `apply` multiplies rows by the
sums of their sequence or block. Packed sequences and blocks of a mask are segments too.

Products are of the inputs' dtype, sums float32. A state that is handed out is float32 to the last bits; the one that
stays inside is multiplied as the inputs are. No atomics: results do not depend on the order of programs.
"""

# mypy: disable-error-code=no-untyped-def
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared_kernels._tiles import dot_precision, load_tile, no_float64, store_tile, strided_rows, target, width

_ENOUGH = 264  # programs that keep a GPU busy: two for each multiprocessor of the largest
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _segment(bounds, segment, per_batch, length, N, PACKED: tl.constexpr):
    """Batch, number of the state, first token, and token past the last of a segment."""
    if PACKED:
        at = bounds + segment.to(tl.int64) * 3
        return segment * 0, tl.load(at + 2), tl.load(at), tl.load(at + 1)
    index = segment % per_batch
    start = index * length
    return segment // per_batch, index, start, tl.minimum(start + length, N)


@triton.jit
def linear_attention_kernel_sweep(
    query, key, value, log_decay, initial, bounds, out, final,
    H, N, D, E, per_batch, length, scale,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_is, stride_ih, stride_id, stride_ie, stride_ob, stride_oh, stride_on, stride_f,
    DECAY: tl.constexpr, INITIAL: tl.constexpr, OUTPUT: tl.constexpr, FINAL: tl.constexpr, REVERSE: tl.constexpr,
    ADD: tl.constexpr, WEIGHTED: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(E, BLOCK_E)
    program = tl.program_id(0)
    head, segment = program // tiles % H, program // tiles // H
    batch, _, start, stop = _segment(bounds, segment, per_batch, length, N, PACKED)
    b, h, s = batch.to(tl.int64), head.to(tl.int64), segment.to(tl.int64)
    i, d, e = tl.arange(0, CHUNK), tl.arange(0, BLOCK_D), program % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = (d < D)[:, None] & (e < E)[None, :]
    state = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    if INITIAL:
        at = initial + s * stride_is + h * stride_ih
        state = tl.load(at + d[:, None] * stride_id + e[None, :] * stride_ie, mask=inside, other=0.0).to(tl.float32)
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + head) * _LOG2E
    age = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]
    within = tl.where(age >= 0, tl.exp2(rate * tl.maximum(age, 0).to(tl.float32)), 0.0) * scale
    chunks = tl.cdiv(stop - start, CHUNK)
    for c in range(chunks):
        first = start + (chunks - 1 - c if REVERSE else c) * CHUNK
        rows, size = first + i, tl.minimum(CHUNK, stop - first)
        K = load_tile(key + b * stride_kb + h * stride_kh, rows, d, stride_kn, stop, D).to(tl.float32)
        V = load_tile(value + b * stride_vb + h * stride_vh, rows, e, stride_vn, stop, E).to(tl.float32)
        since, until = i + 1, tl.maximum(size - 1 - i, 0)  # rows past the end count nothing, and must not overflow
        if OUTPUT:
            Q = load_tile(query + b * stride_qb + h * stride_qh, rows, d, stride_qn, stop, D).to(DOT)
            scores = tl.dot(Q, tl.trans(K.to(DOT)), input_precision=PRECISION) * within
            read = tl.exp2(rate * (until if REVERSE else since).to(tl.float32)) * (1.0 if REVERSE else scale)
            part = tl.dot(Q, state.to(DOT), input_precision=PRECISION) * read[:, None]
            part += tl.dot(scores.to(DOT), V.to(DOT), input_precision=PRECISION)
            result = out + b * stride_ob + h * stride_oh
            if ADD:
                part += load_tile(result, rows, e, stride_on, stop, E)
            store_tile(result, part, rows, e, stride_on, stop, E)
        if WEIGHTED:
            write = tl.exp2(rate * (since if REVERSE else until).to(tl.float32)) * (scale if REVERSE else 1.0)
            K = K * write[:, None]
        state = state * tl.exp2(rate * size.to(tl.float32))
        if WEIGHTED and EXACT:
            state += tl.dot(tl.trans(K), V, input_precision=WIDE)
        else:
            state += tl.dot(tl.trans(K.to(DOT)), V.to(DOT), input_precision=PRECISION)
    if FINAL:
        at = final + (s * H + h) * stride_f
        tl.store(at + d[:, None] * E + e[None, :], state, mask=inside)


@triton.jit
def linear_attention_kernel_scan(
    sums, initial, log_decay, bounds, firsts, entering, final, H, N, size, per_batch, length, stride_is, stride_ih,
    DECAY: tl.constexpr, INITIAL: tl.constexpr, ENTERING: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence, head and part of the state, which is `size` numbers in a row."""
    parts = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    head, sequence = program // parts % H, program // parts // H
    h, numbers = head.to(tl.int64), program % parts * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < size
    first, last = sequence * per_batch, (sequence + 1) * per_batch
    if PACKED:
        first, last = tl.load(firsts + sequence), tl.load(firsts + sequence + 1)
    state = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        begin = initial + sequence.to(tl.int64) * stride_is + h * stride_ih
        state = tl.load(begin + numbers, mask=inside, other=0.0).to(tl.float32)
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + head) * _LOG2E
    for n in range(last - first):
        segment = last - 1 - n if REVERSE else first + n
        _, _, start, stop = _segment(bounds, segment, per_batch, length, N, PACKED)
        at = (segment.to(tl.int64) * H + h) * size + numbers
        if ENTERING:
            tl.store(entering + at, state, mask=inside)
        state = state * tl.exp2(rate * (stop - start).to(tl.float32)) + tl.load(sums + at, mask=inside, other=0.0)
    tl.store(final + (sequence.to(tl.int64) * H + h) * size + numbers, state, mask=inside)


@triton.jit
def linear_attention_kernel_apply(
    rows_of, states, times, left, right, bounds, out,
    H, N, D, E, per_batch, length, scale,
    stride_rb, stride_rh, stride_rn, stride_sb, stride_si, stride_sh, stride_sd, stride_se,
    stride_tb, stride_th, stride_lb, stride_lh, stride_pb, stride_pi, stride_ph, stride_ob, stride_oh, stride_on,
    ADD: tl.constexpr, TIMES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """scale * times * rows . state + left * right for the rows of one segment and a tile of E."""
    tiles = tl.cdiv(E, BLOCK_E)
    program = tl.program_id(0)
    head, segment = program // tiles % H, program // tiles // H
    batch, index, start, stop = _segment(bounds, segment, per_batch, length, N, PACKED)
    b, h, s = batch.to(tl.int64), head.to(tl.int64), index.to(tl.int64)
    i, d, e = tl.arange(0, CHUNK), tl.arange(0, BLOCK_D), program % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = (d < D)[:, None] & (e < E)[None, :]
    at = states + b * stride_sb + s * stride_si + h * stride_sh
    state = tl.load(at + d[:, None] * stride_sd + e[None, :] * stride_se, mask=inside, other=0.0).to(DOT)
    if RIGHT:
        plus = tl.load(right + b * stride_pb + s * stride_pi + h * stride_ph + e, mask=e < E, other=0.0)
    for first in range(start, stop, CHUNK):
        rows = first + i
        R = load_tile(rows_of + b * stride_rb + h * stride_rh, rows, d, stride_rn, stop, D).to(tl.float32)
        part = tl.dot(R.to(DOT), state, input_precision=PRECISION) * scale
        if TIMES:
            part *= tl.load(times + b * stride_tb + h * stride_th + rows, mask=rows < stop, other=0.0)[:, None]
        if RIGHT:
            if LEFT:
                by = tl.load(left + b * stride_lb + h * stride_lh + rows, mask=rows < stop, other=0.0)
                part += by[:, None] * plus[None, :]
            else:
                part += plus[None, :]
        result = out + b * stride_ob + h * stride_oh
        if ADD:
            part += load_tile(result, rows, e, stride_on, stop, E)
        store_tile(result, part, rows, e, stride_on, stop, E)


@triton.jit
def linear_attention_kernel_step(
    query, key, value, state, log_decay, out, H, GROUP, D, E, scale,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kd, stride_vb, stride_vh, stride_ve,
    stride_sb, stride_sh, stride_sd,
    DECAY: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One token of one head and a tile of E, the state read and written once."""
    tiles = tl.cdiv(E, BLOCK_E)
    program = tl.program_id(0)
    head, b = program // tiles % H, (program // tiles // H).to(tl.int64)
    h, kv_head = head.to(tl.int64), (head // GROUP).to(tl.int64)
    d, e = tl.arange(0, BLOCK_D), program % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = (d < D)[:, None] & (e < E)[None, :]
    at = state + b * stride_sb + h * stride_sh + d[:, None] * stride_sd + e[None, :]
    q = tl.load(query + b * stride_qb + h * stride_qh + d * stride_qd, mask=d < D, other=0.0).to(tl.float32)
    k = tl.load(key + b * stride_kb + kv_head * stride_kh + d * stride_kd, mask=d < D, other=0.0).to(tl.float32)
    v = tl.load(value + b * stride_vb + kv_head * stride_vh + e * stride_ve, mask=e < E, other=0.0).to(tl.float32)
    S = tl.load(at, mask=inside, other=0.0)
    if DECAY:
        S *= tl.exp2(tl.load(log_decay + head) * _LOG2E)
    S += k[:, None] * v[None, :]
    tl.store(at, S, mask=inside)
    result = tl.sum(q[:, None] * S, 0) * scale
    tl.store(out + (b * H + h) * E + e, result.to(out.dtype.element_ty), mask=e < E)


class _Layout(NamedTuple):
    """How tokens are cut into segments."""

    segments: int
    """Of all sequences, empty ones included."""
    per_batch: int
    """Of one batch entry; 1 if sequences are packed."""
    length: int
    """Tokens of each segment but the last of a sequence; a bound if sequences are packed."""
    bounds: Tensor | None = None
    """(segments, 3) int32: first token, end, sequence. Of packed sequences only."""
    firsts: Tensor | None = None
    """(sequences + 1,) int32: where each sequence's segments begin. Of packed sequences only."""


def _layout(tensor: Tensor, cu_seqlens: Tensor | None, length: int) -> _Layout:
    """Segments of so many tokens. Nothing waits for the values of cu_seqlens: what is unused stays empty."""
    B, _, N = tensor.shape[:3]
    if cu_seqlens is None:
        per_batch = max(1, triton.cdiv(N, length))
        return _Layout(B * per_batch, per_batch, length)
    sequences = cu_seqlens.shape[0] - 1
    segments = sequences if length >= N else sequences + triton.cdiv(N, length)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    firsts = torch.nn.functional.pad(((ends - starts + length - 1) // length).clamp(min=1).cumsum(0), (1, 0)).int()
    number = torch.arange(segments, device=tensor.device, dtype=torch.int32)
    own = torch.searchsorted(firsts[1:], number, right=True).clamp(max=sequences - 1)
    start = torch.minimum(starts[own] + (number - firsts[own]) * length, ends[own])
    stop = torch.minimum(start + length, ends[own])
    return _Layout(segments, 1, length, torch.stack([start, stop, own.int()], 1).contiguous(), firsts)


def tiles(D: int, E: int, where: str, *, wide: bool, exact: bool) -> dict[str, int]:
    """PIECE of D that a launch takes, CHUNK, BLOCK_E, warps and stages.

    `wide` if products are of float32, `exact` if the states handed out have to be.
    """
    if where == "interpreter":
        return {"PIECE": 32, "CHUNK": 32, "BLOCK_E": 32, "num_warps": 4, "num_stages": 1}
    if wide:
        return {"PIECE": 64, "CHUNK": 16, "BLOCK_E": 16, "num_warps": 4, "num_stages": 2}
    if D > 128:
        return {"PIECE": 256, "CHUNK": 16, "BLOCK_E": 32, "num_warps": 8, "num_stages": 1}
    odd = D % 16 > 0 or E % 16 > 0  # loads that cannot be vectorised take more registers
    if odd or (exact and D > 64):
        return {"PIECE": 128, "CHUNK": 32, "BLOCK_E": 32, "num_warps": 8, "num_stages": 1 if exact else 2}
    return {"PIECE": 128, "CHUNK": 64, "BLOCK_E": 32, "num_warps": 4, "num_stages": 2}


class _Plan(NamedTuple):
    """How kernels multiply tensors of these dtypes and widths."""

    piece: int
    tiles: int
    """Of E."""
    chunk: int
    constants: dict[str, object]


def _plan(*tensors: Tensor, D: int, E: int, exact: bool = False) -> _Plan:
    """Tensors of mixed dtypes are multiplied in float32."""
    dtype = torch.float32
    if tensors[0].device.type != "cpu" and all(t.dtype == tensors[0].dtype for t in tensors):
        dtype = tensors[0].dtype  # the interpreter would truncate where a GPU rounds
    sizes = tiles(D, E, target(tensors[0]), wide=dtype == torch.float32, exact=exact)
    constants: dict[str, object] = {
        "DOT": {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype],
        "PRECISION": dot_precision(torch.empty(0, dtype=dtype, device=tensors[0].device)),
        "BLOCK_D": width(min(D, sizes["PIECE"])),
        "enable_fp_fusion": True,
    }
    piece = sizes.pop("PIECE")
    return _Plan(piece, triton.cdiv(E, sizes["BLOCK_E"]), sizes["CHUNK"], constants | sizes)


def _pieces(D: int, piece: int) -> list[slice]:
    return [slice(start, min(start + piece, D)) for start in range(0, D, piece)]


def _accumulator(out: Tensor, pieces: int) -> Tensor:
    """What pieces add to: the output if that rounds nothing."""
    return out if pieces == 1 or out.dtype == torch.float32 else out.new_empty(out.shape, dtype=torch.float32)


class _Sweep:
    """One causal pass over tensors of one shape; `scale` multiplies the output, or going back what the state gains.

    Scores and states are sums over D and rows of it, so a wide D is taken in pieces that add to the same output.
    """

    def __init__(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        log_decay: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        *,
        reverse: bool,
        exact: bool,
    ) -> None:
        self.query, self.key, self.value = (strided_rows(t) for t in tokens)
        self.log_decay, self.cu_seqlens, self.scale, self.reverse = log_decay, cu_seqlens, scale, reverse
        self.H, self.N, self.D, self.E = *self.key.shape[1:], self.value.shape[3]
        self.sequences = self.key.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        weighted = log_decay is not None or (reverse and scale != 1)
        self.exact = exact
        self.plan = _plan(*tokens, D=self.D, E=self.E, exact=exact and weighted)
        wide = dot_precision(torch.empty(0, device=self.key.device))
        self.plan.constants.update(
            DECAY=log_decay is not None, REVERSE=reverse, WEIGHTED=weighted, EXACT=exact, WIDE=wide
        )

    def state(self, segments: int) -> Tensor:
        return self.key.new_empty((segments, self.H, self.D, self.E), dtype=torch.float32)

    def length(self) -> int:
        """Tokens of a segment: all, or fewer if sequences and heads make too few programs."""
        interpreted = target(self.key) == "interpreter"
        enough, least = (3, 1) if interpreted else (_ENOUGH, 4)
        chunks = triton.cdiv(self.N, self.plan.chunk)
        programs = max(1, self.sequences * self.H * self.plan.tiles)
        segments = max(1, min(triton.cdiv(enough, programs), triton.cdiv(chunks, least)))
        return max(1, triton.cdiv(chunks, segments)) * self.plan.chunk

    def over(self, layout: _Layout, initial: Tensor | None, out: Tensor | None, final: Tensor | None) -> None:
        """Launch over all segments; `final` (segments, H, D, E) contiguous, initial of the same shape."""
        pieces = _pieces(self.D, self.plan.piece)
        result = self.key if out is None else _accumulator(out, len(pieces))
        begin, end = (self.key if t is None else t for t in (initial, final))
        for piece in pieces:
            q, k = self.query[..., piece], self.key[..., piece]
            linear_attention_kernel_sweep[(layout.segments * self.H * self.plan.tiles,)](
                q, k, self.value, self.log_decay, begin[:, :, piece], layout.bounds, result, end[:, :, piece],
                self.H, self.N, k.shape[3], self.E, layout.per_batch, layout.length, self.scale,
                *q.stride()[:3], *k.stride()[:3], *self.value.stride()[:3],
                *begin.stride(), *result.stride()[:3], self.D * self.E,
                INITIAL=initial is not None, OUTPUT=out is not None, FINAL=final is not None, ADD=piece.start > 0,
                PACKED=layout.bounds is not None, **self.plan.constants,
            )  # fmt: skip
        if out is not None and result is not out:
            out.copy_(result)

    def scan(self, layout: _Layout, sums: Tensor, initial: Tensor | None, entering: Tensor | None) -> Tensor:
        """The state after every sequence; `entering` gets those before every segment."""
        final, size, block = self.state(self.sequences), self.D * self.E, 1024
        initial = None if initial is None else initial.contiguous()
        linear_attention_kernel_scan[(self.sequences * self.H * triton.cdiv(size, block),)](
            sums, initial, self.log_decay, layout.bounds, layout.firsts, entering, final,
            self.H, self.N, size, layout.per_batch, layout.length, *(sums if initial is None else initial).stride()[:2],
            DECAY=self.log_decay is not None, INITIAL=initial is not None, ENTERING=entering is not None,
            REVERSE=self.reverse, PACKED=layout.bounds is not None, BLOCK=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return final

    def run(self, initial: Tensor | None, out: Tensor | None) -> Tensor:
        """Fill `out`; returns the state after every sequence, which holds nothing unless it was to be exact."""
        layout = _layout(self.key, self.cu_seqlens, self.length())
        if layout.segments == self.sequences:
            final = self.state(self.sequences)
            self.over(layout, initial, out, final if self.exact else None)
            return final
        sums = self.state(layout.segments)
        self.over(layout, None, None, sums)
        entering = None if out is None else torch.empty_like(sums)
        final = self.scan(layout, sums, initial, entering)
        if out is not None:
            self.over(layout, entering, out, None)
        return final


def _outputs(cu_seqlens: Tensor | None, *like: Tensor) -> list[Tensor]:
    """Contiguous; zeros where some rows may belong to no sequence."""
    make = torch.empty if cu_seqlens is None else torch.zeros
    return [make(t.shape, dtype=t.dtype, device=t.device) for t in like]


def _start(initial: Tensor | None, query: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The state where there is nothing to add."""
    if initial is not None:
        return initial.clone(memory_format=torch.contiguous_format)
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return query.new_zeros((sequences, query.shape[1], query.shape[3], value.shape[3]), dtype=torch.float32)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    state_wanted: bool,
) -> tuple[Tensor, Tensor]:
    no_float64(query)
    (out,) = _outputs(cu_seqlens, value)
    if query.numel() == 0 or value.numel() == 0:
        return out.zero_(), _start(initial_state, query, value, cu_seqlens)
    sweep = _Sweep((query, key, value), log_decay, cu_seqlens, scale, reverse=False, exact=state_wanted)
    return out, sweep.run(initial_state, out)


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
    d_query, d_key, d_value = _outputs(cu_seqlens, query, key, value)
    if query.numel() == 0 or value.numel() == 0:
        d_initial = _start(d_state, query, value, cu_seqlens)
        return d_query.zero_(), d_key.zero_(), d_value.zero_(), d_initial
    rest = (log_decay, cu_seqlens, scale)
    turned, d_turned = (None if t is None else t.mT for t in (initial_state, d_state))
    _Sweep((d_out, value, key), *rest, reverse=False, exact=False).run(turned, d_query)
    _Sweep((value, d_out, query), *rest, reverse=True, exact=False).run(d_turned, d_key)
    last = _Sweep((key, query, d_out), *rest, reverse=True, exact=initial_state is not None)
    return d_query, d_key, d_value, last.run(d_state, d_value)


def _block_sums(key: Tensor, value: Tensor, block: int) -> Tensor:
    """key^T value of every block of tokens: (B, H, blocks, D, E), float32."""
    sweep, layout = _Sweep((key, key, value), None, None, 1.0, reverse=False, exact=True), _layout(key, None, block)
    sums = sweep.state(layout.segments)
    sweep.over(layout, None, None, sums)
    return sums.unflatten(0, (key.shape[0], layout.per_batch)).transpose(1, 2)


class _Sets:
    """Which queries share which sums: those of a sequence all keys', or those of a block the mask's."""

    def __init__(self, mask: Tensor | None, block_q: int, block_k: int, cu_seqlens: Tensor | None) -> None:
        self.mask = None if mask is None else mask.to(torch.float32)
        self.block_q, self.block_k, self.cu_seqlens = block_q, block_k, cu_seqlens

    def seen(self, key: Tensor, value: Tensor, initial: Tensor | None = None) -> Tensor:
        """Sums of key^T value: (B, H, blocks of queries or 1, D, E), or (sequences, H, D, E) without a mask."""
        if self.mask is None:
            return self._total(key, value, initial)
        return self._summed(self.mask, _block_sums(key, value, self.block_k))

    def seeing(self, query: Tensor, value: Tensor, initial: Tensor | None = None) -> Tensor:
        """The transpose: sums over the queries that see a key of query^T value."""
        if self.mask is None:
            return self._total(query, value, initial)
        return self._summed(self.mask.mT, _block_sums(query, value, self.block_q))

    def _total(self, key: Tensor, value: Tensor, initial: Tensor | None) -> Tensor:
        if key.numel() == 0:
            return _start(initial, key, value, self.cu_seqlens)
        return _Sweep((key, key, value), None, self.cu_seqlens, 1.0, reverse=False, exact=True).run(initial, None)

    def _summed(self, mask: Tensor, sums: Tensor) -> Tensor:
        return torch.matmul(mask, sums.flatten(3)).unflatten(3, sums.shape[3:])

    def apply(
        self,
        rows: Tensor,
        states: Tensor,
        out: Tensor,
        times: Tensor | None = None,
        plus: tuple[Tensor | None, Tensor] | None = None,
        *,
        scale: float = 1.0,
        of_keys: bool = False,
    ) -> None:
        """out = scale * times * rows . states + plus, a column (or ones) times a row for each state."""
        if out.numel() == 0:
            return
        rows, (D, E) = strided_rows(rows), states.shape[-2:]
        plan = _plan(rows, D=D, E=E)
        block = 8 * plan.chunk if self.mask is None else self.block_k if of_keys else self.block_q
        layout, (left, right) = _layout(rows, self.cu_seqlens, block), plus or (None, None)
        one = rows.new_empty((1, 1, 1))
        column, weight, row = (one if t is None else t for t in (times, left, right))
        pieces = _pieces(D, plan.piece)
        result = _accumulator(out, len(pieces))
        for piece in pieces:
            some, own = rows[..., piece], states[..., piece, :]
            linear_attention_kernel_apply[(layout.segments * rows.shape[1] * plan.tiles,)](
                some, own, column, weight, row, layout.bounds, result,
                rows.shape[1], rows.shape[2], some.shape[3], E, layout.per_batch, layout.length, scale,
                *some.stride()[:3], *self._strides(own), *own.stride()[-2:],
                *column.stride()[:2], *weight.stride()[:2], *self._strides(row), *result.stride()[:3],
                ADD=piece.start > 0, TIMES=times is not None, LEFT=left is not None,
                RIGHT=right is not None and piece.start == 0, PACKED=layout.bounds is not None, **plan.constants,
            )  # fmt: skip
        if result is not out:
            out.copy_(result)

    def _strides(self, states: Tensor) -> tuple[int, int, int]:
        """Of batch, block or packed sequence, and head."""
        if self.mask is not None:
            return states.stride(0), states.stride(2), states.stride(1)
        own = states.stride(0)
        return (own, 0, states.stride(1)) if self.cu_seqlens is None else (0, own, states.stride(1))


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
    no_float64(query)
    (out,) = _outputs(cu_seqlens, query.new_empty(()).expand(*query.shape[:3], value.shape[3]))
    sets = _Sets(block_mask, block_q, block_k, cu_seqlens)
    states = sets.seen(key, value, initial_state)
    if normalizer == "none":
        sets.apply(query, states, out, scale=scale)
        divisor = states.new_empty(0)
    else:
        (divisor,) = _outputs(cu_seqlens, states.new_empty(()).expand(query.shape[:3]))
        sets.apply(query, sets.seen(key, _ones(key)), divisor[..., None])
        divisor = divisor.add_(eps) if normalizer == "sum" else divisor.clamp_(min=eps)
        sets.apply(query, states, out, 1 / divisor, scale=scale)
    return out, states if block_mask is None else states.new_empty(0), divisor


def _ones(rows: Tensor) -> Tensor:
    return torch.ones_like(rows[..., :1])


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
    """As in `cpu.py`; the weighted d_out is float32 where float16 could not hold it."""
    d_query, d_key, d_value = _outputs(cu_seqlens, query, key, value)
    sets = _Sets(block_mask, block_q, block_k, cu_seqlens)
    flow, of_queries, of_keys = d_out if scale == 1 else d_out * scale, None, None
    if out is not None:
        pull = -(d_out.float() * out).sum(-1) / divisor
        if normalizer == "clamp":
            pull = pull.masked_fill(divisor <= eps, 0.0)
        flow = d_out.float() * (scale / divisor)[..., None]
        flow = flow if query.dtype == torch.float16 else flow.to(query.dtype)
        of_queries = (pull, sets.seen(key, _ones(key))[..., 0])
        of_keys = (None, sets.seeing(query, pull[..., None])[..., 0])
    states = state if block_mask is None else sets.seen(key, value)
    d_states = sets.seeing(query, flow, d_state)
    sets.apply(flow, states.mT, d_query, None, of_queries)
    sets.apply(value, d_states.mT, d_key, None, of_keys, of_keys=True)
    sets.apply(key, d_states, d_value, of_keys=True)
    return d_query, d_key, d_value, d_states if block_mask is None else state.new_empty(0)


def step(query: Tensor, key: Tensor, value: Tensor, state: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    no_float64(query)
    (B, H, D), E = query.shape, value.shape[2]
    out = torch.empty((B, H, E), dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    block_d = triton.next_power_of_2(D)
    block_e = min(triton.next_power_of_2(E), max(1, 4096 // block_d))
    linear_attention_kernel_step[(B * H * triton.cdiv(E, block_e),)](
        query, key, value, state, log_decay, out, H, H // key.shape[1], D, E, scale,
        *query.stride(), *key.stride(), *value.stride(), *state.stride()[:3],
        DECAY=log_decay is not None, BLOCK_D=block_d, BLOCK_E=block_e, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
