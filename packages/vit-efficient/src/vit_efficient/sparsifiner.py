"""Sparsifiner: each query of a ViT attends to the keys that a small predictor names for it, image by image.

Wei et al.: Sparsifiner (CVPR 2023, arXiv:2303.13755). The predictor is an attention of low rank: queries against a
projection of the keys give K coefficients, which a learned, sparse basis expands to a score for every key. The best
keys of each query are kept and exact softmax attention runs over them. The predictor is trained first, to reconstruct
the dense attention, and frozen while the backbone adapts to the mask.

Decided here, where paper and published code differ or are silent:
- scores are scaled by the root of the head width (paper; the code takes the number of heads) and the basis is signed
  wherever its magnitude exceeds the threshold (the code takes magnitudes at test time): `official=True` for both;
- queries and keys go into the predictor as they are (paper); `reduce_channels=2` puts linear maps to half their width
  before it, as the code does, which costs more than it saves at 197 tokens;
- prefix tokens attend to everything, as the class token does; no key is forced;
- `granularity="block"` is ours, not the paper's: sums of scores over blocks of queries and keys need no map of queries
  x keys, since scores are bilinear; the best blocks are kept, and every query's own block and that of the prefix;
- with token pruning (section 3.4) pruned tokens are removed, where the published code zeroes them, and the predictor
  takes the rows of those that are left; a query goes on keeping as many keys as at full length.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from timm.layers import Attention, trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from shared_kernels import choose_blocks, sparse_attention
from vit_efficient.door import Handle, check_locations, check_vit, open_door, register_method
from vit_efficient.token_reduction import Reducer, Seen, Tokens, drop_tokens, reduced_class

Phase = Literal["reconstruct", "finetune"]


@dataclass(frozen=True, kw_only=True)
class SparsifinerConfig:
    """Which keys are kept.

    keep_rate: share of the keys (or of the blocks of keys) that a query keeps.
    granularity: "token" as in the paper, or "block".
    block: tokens in a block.
    reduce_tokens: the predictor's rank is N / reduce_tokens.
    reduce_channels: its width is head_dim / reduce_channels, by linear maps; 1 for none.
    coefficients: how many of a query's coefficients are used.
    basis_threshold: magnitude below which the basis counts as zero.
    official: scale and basis as in the published code.
    token_keep: share of the patch tokens that goes on from each block of `prune_after`; 1 for no token pruning.
    prune_after: blocks (from 0); None for a quarter, a half, three quarters of the depth.
    """

    keep_rate: float = 0.25
    granularity: Literal["token", "block"] = "token"
    block: int = 64
    reduce_tokens: int = 6
    reduce_channels: int = 1
    coefficients: int = 8
    basis_threshold: float = 0.02
    official: bool = False
    token_keep: float = 1.0
    prune_after: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError on values out of range."""
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], got {self.keep_rate}")
        if not 0 < self.token_keep <= 1:
            raise ValueError(f"token_keep must be in (0, 1], got {self.token_keep}")
        if self.granularity not in ("token", "block"):
            raise ValueError(f"granularity must be 'token' or 'block', got {self.granularity!r}")
        if min(self.block, self.reduce_tokens, self.reduce_channels, self.coefficients) < 1:
            raise ValueError("block, reduce_tokens, reduce_channels and coefficients must be at least 1")


