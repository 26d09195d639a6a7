"""SLA: the checks of the paper's formulas, and the method in every family."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffusion_attn.diffusers.methods import apply_sla
from diffusion_attn.sla import (
    SLAConfig,
    SparseLinearAttention,
    classify_blocks,
    feature_map,
    sla_flops,
    sparse_linear_parts,
)
from diffusion_attn.testing import DoorTests
from diffusion_attn.visual_attention import listed_blocks
from shared_kernels import linear_attention


def qkv(*shape, seed=0, dtype=torch.float32):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=make, dtype=dtype) for _ in range(3)]


def over_tokens(mask, block_size, S):
    return mask.repeat_interleave(block_size[0], 2).repeat_interleave(block_size[1], 3)[:, :, :S, :S]


def plain_parts(query, key, value, classes, config):
    """Both outputs from whole maps (paper, equations 4 to 6)."""
    S, num_blocks = query.shape[2], classes.marginal.shape[3]
    critical = over_tokens(listed_blocks(classes.critical, num_blocks), config.block_size, S)
    sparse = F.scaled_dot_product_attention(query, key, value, attn_mask=critical)
    weights = feature_map(query, config.feature_map) @ feature_map(key, config.feature_map).mT
    if config.linear_scope == "marginal":
        weights = weights * over_tokens(classes.marginal, config.block_size, S)
        return sparse, weights @ value / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    return sparse, weights @ value / (weights.sum(-1, keepdim=True) + 1e-5)


def layer(config, head_dim, seed=3):
    """With a map that is not zero."""
    own = SparseLinearAttention(head_dim, config)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return own


def test_untrained_it_is_block_sparse_attention():
    query, key, value = qkv(2, 3, 90, 16)
    config = SLAConfig(critical=0.3, negligible=0.2, block_size=(16, 8))
    classes = classify_blocks(query, key, config)
    expected, _ = plain_parts(query, key, value, classes, config)
    torch.testing.assert_close(SparseLinearAttention(16, config)(query, key, value), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scope", ["marginal", "all"])
@pytest.mark.parametrize("kind", ["softmax", "elu", "relu"])
def test_the_formulas_written_out(scope, kind):
    query, key, value = qkv(2, 3, 90, 16, dtype=torch.float64)
    config = SLAConfig(critical=0.3, negligible=0.2, block_size=(16, 8), feature_map=kind, linear_scope=scope)
    classes = classify_blocks(query, key, config)
    found = sparse_linear_parts(query, key, value, classes, config)
    for mine, right in zip(found, plain_parts(query, key, value, classes, config), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-10, rtol=0)


def test_with_all_blocks_critical_it_is_dense_and_the_map_learns_nothing():
    query, key, value = qkv(1, 2, 70, 8)
    own = layer(SLAConfig(critical=1, negligible=0, block_size=(16, 16)), 8)
    with torch.no_grad():
        own.proj.bias.zero_()
    out = own(query, key, value)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value), atol=1e-5, rtol=0)
    out.sum().backward()
    assert not own.proj.weight.grad.any()


def test_the_linear_branch_over_all_tokens_is_linear_attention():
    query, key, value = qkv(1, 2, 70, 8)
    config = SLAConfig(linear_scope="all", block_size=(16, 16))
    _, linear = sparse_linear_parts(query, key, value, classify_blocks(query, key, config), config)
    phi = query.softmax(-1), key.softmax(-1)
    torch.testing.assert_close(linear, linear_attention(*phi, value, normalizer="sum", eps=1e-5), atol=1e-6, rtol=0)


def test_sizes_of_the_classes_and_what_they_do_not_depend_on():
    query, key, _ = qkv(2, 3, 330, 16)
    config = SLAConfig(critical=0.15, negligible=0.3, block_size=(32, 16))
    classes = classify_blocks(query, key, config)  # 21 key blocks
    critical = listed_blocks(classes.critical, 21)
    assert (critical.sum(-1) == 3).all()
    assert ((~critical & ~classes.marginal).sum(-1) == 6).all()
    assert not (critical & classes.marginal).any()
    for other in (classify_blocks(query, key + torch.randn(16), config), classify_blocks(3 * query, key, config)):
        assert torch.equal(listed_blocks(other.critical, 21), critical)
        assert torch.equal(other.marginal, classes.marginal)


def test_equal_scores_give_disjoint_classes():
    zeros = torch.zeros(1, 1, 64, 4)
    classes = classify_blocks(zeros, zeros, SLAConfig(critical=0.25, negligible=0.25, block_size=(8, 8)))
    critical = listed_blocks(classes.critical, 8)
    assert critical[0, 0, 0].nonzero().flatten().tolist() == [0, 1]
    assert (~critical & ~classes.marginal)[0, 0, 0].nonzero().flatten().tolist() == [2, 3]


def test_the_best_are_critical_and_the_worst_negligible():
    means = torch.tensor([3.0, -1.0, 0.5, 2.0, -4.0])
    key = means.repeat_interleave(8)[None, None, :, None] * torch.ones(1, 1, 1, 4)
    query = torch.ones(1, 1, 40, 4)
    classes = classify_blocks(query, key, SLAConfig(critical=0.4, negligible=0.2, block_size=(8, 8)))
    assert classes.critical.indices[0, 0, 0].tolist() == [0, 3]
    assert classes.marginal[0, 0, 0].tolist() == [False, True, True, False, False]


def test_the_linear_output_is_a_mean_of_marginal_values():
    query, key, _ = qkv(1, 2, 96, 8)
    config = SLAConfig(critical=0.2, negligible=0.2, block_size=(16, 16))
    _, linear = sparse_linear_parts(query, key, torch.full_like(key, 2.5), classify_blocks(query, key, config), config)
    torch.testing.assert_close(linear, torch.full_like(linear, 2.5), atol=1e-5, rtol=0)


def test_gradients_are_exact():
    query, key, value = (x.requires_grad_() for x in qkv(1, 1, 96, 8, dtype=torch.float64))
    config = SLAConfig(critical=0.2, negligible=0.34, block_size=(16, 16))
    classes = classify_blocks(query, key, config)
    assert classes.marginal.any()
    own = layer(config, 8).double()

    def run(*tensors):
        return own(*tensors, classes=classes)

    assert torch.autograd.gradcheck(run, (query, key, value), atol=1e-6, fast_mode=True)
    sparse, linear = plain_parts(query, key, value, classes, config)
    weights = torch.randn(1, 1, 96, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    inputs = [query, key, value, *own.parameters()]
    right = torch.autograd.grad(((sparse + own.proj(linear)) * weights).sum(), inputs)
    found = torch.autograd.grad((run(query, key, value) * weights).sum(), inputs)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


def test_what_is_negligible_for_all_has_no_influence():
    query, key, value = (x.requires_grad_() for x in qkv(1, 1, 64, 8))
    config = SLAConfig(critical=0.25, negligible=0.25, block_size=(16, 16))
    lists = classify_blocks(query, key, config).critical
    lists = type(lists)(torch.zeros_like(lists.indices), torch.ones_like(lists.counts))
    marginal = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    marginal[..., 1:3] = True
    classes = type(classify_blocks(query, key, config))(lists, marginal)
    own = layer(config, 8)
    out = own(query, key, value, classes=classes)
    d_key, d_value = torch.autograd.grad(out.sum(), (key, value))
    assert not d_key[:, :, 48:].any()
    assert not d_value[:, :, 48:].any()
    with torch.no_grad():
        other_key, other_value = key.clone(), value.clone()
        other_key[:, :, 48:] += 5
        other_value[:, :, 48:] = 100
        assert torch.equal(own(query, other_key, other_value, classes=classes), out)


def trained(scope_or_sparse, seed):
    """A layer that is to imitate dense attention of other projections; error relative to the teacher's output."""
    make = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(8, 8, 32, generator=make)
    inputs = centres.repeat_interleave(32, 1) + torch.randn(8, 256, 32, generator=make)
    weights = [torch.randn(32, 32, generator=make) / 32**0.5 for _ in range(3)]
    teacher = F.scaled_dot_product_attention(*((inputs @ w)[:, None] for w in weights))
    own = SparseLinearAttention(32, SLAConfig(critical=0.125, negligible=0, block_size=(32, 32)))
    student = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.Adam([*student, *own.parameters()], lr=3e-3)
    for _ in range(150):
        query, key, value = ((inputs @ w)[:, None] for w in student)
        classes = classify_blocks(query, key, own.config)
        sparse, linear = sparse_linear_parts(query, key, value, classes, own.config)
        out = sparse if scope_or_sparse == "sparse" else sparse + own.proj(linear)
        loss = F.mse_loss(out, teacher) / teacher.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_it_learns_more_than_the_sparse_part_alone():
    assert trained("both", 0) <= 0.92 * trained("sparse", 0)


