"""Runs a timm ViT on ever fewer tokens, each image with its own number, whatever method decides which.

A method is a `Reducer`: it sees the tokens before each block and between attention and MLP, and drops or merges some.
The engine does the rest. Images of a batch keep different numbers of tokens; they are grouped by that number, rounded
up to a multiple of `rounding`, and padding inside a group is masked out of attention, so that an image's logits do not
depend on its neighbours and hardly any work is done on padding. Every grid position remembers which token stands for
it, or the value it had when it was dropped, so feature maps keep their shape: `forward_intermediates`, `features_only`
and dense heads work on.

Decided here: with average pooling, dropped positions count as the mean of those kept, which is the mean over these.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vit_efficient.blocks import close_attention, mlp_half, project, split_heads


@dataclass(frozen=True)
class Tokens:
    """Tokens of some images of a batch that are worked on together.

    x: (b, P + n, C), P prefix tokens (class, distillation, registers), then n patch tokens.
    owner: (b, N), for each of N grid positions the patch token that stands for it, -1 where it was dropped.
    dropped: (b, N, C), what a position held when it was dropped; None where nobody asks for feature maps.
    valid: (b, n), False on padding; None where there is none.
    size: (b, n), how many patches a token stands for; None where nothing is merged.
    score: (b, n), what the method left for its next decision; None otherwise.
    image: (b,), index in the batch.
    num_prefix: P.
    rope: (N, D2), rotary positions of the grid; None where the host has none.
    """

    x: Float[Tensor, "b t C"]
    owner: Int[Tensor, "b N"]
    image: Int[Tensor, "b"]
    num_prefix: int
    dropped: Float[Tensor, "b N C"] | None = None
    valid: Bool[Tensor, "b n"] | None = None
    size: Float[Tensor, "b n"] | None = None
    score: Float[Tensor, "b n"] | None = None
    rope: Float[Tensor, "N D2"] | None = None

    @property
    def num_patches(self) -> int:
        """Patch tokens, padding included."""
        return self.x.shape[1] - self.num_prefix

    def present(self) -> Bool[Tensor, "b n"]:
        """Which patch tokens are real."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.x.shape[0], self.num_patches, dtype=torch.bool, device=self.x.device)

    def counts(self) -> Int[Tensor, "b"]:
        """Real patch tokens of each image."""
        return self.present().sum(1)

    def places(self) -> Int[Tensor, "b n"]:
        """Grid position of each patch token; of the last one it stands for, where tokens were merged."""
        positions = torch.arange(self.owner.shape[1], device=self.owner.device).expand_as(self.owner)
        there = torch.where(self.owner >= 0, self.owner, self.num_patches)  # the dropped go to a column of their own
        return there.new_zeros(self.x.shape[0], self.num_patches + 1).scatter(1, there, positions)[:, :-1]

    def turns(self) -> Tensor | None:
        """Rotary positions of the patch tokens, (n, D2) or (b, 1, n, D2)."""
        if self.rope is None or self.num_patches == self.rope.shape[0]:
            return self.rope
        return self.rope[self.places()][:, None]

    def grid(self) -> Float[Tensor, "b N C"]:
        """What each grid position holds."""
        patches = self.x[:, self.num_prefix :]
        held = patches.gather(1, _wide(self.owner.clamp(min=0), patches))
        if self.dropped is None:
            return held
        return torch.where(self.owner[..., None] >= 0, held, self.dropped)

    def take(self, rows: Tensor, width: int) -> "Tokens":
        """Some of the images, their first `width` patch tokens."""
        valid, size, score = (None if t is None else t[rows, :width] for t in (self.valid, self.size, self.score))
        if valid is not None and bool(valid.all()):
            valid = None
        dropped = None if self.dropped is None else self.dropped[rows]
        x, owner, image = self.x[rows, : self.num_prefix + width], self.owner[rows], self.image[rows]
        return Tokens(x, owner, image, self.num_prefix, dropped, valid, size, score, self.rope)


def drop_tokens(tokens: Tokens, keep: Bool[Tensor, "b n"]) -> Tokens:
    """Only the patch tokens to keep, in their order, padded to the most that an image keeps."""
    keep = keep & tokens.present()
    counts = keep.sum(1)
    width = int(counts.max()) if counts.numel() else 0
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    rank = torch.where(keep, keep.cumsum(1) - 1, -1)
    owner = torch.where(tokens.owner >= 0, rank.gather(1, tokens.owner.clamp(min=0)), -1)
    dropped = None if tokens.dropped is None else tokens.grid()
    valid = torch.arange(width, device=keep.device) < counts[:, None]
    patches = tokens.x[:, tokens.num_prefix :]
    x = torch.cat([tokens.x[:, : tokens.num_prefix], patches.gather(1, _wide(order, patches))], 1)
    size = None if tokens.size is None else tokens.size.gather(1, order)
    score = None if tokens.score is None else tokens.score.gather(1, order)
    return replace(tokens, x=x, owner=owner, dropped=dropped, valid=valid, size=size, score=score)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, like.shape[2])


