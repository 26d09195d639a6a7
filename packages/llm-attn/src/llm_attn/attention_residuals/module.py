"""Attention Residuals as a function of tensors and as a module that holds the queries."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_attn.attention_residuals.config import TwoPhase, Variant
from llm_attn.attention_residuals.stream import Mixer, OnWeights, ResidualStream


def attention_residuals(
    embedding: Float[Tensor, "*tokens D"],
    layers: Iterable[Callable[[Tensor], Tensor]],
    queries: Float[Tensor, "L+1 D"],
    key_weights: Float[Tensor, "L+1 D"] | None = None,
    *,
    block_size: int,
    eps: float,
    sum_scale: bool = False,
    normed: bool = False,
    run: int = 0,
) -> Float[Tensor, "*tokens D"]:
    """Run `layers`, each with its own pre-norm and without a residual, over mixes of what came before (equations 1-6).

    `layers` are the L attentions and MLPs in turn, `block_size` S of them share a block sum; 1 is Full Attention
    Residuals. `run` queries, a multiple of S, look at the closed blocks together (algorithm 1); 0 computes directly.
    `normed` is Inkling-2's way. Returns the final aggregation, which goes into the network's final norm.
    """
    mixer = Mixer(queries=queries, key_weights=key_weights, eps=eps, sum_scale=sum_scale, normed=normed, run=run)
    if run % block_size:
        raise ValueError(f"run must be a multiple of block_size, got {run} and {block_size}")
    stream = ResidualStream.start(embedding, mixer, block_size)
    for layer in layers:
        stream = stream + layer(stream.mixed())
    if stream.state.num_layers + 1 != len(queries):
        raise ValueError(
            f"queries must have a row for each of the {stream.state.num_layers} layers and one for the final "
            f"aggregation, got {len(queries)}"
        )
    return stream.mixed()


class AttentionResiduals(nn.Module):
    """The pseudo-queries and key norms of all L layers and of the final aggregation, as the rows of two parameters.

    Queries begin at zero: every mix is then the mean of its sources. They are vectors, not a matrix: keep them out of
    weight decay and of Muon (`llm_attn.transformers.training.param_groups` does).
    """

    no_weight_decay = ("queries", "key_weights")

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        block_size: int,
        eps: float,
        sum_scale: bool = False,
        variant: Variant = "report",
        two_phase: TwoPhase = "inference",
    ) -> None:
        super().__init__()
        self.block_size, self.eps, self.sum_scale = block_size, eps, sum_scale
        self.variant, self.two_phase = variant, two_phase
        # Full Attention Residuals has no blocks to look at together: there it is a matter of schedule alone
        self.run_length = block_size * math.ceil(math.sqrt(num_layers) / block_size)
        self.queries = nn.Parameter(torch.zeros(num_layers + 1, hidden_size))
        self.key_weights: nn.Parameter | None = None
        if variant == "report":
            self.key_weights = nn.Parameter(torch.ones(num_layers + 1, hidden_size))
        self.on_weights: OnWeights | None = None

    def start(self, embedding: Float[Tensor, "*tokens D"]) -> ResidualStream:
        """The stream before the first layer."""
        return ResidualStream.start(embedding, self.mixer(), self.block_size)

    def mixer(self) -> Mixer:
        """How to mix now: in two phases or directly."""
        together = self.two_phase == "always" or (self.two_phase == "inference" and not torch.is_grad_enabled())
        return Mixer(
            queries=self.queries,
            key_weights=self.key_weights,
            eps=self.eps,
            sum_scale=self.sum_scale,
            normed=self.variant == "inkling2",
            run=self.run_length if together and self.on_weights is None else 0,
            on_weights=self.on_weights,
        )

    def forward(
        self, embedding: Float[Tensor, "*tokens D"], layers: Sequence[Callable[[Tensor], Tensor]]
    ) -> Float[Tensor, "*tokens D"]:
        """See `attention_residuals`."""
        stream = self.start(embedding)
        for layer in layers:
            stream = stream + layer(stream.mixed())
        return stream.mixed()

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        rows, width = self.queries.shape
        return f"layers={rows - 1}, hidden_size={width}, block_size={self.block_size}, variant={self.variant}"
