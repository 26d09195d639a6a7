"""AS-ViT against the paper's formulas, and through the suite of doors."""

from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vit_efficient.adaptive_sparsity import (
    AdaptiveSparsityConfig,
    AdaptiveSparsityLoss,
    apply_adaptive_sparsity,
    at_least,
    fit_thresholds,
    masked_forward,
    model_macs,
    scale_thresholds,
    straight_through,
    token_score,
)
from vit_efficient.baselines import apply_tome
from vit_efficient.door import load_method, save_method
from vit_efficient.masked_training import policy_softmax
from vit_efficient.testing import EVAS, KINDS, DoorTests, images, tiny_eva, tiny_vit
from vit_efficient.token_reduction import token_counts

CONFIG = AdaptiveSparsityConfig(locations=(1, 2, 3), thresholds=(0.0028, 0.0036, 0.0042))


class TestAdaptiveSparsityDoor(DoorTests):
    trained = True

    def apply(self, model):
        return apply_adaptive_sparsity(model, CONFIG)

    def neutral(self, model):
        return apply_adaptive_sparsity(model, AdaptiveSparsityConfig(locations=(1, 2, 3), thresholds=(-1.0,) * 3))


def pruned(kind="plain", config=CONFIG, **changes):
    model = tiny_vit(kind, **changes)
    apply_adaptive_sparsity(model, config)
    return model


