"""A fixed share of the patches goes on from each location: chosen at random, or spread evenly over the image.

The floor under every method that looks at the image.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from vit_efficient.door import Handle, check_locations, check_vit, open_door, register_method
from vit_efficient.token_reduction import Reducer, Tokens, drop_tokens, reduced_class


@dataclass(frozen=True, kw_only=True)
class FixedTokensConfig:
    """Which patches go on.

    keep_ratio: share of the patches present that each location lets through.
    locations: blocks (from 0) before which tokens are dropped; None for a quarter, a half, three quarters of the depth.
    choice: "random", drawn anew for each image, or "uniform", evenly spaced.
    seed: of the random choice.
    """

    keep_ratio: float = 0.7
    locations: tuple[int, ...] | None = None
    choice: Literal["random", "uniform"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}")
        if self.choice not in ("random", "uniform"):
            raise ValueError(f"choice must be 'random' or 'uniform', got {self.choice!r}")


class FixedTokensReducer(Reducer):
    """Keeps the same number of patches in every image, without a look at them."""

    def __init__(self, config: FixedTokensConfig, locations: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.locations = config, locations

    def before_block(self, block: int, tokens: Tokens) -> Tokens:
        """A share of the tokens."""
        if block not in self.locations or not tokens.num_patches:
            return tokens
        b, n = tokens.x.shape[0], tokens.num_patches
        num = math.ceil(self.config.keep_ratio * n)
        if self.config.choice == "uniform":
            chosen = (torch.arange(num) * n // num).expand(b, -1)
        else:
            # one draw for each image and location, whatever the batch
            generator = torch.Generator().manual_seed(self.config.seed * 1009 + block)
            chosen = torch.rand(n, generator=generator).argsort()[:num].expand(b, -1)
        keep = torch.zeros(b, n, dtype=torch.bool, device=tokens.x.device)
        return drop_tokens(tokens, keep.scatter(1, chosen.to(keep.device), True))


def apply_fixed_tokens(model: nn.Module, config: FixedTokensConfig = FixedTokensConfig()) -> Handle:
    """Drops a fixed share of the patches at each location. TypeError or ValueError on a model that is not supported."""
    vit = check_vit(model)
    locations = check_locations(vit, config.locations)
    modules: dict[str, nn.Module] = {"token_reducer": FixedTokensReducer(config, locations)}
    return open_door(vit, f"{config.choice}_tokens", config, reduced_class(vit), modules, locations)


register_method("random_tokens", FixedTokensConfig, apply_fixed_tokens)
register_method("uniform_tokens", FixedTokensConfig, apply_fixed_tokens)