def group_by_count(tokens: Tokens, rounding: int) -> list[Tokens]:
    """The images in groups of about the same number of tokens, so that little of a group is padding."""
    if tokens.valid is None or not tokens.image.numel():
        return [tokens]
    counts = tokens.counts()
    widths = (counts + rounding - 1).div(rounding, rounding_mode="floor").mul(rounding)
    groups = []
    for width in widths.unique().tolist():
        rows = (widths == width).nonzero()[:, 0]
        groups.append(tokens.take(rows, int(counts[rows].max())))
    return groups


@dataclass(frozen=True)
class Seen:
    """What a method asked to see of a block's attention; None where it did not ask.

    class_attention: (b, H, n), attention of the class token to each patch token.
    context_norm: (b, H, n), norm of each patch token's attention output before the projection.
    keys: (b, H, n, D), of the patch tokens.
    """

    class_attention: Float[Tensor, "b H n"] | None = None
    context_norm: Float[Tensor, "b H n"] | None = None
    keys: Float[Tensor, "b H n D"] | None = None


class Reducer(nn.Module):
    """A method that drops or merges tokens. Subclasses override what they need; this one keeps everything."""

    weighs_size = True
    """Whether attention counts a merged token as often as the patches it stands for."""

    def wants(self, block: int) -> frozenset[str]:  # noqa: ARG002
        """Which fields of `Seen` the method needs of this block."""
        return frozenset()

    def before_block(self, block: int, tokens: Tokens) -> Tokens:  # noqa: ARG002
        """The tokens that go into the block."""
        return tokens

    def attend(
        self,
        tokens: Tokens,  # noqa: ARG002
        attn: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Attention (b, H, t, D) of the tokens; `attn` is timm's module, `bias` what `attention_bias` gave."""
        return dense_attention(attn, query, key, value, bias)

    def after_attention(self, block: int, tokens: Tokens, seen: Seen) -> Tokens:  # noqa: ARG002
        """The tokens that go on from attention to the MLP."""
        return tokens


@dataclass(frozen=True)
class Reduced:
    """What a run gives. features: (B, P + N, C), normalised, None if not asked for. prefix: (B, P, C), normalised.

    counts: (B, L), patch tokens that went into the MLP of each block. maps: feature maps (B, P + N, C) by block.
    """

    prefix: Float[Tensor, "B P C"]
    features: Float[Tensor, "B t C"] | None
    counts: Int[Tensor, "B L"]
    maps: dict[int, Float[Tensor, "B t C"]] = field(default_factory=dict)
    kept: dict[int, Bool[Tensor, "B N"]] = field(default_factory=dict)


def embed(model: Any, images: Float[Tensor, "B c h w"]) -> tuple[Float[Tensor, "B t C"], Tensor | None]:
    """Patches, positions and prefix tokens, as timm's own forward pass makes them, and the rotary positions if any."""
    if isinstance(model, Eva):
        x, rope = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(x), rope
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))), None


def run_reduced(
    model: "TokenReduction", images: Float[Tensor, "B c h w"], *, maps: tuple[int, ...] = (), features: bool = True
) -> Reduced:
    """All blocks, with the model's reducer at work; `maps` are the blocks whose feature maps are wanted."""
    x, rope = embed(model, images)
    B, P = x.shape[0], model.num_prefix_tokens
    N = x.shape[1] - P
    track = features or bool(maps)
    every = torch.arange(N, device=x.device).expand(B, N)
    dropped = torch.zeros_like(x[:, P:]) if track else None
    groups = [Tokens(x, every, torch.arange(B, device=x.device), P, dropped, rope=rope)]
    counts, kept, found = [], {}, {}
    for index, block in enumerate(model.blocks):
        groups = [part for group in groups for part in _before(model, index, group)]
        groups = _run_block(model, index, block, groups)
        counts.append(_together(groups, [group.counts() for group in groups], B))
        if track:
            kept[index] = _together(groups, [group.owner >= 0 for group in groups], B)
        if index in maps:
            whole = [torch.cat([group.x[:, :P], group.grid()], 1) for group in groups]
            found[index] = _together(groups, whole, B)
    prefix = model.norm(_together(groups, [group.x[:, :P] for group in groups], B))
    final = _together(groups, [_final_grid(model, group) for group in groups], B) if features else None
    final = None if final is None else torch.cat([prefix, final], 1)
    return Reduced(prefix, final, torch.stack(counts, 1), found, kept)


