"""EViT: the patches that the class token attends to most go on, the rest become one token.

Liang et al.: Not All Patches are What You Need (ICLR 2022, arXiv:2202.07800). Between attention and MLP of each
location the patches are ranked by the class token's attention, averaged over heads; the best go on, the others are
summed, weighted by their attention, into a token that counts as a patch from then on.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vit_efficient.door import Handle, check_locations, check_vit, open_door, register_method
from vit_efficient.token_reduction import Reducer, Seen, Tokens, drop_tokens, reduced_class


@dataclass(frozen=True, kw_only=True)
class EViTConfig:
    """How much goes on.

    keep_ratio: share of the patches present that each location lets through.
    locations: blocks (from 0) in which tokens are dropped; None for a quarter, a half, three quarters of the depth.
    fuse: whether the others become one token, or are dropped.
    """

    keep_ratio: float = 0.7
    locations: tuple[int, ...] | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}")


class EViTReducer(Reducer):
    """Keeps a share of the patches, the best by class attention."""

    def __init__(self, config: EViTConfig, locations: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.locations = config, locations

    def wants(self, block: int) -> frozenset[str]:
        """Class attention at the locations."""
        return frozenset(("class_attention",) if block in self.locations else ())

    def after_attention(self, block: int, tokens: Tokens, seen: Seen) -> Tokens:  # noqa: ARG002
        """The best patches, and the rest in one."""
        n = tokens.num_patches
        num = math.ceil(self.config.keep_ratio * n)
        if seen.class_attention is None or num >= n:
            return tokens
        score = seen.class_attention.mean(1)
        keep = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(num, 1).indices, True)
        kept = drop_tokens(tokens, keep)
        return _append(kept, _fused(tokens, score, keep), keep, tokens) if self.config.fuse else kept


def _fused(tokens: Tokens, score: Tensor, keep: Tensor) -> Tensor:
    weights = score.masked_fill(keep, 0)
    return (weights[..., None] * tokens.x[:, tokens.num_prefix :]).sum(1, keepdim=True)


def _append(kept: Tokens, fused: Tensor, keep: Tensor, before: Tokens) -> Tokens:
    # positions that this step dropped are from now on represented by the fused token
    gone = (before.owner >= 0) & ~keep.gather(1, before.owner.clamp(min=0))
    owner = torch.where(gone, kept.num_patches, kept.owner)
    return replace(kept, x=torch.cat([kept.x, fused], 1), owner=owner, valid=None)


def apply_evit(model: nn.Module, config: EViTConfig = EViTConfig()) -> Handle:
    """Keeps the patches with most class attention. TypeError or ValueError on a model that is not supported."""
    vit = check_vit(model)
    locations = check_locations(vit, config.locations)
    modules: dict[str, nn.Module] = {"token_reducer": EViTReducer(config, locations)}
    return open_door(vit, "evit", config, reduced_class(vit), modules, locations)


register_method("evit", EViTConfig, apply_evit)
