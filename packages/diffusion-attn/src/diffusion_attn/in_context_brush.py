"""In-Context Brush: attention that leans on a given subject and on the prompt (arXiv:2505.20271).

Subject and target stand in one canvas that an inpainting model repaints in part. In the joint attention of its
double-stream blocks, two things are changed for the target's tokens:
- latent feature shifting (equation 5): what a token reads from the text and from the subject is added once more, with
  weights alpha_text and alpha_demo, without renormalising;
- head-wise reweighting (equations 6 to 8): heads count more, up to 1 + beta, the more the target reads text in them.

Decided here: no map is made. Shifting is attention to values that are scaled by 1 + alpha, and a head's activation is a
sum of exp(LSE over the text - LSE over all). Heads are reweighted in the target's rows, as in the paper's figure; the
published code does it in all rows of the image: `reweight_rows="image"`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_attn.visual_attention import TextKeys, attend_all, attend_with_lse
from shared_kernels import merge_states


@dataclass(frozen=True, kw_only=True)
class InContextBrushConfig:
    """How strongly the target leans on text and subject. All three at 0 is the host."""

    alpha_text: float = 0.3
    """How much of what is read from the text is added."""
    alpha_demo: float = 0.3
    """How much of what is read from the subject is added."""
    beta: float = 0.2
    """How much more the head counts that reads most text; the one that reads least counts 1."""
    reweight_rows: Literal["target", "image"] = "target"
    """Rows in which heads are reweighted."""

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        for name in ("alpha_text", "alpha_demo", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if self.reweight_rows not in ("target", "image"):
            raise ValueError(f"reweight_rows must be 'target' or 'image', got {self.reweight_rows!r}")


def in_context_attention(
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S E"],
    text: TextKeys,
    demo: Int[Tensor, "c"],
    target: Int[Tensor, "s"],
    config: InContextBrushConfig = InContextBrushConfig(),
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H S E"]:
    """Output of the image tokens. demo, target: which of them are subject and target; all others attend as ever.

    Exact, differentiable, and of the cost of dense attention.
    """
    weight = torch.ones(value.shape[2], dtype=value.dtype, device=value.device)
    shifted = value * weight.index_fill(0, demo, 1 + config.alpha_demo)[:, None]
    own = query.index_select(2, target)
    seen, lse_seen = attend_with_lse(own, key, shifted, scale=scale)
    read, lse_read = _attend_words(own, text, 1 + config.alpha_text, scale)
    out_target, lse = merge_states(seen, lse_seen, read, lse_read)
    heads = head_weights((lse_read - lse).exp().sum(-1), config.beta).to(out_target.dtype)[..., None, None]
    out = attend_all(query, key, value, text, scale=scale)
    if config.reweight_rows == "image":
        out = out * heads
    return out.index_copy(2, target, out_target * heads)


def head_weights(activation: Float[Tensor, "B H"], beta: float) -> Float[Tensor, "B H"]:
    """1 + beta times the activation, stretched over the heads of each sample to lie in [0, 1] (equations 6 to 8)."""
    low, high = activation.amin(1, keepdim=True), activation.amax(1, keepdim=True)
    return 1 + beta * (activation - low) / (high - low + torch.finfo(activation.dtype).eps)


def _attend_words(query: Tensor, text: TextKeys, factor: float, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention to the valid text alone, values multiplied by `factor`, and its log-sum-exp."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ text.key.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if text.valid is not None:
        scores = scores.masked_fill(~text.valid[:, None, None], -torch.inf)
    return (scores.softmax(-1).to(text.value.dtype) @ text.value) * factor, scores.logsumexp(-1)
