"""The network: shapes, normalisation, saving, weights from elsewhere, folding, the small one that comes along."""

import pytest
import torch

from reid_robot.folding import fold_batch_norms
from reid_robot.network import ReidConfig, ReidNet, build_reid, load_backbone_weights
from reid_robot.small import SMALL, load_small
from reid_robot.timm_door import BLOCKS, attention_blocks


def net(attention="light", **fields):
    torch.manual_seed(1)
    config = {"backbone": "resnet18_reid_w16", "attention": attention, "input_size": (64, 32)} | fields
    return ReidNet(ReidConfig(**config)).eval()


def lived_in(model):
    """Weights, biases and statistics that are not those it starts with."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
        for block in attention_blocks(model).values():
            for parameter in block.parameters():
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def crops():
    return torch.randint(0, 256, (3, 3, 64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_and_normalised_crops_give_the_same_unit_vectors(crops):
    model = lived_in(net())
    normalised = (crops / 255 - model.mean) / model.std
    embedded = model(crops)
    assert embedded.shape == (3, 128)
    assert torch.allclose(embedded, model(normalised), atol=1e-6)
    assert torch.allclose(embedded.norm(dim=1), torch.ones(3), atol=1e-6)


def test_embeddings_before_and_after_the_neck(crops):
    after, before = lived_in(net()), lived_in(net(embedding="before"))
    pooled = after.pooled(crops)
    assert torch.allclose(before(crops), pooled / pooled.norm(dim=1, keepdim=True), atol=1e-6)
    scaled = after.neck(pooled)
    assert torch.allclose(after(crops), scaled / scaled.norm(dim=1, keepdim=True), atol=1e-6)
    assert not after.neck.bias.requires_grad


def test_last_stride(crops):
    sizes = {stride: net(last_stride=stride).backbone.forward_features(crops.float()).shape[2:] for stride in (1, 2)}
    assert (tuple(sizes[1]), tuple(sizes[2])) == ((4, 2), (2, 1))


@pytest.mark.parametrize("block", [None, *BLOCKS])
def test_folding_changes_nothing(block, crops):
    model = lived_in(net(block, where="s1.last,s2.first:in" if block != "rga-sc" else "s1.last"))
    folded = fold_batch_norms(model, crops)
    assert torch.allclose(folded(crops), model(crops), atol=1e-4)
    norms = [m for m in folded.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms == [folded.neck]


def test_saved_and_loaded(crops, tmp_path):
    model = lived_in(net(num_ids=7))
    model.save(tmp_path / "net.safetensors")
    again = ReidNet.load(tmp_path / "net.safetensors")
    assert torch.equal(again(crops), model(crops))
    assert again.classifier is None
    assert again.config.where == model.config.where
    model.save(tmp_path / "half.safetensors", half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "net.safetensors").stat().st_size
    assert (ReidNet.load(tmp_path / "half.safetensors")(crops) * model(crops)).sum(1).min() > 0.999
    (tmp_path / "text").write_text("no checkpoint")
    with pytest.raises(ValueError, match="is no checkpoint"):
        ReidNet.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        ReidNet.load(tmp_path / "none")


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_weights_of_a_plain_backbone(prefix, crops, tmp_path):
    plain, model = lived_in(net(None)), net()
    state = {prefix + key: value for key, value in plain.backbone.state_dict().items()}
    if prefix == "backbone.":
        state |= {f"heads.bottleneck.0.{key}": value for key, value in plain.neck.state_dict().items()}
    else:
        model.neck.load_state_dict(plain.neck.state_dict())
    torch.save({"model": state}, tmp_path / "weights.pth")
    assert load_backbone_weights(model, tmp_path / "weights.pth") == len(plain.backbone.state_dict())
    assert torch.equal(model(crops), plain(crops))
    del state[prefix + "conv1.0.weight"]
    with pytest.raises(ValueError, match="conv1.0.weight first"):
        load_backbone_weights(model, state)
    state[prefix + "conv1.0.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="conv1.0.weight must be"):
        load_backbone_weights(model, state)


def test_the_small_network_comes_along(crops):
    small = load_small()
    assert SMALL.stat().st_size < 2e6
    assert small.config.attention == "light"
    assert any(block.w2.abs().max() > 0.01 for block in attention_blocks(small).values()), "attention was trained"
    assert small(crops).isfinite().all()


def test_mobile_backbone(crops):
    model = build_reid("mobilenetv3_small_050", where="s3.last:in,s4.last", input_size=(64, 32))
    assert model.eval()(crops).shape == (3, model.backbone.num_features)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "resnet7"}, "timm has no model 'resnet7'"),
        ({"attention": "big"}, "no attention block 'big'"),
        ({"num_ids": -1}, "num_ids must not"),
        ({"last_stride": 3}, "last_stride must be"),
        ({"embedding": "neck"}, "embedding must be"),
        ({"where": "s9.last"}, "stages 1 to 4"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        net(**fields)


def test_refused_crops():
    with pytest.raises(ValueError, match=r"crops must be \(B, 3, H, W\)"):
        net()(torch.zeros(2, 1, 64, 32))
    with pytest.raises(ValueError, match="build it with num_ids"):
        net().training_outputs(torch.zeros(2, 3, 64, 32))
