"""Sparsifiner against masked dense attention, and through the suite of doors."""

import pytest
import timm
import torch
from torch import nn

from vit_efficient.door import load_method, save_method
from vit_efficient.sparsifiner import (
    ConnectivityPredictor,
    SparsifinerConfig,
    apply_sparsifiner,
    attention_macs,
    connectivity,
    look,
    phase,
    project,
    reconstruction_loss,
    resize_connectivity,
    set_phase,
    sparse_layers,
)
from vit_efficient.testing import DoorTests, images, tiny_vit
from vit_efficient.token_reduction import token_counts


class TestSparsifinerDoor(DoorTests):
    trained = True
    any_size = False

    def apply(self, model):
        torch.manual_seed(3)
        return apply_sparsifiner(model, SparsifinerConfig(keep_rate=0.3, basis_threshold=0.005))

    def neutral(self, model):
        return apply_sparsifiner(model, SparsifinerConfig(keep_rate=1.0))


class TestBlockSparsifinerDoor(DoorTests):
    trained = True
    any_size = False
    compiled = False

    def apply(self, model):
        torch.manual_seed(3)
        return apply_sparsifiner(
            model, SparsifinerConfig(keep_rate=0.2, granularity="block", block=6, basis_threshold=0.005)
        )


class TestPruningSparsifinerDoor(DoorTests):
    trained = True
    any_size = False
    compiled = False

    def apply(self, model):
        torch.manual_seed(3)
        return apply_sparsifiner(model, PRUNING)


PRUNING = SparsifinerConfig(keep_rate=0.3, coefficients=4, basis_threshold=0.005, token_keep=0.6, prune_after=(0, 2))


def sparse(config, kind="plain", **changes):
    torch.manual_seed(3)
    model = tiny_vit(kind, **changes)
    apply_sparsifiner(model, config)
    for layer in sparse_layers(model):
        layer.predictor.down.data *= 30  # a fresh predictor tells no query from another
    return model


CONFIGS = {
    "token": SparsifinerConfig(keep_rate=0.3, basis_threshold=0.005),
    "official": SparsifinerConfig(keep_rate=0.3, basis_threshold=0.005, official=True),
    "block": SparsifinerConfig(keep_rate=0.2, granularity="block", block=6, basis_threshold=0.005),
}


@pytest.mark.parametrize("kind", ["plain", "registers", "qk_norm"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_attention_is_dense_attention_under_the_mask(config, kind):
    model = sparse(config, kind).double()
    attn, P = sparse_layers(model)[0], model.num_prefix_tokens
    mask = connectivity(model, images(2).double(), 0)
    x = model.blocks[0].norm1(model.norm_pre(model._pos_embed(model.patch_embed(images(2).double()))))
    query, key, value = project(attn, x)
    scores = query @ key.mT * attn.head_dim**-0.5
    scores[:, :, P:] = scores[:, :, P:].masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attn.attend(query, key, value), scores.softmax(-1) @ value, atol=1e-10, rtol=1e-10)


def test_every_patch_keeps_exactly_its_share():
    model = sparse(CONFIGS["token"])
    mask = connectivity(model, images(2), 2)
    assert mask.shape == (2, 3, 36, 37)
    assert mask.sum(-1).unique().tolist() == [12]  # ceil(0.3 * 37)
    assert (mask[0] != mask[1]).any(), "the mask depends on the image"


def test_blocks_keep_their_share_their_own_and_the_first():
    model = sparse(CONFIGS["block"])
    mask = connectivity(model, images(1), 0)[0]
    for row, query in enumerate(range(1, 37)):
        own = query // 6 * 6
        assert mask[:, row, own : own + 6].all()
        assert mask[:, row, :6].all()
        held = mask[:, row, ::6].sum(-1)  # of 7 blocks, the best ceil(0.2 * 7) and two that are forced
        assert bool((held >= 2).all() & (held <= 4).all())


def test_block_scores_are_sums_of_token_scores():
    torch.manual_seed(0)
    predictor = ConnectivityPredictor(
        8, 2, (4, 5), 1, SparsifinerConfig(reduce_tokens=3, coefficients=3, basis_threshold=0.01)
    ).double()
    query, key = torch.randn(2, 2, 20, 8, dtype=torch.float64), torch.randn(2, 2, 21, 8, dtype=torch.float64)
    scores = nn.functional.pad(predictor.scores(query, key, "finetune"), (0, 3, 1, 3))
    wanted = scores.unflatten(2, (6, 4)).unflatten(4, (6, 4)).sum((3, 5))
    torch.testing.assert_close(predictor.block_scores(query, key, 4), wanted, atol=1e-12, rtol=1e-6)
    ones = nn.functional.pad(predictor.scores(query, key, "finetune"), (0, 0, 1, 0))
    torch.testing.assert_close(predictor.block_scores(query, key, 1), ones, atol=1e-12, rtol=1e-6)


def test_official_scale_and_basis():
    torch.manual_seed(0)
    ours = ConnectivityPredictor(8, 2, (3, 3), 1, SparsifinerConfig(basis_threshold=0.01))
    theirs = ConnectivityPredictor(8, 2, (3, 3), 1, SparsifinerConfig(basis_threshold=0.01, official=True))
    theirs.load_state_dict(ours.state_dict())
    assert ours.scale == pytest.approx(8**-0.5)
    assert theirs.scale == pytest.approx(2**-0.5)
    assert torch.equal(theirs.basis("finetune"), ours.basis("finetune").abs())
    assert torch.equal(theirs.basis("reconstruct"), ours.basis("reconstruct"))


def test_gradients_are_those_of_masked_attention():
    model = sparse(CONFIGS["token"]).double()
    attn = sparse_layers(model)[0]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, 3, 37, 16, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    indices, _, _ = attn.lists(tensors[0], tensors[1])
    attn.attend(*tensors).sin().sum().backward()
    given = [t.grad.clone() for t in tensors]
    mask = torch.ones(1, 3, 37, 37, dtype=torch.bool)
    mask[:, :, 1:] = torch.zeros(1, 3, 36, 37, dtype=torch.bool).scatter(-1, indices.long(), True)
    for t in tensors:
        t.grad = None
    nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask).sin().sum().backward()
    for one, tensor in zip(given, tensors, strict=True):
        torch.testing.assert_close(one, tensor.grad, atol=1e-10, rtol=1e-8)