def test_counted_work():
    """At 32,760 tokens of width 128, 64-blocks, 5 % critical: a twentieth of dense attention, and what joins it."""
    flops = sla_flops(32_760, 128)
    assert flops["dense"] == 4 * 32_760**2 * 128
    assert flops["sparse"] / flops["dense"] == pytest.approx(25 / 511.875, rel=1e-3)  # 25 of 512 blocks
    assert flops["all"] == sum(flops[part] for part in ("sparse", "linear", "sums", "mask", "projection"))
    assert sla_flops(32_760, 128, heads=3)["all"] == 3 * flops["all"]


def test_counted_work_is_what_runs():
    """Products as torch counts them, within 5 %, at a size at which tails are whole."""
    config = SLAConfig(critical=0.125, negligible=0.25, block_size=(64, 64))
    query, key, value = qkv(1, 2, 1_024, 64)
    own = SparseLinearAttention(64, config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        own(query, key, value)
    assert counter.get_total_flops() == pytest.approx(sla_flops(1_024, 64, config, heads=2)["all"], rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"critical": 0}, "critical must lie in"),
        ({"critical": 0.5, "negligible": 0.6}, "negligible must lie in"),
        ({"negligible": -0.1}, "negligible must lie in"),
        ({"block_size": (0, 64)}, "block_size must be two sizes"),
        ({"feature_map": "exp"}, "feature_map must be"),
        ({"linear_scope": "none"}, "linear_scope must be"),
        ({"order": "hilbert"}, "order must be"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SLAConfig(**wrong)


class TestDoor(DoorTests):
    def apply(self, model):
        return apply_sla(model, SLAConfig(critical=0.2, negligible=0.2, block_size=(8, 8)))

    def neutral(self, model):
        return apply_sla(model, SLAConfig(critical=1, negligible=0, block_size=(8, 8)))

    def test_weights_are_in_the_state_dict_and_learn(self):
        model, inputs, _ = self.first()
        before = copy.deepcopy(model.state_dict())
        with self.apply(model):
            added = sorted(set(model.state_dict()) - set(before))
            assert added == [
                f"blocks.{n}.attn1.diffusion_attn_sla.proj.{part}" for n in (0, 1) for part in ("bias", "weight")
            ]
            model(**inputs)[0].square().sum().backward()
            for n in (0, 1):
                assert model.blocks[n].attn1.diffusion_attn_sla.proj.weight.grad.norm() > 0
