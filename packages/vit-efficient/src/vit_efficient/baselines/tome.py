"""ToMe: in every block the most similar tokens are merged, without training.

Bolya et al.: Token Merging: Your ViT But Faster (ICLR 2023, arXiv:2210.09461). Tokens are split by even and odd
position; each even token proposes the odd one whose key, averaged over heads, is most like its own, and the most alike
are merged as means weighted by the number of patches they stand for. Attention adds the logarithm of that number to its
scores. Prefix tokens are never merged.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vit_efficient.door import Handle, check_vit, open_door, register_method
from vit_efficient.token_reduction import Reducer, Seen, Tokens, reduced_class


@dataclass(frozen=True, kw_only=True)
class ToMeConfig:
    """How much is merged.

    r: tokens that each block merges away, on average.
    inflect: slope of r over depth: 0 for a constant r, -1 from 2 r down to 0, 1 the other way round.
    proportional: whether attention weighs merged tokens by their size.
    """

    r: int = 13
    inflect: float = 0.0
    proportional: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if self.r < 0:
            raise ValueError(f"r must be at least 0, got {self.r}")
        if not -1 <= self.inflect <= 1:
            raise ValueError(f"inflect must be from -1 to 1, got {self.inflect}")

    def schedule(self, depth: int) -> tuple[int, ...]:
        """Tokens to merge away in each of `depth` blocks."""
        first = self.r * (1 - self.inflect)
        step = (2 * self.r - 2 * first) / max(depth - 1, 1)
        return tuple(int(first + step * block) for block in range(depth))


class ToMeReducer(Reducer):
    """Merges the most similar patches."""

    def __init__(self, config: ToMeConfig, depth: int) -> None:
        super().__init__()
        self.weighs_size, self.schedule = config.proportional, config.schedule(depth)

    def wants(self, block: int) -> frozenset[str]:
        """Keys wherever something is merged."""
        return frozenset(("keys",) if self.schedule[block] else ())

    def after_attention(self, block: int, tokens: Tokens, seen: Seen) -> Tokens:
        """Fewer, larger tokens."""
        n = tokens.num_patches
        proposers = len(range(tokens.num_prefix % 2, n, 2))  # positions are counted with the prefix
        num = min(self.schedule[block], proposers)
        if seen.keys is None or n < 2 or num < 1:
            return tokens
        into = _partners(nn.functional.normalize(seen.keys.mean(1), dim=-1), num, tokens.num_prefix)
        return _merge(tokens, into, n - num)


def _partners(metric: Tensor, num: int, num_prefix: int) -> Tensor:
    """(b, n): the row each patch has after merging."""
    b, n, _ = metric.shape
    first = num_prefix % 2
    even, odd = torch.arange(first, n, 2), torch.arange(1 - first, n, 2)
    even, odd = even.to(metric.device), odd.to(metric.device)
    best, choice = (metric[:, even] @ metric[:, odd].mT).max(-1)
    proposals = best.argsort(dim=1, descending=True)
    gone, stays = even[proposals[:, :num]], even[proposals[:, num:].sort(1).values]
    order = torch.cat([stays, odd.expand(b, -1)], 1)
    rows = torch.arange(n - num, device=metric.device).expand(b, -1)
    into = torch.zeros(b, n, dtype=torch.long, device=metric.device).scatter(1, order, rows)
    partner = odd[choice.gather(1, proposals[:, :num])]
    return into.scatter(1, gone, into.gather(1, partner))


def _merge(tokens: Tokens, into: Tensor, num: int) -> Tokens:
    P = tokens.num_prefix
    patches = tokens.x[:, P:]
    wide_dtype = torch.promote_types(patches.dtype, torch.float32)
    size = torch.ones_like(into, dtype=wide_dtype) if tokens.size is None else tokens.size
    new_size = size.new_zeros(into.shape[0], num).scatter_add(1, into, size)
    total = size.new_zeros(into.shape[0], num, patches.shape[2])
    total = total.scatter_add(1, into[..., None].expand_as(patches), patches * size[..., None])
    x = torch.cat([tokens.x[:, :P], (total / new_size[..., None]).to(patches.dtype)], 1)
    owner = torch.where(tokens.owner >= 0, into.gather(1, tokens.owner.clamp(min=0)), -1)
    return replace(tokens, x=x, owner=owner, size=new_size)


def apply_tome(model: nn.Module, config: ToMeConfig = ToMeConfig()) -> Handle:
    """Merges the most similar patches in every block. TypeError or ValueError on a model that is not supported."""
    vit = check_vit(model)
    reducer = ToMeReducer(config, len(vit.blocks))
    changed = [block for block, r in enumerate(reducer.schedule) if r]
    return open_door(vit, "tome", config, reduced_class(vit), {"token_reducer": reducer}, changed)


register_method("tome", ToMeConfig, apply_tome)
