"""The methods that ours are compared with, against loops that follow their papers, and through the suite of doors."""

import pytest
import torch

from vit_efficient.baselines import (
    DynamicViTConfig,
    DynamicViTLoss,
    EViTConfig,
    FixedTokensConfig,
    ToMeConfig,
    apply_dynamicvit,
    apply_evit,
    apply_fixed_tokens,
    apply_tome,
    dynamicvit_forward,
    keep_ratio_loss,
)
from vit_efficient.testing import KINDS, DoorTests, images, tiny_vit
from vit_efficient.token_maps import draw_token_maps, kept_patches
from vit_efficient.token_reduction import token_counts


class TestRandomDoor(DoorTests):
    compiled = False  # the engine is the same as ToMe's

    def apply(self, model):
        return apply_fixed_tokens(model, FixedTokensConfig(keep_ratio=0.6))

    def neutral(self, model):
        return apply_fixed_tokens(model, FixedTokensConfig(keep_ratio=1.0))


class TestEViTDoor(DoorTests):
    compiled = False  # the engine is the same as ToMe's

    def apply(self, model):
        return apply_evit(model, EViTConfig(keep_ratio=0.6))

    def neutral(self, model):
        return apply_evit(model, EViTConfig(keep_ratio=1.0))


class TestToMeDoor(DoorTests):
    def apply(self, model):
        return apply_tome(model, ToMeConfig(r=5))

    def neutral(self, model):
        return apply_tome(model, ToMeConfig(r=0))


class TestDynamicViTDoor(DoorTests):
    compiled = False  # the engine is the same as ToMe's
    trained = True

    def apply(self, model):
        torch.manual_seed(3)
        return apply_dynamicvit(model, DynamicViTConfig(keep_ratio=0.6))

    def neutral(self, model):
        return apply_dynamicvit(model, DynamicViTConfig(keep_ratio=1.0))

    def test_checkpointing_changes_nothing(self):
        """Decisions are drawn: the draws are made alike, as timm's checkpointing does."""
        torch.manual_seed(0)
        model = self.changed().train()
        for checkpointing in (False, True):
            model.zero_grad()
            model.set_grad_checkpointing(checkpointing)
            torch.manual_seed(4)
            model(images(2)).square().mean().backward()
            if not checkpointing:
                wanted = model.blocks[0].attn.qkv.weight.grad.clone()
        self.same(model.blocks[0].attn.qkv.weight.grad, wanted)


def attention_of(block, x):
    """Attention weights and keys (H, t, ...) of one image, written out."""
    attn, t = block.attn, x.shape[0]
    q, k, v = attn.qkv(block.norm1(x)).reshape(t, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
    return attn.q_norm(q), attn.k_norm(k), v


def finish(block, x, weights, value):
    out = (weights @ value).transpose(0, 1).reshape(x.shape[0], -1)
    return x + block.ls1(block.attn.proj(out))


@pytest.mark.parametrize("kind", KINDS)
def test_tome_is_the_loop_over_pairs(kind):
    model = tiny_vit(kind).double()
    apply_tome(model, ToMeConfig(r=5))
    image, P = images(1).double(), model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))[0]
    size = torch.ones(x.shape[0], dtype=torch.float64)
    for block in model.blocks:
        q, k, v = attention_of(block, x)
        weights = (q @ k.mT / block.attn.head_dim**0.5 + size.log()).softmax(-1)
        x = finish(block, x, weights, v)
        metric = torch.nn.functional.normalize(k.mean(0), dim=-1)
        a = [i for i in range(x.shape[0]) if i % 2 == 0 and i >= P]
        b = [i for i in range(x.shape[0]) if i % 2 == 1 and i >= P]
        proposals = []
        for i in a:
            likes = [(metric[i] @ metric[j]).item() for j in b]
            proposals.append((max(likes), i, b[likes.index(max(likes))]))
        merged = sorted(proposals, reverse=True)[:5]
        total, new_size = x * size[:, None], size.clone()
        for _, i, j in merged:
            total[j] += x[i] * size[i]
            new_size[j] += size[i]
        order = [*range(P), *[i for i in a if i not in {m[1] for m in merged}], *b]
        x, size = (total / new_size[:, None])[order], new_size[order]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    wanted = model.forward_head(model.norm(x)[None])
    torch.testing.assert_close(model(image), wanted, atol=1e-8, rtol=1e-8)
    assert token_counts(model, image).tolist() == [[31, 26, 21, 16]]