def _before(model: "TokenReduction", index: int, tokens: Tokens) -> list[Tokens]:
    after = model.token_reducer.before_block(index, tokens)
    return [after] if after is tokens else group_by_count(after, model.token_rounding)


def _together(groups: list[Tokens], parts: list[Tensor], batch: int) -> Tensor:
    if len(groups) == 1:
        return parts[0]
    out = parts[0].new_empty((batch, *parts[0].shape[1:]))
    return out.index_copy(0, torch.cat([group.image for group in groups]), torch.cat(parts))


def _final_grid(model: "TokenReduction", tokens: Tokens) -> Tensor:
    grid = model.norm(tokens.grid())
    if model.global_pool != "avg":
        return grid
    stands = (tokens.owner >= 0)[..., None]
    mean = torch.where(stands, grid, 0).sum(1, keepdim=True) / stands.sum(1, keepdim=True).clamp(min=1)
    return torch.where(stands, grid, mean)


def _run_block(model: "TokenReduction", index: int, block: Any, groups: list[Tokens]) -> list[Tokens]:
    if len(groups) > 1 and model.training:  # drop path draws once for an image, so rows of images stay together
        return [done for group in groups for done in _run_block(model, index, block, [group])]
    reducer = model.token_reducer
    saving = model.grad_checkpointing and torch.is_grad_enabled()
    biases = [attention_bias(group if reducer.weighs_size else replace(group, size=None)) for group in groups]
    attends = [partial(reducer.attend, group) for group in groups]
    turns = [group.turns() for group in groups]
    arguments: tuple[Any, ...] = (
        block,
        [group.x for group in groups],
        biases,
        turns,
        reducer.wants(index),
        groups[0].num_prefix,
        attends,
    )
    rows, seen = checkpoint(attention_halves, *arguments) if saving else attention_halves(*arguments)
    parts = unpack(rows, [group.x for group in groups])
    groups = [replace(group, x=part) for group, part in zip(groups, parts, strict=True)]
    groups = [reducer.after_attention(index, group, saw) for group, saw in zip(groups, seen, strict=True)]
    if any(group.x is not part for group, part in zip(groups, parts, strict=True)):
        rows = pack([group.x for group in groups])
    rows = checkpoint(mlp_half, block, rows) if saving else mlp_half(block, rows)
    parts = unpack(rows, [group.x for group in groups])
    return [replace(group, x=part) for group, part in zip(groups, parts, strict=True)]


def pack(groups: list[Tensor]) -> Tensor:
    """The tokens (b, t, C) of several groups of images as rows under each other; of one group, as they are."""
    return groups[0] if len(groups) == 1 else torch.cat([x.flatten(0, 1) for x in groups])


