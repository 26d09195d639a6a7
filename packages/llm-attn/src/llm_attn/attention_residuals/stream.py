"""The residual stream of Attention Residuals: what is added to, and read as a mix by, each layer of a network.

A `ResidualStream` stands where a host has its sum of outputs: `stream + output` is the stream after one more layer, and
`stream.mixed()` the input of the next. In two phases (algorithm 1) it also carries what the coming queries found in the
closed blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_attn.attention_residuals.blocks import BlockState
from shared_kernels import depth_attention

_PLUS = (Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add)

OnWeights = Callable[[int, Float[Tensor, "*tokens sources"]], None]


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """Everything that says how sources become the input of layer l, but the sources.

    queries: w_l of every layer, and last that of the final aggregation. key_weights: of the key norms g_l, or None.
    run: queries that look at the closed blocks together, or 0 for each on its own (direct computation).
    on_weights: called with the layer's index and its weights at each mix; then everything is computed directly.
    """

    queries: Float[Tensor, "L+1 D"]
    key_weights: Float[Tensor, "L+1 D"] | None
    eps: float
    sum_scale: bool = False
    normed: bool = False
    run: int = 0
    on_weights: OnWeights | None = None

    def direct(self, state: BlockState) -> Float[Tensor, "*tokens D"]:
        """Equations 2 to 4 over all sources of the next layer."""
        if self.on_weights is not None:
            return self._reported(state, self.on_weights)
        if len(state.sources) == 1:
            return state.sources[0]
        return self._attend(state.sources, state.num_layers)

    def _reported(self, state: BlockState, on_weights: OnWeights) -> Tensor:
        mixed, weights = self._attend(state.sources, state.num_layers, return_weights=True)
        on_weights(state.num_layers, weights)
        return state.sources[0] if len(state.sources) == 1 else mixed

    def look(self, state: BlockState) -> "Look":
        """Phase one: the queries of the next `run` layers over the closed blocks, each block read once."""
        first = state.num_layers
        out, lse = self._attend(state.done, slice(first, first + self.run), return_lse=True)
        return Look(first, len(state.done), out.unbind(0), lse.unbind(0))

    def merged(self, state: BlockState, look: "Look") -> Float[Tensor, "*tokens D"]:
        """Phase two: from what was seen in the closed blocks on, with what came after them."""
        if len(state.sources) == 1:
            return state.sources[0]
        index = state.num_layers
        out, lse = look.outs[index - look.first], look.lses[index - look.first]
        later = state.sources[look.blocks :]
        if len(later) == 1 and later[0].device.type == "cpu" and not self.normed:
            key_weight = None if self.key_weights is None else self.key_weights[index]
            return merge_partial(later[0], self.queries[index], key_weight, out, lse, eps=self.eps)
        return self._attend(later, index, state=(out, lse)) if later else out

    def _attend(
        self,
        sources: tuple[Tensor, ...],
        rows: int | slice,
        *,
        state: tuple[Tensor, Tensor] | None = None,
        return_lse: bool = False,
        return_weights: bool = False,
    ) -> Any:
        return depth_attention(
            sources,
            self.queries[rows],
            key_weight=None if self.key_weights is None else self.key_weights[rows],
            eps=self.eps,
            scale=self.queries.shape[-1] ** -0.5 if self.normed else 1.0,
            normed_values=self.normed,
            state=state,
            return_lse=return_lse,
            return_weights=return_weights,
        )


def merge_partial(
    partial: Float[Tensor, "*tokens D"],
    query: Float[Tensor, "D"],
    key_weight: Float[Tensor, "D"] | None,
    out: Float[Tensor, "*tokens D"],
    lse: Float[Tensor, "*tokens"],
    *,
    eps: float,
) -> Float[Tensor, "*tokens D"]:
    """Phase two with a single source c: out + sigmoid(w . RMSNorm(c) - lse) * (c - out).

    The same as depth_attention([partial], query, ..., state=(out, lse)). On CPUs these few calls of torch take a fifth
    of the op's time for 1,024 tokens and a tenth when decoding; on a GPU each would be a launch of its own.
    """
    acc = torch.promote_types(torch.promote_types(partial.dtype, out.dtype), torch.float32)
    value, query = partial.to(acc), query.to(acc)
    query = query if key_weight is None else query * key_weight.to(acc)
    score = (value @ query) * torch.rsqrt(torch.linalg.vecdot(value, value) / value.shape[-1] + eps)
    gate = torch.sigmoid(score - lse).unsqueeze(-1)
    return torch.lerp(out.to(acc), value, gate).to(torch.promote_types(partial.dtype, out.dtype))


@dataclass(frozen=True)
class Look:
    """What queries `first` and on found in the first `blocks` sources: mixes and log-sum-exps."""

    first: int
    blocks: int
    outs: tuple[Float[Tensor, "*tokens D"], ...]
    lses: tuple[Float[Tensor, "*tokens"], ...]


class ResidualStream:
    """A block state, how to mix it, and what the coming queries have seen of it. A value, like a tensor."""

    def __init__(self, state: BlockState, mixer: Mixer, look: Look | None) -> None:
        self.state, self.mixer, self.look = state, mixer, look

    @classmethod
    def start(cls, embedding: Float[Tensor, "*tokens D"], mixer: Mixer, block_size: int) -> "ResidualStream":
        """Before the first layer."""
        return cls.at(BlockState.start(embedding, block_size), mixer)

    @classmethod
    def at(cls, state: BlockState, mixer: Mixer) -> "ResidualStream":
        """At any place, as a later rank of a pipeline begins; what lies in an open block is mixed directly."""
        two_phase = mixer.run > 0 and state.num_layers % mixer.run == 0
        return cls(state, mixer, mixer.look(state) if two_phase else None)

    def mixed(self) -> Float[Tensor, "*tokens D"]:
        """The input h of the next layer; after the last, that of the final norm."""
        if self.look is None:
            mixed = self.mixer.direct(self.state)
        else:
            mixed = self.mixer.merged(self.state, self.look)
        return mixed * len(self.state.sources) if self.mixer.sum_scale else mixed

    def plus(self, output: Float[Tensor, "*tokens D"]) -> "ResidualStream":
        """The stream after one more layer."""
        state = self.state.add(output)
        if self.look is not None and state.num_layers < self.look.first + self.mixer.run:
            return ResidualStream(state, self.mixer, self.look)
        return ResidualStream.at(state, self.mixer)

    def __add__(self, output: Float[Tensor, "*tokens D"]) -> "ResidualStream":
        return self.plus(output) if isinstance(output, Tensor) else NotImplemented

    __radd__ = __add__

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """A tensor on the left of a plus asks here; so does torch.compile, on either side."""
        if function in _PLUS and len(args) == 2 and not kwargs:
            first, second = args
            return first.plus(second) if isinstance(first, ResidualStream) else second.plus(first)
        raise TypeError(
            f"a residual stream can be added to and mixed, nothing else: {getattr(function, '__name__', function)} "
            "was called on it"
        )

    @property
    def shape(self) -> torch.Size:
        """As of the tensor in its place."""
        return self.state.done[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """As of the tensor in its place."""
        return self.state.sources[-1].dtype

    @property
    def device(self) -> torch.device:
        """As of the tensor in its place."""
        return self.state.sources[-1].device
