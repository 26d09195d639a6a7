"""DynamicViT: small predictors decide which patches go on, the same number in every image.

Rao et al.: DynamicViT (NeurIPS 2021, arXiv:2106.02034). Before each location a predictor looks at every patch and at
the mean of those present, and gives the probability that it goes on. In training the decision is a hard Gumbel-softmax,
multiplied onto the earlier ones, and dropped patches are masked out of attention; at inference the most probable
floor(N keep_ratio^s) go on from location s.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.models._manipulate import checkpoint
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vit_efficient.door import Handle, check_locations, check_vit, open_door, register_method
from vit_efficient.masked_training import masked_block
from vit_efficient.token_reduction import ReducedViT, Reducer, Tokens, drop_tokens, embed


@dataclass(frozen=True, kw_only=True)
class DynamicViTConfig:
    """How much goes on.

    keep_ratio: share of the patches present that each location lets through.
    locations: blocks (from 0) before which tokens are dropped; None for a quarter, a half, three quarters of the depth.
    """

    keep_ratio: float = 0.7
    locations: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}")


class Predictor(nn.Module):
    """Log-probabilities that a patch is dropped and that it goes on (paper, equations 2-5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        half, quarter = width // 2, width // 4
        self.out = nn.Sequential(
            nn.Linear(width, half),
            nn.GELU(),
            nn.Linear(half, quarter),
            nn.GELU(),
            nn.Linear(quarter, 2),
            nn.LogSoftmax(-1),
        )

    def forward(self, patches: Float[Tensor, "B N C"], policy: Float[Tensor, "B N"]) -> Float[Tensor, "B N 2"]:
        """policy: 1 for patches present, 0 for those dropped before."""
        x = self.local(patches)
        half = x.shape[-1] // 2
        weights = policy[..., None].to(x.dtype)
        mean = (x[..., half:] * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
        return self.out(torch.cat([x[..., :half], mean.expand(-1, x.shape[1], -1)], -1))


class DynamicViTReducer(Reducer):
    """Keeps the patches that the predictors find most probable."""

    def __init__(self, config: DynamicViTConfig, locations: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.config, self.locations = config, locations
        self.predictors = nn.ModuleList([Predictor(width) for _ in locations])

    def num_kept(self, stage: int, num_patches: int) -> int:
        """Patches that go on from a location, of those in the image."""
        return max(int(num_patches * self.config.keep_ratio ** (stage + 1)), 1)

    def before_block(self, block: int, tokens: Tokens) -> Tokens:
        """The most probable tokens."""
        if block not in self.locations:
            return tokens
        stage = self.locations.index(block)
        num = self.num_kept(stage, tokens.owner.shape[1])
        if num >= tokens.num_patches:
            return tokens
        patches = tokens.x[:, tokens.num_prefix :]
        score = self.predictors[stage](patches, torch.ones_like(patches[..., 0]))[..., 1]
        return drop_tokens(
            tokens, torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(num, 1).indices, True)
        )


@dataclass(frozen=True)
class DynamicViTOutput:
    """What a masked pass gives: logits, features (B, P + N, C), and per location 1 for patches that go on."""

    logits: Float[Tensor, "B classes"]
    features: Float[Tensor, "B t C"]
    keeps: tuple[Float[Tensor, "B N"], ...]


def dynamicvit_forward(model: nn.Module, images: Float[Tensor, "B c h w"]) -> DynamicViTOutput:
    """The pass for training; decisions are drawn from torch's global generator. TypeError on another model."""
    if not isinstance(model, ReducedViT) or not isinstance(model.token_reducer, DynamicViTReducer):
        raise TypeError(f"dynamicvit_forward needs a model with DynamicViT at work, got {type(model).__name__}")
    reducer, P = model.token_reducer, model.num_prefix_tokens
    x, _ = embed(model, images)
    keep = torch.ones(x.shape[0], x.shape[1] - P, device=x.device)
    keeps: list[Tensor] = []
    saving = model.grad_checkpointing and torch.is_grad_enabled()
    for index, block in enumerate(model.blocks):
        if index in reducer.locations:
            chances = reducer.predictors[len(keeps)](x[:, P:], keep)
            keep = nn.functional.gumbel_softmax(chances.float(), hard=True)[..., 1] * keep
            keeps.append(keep)
        policy = nn.functional.pad(keep, (P, 0), value=1.0) if keeps else None
        arguments = (block, x, policy, P, False)
        x, _ = checkpoint(masked_block, *arguments) if saving else masked_block(*arguments)
    features = model.norm(x)
    return DynamicViTOutput(model.forward_head(features), features, tuple(keeps))


def keep_ratio_loss(keeps: tuple[Float[Tensor, "B N"], ...], keep_ratio: float) -> Float[Tensor, ""]:
    """Mean square distance of the shares kept at each location from keep_ratio^s (paper, equation 14)."""
    distances = [(keep.mean(1) - keep_ratio ** (s + 1)).square().mean() for s, keep in enumerate(keeps)]
    return torch.stack(distances).mean()


class DynamicViTLoss(nn.Module):
    """Cross-entropy + 2 x keep-ratio + 0.5 x KL to the teacher + 0.5 x distance of kept tokens to its (equation 15)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model: list[Any] = [model]  # in a list: the loss does not own the model's weights

    def forward(
        self,
        output: DynamicViTOutput,
        labels: Int[Tensor, "B"] | Float[Tensor, "B classes"],
        teacher_logits: Float[Tensor, "B classes"],
        teacher_features: Float[Tensor, "B t C"],
    ) -> Float[Tensor, ""]:
        """labels: classes or probabilities; teacher: the dense model on the same images."""
        model = self._model[0]
        ratio = keep_ratio_loss(output.keeps, model.token_reducer.config.keep_ratio)
        kept = output.keeps[-1].detach() > 0.5
        P = model.num_prefix_tokens
        distance = (output.features[:, P:] - teacher_features[:, P:]).square()[kept].mean()
        imitation = nn.functional.kl_div(
            output.logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        task = nn.functional.cross_entropy(output.logits, labels)
        return task + 2 * ratio + 0.5 * imitation + 0.5 * distance


class DynamicViT(ReducedViT):
    """A ViT with DynamicViT: masked in training mode, pruned in eval mode."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Logits (B, classes)."""
        return dynamicvit_forward(self, x).logits if self.training else super().forward(x, attn_mask, is_causal)


class DynamicDistilledViT(DynamicViT, VisionTransformerDistilled):
    """The same for DeiT with a distillation token."""


def apply_dynamicvit(model: nn.Module, config: DynamicViTConfig = DynamicViTConfig()) -> Handle:
    """Puts predictors before the locations; they want training with `DynamicViTLoss`.

    TypeError or ValueError on a model that is not supported, among them those that pool by the average.
    """
    vit = check_vit(model)
    if vit.global_pool == "avg":
        raise ValueError("DynamicViT reads the class token; global_pool='avg' is not supported")
    locations = check_locations(vit, config.locations)
    changed = DynamicDistilledViT if isinstance(vit, VisionTransformerDistilled) else DynamicViT
    modules: dict[str, nn.Module] = {"token_reducer": DynamicViTReducer(config, locations, vit.embed_dim)}
    return open_door(vit, "dynamicvit", config, changed, modules, locations)


register_method("dynamicvit", DynamicViTConfig, apply_dynamicvit)