def one_by_one(model, image):
    """Scores, counts and logits of one image in float64: the whole attention map, tokens removed in a loop."""
    P, locations = model.num_prefix_tokens, model.token_reducer.locations
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    counts, score, scores = [], None, []
    for index, block in enumerate(model.blocks):
        if index in locations:
            threshold = model.token_reducer.thresholds[locations.index(index)] * 196 / 36
            keep = score > threshold
            if not keep.any():
                keep = score == score.max()
            x = torch.cat([x[:, :P], x[:, P:][:, keep]], 1)
        attn, t = block.attn, x.shape[1]
        q, k, v = attn.qkv(block.norm1(x)).reshape(1, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        weights = (q @ k.mT / attn.head_dim**0.5).softmax(-1)
        context = weights @ v
        norm = context[0, :, P:].norm(dim=-1)
        score = (norm / (norm.sum(0) + 1e-8) * weights[0, :, 0, P:]).sum(0)
        scores.append(score)
        x = x + block.ls1(attn.proj(context.transpose(1, 2).reshape(1, t, -1)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        counts.append(t - P)
    return model.forward_head(model.norm(x))[0], counts, scores


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_pass_is_the_loop_over_images(kind):
    model, x = pruned(kind).double(), images(5).double()
    logits, counts = model(x), token_counts(model, x)
    for image, given, count in zip(x, logits, counts, strict=True):
        wanted, wanted_counts, _ = one_by_one(model, image)
        assert count.tolist() == wanted_counts
        torch.testing.assert_close(given, wanted, atol=1e-8, rtol=1e-8)
    assert len({tuple(row) for row in counts.tolist()}) > 1, "all images keep the same"


def keep_output(seen, _module, _given, output):
    seen.append(output)


def keep_input(seen, _module, given, _output):
    seen.append(given[0])


def eva_one_by_one(model, image):
    """Counts and normalised tokens of one image by timm's own blocks, told the positions of the patches left."""
    P, locations = model.num_prefix_tokens, model.token_reducer.locations
    x, rope = model._pos_embed(model.patch_embed(image[None]))
    x, counts, score = model.norm_pre(x), [], None
    for index, block in enumerate(model.blocks):
        if index in locations:
            keep = score > model.token_reducer.thresholds[locations.index(index)] * 196 / 36
            keep = keep if keep.any() else score == score.max()
            x = torch.cat([x[:, :P], x[:, P:][:, keep]], 1)
            rope = None if rope is None else rope[keep]
        seen = []
        block.attn.fused_attn = False
        hooks = [block.attn.attn_drop.register_forward_hook(partial(keep_output, seen))]
        hooks.append(block.attn.norm.register_forward_hook(partial(keep_input, seen)))
        x = block(x, rope=rope)
        for hook in hooks:
            hook.remove()
        weights, context = seen
        norm = context[0, P:].unflatten(-1, (3, -1)).norm(dim=-1).T
        score = (norm / (norm.sum(0) + 1e-8) * weights[0, :, 0, P:]).sum(0)
        counts.append(x.shape[1] - P)
    return model.norm(x), counts


EVA_THRESHOLDS = {"eva": (0.002, 0.003, 0.004), "eva02": (0.002, 0.003, 0.004), "half_turns": (0.002, 0.003, 0.004)}


def pruned_eva(kind, **changes):
    model = tiny_eva(kind, **changes)
    config = AdaptiveSparsityConfig(locations=(1, 2, 3), thresholds=EVA_THRESHOLDS[kind])
    return model, apply_adaptive_sparsity(model, config)


@pytest.mark.parametrize("kind", EVAS)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_on_eva_it_is_the_loop_over_images(kind, pool):
    model, handle = pruned_eva(kind, global_pool=pool)
    model, x = model.double(), images(5).double()
    logits, counts = model(x), token_counts(model, x)
    for image, given, count in zip(x, logits, counts, strict=True):
        features, wanted_counts = eva_one_by_one(model, image)
        assert count.tolist() == wanted_counts
        torch.testing.assert_close(given, model.forward_head(features)[0], atol=1e-8, rtol=1e-8)
    assert len({tuple(row) for row in counts.tolist()}) > 1, "all images keep the same"
    handle.remove()
    assert not torch.equal(model(x), logits)


@pytest.mark.parametrize("kind", EVAS)
def test_eva_comes_back_and_trains_as_it_prunes(kind):
    x, host = images(3), tiny_eva(kind, global_pool="token")
    before = host(x)
    with apply_adaptive_sparsity(host, AdaptiveSparsityConfig(locations=(1, 2, 3), thresholds=(-1.0,) * 3)):
        torch.testing.assert_close(host(x), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(host(x), before)
    model, _ = pruned_eva(kind, global_pool="token")
    masked, logits = masked_forward(model, x), model(x)
    torch.testing.assert_close(masked.logits, logits, atol=2e-4, rtol=2e-4)
    counts = token_counts(model, x)
    assert [keep.sum(1).int().tolist() for keep in masked.keeps] == [counts[:, place].tolist() for place in (1, 2, 3)]
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(3, 48, 6, 6)] * 4
    torch.testing.assert_close(model.forward_head(final), logits, atol=1e-5, rtol=1e-5)
    with FlopCounterMode(display=False) as counter:
        model(x[:1])
    counted = counter.get_total_flops() / 2 - model.head.weight.numel()
    assert model_macs(model, token_counts(model, x[:1])).item() == pytest.approx(counted, rel=0.01)


def test_evas_it_is_not_right_on_are_refused():
    for changes, message in (
        ({"class_token": False, "num_reg_tokens": 1}, "no class token"),
        ({"use_post_norm": True}, "blocks of EvaBlockPostNorm"),
        ({"global_pool": "map"}, "an attention pool"),
        ({"patch_drop_rate": 0.5}, "patch dropout"),
        ({"use_rot_pos_emb": True, "rope_type": "mixed"}, "learned by block"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            apply_adaptive_sparsity(tiny_eva("eva", **changes))
    with pytest.raises(TypeError, match="Eva is not supported; supported is timm's VisionTransformer"):
        apply_tome(tiny_eva("eva02"))


def test_score_lies_between_the_heads():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 3, 7, generator=generator, dtype=torch.float64)
    norm = torch.rand(2, 3, 7, generator=generator, dtype=torch.float64) + 0.1
    score = token_score(attention, norm)
    assert bool((score > attention.amin(1) - 1e-7).all() & (score < attention.amax(1) + 1e-7).all())
    torch.testing.assert_close(token_score(attention, torch.ones_like(norm)), attention.mean(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [*KINDS, "average"])
def test_masked_training_pass_gives_the_pruned_logits(kind):
    changes = {"global_pool": "avg"} if kind == "average" else {}
    model, x = pruned("plain" if kind == "average" else kind, **changes), images(4)
    masked = masked_forward(model, x)
    # the paper's epsilon weighs more where a dropped key had the largest score, and the average sees every row
    tolerance = 2e-3 if kind == "average" else 1e-4
    torch.testing.assert_close(masked.logits, model(x), atol=tolerance, rtol=tolerance)
    counts = token_counts(model, x)
    for place, keep in zip(CONFIG.locations, masked.keeps, strict=True):
        assert keep.sum(1).int().tolist() == counts[:, place].tolist()
        assert set(keep.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(model.train()(x), masked.logits)


def test_raising_a_threshold_keeps_fewer():
    model, x = pruned(), images(6)
    counts = []
    for factor in (0.5, 1.0, 1.5, 3.0):
        model.token_reducer.thresholds.data = torch.tensor([0.0028 * factor, -1.0, -1.0])
        counts.append(token_counts(model, x)[:, 1])
    for fewer, more in zip(counts[1:], counts[:-1], strict=True):
        assert bool((fewer <= more).all())
    assert counts[-1].sum() < counts[0].sum()


@pytest.mark.parametrize(("target", "sign"), [(0.2, -1), (1.0, 1)])
def test_budget_pushes_thresholds_the_right_way(target, sign):
    model = pruned(
        config=AdaptiveSparsityConfig(locations=(1, 2, 3), thresholds=(0.0025, 0.003, 0.0035), temperature=1e3)
    )
    loss = AdaptiveSparsityLoss(model.train(), target)(masked_forward(model, images(4)), torch.arange(4))
    loss.budget.backward()
    gradient = model.token_reducer.thresholds.grad
    assert bool((gradient * sign >= 0).all())
    assert gradient.abs().max() > 0
    assert 0.2 < loss.ratio < 1


def test_straight_through_has_the_value_of_a_step_and_the_slope_of_a_sigmoid():
    score = torch.tensor([[-1e-4, 0.0, 2e-4]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    keep = straight_through(score, threshold, 1e4)
    assert keep.tolist() == [[0.0, 0.0, 1.0]]
    keep.sum().backward()
    soft = torch.sigmoid(1e4 * score.detach())
    torch.testing.assert_close(score.grad, 1e4 * soft * (1 - soft), atol=1e-6, rtol=0)
    torch.testing.assert_close(threshold.grad, -score.grad.sum(), atol=1e-6, rtol=0)


def test_policy_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    policy = torch.rand(1, 4, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    torch.autograd.gradcheck(policy_softmax, (logits, policy.requires_grad_()))
    ones = torch.ones(1, 4, dtype=torch.float64)
    torch.testing.assert_close(policy_softmax(logits, ones), logits.softmax(-1), atol=1e-6, rtol=0)
    dropped = torch.tensor([[1.0, 0, 1, 1]], dtype=torch.float64)
    weights = policy_softmax(logits, dropped)
    assert weights[..., [0, 2, 3], 1].max() < 1e-6
    assert weights[..., 1, 1].min() > 0.01, "a dropped token sees itself"


def test_cost_of_deit_small_is_the_published_one():
    model = timm.create_model("deit_small_patch16_224")
    dense = torch.full((1, 12), 196)
    assert model_macs(model, dense).item() / 1e9 == pytest.approx(4.599, rel=1e-3)
    model.num_prefix_tokens = 0
    assert model_macs(model, dense).item() / 1e9 == pytest.approx(4.574, rel=1e-3)


def test_cost_is_what_torch_counts():
    model, x = pruned(), images(1)
    with FlopCounterMode(display=False) as counter:
        model(x)
    head = model.head.weight.numel()
    counted = counter.get_total_flops() / 2 - head
    assert model_macs(model, token_counts(model, x)).item() == pytest.approx(counted, rel=0.01)


def test_budget_is_learned_by_the_thresholds_alone():
    torch.manual_seed(0)
    model = tiny_vit(depth=8, img_size=96)
    apply_adaptive_sparsity(model, AdaptiveSparsityConfig(thresholds=(0.0005, 0.001, 0.0015)))
    loss = AdaptiveSparsityLoss(model, 0.65)
    optimizer = torch.optim.Adam([model.token_reducer.thresholds], lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        x = torch.randn(8, 3, 96, 96, generator=generator)
        parts = loss(masked_forward(model, x), torch.zeros(8, dtype=torch.long))
        optimizer.zero_grad()
        parts.budget.backward()
        optimizer.step()
    counts = token_counts(model, torch.randn(16, 3, 96, 96, generator=generator)).float()
    full = model_macs(model, torch.full((1, 8), 144))
    assert (model_macs(model, counts).mean() / full).item() == pytest.approx(0.65, abs=0.04)


@pytest.mark.parametrize("target", [0.8, 0.6])
def test_thresholds_without_training_meet_the_budget(target):
    model, x = pruned(), images(8)
    cost = fit_thresholds(model, x, target)
    counts = token_counts(model, x)
    full = model_macs(model, torch.full((1, 4), 36))
    assert cost == pytest.approx(target, abs=0.006)
    assert (model_macs(model, counts).mean() / full).item() == pytest.approx(target, abs=0.01)
    assert len(counts[:, -1].unique()) > 1, "images keep different numbers"
    with pytest.raises(ValueError, match="no thresholds bring the cost"):
        fit_thresholds(model, x, 0.05)


def test_one_factor_brings_trained_thresholds_to_the_budget():
    model, x = pruned(), images(8)
    learned = model.token_reducer.thresholds.detach().clone()
    cost = scale_thresholds(model, x, 0.7, tolerance=0.01)
    factors = model.token_reducer.thresholds.detach() / learned
    torch.testing.assert_close(factors, factors[:1].expand(3))
    assert factors[0] != 1
    full = model_macs(model, torch.full((1, 4), 36))
    assert (model_macs(model, token_counts(model, x)).mean() / full).item() == pytest.approx(cost, abs=0.005)
    assert cost == pytest.approx(0.7, abs=0.01)
    before = model.token_reducer.thresholds.detach().clone()
    with pytest.raises(ValueError, match="no common factor"):
        scale_thresholds(model, x, 0.01)
    assert torch.equal(model.token_reducer.thresholds, before)


def test_loss_in_gflops_is_the_relative_one_times_the_dense_cost():
    model, labels = pruned(), torch.arange(4)
    masked = masked_forward(model, images(4))
    relative = AdaptiveSparsityLoss(model, 0.5)(masked, labels).budget
    full = model_macs(model, torch.full((1, 4), 36)).item() / 1e9
    torch.testing.assert_close(AdaptiveSparsityLoss(model, 0.5, unit="gflops")(masked, labels).budget, relative * full)


def test_an_object_on_a_flat_field_keeps_other_tokens_than_noise():
    model = pruned()
    flat = torch.zeros(3, 48, 48)
    flat[:, 16:32, 16:32] = 2
    noise = torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(2))
    counts = token_counts(model, torch.stack([flat, noise]))
    assert counts[0, -1] != counts[1, -1]


def test_published_batch_mode_depends_on_the_batch():
    config = AdaptiveSparsityConfig(locations=(1, 2, 3), thresholds=CONFIG.thresholds, batch_mode="mean_topk")
    model, x = pruned(config=config), images(4)
    counts = token_counts(model, x)
    assert bool((counts == counts[:1]).all())
    assert (model(x)[:1] - model(x[:1])).abs().max() > 1e-3


def test_at_least_keeps_the_best():
    score = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.1, 0.9]])
    keep = torch.tensor([[False, False, False], [True, False, True]])
    assert at_least(keep, score, 1).tolist() == [[False, True, False], [True, False, True]]
    assert at_least(keep, score, 2).tolist() == [[False, True, True], [True, False, True]]


def test_when_every_patch_is_below_one_stays():
    model = pruned(config=AdaptiveSparsityConfig(locations=(1, 2, 3), thresholds=(9.0, 9.0, 9.0)))
    assert token_counts(model, images(3))[:, 1:].unique().tolist() == [1]
    assert bool(model(images(3)).isfinite().all())
    assert bool(masked_forward(model, images(3)).logits.isfinite().all())


def test_saved_and_loaded(tmp_path):
    model, x = tiny_vit(), images(2)
    handle = apply_adaptive_sparsity(model, CONFIG)
    model.token_reducer.thresholds.data *= 1.1
    save_method(handle, tmp_path)
    other = tiny_vit(seed=5)
    assert load_method(other, tmp_path).config == CONFIG
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="another architecture: .*size mismatch"):
        load_method(tiny_vit(embed_dim=24), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no method\.json"):
        load_method(tiny_vit(), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": (float("nan"), 0.1, 0.1)}, "thresholds must be numbers"),
        ({"thresholds": ()}, "thresholds must be numbers"),
        ({"locations": (1, 2)}, "needs a threshold"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"min_keep": 0}, "at least 1"),
        ({"batch_mode": "all"}, "batch_mode must be"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSparsityConfig(**change)


@pytest.mark.parametrize("locations", [(0, 1, 2), (1, 1, 2), (1, 2, 4), (3, 2, 1)])
def test_locations_outside_the_model_are_refused(locations):
    with pytest.raises(ValueError, match="increasing blocks from 1 to 3"):
        apply_adaptive_sparsity(tiny_vit(), AdaptiveSparsityConfig(locations=locations))


def test_paper_locations():
    model = timm.create_model("deit_tiny_patch16_224")
    handle = apply_adaptive_sparsity(model)
    assert model.token_reducer.locations == (4, 7, 10)
    assert handle.layers_changed == (3, 6, 9)


def test_models_it_is_not_right_on_are_refused():
    for changes, message in (
        ({"global_pool": "map", "class_token": False}, "class token"),
        ({"class_token": False, "global_pool": "avg"}, "class token"),
        ({"global_pool": "max"}, "global_pool='max'"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_adaptive_sparsity(tiny_vit(**changes))
    with pytest.raises(TypeError, match="adaptive sparsity at work is needed, got Linear"):
        masked_forward(nn.Linear(2, 2), images(1))
    with pytest.raises(ValueError, match="target must be a share"):
        AdaptiveSparsityLoss(tiny_vit(), 1.2)