def unpack(rows: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of packed rows with the images and tokens of `like`."""
    if len(like) == 1:
        return [rows]
    parts = rows.split([x.shape[0] * x.shape[1] for x in like])
    return [part.unflatten(0, x.shape[:2]) for part, x in zip(parts, like, strict=True)]


def attention_bias(tokens: Tokens) -> Tensor | None:
    """What attention adds to its scores, or the keys it may see (boolean): padding, and the size of merged tokens."""
    if tokens.valid is None and tokens.size is None:
        return None
    prefix = tokens.num_prefix
    if tokens.size is None:
        return nn.functional.pad(tokens.present(), (prefix, 0), value=True)[:, None, None]
    bias = tokens.size.log().masked_fill(~tokens.present(), -torch.inf)
    return nn.functional.pad(bias, (prefix, 0))[:, None, None].to(tokens.x.dtype)


def dense_attention(attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention over all tokens with what `attention_bias` gave, and the dropout of timm's module."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    # timm divides by the root of head_dim too, in its fused path by leaving the scale out
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


def attention_halves(
    block: Any,
    groups: list[Float[Tensor, "_b _t C"]],
    biases: list[Tensor | None],
    turns: list[Tensor | None],
    wants: frozenset[str],
    num_prefix: int,
    attends: list[Callable[..., Tensor]],
) -> tuple[Tensor, list[Seen]]:
    """x + attention, as timm's Block has it, and what was asked for, of groups of images that differ in length.

    Norms and linear maps take the rows of all groups at once, attention a group at a time. Returns packed rows.
    biases, turns: of each group, what `attention_bias` and `Tokens.turns` gave.
    attends: (attn, query, key, value, bias) -> attention before the projection.
    """
    attn, rows = block.attn, pack(groups)
    normed = block.norm1(rows)
    contexts, seen = [], []
    parts = unpack(project(attn, normed), groups)
    for qkv, bias, turn, attend in zip(parts, biases, turns, attends, strict=True):
        query, key, value = split_heads(attn, qkv, num_prefix, turn)
        context = attend(attn, query, key, value, bias)
        contexts.append(context.transpose(1, 2).flatten(2))
        seen.append(_look(query, key, context, bias, wants, num_prefix))
    return rows + close_attention(block, normed, pack(contexts)), seen


def _look(
    query: Tensor, key: Tensor, context: Tensor, bias: Tensor | None, wants: frozenset[str], num_prefix: int
) -> Seen:
    attention = norm = None
    if "class_attention" in wants:
        attention = class_attention(query, key, bias)[..., num_prefix:]
    if "context_norm" in wants:
        norm = context[:, :, num_prefix:].norm(dim=-1)
    return Seen(attention, norm, key[:, :, num_prefix:] if "keys" in wants else None)


def class_attention(
    query: Float[Tensor, "b H t D"], key: Float[Tensor, "b H t D"], bias: Tensor | None
) -> Float[Tensor, "b H t"]:
    """The class token's row of the attention map; the others are not computed."""
    scores = (query[:, :, :1] * query.shape[-1] ** -0.5) @ key.mT
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(-1)[:, :, 0]


class TokenReduction(nn.Module):
    """The passes of a timm ViT whose `token_reducer` decides which tokens go on; to be mixed into a class of timm.

    token_reducer: the method. token_rounding: numbers of tokens are rounded up to multiples of this inside a batch.
    """

    token_reducer: Reducer
    token_rounding: int = 8
    blocks: Any
    norm: Any
    patch_embed: Any
    forward_head: Any
    num_prefix_tokens: int
    global_pool: str
    grad_checkpointing: bool

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, P + N, C), as timm's; positions that were dropped hold what they held then."""
        _refuse_masks(attn_mask, is_causal)
        features = run_reduced(self, x).features
        if features is None:
            raise RuntimeError("features were asked for")
        return features

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Logits (B, classes)."""
        _refuse_masks(attn_mask, is_causal)
        if self.global_pool == "token":
            return self.forward_head(run_reduced(self, x, features=False).prefix)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,  # noqa: ARG002 - timm's signature; the blocks after the last map are cheap
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's; maps keep the whole grid."""
        _refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt}")
        take, _ = feature_take_indices(len(self.blocks), indices)
        run = run_reduced(self, x, maps=tuple(take))
        whole = [self.norm(run.maps[i]) if norm else run.maps[i] for i in take]
        prefixes = [m[:, : self.num_prefix_tokens] for m in whole]
        maps = [m[:, self.num_prefix_tokens :] for m in whole]
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            maps = [m.mT.reshape(m.shape[0], -1, height, width).contiguous() for m in maps]
        if output_dict:
            extra = {"image_intermediates_prefix": prefixes} if return_prefix_tokens else {}
            features = {} if intermediates_only else {"image_features": run.features}
            return {"image_intermediates": maps, **extra, **features}
        pairs: list[Any] = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return pairs if intermediates_only else (run.features, pairs)


class ReducedViT(TokenReduction, VisionTransformer):
    """A ViT whose tokens are reduced. Models get this class, and the two below, by a door, never by name."""


class ReducedEva(TokenReduction, Eva):
    """The same for Eva."""


class ReducedDistilledViT(ReducedViT, VisionTransformerDistilled):
    """The same for DeiT with a distillation token."""


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal are not supported while tokens are dropped or merged")


def reduced_class(model: nn.Module) -> type[TokenReduction]:
    """The class that a checked model is given."""
    if isinstance(model, Eva):
        return ReducedEva
    return ReducedDistilledViT if isinstance(model, VisionTransformerDistilled) else ReducedViT


def token_counts(model: nn.Module, images: Float[Tensor, "B c h w"]) -> Int[Tensor, "B L"]:
    """Patch tokens that went into the MLP of each block, per image. TypeError on a model without a token method."""
    if not isinstance(model, TokenReduction):
        raise TypeError(f"token_counts needs a model with a token method at work, got {type(model).__name__}")
    return run_reduced(model, images, features=False).counts