def test_phases_train_what_they_should():
    model = sparse(CONFIGS["token"]).train()
    set_phase(model, "reconstruct")
    reconstruction_loss(model, images(2)).backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {name for name, _ in model.named_parameters() if ".predictor." in name}
    model.zero_grad()
    set_phase(model, "finetune")
    model(images(2)).sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {name for name, _ in model.named_parameters() if ".predictor." not in name}
    with pytest.raises(ValueError, match="phase must be"):
        set_phase(model, "both")


def test_reconstruction_is_dense_and_ends_with_the_block():
    model, x = sparse(CONFIGS["token"]), images(2)
    dense, before = tiny_vit()(x), model(x)
    with phase(model, "reconstruct"):
        torch.testing.assert_close(model(x), dense)
    assert torch.equal(model(x), before)
    assert all(p.requires_grad for p in model.parameters())


def test_predictor_learns_where_attention_goes():
    torch.manual_seed(0)
    centres, places = torch.randn(4, 16), torch.randn(65, 16)
    predictor = ConnectivityPredictor(16, 2, (8, 8), 1, SparsifinerConfig(reduce_tokens=4, keep_rate=0.25))
    optimizer = torch.optim.Adam(predictor.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)

    def draw():
        kinds = torch.randint(4, (8, 65), generator=generator)
        x = (centres[kinds] + places)[:, None].expand(-1, 2, -1, -1)
        return x[:, :, 1:], x, (x[:, :, 1:] @ x.mT / 4).softmax(-1)

    def captured():
        query, key, attention = draw()
        best = predictor.scores(query, key, "reconstruct").topk(16, -1).indices
        return attention.gather(-1, best).sum(-1).mean()

    before = captured()
    for _ in range(300):
        query, key, attention = draw()
        loss = (predictor.scores(query, key, "reconstruct") - attention).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert captured() > 0.6 > before + 0.2


def test_costs_are_the_published_ones():
    model = timm.create_model("deit_small_patch16_224")
    assert attention_macs(model, None) / 1e6 == pytest.approx(357.7, abs=0.1)
    config = [SparsifinerConfig(keep_rate=k / 197) for k in (50, 51)]
    assert (attention_macs(model, config[1]) - attention_macs(model, config[0])) / 1e6 == pytest.approx(1.806, abs=1e-3)
    for keep, published in ((0.3, 183.6), (0.1, 111.4)):  # with 0.69 of the basis above the threshold
        given = attention_macs(model, SparsifinerConfig(keep_rate=keep), basis_density=0.69) / 1e6
        assert given == pytest.approx(published, rel=0.01)
    apply_sparsifiner(model, SparsifinerConfig(reduce_channels=2))
    assert sum(p.numel() for p in sparse_layers(model)[0].predictor.parameters()) == 16_768


