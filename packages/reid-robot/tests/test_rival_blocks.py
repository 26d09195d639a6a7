"""The blocks of the literature against their formulas, written out differently from the code."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reid_robot.rival_blocks import CBAM, EfficientChannel, NonLocal, RelationAware, SqueezeExcitation

C, H, W = 16, 4, 2
MAKERS = {
    "se": lambda: SqueezeExcitation(C, reduction=4),
    "eca": lambda: EfficientChannel(C),
    "cbam": lambda: CBAM(C, reduction=4),
    "nonlocal": lambda: NonLocal(C),
    "rga-s": lambda: RelationAware(C, (H, W), parts="s"),
    "rga-c": lambda: RelationAware(C, (H, W), parts="c"),
    "rga-sc": lambda: RelationAware(C, (H, W)),
}


def trained(name):
    torch.manual_seed(5)
    block = MAKERS[name]().double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
        for key, buffer in block.named_buffers():
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif key.endswith("running_mean"):
                buffer.normal_(std=0.3)
    return block


def batch_norm(x, norm):
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean.view(shape)) * scale.view(shape) + norm.bias.view(shape)


def layers(x, sequence):
    """conv1x1, BN, ReLU over (B, features, nodes), with a product in place of the convolution."""
    for layer in sequence:
        if isinstance(layer, torch.nn.Conv1d):
            x = torch.einsum("of,bfn->bon", layer.weight[..., 0], x)
        elif isinstance(layer, torch.nn.BatchNorm1d):
            x = batch_norm(x, layer)
        else:
            x = x.clamp(min=0)
    return x


def rga_logits(x, gate):
    """Node by node: what it gives to all, what it takes from all, and what it is."""
    theta, phi, own = layers(x, gate.theta), layers(x, gate.phi), layers(x, gate.embed).mean(1)
    B, _, n = x.shape
    vectors = torch.empty(B, 2 * n, n, dtype=x.dtype)
    for b in range(B):
        for i in range(n):
            gives = [theta[b, :, i] @ phi[b, :, j] for j in range(n)]
            takes = [theta[b, :, j] @ phi[b, :, i] for j in range(n)]
            vectors[b, :, i] = torch.stack(gives + takes)
    return layers(torch.cat([own[:, None], layers(vectors, gate.relate)], 1), gate.weigh)[:, 0]


def formula(name, block, x):
    if name == "se":
        return x * torch.sigmoid((x.mean((2, 3)) @ block.w1.T).relu() @ block.w2.T).view(-1, C, 1, 1)
    if name == "eca":
        k = block.conv.kernel_size[0]
        means = F.pad(x.mean((2, 3)), (k // 2, k // 2))
        logits = torch.stack([(means[:, c : c + k] * block.conv.weight[0, 0]).sum(1) for c in range(C)], 1)
        return x * torch.sigmoid(logits).view(-1, C, 1, 1)
    if name == "cbam":
        x = x * torch.sigmoid(block.mlp(x.flatten(2).mean(2)) + block.mlp(x.flatten(2).max(2).values)).view(-1, C, 1, 1)
        seen = torch.stack([x.mean(1), x.max(1).values], 1)
        patches = F.unfold(seen, 7, padding=3)  # (B, 98, places)
        logits = torch.einsum("k,bkn->bn", block.conv.weight.flatten(), patches).view(-1, 1, H, W)
        return x * torch.sigmoid(batch_norm(logits, block.norm))
    if name == "nonlocal":
        flat = x.flatten(2)

        def project(layer, value):
            return torch.einsum("oi,bin->bon", layer.weight[..., 0, 0], value) + layer.bias[:, None]

        theta, phi, g = (project(layer, flat) for layer in (block.theta, block.phi, block.g))
        taken = torch.einsum("bki,bkj,bcj->bci", theta, phi, g) / (H * W)
        return x + batch_norm(project(block.out, taken), block.norm).view_as(x)
    if "s" in name.split("-")[1]:
        x = x * torch.sigmoid(rga_logits(x.flatten(2), block.gates["s"])).view(-1, 1, H, W)
    if "c" in name.split("-")[1]:
        x = x * torch.sigmoid(rga_logits(x.flatten(2).transpose(1, 2), block.gates["c"])).view(-1, C, 1, 1)
    return x


@pytest.mark.parametrize("name", MAKERS)
def test_formula(name):
    block, x = trained(name), torch.randn(3, C, H, W, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(block(x), formula(name, block, x), atol=1e-10)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients(name):
    block = trained(name)
    x = torch.randn(2, C, H, W, dtype=torch.float64, requires_grad=True)
    names = [key for key, _ in block.named_parameters()]

    def run(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", MAKERS)
def test_counted_work_is_the_formulas(name):
    block = MAKERS[name]().eval()
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, C, H, W))
    assert counter.get_total_flops() == 2 * block.macs(H, W)


def test_non_local_starts_as_the_identity():
    x = torch.randn(2, C, 5, 3)
    assert torch.equal(NonLocal(C)(x), x)
    assert NonLocal(64).inner == 32  # not 1, as in a much used copy


def test_eca_kernel():
    for channels, size in ((16, 3), (64, 3), (256, 5), (512, 5), (2048, 7)):
        assert EfficientChannel(channels).conv.kernel_size[0] == size


def test_rga_parameters_are_the_published_modules():
    """256 channels on 64 x 32 and eight: counted from the released module's layers, without biases."""
    n, c = 2048, 256

    def side(nodes, features):
        inner, relations = features // 8, nodes // 8
        hidden = (1 + relations) // 8
        convolutions = 3 * features * inner + 2 * nodes * relations + (1 + relations) * hidden + hidden
        return convolutions + 2 * (3 * inner + relations + hidden + 1)

    block = RelationAware(c, (64, 32))
    assert sum(p.numel() for p in block.parameters()) == side(n, c) + side(c, n)


def test_rga_is_bound_to_its_size():
    with pytest.raises(ValueError, match="built for a map of 4 x 2, got 8 x 4"):
        RelationAware(C, (H, W))(torch.randn(1, C, 8, 4))
    with pytest.raises(ValueError, match="at least 8 channels and places"):
        RelationAware(C, (3, 2))
