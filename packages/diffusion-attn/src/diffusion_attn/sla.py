"""SLA, sparse-linear attention (arXiv:2509.24006): a few blocks exactly, most by linear attention, the rest not at all.

Queries and keys are pooled into blocks; for every query block the best k_h of the key blocks are critical (softmax
attention), the worst k_l negligible (skipped), those between marginal: linear attention with a feature map. A linear
map, zero at first, joins the linear output to the sparse one, so that an untrained SLA is block-sparse attention; it is
made to be fine-tuned.

Decided here: the linear branch covers the marginal blocks, as in the paper; `linear_scope="all"` is what the authors'
later code does (all tokens, cheaper, used by released checkpoints). Pooling divides by the tokens that a block has.
Critical blocks are at least one; ties go to the lower index. In joint attention text is always critical.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_attn.visual_attention import TextKeys, attend_blocks, listed_blocks, output_of
from shared_kernels import BlockLists, block_stats, choose_blocks, linear_attention

FeatureMap = Literal["softmax", "elu", "relu"]
_TINY = 1e-12  # where no key is marginal, 0 / tiny is the 0 that is meant


@dataclass(frozen=True, kw_only=True)
class SLAConfig:
    """Which blocks are attended to, and how."""

    critical: float = 0.05
    """Share k_h of the key blocks with exact attention, rounded down, at least one block."""
    negligible: float = 0.10
    """Share k_l of the key blocks that are skipped, rounded down."""
    block_size: tuple[int, int] = (64, 64)
    """Queries and keys of a block."""
    feature_map: FeatureMap = "softmax"
    """Of queries and keys in the linear branch: softmax over the dimensions, elu + 1, or relu."""
    linear_scope: Literal["marginal", "all"] = "marginal"
    """What the linear branch sees."""
    order: Literal["raster", "gilbert"] = "raster"
    """How tokens are brought into blocks, see `token_order`; the paper leaves them as they are."""

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if not 0 < self.critical <= 1:
            raise ValueError(f"critical must lie in (0, 1], got {self.critical}")
        if not 0 <= self.negligible <= 1 - self.critical:
            raise ValueError(f"negligible must lie in [0, 1 - critical = {1 - self.critical}], got {self.negligible}")
        if min(self.block_size) < 1:
            raise ValueError(f"block_size must be two sizes of at least 1, got {self.block_size}")
        if self.feature_map not in ("softmax", "elu", "relu"):
            raise ValueError(f"feature_map must be 'softmax', 'elu' or 'relu', got {self.feature_map!r}")
        if self.linear_scope not in ("marginal", "all"):
            raise ValueError(f"linear_scope must be 'marginal' or 'all', got {self.linear_scope!r}")
        if self.order not in ("raster", "gilbert"):
            raise ValueError(f"order must be 'raster' or 'gilbert', got {self.order!r}")


class Classes(NamedTuple):
    """The classes of key blocks for every query block; what is in neither is negligible."""

    critical: BlockLists
    marginal: Bool[Tensor, "B H nq nk"]


def feature_map(x: Float[Tensor, "... D"], kind: FeatureMap) -> Float[Tensor, "... D"]:
    """phi(x), not negative, computed in float32 at least and returned in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mapped = {"softmax": lambda t: t.softmax(-1), "elu": lambda t: F.elu(t) + 1, "relu": F.relu}[kind](wide)
    return mapped.to(x.dtype)


def classify_blocks(
    query: Float[Tensor, "B H S D"], key: Float[Tensor, "B H S D"], config: SLAConfig = SLAConfig()
) -> Classes:
    """Critical, marginal and negligible blocks by the products of block means (paper, equations 2 and 3).

    The softmax that the paper takes of them changes no order and is left out. Not differentiable.
    """
    means = (
        block_stats(x.detach(), block_size=size).mean for x, size in zip((query, key), config.block_size, strict=True)
    )
    scores = torch.matmul(next(means), next(means).mT)
    num_blocks = scores.shape[-1]
    critical = choose_blocks(scores, topk=float(config.critical))
    named = listed_blocks(critical, num_blocks)
    negligible = min(int(config.negligible * num_blocks + 1e-9), num_blocks - critical.indices.shape[-1])
    if negligible:
        worst = choose_blocks((-scores).masked_fill(named, -torch.inf), topk=negligible)
        named = named | listed_blocks(worst, num_blocks)
    return Classes(critical, ~named)


def sparse_linear_parts(
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S E"],
    classes: Classes,
    config: SLAConfig = SLAConfig(),
    *,
    text: TextKeys | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H S E"], Float[Tensor, "B H S E"]]:
    """The sparse and the linear output, before the map that joins them. Differentiable; the classes are constants."""
    sparse = attend_blocks(query, key, value, classes.critical, block_size=config.block_size, text=text, scale=scale)
    mapped = feature_map(query, config.feature_map), feature_map(key, config.feature_map)
    if config.linear_scope == "all":
        return sparse, output_of(linear_attention(*mapped, value, normalizer="sum", eps=1e-5))
    linear = linear_attention(
        *mapped, value, normalizer="clamp", eps=_TINY, block_mask=classes.marginal, block_size=config.block_size
    )
    return sparse, output_of(linear)


class SparseLinearAttention(nn.Module):
    """SLA of one layer: sparse + proj(linear), `proj` (head_dim, head_dim) shared by the heads, zero at first."""

    def __init__(self, head_dim: int, config: SLAConfig = SLAConfig()) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(head_dim, head_dim)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(
        self,
        query: Float[Tensor, "B H S D"],
        key: Float[Tensor, "B H S D"],
        value: Float[Tensor, "B H S E"],
        *,
        text: TextKeys | None = None,
        scale: float | None = None,
        classes: Classes | None = None,
    ) -> Float[Tensor, "B H S E"]:
        """Attention of visual tokens to each other, and exactly to `text`. classes: those of the means unless given."""
        classes = classify_blocks(query, key, self.config) if classes is None else classes
        sparse, linear = sparse_linear_parts(query, key, value, classes, self.config, text=text, scale=scale)
        joined = F.linear(linear, self.proj.weight.to(linear.dtype), self.proj.bias.to(linear.dtype))
        return sparse + joined


def sla_flops(tokens: int, head_dim: int, config: SLAConfig = SLAConfig(), *, heads: int = 1) -> Mapping[str, int]:
    """Floating-point operations of one forward pass: of dense attention, of SLA's parts, and of all of SLA (section 3).

    A multiply-add counts two. The linear branch's sums over marginal blocks are counted as additions of states.
    """
    block_q, block_k = config.block_size
    nq, nk = -(-tokens // block_q), -(-tokens // block_k)
    critical = max(1, int(config.critical * nk + 1e-9))
    marginal = nk - critical - min(int(config.negligible * nk + 1e-9), nk - critical)
    state = head_dim * (head_dim + 1)
    parts: dict[str, Any] = {
        "dense": 4 * tokens * tokens * head_dim,
        "sparse": 4 * tokens * min(critical * block_k, tokens) * head_dim,
        "linear": 4 * tokens * state,
        "sums": 2 * nq * marginal * state if config.linear_scope == "marginal" else 0,
        "mask": 2 * nq * nk * head_dim,
        "projection": 2 * tokens * head_dim * head_dim,
    }
    parts = {name: heads * amount for name, amount in parts.items()}
    return parts | {"all": sum(amount for name, amount in parts.items() if name != "dense")}
