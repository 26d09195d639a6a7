"""Attention in timm's networks: nothing changes at first, everything comes back, costs are what they are said to be."""

import copy

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from reid_robot.costs import count_macs, count_parameters
from reid_robot.light_attention import LightAttention
from reid_robot.timm_door import (
    BLOCKS,
    AttentionConfig,
    apply_attention,
    attention_blocks,
    keep_last_resolution,
    map_sizes,
    stages,
)

SIZE = (64, 32)
HOSTS = {
    "resnet18_reid_w16": "s1.last,s2.all,s4.first",
    "test_resnet": "s2.last:in,s4.last",  # basic blocks and bottlenecks
    "mobilenetv3_small_050": "s1.1,s2.last:in,s3.first:in,s5.last",
    "test_efficientnet": "s2.last:in,s4.last",
    "mobilenetv4_conv_small_035": "s3.last:in,s4.last",
    "test_convnext": "s1.last,s3.all",
}


def host(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


def wake(model, scale=0.3):
    """Attention weights away from where they start."""
    for block in attention_blocks(model).values():
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=scale)


@pytest.mark.parametrize("name", HOSTS)
def test_light_attention_starts_as_the_host_and_comes_off(name):
    model, crops = host(name), torch.randn(2, 3, *SIZE)
    names, before = list(model.state_dict()), model(crops)
    handle = apply_attention(model, AttentionConfig(where=HOSTS[name], input_size=SIZE))
    assert torch.equal(model(crops), before)
    assert set(names) <= set(model.state_dict())
    wake(model)
    changed = model(crops)
    assert not torch.allclose(changed, before)
    assert torch.equal(copy.deepcopy(model)(crops), changed)
    handle.remove()
    assert torch.equal(model(crops), before)
    assert list(model.state_dict()) == names
    handle.remove()


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_at_every_stage(block):
    model, crops = host("resnet18_reid_w16"), torch.randn(2, 3, *SIZE)
    where = "s1.last,s2.last"
    with apply_attention(model, AttentionConfig(block=block, where=where, input_size=SIZE)) as handle:
        assert handle.layers_changed == (1, 3)
        assert len(attention_blocks(model)) == 2
        wake(model)
        awake = model(crops)
        for name in ("layer1.1.reid_attention", "layer2.1.reid_attention"):
            assert name in attention_blocks(model)
    assert not torch.allclose(awake, model(crops))


@pytest.mark.parametrize("block", BLOCKS)
def test_parameters_and_work_add_up(block):
    """Per block, the network's counts grow by exactly what the block says."""
    model, crops = host("resnet18_reid_w16"), torch.randn(1, 3, *SIZE)
    parameters, macs = count_parameters(model), count_macs(model, crops)
    where = "s1.all,s2.first:in,s3.last"
    apply_attention(model, AttentionConfig(block=block, where=where, input_size=SIZE))
    sizes = map_sizes(model, SIZE)
    maps = [sizes[0][0], sizes[0][1], sizes[1][0], sizes[2][1]]
    blocks = list(attention_blocks(model).values())
    assert count_parameters(model) - parameters == sum(p.numel() for b in blocks for p in b.parameters())
    assert count_macs(model, crops) - macs == sum(b.macs(h, w) for b, (_, h, w) in zip(blocks, maps, strict=True))


def test_resnet50_costs():
    """Four stages at 256 x 128: about 0.69 M parameters of channel gates, under half a percent of the work."""
    with torch.device("meta"):
        plain = timm.create_model("resnet50", num_classes=0)
        gates = {c: LightAttention(c, kind="c") for c in (256, 512, 1024, 2048)}
        both = {c: LightAttention(c) for c in (256, 512, 1024, 2048)}
    extra = sum(p.numel() for gate in gates.values() for p in gate.parameters())
    assert extra == sum(2 * c * c // 16 for c in gates) == 696_320
    keep_last_resolution(plain)
    with FlopCounterMode(display=False) as counter:
        plain(torch.empty(1, 3, 256, 128, device="meta"))
    maps = {256: (64, 32), 512: (32, 16), 1024: (16, 8), 2048: (16, 8)}
    assert sum(both[c].macs(*size) for c, size in maps.items()) < 0.005 * counter.get_total_flops() / 2


def test_map_sizes():
    model = host("resnet18_reid_w16")
    assert [stage[-1] for stage in map_sizes(model, (128, 64))] == [(16, 32, 16), (32, 16, 8), (64, 8, 4), (128, 4, 2)]
    keep_last_resolution(model)
    assert map_sizes(model, (128, 64))[3][0] == (128, 8, 4)


def test_variable_sizes():
    model = host("resnet18_reid_w16")
    apply_attention(model, AttentionConfig(where="s1.last,s4.last"))
    wake(model)
    for size in ((256, 128), (384, 128), (128, 64)):
        assert model(torch.randn(1, 3, *size)).isfinite().all()
    bound = host("resnet18_reid_w16")
    apply_attention(bound, AttentionConfig(block="rga-sc", where="s2.last", input_size=(128, 64)))
    with pytest.raises(ValueError, match="built for a map of 16 x 8, got 32 x 16"):
        bound(torch.randn(1, 3, 256, 128))


def test_registered_models():
    model = timm.create_model("resnet50_reid_light", num_classes=0, features_only=False)
    assert [str(type(b).__name__) for b in attention_blocks(model).values()] == ["LightAttention"] * 3
    with torch.no_grad():
        features = timm.create_model("resnet50_reid_light", features_only=True).eval()(torch.randn(1, 3, 64, 32))
        assert [tuple(f.shape[1:]) for f in features] == [
            (64, 32, 16), (256, 16, 8), (512, 8, 4), (1024, 4, 2), (2048, 4, 2),
        ]  # fmt: skip
    deeper = timm.create_model("resnet34_reid_w16")
    assert [len(stage) for stage in stages(deeper)] == [3, 4, 6, 3]
    with pytest.raises(ValueError, match="no pretrained weights"):
        timm.create_model("resnet18_reid_w16", pretrained=True)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("resnet18_reid_w16", {"where": ""}, ValueError, "names no site"),
        ("resnet18_reid_w16", {"block": "none"}, ValueError, "there are light, light-c"),
        ("resnet18_reid_w16", {"where": "s1.3"}, ValueError, "blocks 1 to 2"),
        ("resnet18_reid_w16", {"input_size": (0, 3)}, ValueError, "input_size must be"),
        ("test_convnext", {"where": "s1.last:in"}, ValueError, "use ':out'"),
        ("test_vit", {}, TypeError, "VisionTransformer is not supported"),
    ],
)
def test_refused(name, arguments, error, message):
    with pytest.raises(error, match=message):
        apply_attention(host(name), AttentionConfig(**arguments))


def test_taken_sites_are_refused():
    model = host("resnet18_reid_w16")
    apply_attention(model, AttentionConfig(where="s2.last,s3.last:in", input_size=SIZE))
    for where in ("s2.last", "s3.last:in"):
        with pytest.raises(ValueError, match="there is attention at"):
            apply_attention(model, AttentionConfig(where=where, input_size=SIZE))
    assert len(attention_blocks(model)) == 2
    with pytest.raises(ValueError, match="by pooling"):
        keep_last_resolution(timm.create_model("resnet18d"))