class ConnectivityPredictor(nn.Module):
    """Scores every key for every patch query, of rank N / reduce_tokens (paper, section 3.2).

    grid: rows and columns of patches that it is made for. num_prefix: tokens before them.
    """

    def __init__(
        self, head_dim: int, num_heads: int, grid: tuple[int, int], num_prefix: int, config: SparsifinerConfig
    ):
        super().__init__()
        self.config, self.grid, self.num_prefix = config, grid, num_prefix
        tokens = num_prefix + grid[0] * grid[1]
        rank, width = max(tokens // config.reduce_tokens, 1), max(head_dim // config.reduce_channels, 1)
        self.scale = num_heads**-0.5 if config.official else head_dim**-0.5
        self.reduce_query: nn.Module = nn.Identity()
        self.reduce_key: nn.Module = nn.Identity()
        self.down, self.up = nn.Parameter(torch.empty(tokens, rank)), nn.Parameter(torch.empty(tokens, rank))
        if config.reduce_channels > 1:
            self.reduce_query, self.reduce_key = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        for parameter in self.parameters():
            trunc_normal_(parameter, std=0.02)

    def low_rank(
        self, query: Float[Tensor, "B H N D"], key: Float[Tensor, "B H T D"], places: Int[Tensor, "B n"] | None = None
    ) -> Float[Tensor, "B H N K"]:
        """Softmax of the queries against the projected keys.

        query: of the patches. key: of all tokens. places: grid positions of the patches; None if all are there.
        """
        down = self._rows(self.down, places)
        if key.shape[2] != down.shape[-2]:
            raise ValueError(
                f"the connectivity predictor was made for {self.down.shape[0]} tokens, got {key.shape[2]}; "
                "call resize_connectivity(model, grid) for another size"
            )
        projected = self.reduce_key(key).mT @ (down if places is None else down[:, None])
        return (self.reduce_query(query) @ (projected * self.scale)).softmax(-1)

    def basis(self, phase: Phase) -> Float[Tensor, "K T"]:
        """What a coefficient adds to the score of each key."""
        if phase == "reconstruct":
            return self.up.T
        large = torch.where(self.up.abs() > self.config.basis_threshold, self.up, 0).T
        return large.abs() if self.config.official else large

    def scores(
        self,
        query: Float[Tensor, "B H N D"],
        key: Float[Tensor, "B H T D"],
        phase: Phase,
        places: Int[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B H N T"]:
        """Score of every key for every patch query; except in reconstruction, from the largest coefficients only."""
        low = self.low_rank(query, key, places)
        if phase == "reconstruct":
            return low @ self.basis(phase)
        best, basis = self._largest(low), self._rows(self.basis(phase).T, places).mT
        rows = best.indices
        if places is not None:  # a basis for each image: all of them under each other
            first = torch.arange(0, basis.shape[0] * basis.shape[1], basis.shape[1], device=rows.device)
            rows, basis = rows + first[:, None, None, None], basis.flatten(0, 1)
        c = rows.shape[-1]
        values = best.values.to(basis.dtype).reshape(-1, c)
        flat = F.embedding_bag(rows.reshape(-1, c), basis.contiguous(), per_sample_weights=values, mode="sum")
        return flat.view(*low.shape[:-1], -1)

    def block_scores(
        self,
        query: Float[Tensor, "B H N D"],
        key: Float[Tensor, "B H T D"],
        block: int,
        places: Int[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B H n n"]:
        """Sums of `scores` over blocks of all tokens, without the scores; prefix queries count as zero."""
        low = self.low_rank(query, key, places)
        (B, H, N, K), best = low.shape, self._largest(low)
        blocks = -(-(N + self.num_prefix) // block)
        row = torch.arange(self.num_prefix, N + self.num_prefix, device=low.device).div(block, rounding_mode="floor")
        where = (row[:, None] * K + best.indices).flatten(2)
        sums = low.new_zeros(B, H, blocks * K).scatter_add(2, where, best.values.flatten(2)).unflatten(2, (blocks, K))
        basis = _block_sums(self._rows(self.basis("finetune").T, places), block)
        return sums @ (basis if places is None else basis[:, None]).mT

    def _largest(self, low: Tensor) -> Any:
        return low.topk(min(self.config.coefficients, low.shape[-1]), -1, sorted=False)

    def _rows(self, weight: Tensor, places: Tensor | None) -> Tensor:
        """(T, K), or (B, T, K) where only the patches at `places` are there."""
        if places is None:
            return weight
        prefix = torch.arange(self.num_prefix, device=places.device).expand(len(places), -1)
        return weight[torch.cat([prefix, places + self.num_prefix], 1)]

    def resize(self, grid: tuple[int, int]) -> None:
        """Resamples the patch rows of both projections to another grid; reconstruction should be trained again."""
        before = self.down.shape[0]
        for name in ("down", "up"):
            weight = getattr(self, name).detach()
            prefix, patches = weight[: self.num_prefix], weight[self.num_prefix :]
            image = patches.T.unflatten(1, self.grid)[None]
            resized = F.interpolate(image, grid, mode="bicubic", antialias=True)[0].flatten(1).T
            setattr(self, name, nn.Parameter(torch.cat([prefix, resized])))
        self.down.data *= before / self.down.shape[0]  # a sum over keys keeps its size
        self.grid = grid


def _block_sums(x: Float[Tensor, "*B T K"], block: int) -> Float[Tensor, "*B n K"]:
    blocks = -(-x.shape[-2] // block)
    return F.pad(x, (0, 0, 0, blocks * block - x.shape[-2])).unflatten(-2, (blocks, block)).sum(-2)


class SparsifinerAttention(Attention):
    """timm's Attention with a connectivity predictor; the same weights under the same names.

    Modules get this class by the door, never by name.
    """

    predictor: ConnectivityPredictor
    phase: Phase

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The tokens after attention; dense in reconstruction."""
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal are not supported by Sparsifiner")
        B, T, _ = x.shape
        context = self.attend(*project(self, x)).transpose(1, 2).reshape(B, T, self.attn_dim)
        context = self.norm(context)
        if getattr(self, "gate", None) is not None:
            context = context * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(context))

    def attend(
        self,
        query: Float[Tensor, "B H T D"],
        key: Float[Tensor, "B H T D"],
        value: Float[Tensor, "B H T D"],
        places: Int[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B H T D"]:
        """Softmax attention over the keys that the predictor keeps.

        places: grid positions of the patches; None if all are there.
        """
        config, P = self.predictor.config, self.predictor.num_prefix
        kept = num_kept(config, self.predictor.down.shape[0])
        if self.phase == "reconstruct" or kept >= key.shape[2] or not query.numel():
            return F.scaled_dot_product_attention(query, key, value)
        with torch.no_grad():
            indices, counts, size = self.lists(query, key, places)
        start = 0 if config.granularity == "block" else P
        patches: Any = sparse_attention(query[:, :, start:], key, value, indices, counts, block_size=size)
        prefix = F.scaled_dot_product_attention(query[:, :, :P], key, value)
        return torch.cat([prefix, patches[:, :, P - start :]], 2)

    def lists(
        self, query: Float[Tensor, "B H T D"], key: Float[Tensor, "B H T D"], places: Int[Tensor, "B n"] | None = None
    ) -> tuple[Int[Tensor, "B H n m"], Int[Tensor, "B H n"] | None, tuple[int, int]]:
        """The kept keys of each patch query, or the kept blocks of each block of tokens, for `sparse_attention`."""
        config, P = self.predictor.config, self.predictor.num_prefix
        num = num_kept(config, self.predictor.down.shape[0])
        if config.granularity == "token":
            scores = self.predictor.scores(query[:, :, P:], key, "finetune", places)
            return scores.topk(num, -1, sorted=False).indices.int(), None, (1, 1)
        scores = self.predictor.block_scores(query[:, :, P:], key, config.block, places)
        blocks = scores.shape[-1]
        forced = torch.eye(blocks, dtype=torch.bool, device=scores.device)
        forced[:, : -(-P // config.block)] = True
        lists = choose_blocks(scores, topk=min(-(-num // config.block), blocks), forced=forced[None, None])
        return lists.indices, lists.counts, (config.block, config.block)


def num_kept(config: SparsifinerConfig, tokens: int) -> int:
    """Keys that a query keeps, of so many tokens."""
    return math.ceil(config.keep_rate * tokens)


def project(attn: Attention, x: Float[Tensor, "B T C"]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values (B, H, T, D) of timm's Attention."""
    B, T, _ = x.shape
    query, key, value = attn.qkv(x).reshape(B, T, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    return attn.q_norm(query), attn.k_norm(key), value


# ---- together with token pruning


class SparsifinerReducer(Reducer):
    """Drops the patches with least class attention after each location; attention goes through the predictor."""

    def __init__(self, config: SparsifinerConfig, locations: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.locations = config, locations

    def wants(self, block: int) -> frozenset[str]:
        """Class attention at the locations."""
        return frozenset(("class_attention",) if block in self.locations else ())

    def attend(
        self, tokens: Tokens, attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Over the kept keys; all images of a batch have the same number of tokens, so nothing is padded."""
        if bias is not None and query.numel():
            raise RuntimeError("images of a batch were expected to keep the same number of tokens")
        return attn.attend(query, key, value, None if tokens.owner.shape[1] == tokens.num_patches else tokens.places())

    def after_attention(self, block: int, tokens: Tokens, seen: Seen) -> Tokens:  # noqa: ARG002
        """The tokens with the class attention they received; the block's MLP still runs on all."""
        return replace(tokens, score=None if seen.class_attention is None else seen.class_attention.mean(1))

    def before_block(self, block: int, tokens: Tokens) -> Tokens:
        """The best tokens, ceil(token_keep^s of all) after location s."""
        if tokens.score is None:
            return tokens
        stage = self.locations.index(block - 1)
        num = min(math.ceil(self.config.token_keep ** (stage + 1) * tokens.owner.shape[1]), tokens.num_patches)
        keep = torch.zeros_like(tokens.score, dtype=torch.bool).scatter(1, tokens.score.topk(num, 1).indices, True)
        return replace(drop_tokens(tokens, keep), score=None)


# ---- the door and its phases


def apply_sparsifiner(model: nn.Module, config: SparsifinerConfig = SparsifinerConfig()) -> Handle:
    """Gives every block's attention a connectivity predictor, `block.attn.predictor`.

    Predictors start random: train them in the phase "reconstruct" (`phase`, `reconstruction_loss`), then the backbone
    in "finetune", which is the phase of a fresh model and of inference. TypeError or ValueError on a model that is not
    supported.
    """
    vit = check_vit(model)
    if vit.patch_embed.grid_size is None:
        raise ValueError("Sparsifiner needs a model with a grid of patches: create it with an img_size")
    locations, changed = check_locations(vit, config.prune_after), type(vit)
    modules: dict[str, nn.Module] = {}
    if config.token_keep < 1:
        modules, changed = {"token_reducer": SparsifinerReducer(config, locations)}, reduced_class(vit)
    handle = open_door(vit, "sparsifiner", config, changed, modules, range(len(vit.blocks)))
    for block in vit.blocks:
        attn = block.attn
        grid = tuple(vit.patch_embed.grid_size)
        predictor = ConnectivityPredictor(attn.head_dim, attn.num_heads, grid, vit.num_prefix_tokens, config)
        weight = attn.qkv.weight
        attn.add_module("predictor", predictor.to(weight.device, weight.dtype))
        attn.phase = "finetune"
        attn.__class__ = SparsifinerAttention
        handle.on_remove(lambda attn=attn: _restore(attn))  # type: ignore[misc]
    return handle


def _restore(attn: Any) -> None:
    attn.__class__ = Attention
    del attn.predictor, attn.phase


register_method("sparsifiner", SparsifinerConfig, apply_sparsifiner)


def sparse_layers(model: Any) -> list[SparsifinerAttention]:
    """The attention modules of a model with Sparsifiner. TypeError on another model."""
    layers = [m for m in model.modules() if isinstance(m, SparsifinerAttention)]
    if not layers:
        raise TypeError(f"a model with Sparsifiner at work is needed, got {type(model).__name__}")
    return layers


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Which weights learn: in "reconstruct" the predictors, with dense attention; in "finetune" all others."""
    if phase not in ("reconstruct", "finetune"):
        raise ValueError(f"phase must be 'reconstruct' or 'finetune', got {phase!r}")
    for layer in sparse_layers(model):
        layer.phase = phase
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((".predictor." in name) == (phase == "reconstruct"))


@contextmanager
def phase(model: nn.Module, name: Phase) -> Iterator[None]:
    """`set_phase` for a while; then the phase and what learns are as before."""
    before = [layer.phase for layer in sparse_layers(model)]
    learns = [parameter.requires_grad for parameter in model.parameters()]
    set_phase(model, name)
    try:
        yield
    finally:
        for layer, old in zip(sparse_layers(model), before, strict=True):
            layer.phase = old
        for parameter, old_learns in zip(model.parameters(), learns, strict=True):
            parameter.requires_grad_(old_learns)


def resize_connectivity(model: nn.Module, grid: tuple[int, int]) -> None:
    """Fits all predictors to another grid of patches, as `model.set_input_size` does the positions."""
    for layer in sparse_layers(model):
        layer.predictor.resize(grid)


# ---- looking at it, and training it


@dataclass(frozen=True)
class LayerView:
    """What one layer sees: scores (B, H, N, T) of the predictor, attention (B, H, N, T) of the dense map."""

    scores: Float[Tensor, "B H N T"]
    attention: Float[Tensor, "B H N T"]


def look(model: Any, images: Float[Tensor, "B c h w"]) -> list[LayerView]:
    """Scores and dense attention of the patch queries of each layer; maps of queries x keys, so for small images.

    Of a pass in which no token is pruned.
    """
    views: list[LayerView] = []

    def see(attn: Any, inputs: tuple[Tensor, ...]) -> None:
        query, key, _ = project(attn, inputs[0])
        query = query[:, :, attn.predictor.num_prefix :]
        attention = (query @ key.mT * attn.scale).softmax(-1)
        views.append(LayerView(attn.predictor.scores(query, key, attn.phase), attention))

    hooks = [layer.register_forward_pre_hook(see) for layer in sparse_layers(model)]
    try:
        VisionTransformer.forward_features(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return views


def reconstruction_loss(model: nn.Module, images: Float[Tensor, "B c h w"]) -> Float[Tensor, ""]:
    """Squared distance of the predictors' scores from the dense attention (paper, equation 6), for "reconstruct".

    Summed over images, heads, queries and keys, mean over layers. The model's own dense attention is the teacher: in
    this phase its backbone is the teacher's.
    """
    views = look(model, images)
    return torch.stack([(view.scores - view.attention.detach()).square().sum() for view in views]).mean()


def connectivity(model: Any, images: Float[Tensor, "B c h w"], layer: int) -> Bool[Tensor, "B H N T"]:
    """Which keys each patch query of a layer keeps, in a pass in which no token is pruned."""
    chosen, found = sparse_layers(model)[layer], []

    def see(attn: Any, inputs: tuple[Tensor, ...]) -> None:
        query, key, _ = project(attn, inputs[0])
        found.append((*attn.lists(query, key), key.shape[2]))

    hook = chosen.register_forward_pre_hook(see)
    try:
        with torch.inference_mode():
            VisionTransformer.forward_features(model, images)
    finally:
        hook.remove()
    (indices, counts, (size, _), tokens) = found[0]
    return _as_mask(indices, counts, size, tokens, chosen.predictor.num_prefix)


def _as_mask(indices: Tensor, counts: Tensor | None, size: int, tokens: int, num_prefix: int) -> Tensor:
    held = torch.ones_like(indices, dtype=torch.bool)
    if counts is not None:
        held = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    blocks = -(-tokens // size)
    places = torch.where(held, indices, blocks).long()  # padding goes to a column of its own
    mask = torch.zeros((*indices.shape[:-1], blocks + 1), dtype=torch.bool, device=indices.device)
    mask = mask.scatter(-1, places, True)[..., :blocks]
    if size == 1:
        return mask
    mask = mask.repeat_interleave(size, -1)[..., :tokens].repeat_interleave(size, -2)[..., :tokens, :]
    return mask[..., num_prefix:, :]


def attention_macs(model: Any, config: SparsifinerConfig | None, *, basis_density: float = 1.0) -> int:
    """Multiply-adds of attention in all blocks, projections of the backbone apart; None for dense attention.

    Token-wise: prefix rows are dense, every other row has its kept keys, and the predictor projects, multiplies and
    expands. basis_density: share of the basis above the threshold.
    """
    attn, prefix = model.blocks[0].attn, model.num_prefix_tokens
    rows = model.patch_embed.num_patches
    tokens, width, heads = prefix + rows, attn.attn_dim, attn.num_heads
    if config is None or config.keep_rate == 1:
        return len(model.blocks) * 2 * tokens**2 * width
    rank, narrow = max(tokens // config.reduce_tokens, 1), max(attn.head_dim // config.reduce_channels, 1)
    predictor = heads * narrow * (tokens * rank + rows * rank)
    if config.reduce_channels > 1:
        predictor += heads * narrow * (rows + tokens) * attn.head_dim
    predictor += round(heads * rows * tokens * min(config.coefficients, rank) * basis_density)
    kept = 2 * rows * num_kept(config, tokens) * width
    return len(model.blocks) * (2 * prefix * tokens * width + kept + predictor)
