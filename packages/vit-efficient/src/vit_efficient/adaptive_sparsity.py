"""AS-ViT: tokens whose attention score falls below learned thresholds are dropped, each image as many as it can spare.

Liu, Wu, Guo: Adaptive Sparse ViT (IJCAI 2023, arXiv:2209.13802). The score of a patch is the class token's attention to
it, each head weighted by the norm of its output at that patch. Three scalars are compared with it, at a quarter, a half
and three quarters of the depth. They are trained with the backbone by a loss that pulls the mean cost to a target share
of the dense model's. In training nothing is removed: tokens are masked out of attention, differentiably.

Decided here, where paper and published code differ or are silent:
- the budget is relative (paper), prefix tokens count on both sides, so that an unpruned model costs exactly 1;
- at inference every image of a batch is pruned by itself (the published code averages the batch's counts:
  `batch_mode="mean_topk"`);
- at least one patch is kept, and a token once dropped stays dropped;
- scores go with one over the number of patches, so thresholds, stated for 196, are scaled to the number at hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from timm.models._manipulate import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from torch import Tensor, nn

from vit_efficient.blocks import attention_width, linear_macs
from vit_efficient.door import Handle, check_locations, check_vit, open_door, register_method
from vit_efficient.masked_training import masked_block
from vit_efficient.token_reduction import (
    ReducedEva,
    ReducedViT,
    Reducer,
    Seen,
    TokenReduction,
    Tokens,
    drop_tokens,
    embed,
)

STATED_PATCHES = 196


@dataclass(frozen=True, kw_only=True)
class AdaptiveSparsityConfig:
    """Where and how tokens are dropped.

    locations: blocks (from 0) before which tokens are dropped; None for the paper's rule, 1 + n L / 4.
    thresholds: first values of the learned thresholds, for 196 patches.
    temperature: of the sigmoid whose slope a threshold learns by (the paper's 1 / tau).
    min_keep: patches that an image keeps at least.
    batch_mode: "per_image", or "mean_topk" as the published code: all images keep the batch's mean count.
    rounding: at inference images are grouped by their count, rounded up to a multiple of this.
    """

    locations: tuple[int, ...] | None = None
    thresholds: tuple[float, ...] = (0.001, 0.002, 0.003)
    temperature: float = 1e4
    min_keep: int = 1
    batch_mode: Literal["per_image", "mean_topk"] = "per_image"
    rounding: int = 8

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if not all(t == t for t in self.thresholds) or not self.thresholds:
            raise ValueError(f"thresholds must be numbers, got {self.thresholds}")
        if self.locations is not None and len(self.locations) != len(self.thresholds):
            raise ValueError(
                f"each of the {len(self.locations)} locations needs a threshold, got {len(self.thresholds)}"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.min_keep < 1 or self.rounding < 1:
            raise ValueError(f"min_keep and rounding must be at least 1, got {self.min_keep} and {self.rounding}")
        if self.batch_mode not in ("per_image", "mean_topk"):
            raise ValueError(f"batch_mode must be 'per_image' or 'mean_topk', got {self.batch_mode!r}")


def token_score(class_attention: Float[Tensor, "B H N"], context_norm: Float[Tensor, "B H N"]) -> Float[Tensor, "B N"]:
    """Score of each patch (paper, section 3.2): the heads' class attention, weighted by their share of the output norm.

    class_attention: of the class token to the patches. context_norm: L2 norm of each head's output at the patches.
    """
    share = context_norm / (context_norm.sum(1, keepdim=True) + 1e-8)
    return (share * class_attention).sum(1)


def seen_score(seen: Seen) -> Float[Tensor, "B N"] | None:
    """`token_score` of what was seen of a block, None if nothing was."""
    if seen.class_attention is None or seen.context_norm is None:
        return None
    return token_score(seen.class_attention.float(), seen.context_norm.float())


def at_least(keep: Bool[Tensor, "B N"], score: Float[Tensor, "B N"], num: int) -> Bool[Tensor, "B N"]:
    """`keep`, and in images that would keep fewer than `num` patches, the `num` best."""
    num = min(num, score.shape[1])
    best = torch.zeros_like(keep).scatter(1, score.topk(num, 1).indices, torch.ones_like(keep))
    return torch.where((keep.sum(1) < num)[:, None], best & (score > -torch.inf), keep)


def straight_through(
    score: Float[Tensor, "B N"], threshold: Float[Tensor, ""], temperature: float
) -> Float[Tensor, "B N"]:
    """1 where the score exceeds the threshold, else 0, with the gradient of a sigmoid (paper, equation 6)."""
    soft = torch.sigmoid(temperature * (score - threshold))
    return (score > threshold).to(score.dtype) + (soft - soft.detach())


class AdaptiveReducer(Reducer):
    """Drops patches whose score does not exceed the threshold of that depth."""

    def __init__(self, config: AdaptiveSparsityConfig, locations: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.locations = config, locations
        self.thresholds = nn.Parameter(torch.tensor(config.thresholds))

    def threshold(self, stage: int, num_patches: int) -> Float[Tensor, ""]:
        """The threshold of a stage for an image of so many patches."""
        return self.thresholds[stage].float() * (STATED_PATCHES / num_patches)

    def wants(self, block: int) -> frozenset[str]:
        """Class attention and output norms of the blocks before the locations."""
        return frozenset(("class_attention", "context_norm") if block + 1 in self.locations else ())

    def after_attention(self, block: int, tokens: Tokens, seen: Seen) -> Tokens:  # noqa: ARG002
        """The tokens with their scores."""
        return replace(tokens, score=seen_score(seen))

    def before_block(self, block: int, tokens: Tokens) -> Tokens:
        """The tokens whose score exceeds the threshold."""
        if block not in self.locations or tokens.score is None:
            return tokens
        score = tokens.score.masked_fill(~tokens.present(), -torch.inf)
        keep = score > self.threshold(self.locations.index(block), tokens.owner.shape[1])
        keep = at_least(keep, score, self.config.min_keep)
        if self.config.batch_mode == "mean_topk":
            num = int(keep.sum()) // max(keep.shape[0], 1)
            keep = torch.zeros_like(keep).scatter(1, score.topk(num, 1).indices, torch.ones_like(keep))
        return drop_tokens(tokens, keep)


# ---- training: nothing is removed, dropped tokens are masked out of attention


@dataclass(frozen=True)
class Masked:
    """What a masked pass gives. keeps: per location (B, N), 1 for patches kept, with the gradient of the thresholds."""

    logits: Float[Tensor, "B classes"]
    features: Float[Tensor, "B t C"]
    keeps: tuple[Float[Tensor, "B N"], ...]


def masked_forward(model: nn.Module, images: Float[Tensor, "B c h w"]) -> Masked:
    """The pass that the thresholds are trained by: all tokens, dropped ones seen by nobody but themselves.

    Its logits are those of the pruned pass on the same image. TypeError on a model without AS-ViT.
    """
    return _masked_pass(model, images, _decide)


def _masked_pass(model: Any, images: Tensor, decide: Callable[..., Tensor]) -> Masked:
    if not isinstance(model, TokenReduction) or not isinstance(model.token_reducer, AdaptiveReducer):
        raise TypeError(f"a model with adaptive sparsity at work is needed, got {type(model).__name__}")
    reducer, P = model.token_reducer, model.num_prefix_tokens
    x, rope = embed(model, images)
    keeps: list[Tensor] = []
    score: Tensor | None = None
    policy: Tensor | None = None
    saving = model.grad_checkpointing and torch.is_grad_enabled()
    for index, block in enumerate(model.blocks):
        if index in reducer.locations and score is not None:
            keeps.append(decide(reducer, len(keeps), score, keeps))
            policy = nn.functional.pad(keeps[-1], (P, 0), value=1.0)
        arguments = (block, x, policy, P, index + 1 in reducer.locations, rope)
        x, seen = checkpoint(masked_block, *arguments) if saving else masked_block(*arguments)
        score = seen_score(seen)
    features = model.norm(x)
    if model.global_pool == "avg" and keeps:
        features = _fill_with_mean(features, keeps[-1], P)
    return Masked(model.forward_head(features), features, tuple(keeps))


def _decide(reducer: AdaptiveReducer, stage: int, score: Tensor, before: list[Tensor]) -> Tensor:
    present = before[-1].detach() > 0.5 if before else torch.ones_like(score, dtype=torch.bool)
    keep = straight_through(score, reducer.threshold(stage, score.shape[1]), reducer.config.temperature)
    keep = keep * present
    enough = at_least(keep.detach() > 0.5, score.detach().masked_fill(~present, -torch.inf), reducer.config.min_keep)
    return keep + (enough.to(keep.dtype) - keep.detach())


def _fill_with_mean(features: Tensor, keep: Tensor, num_prefix: int) -> Tensor:
    grid, kept = features[:, num_prefix:], keep[..., None].to(features.dtype)
    mean = (grid * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    return torch.cat([features[:, :num_prefix], grid * kept + mean * (1 - kept)], 1)


# ---- cost and loss


def block_macs(tokens: Tensor | int, linear: int, width: int) -> Tensor | float:
    """Multiply-adds of one block on so many tokens (section 3.3): of linear maps, so many a token, and of attention."""
    return linear * tokens + 2 * width * tokens * tokens


def model_macs(model: Any, counts: Float[Tensor, "B L"] | Int[Tensor, "B L"]) -> Float[Tensor, "B"]:
    """Multiply-adds of each image whose blocks see so many patch tokens, patch embedding included; the head is not."""
    block = model.blocks[0]
    blocks = block_macs(counts.float() + model.num_prefix_tokens, linear_macs(block), attention_width(block))
    embedding = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    return torch.as_tensor(blocks).sum(1) + embedding


@dataclass(frozen=True)
class LossParts:
    """The loss and what it is made of. ratio: cost of the batch as a share of the dense model's."""

    total: Float[Tensor, ""]
    task: Float[Tensor, ""]
    budget: Float[Tensor, ""]
    distillation: Float[Tensor, ""]
    ratio: Float[Tensor, ""]


@torch.no_grad()
def fit_thresholds(model: Any, images: Float[Tensor, "B c h w"], target: float, *, tolerance: float = 0.005) -> float:
    """Sets the thresholds, without training, so that these images cost `target` of the dense model; returns the cost.

    Every location keeps the same share of what reaches it, found by bisection; each image still keeps its own number.
    A start for training, and what a model without training can have. ValueError where the target cannot be reached.
    """
    low, high, cost = 0.0, 1.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        masked = _masked_pass(model, images, partial(_keep_share, share))
        cost = _cost_ratio(model, masked).mean().item()
        if abs(cost - target) <= tolerance:
            return cost
        low, high = (share, high) if cost < target else (low, share)
    raise ValueError(
        f"no thresholds bring the cost to {target}: it is {cost:.3f} at best, where each image keeps little"
    )


@torch.no_grad()
def scale_thresholds(model: Any, images: Float[Tensor, "B c h w"], target: float, *, tolerance: float = 0.005) -> float:
    """Multiplies all thresholds by one factor so that these images cost `target` of the dense model; returns the cost.

    After training, which meets its budget on average over changing thresholds: what was learned about one threshold
    against another stays. ValueError where no factor from 1/64 to 64 meets the target.
    """
    reducer = model.token_reducer
    learned, low, high, cost = reducer.thresholds.clone(), -6.0, 6.0, 1.0
    for _ in range(20):
        exponent = (low + high) / 2
        reducer.thresholds.copy_(learned * 2**exponent)
        cost = _cost_ratio(model, masked_forward(model, images)).mean().item()
        if abs(cost - target) <= tolerance:
            return cost
        low, high = (exponent, high) if cost > target else (low, exponent)
    reducer.thresholds.copy_(learned)
    raise ValueError(f"no common factor of the thresholds brings the cost to {target}; the nearest gave {cost:.3f}")


def _keep_share(share: float, reducer: AdaptiveReducer, stage: int, score: Tensor, before: list[Tensor]) -> Tensor:
    present = before[-1] > 0.5 if before else torch.ones_like(score, dtype=torch.bool)
    threshold = score[present].quantile(1 - share)
    reducer.thresholds[stage] = threshold * score.shape[1] / STATED_PATCHES
    return _decide(reducer, stage, score, before)


def _cost_ratio(model: Any, masked: Masked) -> Float[Tensor, "B"]:
    patches = masked.features.shape[1] - model.num_prefix_tokens
    full = model_macs(model, torch.full((1, len(model.blocks)), patches, device=masked.features.device))
    return model_macs(model, patch_counts(model, masked.keeps, masked.features)) / full


class AdaptiveSparsityLoss(nn.Module):
    """Cross-entropy + 2 x budget + 0.5 x distillation from the dense model (paper, equation 10).

    model: with adaptive sparsity at work. target: share of the dense model's multiply-adds, in (0, 1].
    budget_weight, distillation_weight: of the terms. unit: "relative" (paper), or "gflops" as the published code.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        *,
        budget_weight: float = 2.0,
        distillation_weight: float = 0.5,
        unit: Literal["relative", "gflops"] = "relative",
    ) -> None:
        super().__init__()
        if not 0 < target <= 1:
            raise ValueError(f"target must be a share of the dense model in (0, 1], got {target}")
        if unit not in ("relative", "gflops"):
            raise ValueError(f"unit must be 'relative' or 'gflops', got {unit!r}")
        self._model: list[Any] = [model]  # in a list: the loss does not own the model's weights
        self.target, self.unit = target, unit
        self.budget_weight, self.distillation_weight = budget_weight, distillation_weight

    def forward(
        self,
        masked: Masked,
        labels: Int[Tensor, "B"] | Float[Tensor, "B classes"],
        teacher_logits: Float[Tensor, "B classes"] | None = None,
    ) -> LossParts:
        """labels: classes, or their probabilities after mixup. teacher_logits: of the dense model on the images."""
        model = self._model[0]
        ratio = _cost_ratio(model, masked).mean()
        budget = (ratio - self.target).abs()
        if self.unit == "gflops":
            patches = masked.features.shape[1] - model.num_prefix_tokens
            budget = budget * model_macs(model, torch.full((1, len(model.blocks)), patches))[0].item() / 1e9
        task = nn.functional.cross_entropy(masked.logits, labels)
        distillation = torch.zeros_like(task)
        if teacher_logits is not None:
            distillation = nn.functional.kl_div(
                masked.logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean"
            )
        total = task + self.budget_weight * budget + self.distillation_weight * distillation
        return LossParts(total, task, budget, distillation, ratio.detach())


def patch_counts(
    model: Any, keeps: tuple[Float[Tensor, "B N"], ...], features: Float[Tensor, "B t C"]
) -> Float[Tensor, "B L"]:
    """Patch tokens that each block would see, with gradient."""
    stage = torch.full(features.shape[:1], float(features.shape[1] - model.num_prefix_tokens), device=features.device)
    counts, left = [], iter(keeps)
    for index in range(len(model.blocks)):
        if index in model.token_reducer.locations[: len(keeps)]:
            stage = next(left).sum(1)
        counts.append(stage)
    return torch.stack(counts, 1)


# ---- the door


class AdaptivePasses(TokenReduction):
    """Masked in training mode, pruned in eval mode."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Logits (B, classes)."""
        return masked_forward(self, x).logits if self.training else super().forward(x, attn_mask, is_causal)


class AdaptiveViT(AdaptivePasses, ReducedViT):
    """A ViT with adaptive sparsity."""


class AdaptiveDistilledViT(AdaptiveViT, VisionTransformerDistilled):
    """The same for DeiT with a distillation token."""


class AdaptiveEva(AdaptivePasses, ReducedEva):
    """The same for Eva."""


def apply_adaptive_sparsity(model: nn.Module, config: AdaptiveSparsityConfig = AdaptiveSparsityConfig()) -> Handle:
    """Lets each image drop the patches it can spare; thresholds become `model.token_reducer.thresholds`.

    In eval mode the model prunes; in training mode it runs `masked_forward`. Thresholds start where little is dropped:
    train them with `AdaptiveSparsityLoss`. TypeError or ValueError on a model that is not supported.
    """
    vit = check_vit(model, eva=True)
    depth, stages = len(vit.blocks), len(config.thresholds)
    locations = config.locations
    if locations is None:
        locations = tuple(1 + (n + 1) * depth // (stages + 1) for n in range(stages))
    locations = check_locations(vit, locations, first=1)
    changed: type[AdaptivePasses] = AdaptiveViT
    if isinstance(vit, Eva):
        changed = AdaptiveEva
    elif isinstance(vit, VisionTransformerDistilled):
        changed = AdaptiveDistilledViT
    modules: dict[str, nn.Module] = {"token_reducer": AdaptiveReducer(config, locations)}
    handle = open_door(vit, "adaptive_sparsity", config, changed, modules, [place - 1 for place in locations])
    vit.token_rounding = config.rounding
    handle.on_remove(lambda: delattr(vit, "token_rounding"))
    return handle


register_method("adaptive_sparsity", AdaptiveSparsityConfig, apply_adaptive_sparsity)