def test_views_of_a_layer():
    model, x = sparse(CONFIGS["token"]), images(2)
    views = look(model, x)
    assert len(views) == 4
    torch.testing.assert_close(views[0].attention.sum(-1), torch.ones(2, 3, 36))
    mask = connectivity(model, x, 1)
    kept = views[1].scores.masked_fill(~mask, torch.inf).amin(-1)
    assert bool((kept >= views[1].scores.masked_fill(mask, -torch.inf).amax(-1)).all())


def one_by_one(model, image, config):
    """Logits in float64 of one image: tokens that are pruned are removed, scores come from the whole predictor."""
    P, x = model.num_prefix_tokens, model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    left, counts = torch.arange(36), []
    for index, block in enumerate(model.blocks):
        attn, predictor = block.attn, block.attn.predictor
        rows = torch.cat([torch.arange(P), left + P])
        query, key, value = project(attn, block.norm1(x))
        low = (query[:, :, P:] @ (key.mT @ predictor.down[rows]) * attn.head_dim**-0.5).softmax(-1)
        least = low.sort(-1).values[..., [-config.coefficients]]
        up = torch.where(predictor.up.abs() > config.basis_threshold, predictor.up, 0)[rows]
        scores = torch.where(low >= least, low, 0) @ up.T
        num = -(-3 * (36 + P) // 10)
        mask = torch.ones(1, 3, len(rows), len(rows), dtype=torch.bool)
        mask[:, :, P:] = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argsort(-1)[..., -num:], True)
        weights = (query @ key.mT * attn.head_dim**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + block.ls1(attn.proj((weights @ value).transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        counts.append(len(left))
        if index in config.prune_after:
            stage = config.prune_after.index(index)
            best = weights[0, :, 0, P:].mean(0).argsort(descending=True)[: [22, 13][stage]].sort().values
            x, left = torch.cat([x[:, :P], x[:, P:][:, best]], 1), left[best]
    return model.forward_head(model.norm(x))[0], counts


@pytest.mark.parametrize("kind", ["plain", "registers", "qk_norm"])
def test_with_token_pruning_it_is_the_loop_over_images(kind):
    config = PRUNING
    model = sparse(config, kind).double()
    for layer in sparse_layers(model):
        layer.predictor.up.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))  # no ties
    x = images(3).double()
    logits, counts = model(x), token_counts(model, x)
    for image, given, count in zip(x, logits, counts, strict=True):
        wanted, wanted_counts = one_by_one(model, image, config)
        assert count.tolist() == wanted_counts == [36, 22, 22, 13]
        torch.testing.assert_close(given, wanted, atol=1e-8, rtol=1e-8)


def test_pruning_and_blocks_go_together():
    config = SparsifinerConfig(keep_rate=0.3, granularity="block", block=4, basis_threshold=0.005, token_keep=0.5)
    model, x = sparse(config), images(3)
    assert token_counts(model, x).unique(dim=0).tolist() == [[36, 36, 18, 9]]
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-4, rtol=1e-4)


def test_other_sizes_ask_for_resizing_and_get_it():
    model = sparse(CONFIGS["token"])
    model.set_input_size((64, 48))
    with pytest.raises(ValueError, match="call resize_connectivity"):
        model(images(1, (64, 48)))
    resize_connectivity(model, (8, 6))
    assert bool(model(images(1, (64, 48))).isfinite().all())
    same = sparse(CONFIGS["token"])
    before = same(images(1))
    resize_connectivity(same, (6, 6))
    torch.testing.assert_close(same(images(1)), before, atol=1e-4, rtol=1e-4)


def test_saved_and_loaded(tmp_path):
    model, x = tiny_vit(), images(2)
    torch.manual_seed(1)
    handle = apply_sparsifiner(model, CONFIGS["block"])
    save_method(handle, tmp_path)
    other = tiny_vit(seed=5)
    assert load_method(other, tmp_path).config == CONFIGS["block"]
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        {"keep_rate": 0.0},
        {"keep_rate": 1.1},
        {"granularity": "row"},
        {"block": 0},
        {"coefficients": 0},
        {"token_keep": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="must be"):
        SparsifinerConfig(**change)


def test_masks_and_other_models_are_refused():
    model = sparse(CONFIGS["token"])
    with pytest.raises(ValueError, match="not supported by Sparsifiner"):
        model.blocks[0](torch.zeros(1, 37, 48), is_causal=True)
    with pytest.raises(TypeError, match="Sparsifiner at work is needed, got Linear"):
        set_phase(nn.Linear(2, 2), "finetune")
