"""What decides which visual tokens stay: a `Criterion`, and the `Context` that it is shown.

A criterion is two small functions: `score` rates every token of the sequence (only visual ones are read), `select`
makes of the scores what is kept, by default the best `num_kept` of each sample. Wrappers (debiasing, a guard for
attention sinks) change `score` and leave `select` alone, so they go around any criterion.

Shapes: B samples, n tokens that are left at this stage (text and padding among them), C channels, H heads, D head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared_kernels import keep_tokens

if TYPE_CHECKING:
    from vlm_prune.layer_attention import LayerAttention
    from vlm_prune.vision import Vision

Need = Literal["attention", "next_attention", "tower_attention", "projector_input"]
"""What the engine must record for a criterion: queries and keys of the language layer that has just run, of the one
that comes next, of the vision tower's last layer, or what goes into the projector."""


@dataclass(frozen=True)
class Prompt:
    """The prompt before anything was dropped: embeddings (B, S, C) with visual features in place, visual and text
    tokens (B, S)."""

    embeddings: Float[Tensor, "B S C"]
    visual: Bool[Tensor, "B S"]
    text: Bool[Tensor, "B S"]


@dataclass(frozen=True)
class Context:
    """What a criterion sees at one stage.

    after_layer: the language layer that has just run, -1 before the first.
    hidden: (B, n, C), the tokens: projected visual features and embeddings before the first layer.
    visual: (B, n), the visual tokens that may be dropped. text: (B, n), what guides: tokens behind the last visual one.
    valid: (B, n), False on padding. prompt_index: (B, n), position in the prompt.
    view: (B, n), number of the image, tile or frame that a visual token belongs to, -1 elsewhere.
    num_visual: (B,), visual tokens of the prompt. num_kept: (B,), how many are to stay.
    prompt: before anything was dropped; None where a context is made by hand without it.
    attention: of the layer asked for, None where nobody asked. vision: what the vision side recorded, None if nothing.
    padding: (B, n), visual tokens that show nothing but the border that made an image square; None where unknown.
    notes: what a criterion wants to be read in the report.
    """

    after_layer: int
    hidden: Float[Tensor, "B n C"]
    visual: Bool[Tensor, "B n"]
    text: Bool[Tensor, "B n"]
    valid: Bool[Tensor, "B n"]
    prompt_index: Int[Tensor, "B n"]
    view: Int[Tensor, "B n"]
    num_visual: Int[Tensor, "B"]
    num_kept: Int[Tensor, "B"]
    prompt: Prompt | None = None
    attention: "LayerAttention | None" = None
    vision: "Vision | None" = None
    padding: Bool[Tensor, "B n"] | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)

    def rows(self) -> "LayerAttention":
        """The attention of the layer. RuntimeError where the criterion did not say that it needs it."""
        if self.attention is None:
            raise RuntimeError("this criterion reads language attention: name 'attention' among its needs")
        return self.attention

    def tower(self) -> "Vision":
        """What the vision side recorded. RuntimeError where the criterion did not say that it needs it."""
        if self.vision is None:
            raise RuntimeError("this criterion reads the vision tower: name 'tower_attention' among its needs")
        return self.vision

    def visual_rank(self) -> Int[Tensor, "B n"]:
        """Number of each visual token among those of its sample that are left; meaningless elsewhere."""
        return self.visual.cumsum(1) - 1


@dataclass(frozen=True)
class Selection:
    """What stays. kept: (B, n), within `Context.visual`. hidden: (B, n, C), what the kept tokens become; None: as they
    are. Merging puts the merged vector at the position of one of its tokens."""

    kept: Bool[Tensor, "B n"]
    hidden: Float[Tensor, "B n C"] | None = None


def best_scores(context: Context, scores: Float[Tensor, "B n"]) -> Selection:
    """The `num_kept` highest scores of each sample; ties go to the lower position."""
    return Selection(keep_tokens(scores, num_kept=context.num_kept, candidates=context.visual))


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How visual tokens are chosen at a stage.

    name: for messages. score: (B, n) of a context. select: what is kept of them. needs: what must be recorded.
    attends: whether the score is attention, so that debiasing it makes sense.
    """

    name: str
    score: Callable[[Context], Float[Tensor, "B n"]]
    select: Callable[[Context, Float[Tensor, "B n"]], Selection] = best_scores
    needs: frozenset[Need] = frozenset()
    attends: bool = False

    def __call__(self, context: Context) -> Selection:
        """What stays of the visual tokens. ValueError where the criterion keeps what is not visual."""
        selection = self.select(context, self.score(context))
        if bool((selection.kept & ~context.visual).any()):
            raise ValueError(f"{self.name} keeps tokens that are not visual; it must choose within context.visual")
        return selection