def test_evit_is_the_loop_over_patches():
    model = tiny_vit("registers").double()
    apply_evit(model, EViTConfig(keep_ratio=0.5, locations=(1, 2)))
    image, P = images(1).double(), 5
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))[0]
    for index, block in enumerate(model.blocks):
        q, k, v = attention_of(block, x)
        weights = (q @ k.mT / block.attn.head_dim**0.5).softmax(-1)
        x = finish(block, x, weights, v)
        if index in (1, 2):
            score = weights[:, 0, P:].mean(0)
            best = sorted(score.argsort(descending=True)[: -(-len(score) // 2)].tolist())
            rest = [i for i in range(len(score)) if i not in best]
            fused = sum(score[i] * x[P + i] for i in rest)
            x = torch.cat([x[:P], x[P:][best], fused[None]])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    torch.testing.assert_close(model(image), model.forward_head(model.norm(x)[None]), atol=1e-8, rtol=1e-8)
    assert token_counts(model, image).tolist() == [[36, 19, 11, 11]]


def test_without_fusing_evit_drops():
    model = tiny_vit()
    apply_evit(model, EViTConfig(keep_ratio=0.5, locations=(1,), fuse=False))
    kept = kept_patches(model, images(3))
    assert kept[0].all()
    assert kept[1].sum((1, 2)).tolist() == [18, 18, 18]


def test_tome_schedules():
    assert ToMeConfig(r=4).schedule(3) == (4, 4, 4)
    assert ToMeConfig(r=4, inflect=-1).schedule(3) == (8, 4, 0)
    assert ToMeConfig(r=4, inflect=1).schedule(3) == (0, 4, 8)


def test_tome_without_proportional_attention_differs():
    logits = []
    for proportional in (True, False):
        model = tiny_vit()
        apply_tome(model, ToMeConfig(r=5, proportional=proportional))
        logits.append(model(images(2)))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_merged_positions_show_their_token():
    model = tiny_vit()
    apply_tome(model, ToMeConfig(r=8))
    features = model.forward_features(images(1))[0, 1:]
    assert len(features.unique(dim=0)) == 6  # 36 less 8, 8, 8 and then the half of 12 that may propose


def test_random_choice_is_the_same_in_any_batch_and_another_with_another_seed():
    kept = []
    for seed in (0, 0, 1):
        model = tiny_vit()
        apply_fixed_tokens(model, FixedTokensConfig(keep_ratio=0.5, seed=seed))
        kept.append(kept_patches(model, images(2))[3])
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_uniform_choice_is_evenly_spaced():
    model = tiny_vit()
    handle = apply_fixed_tokens(model, FixedTokensConfig(keep_ratio=0.25, choice="uniform", locations=(2,)))
    assert handle.name == "uniform_tokens"
    assert kept_patches(model, images(1))[2].flatten().nonzero()[:, 0].tolist() == list(range(0, 36, 4))


def test_dynamicvit_learns_its_ratio():
    torch.manual_seed(0)
    model, x = tiny_vit(), images(8)
    apply_dynamicvit(model, DynamicViTConfig(keep_ratio=0.8))
    optimizer = torch.optim.Adam(model.token_reducer.parameters(), lr=3e-3)

    def shares():
        return torch.stack([keep.mean() for keep in dynamicvit_forward(model, x).keeps])

    wanted = torch.tensor([0.8, 0.64, 0.512])
    before = (shares() - wanted).abs().max()
    for _ in range(30):
        optimizer.zero_grad()
        keep_ratio_loss(dynamicvit_forward(model, x).keeps, 0.8).backward()
        optimizer.step()
    assert (shares() - wanted).abs().max() < 0.12 < before
    assert token_counts(model.eval(), x)[0].tolist() == [36, 28, 23, 18]


def test_dynamicvit_loss_is_its_four_terms():
    torch.manual_seed(0)
    model, teacher, x, labels = tiny_vit(), tiny_vit(seed=1), images(2), torch.tensor([1, 4])
    apply_dynamicvit(model, DynamicViTConfig(keep_ratio=0.7))
    output = dynamicvit_forward(model, x)
    features = teacher.forward_features(x)
    logits = teacher.forward_head(features)
    p, q = logits.softmax(-1), output.logits.softmax(-1)
    kept = output.keeps[-1] > 0.5
    far = ((output.features - features)[:, 1:][kept] ** 2).mean()
    ratio = sum(((k.mean(1) - 0.7 ** (s + 1)) ** 2).mean() for s, k in enumerate(output.keeps)) / 3
    wanted = -q[[0, 1], labels].log().mean() + 2 * ratio + 0.5 * (p * (p / q).log()).sum() / 2 + 0.5 * far
    torch.testing.assert_close(DynamicViTLoss(model)(output, labels, logits, features), wanted)


def test_token_maps_are_drawn(tmp_path):
    model = tiny_vit()
    apply_fixed_tokens(model, FixedTokensConfig(keep_ratio=0.5))
    draw_token_maps(model, images(3), tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TypeError, match="token method at work, got VisionTransformer"):
        kept_patches(tiny_vit(), images(1))


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (FixedTokensConfig, {"keep_ratio": 0}, "keep_ratio"),
        (FixedTokensConfig, {"choice": "best"}, "choice"),
        (EViTConfig, {"keep_ratio": 1.5}, "keep_ratio"),
        (DynamicViTConfig, {"keep_ratio": -1}, "keep_ratio"),
        (ToMeConfig, {"r": -1}, "r must be"),
        (ToMeConfig, {"inflect": 2}, "inflect"),
    ],
)
def test_settings_out_of_range_are_refused(config, values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)
