"""BatchNorm folded into the convolution before it, for inference: fewer passes over memory, the same result."""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_weights

from reid_robot.light_attention import LightAttention


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """A copy of the model in eval mode with BatchNorms folded. `example`, an input, is what it is checked with.

    A convolution and the BatchNorm registered right after it belong together in timm's networks and in the blocks here.
    Where that is wrong the outputs differ, and ValueError is raised rather than a wrong network returned.
    """
    expected = model.eval()(example)
    folded = copy.deepcopy(model)
    previous: nn.Module | None = None
    for parent, name, module in list(_in_order(folded)):
        if isinstance(module, LightAttention):
            module.fold()
        if _belong_together(previous, module):
            _fold(previous, module)
            setattr(parent, name, getattr(module, "act", nn.Identity()))  # timm's BatchNormAct2d ends in one
        previous = module
    found = folded(example)
    # folding rounds every weight anew: by 1e-7 relative, which a deep network's random weights may enlarge
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        worst = float((found - expected).abs().max())
        raise ValueError(
            f"BatchNorms of this {type(model).__name__} cannot be folded in order: outputs differ by {worst:.2g}"
        )
    return folded


def _in_order(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Leaves with their parents, as registered; BatchNorms and light blocks count as leaves."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm | LightAttention) or not any(True for _ in child.children()):
            yield module, name, child
        else:
            yield from _in_order(child)


def _belong_together(convolution: nn.Module | None, norm: nn.Module) -> bool:
    return (
        isinstance(convolution, nn.Conv1d | nn.Conv2d)
        and isinstance(norm, _BatchNorm)
        and norm.num_features == convolution.out_channels
        and norm.running_var is not None
    )


def _fold(convolution: nn.Module | None, norm: nn.Module) -> None:
    if not (isinstance(convolution, nn.Conv1d | nn.Conv2d) and isinstance(norm, _BatchNorm)):
        raise TypeError(f"only convolutions and BatchNorms fold, got {type(convolution)} and {type(norm)}")
    if norm.running_mean is None or norm.running_var is None:
        raise TypeError("a BatchNorm that keeps no running statistics cannot be folded")
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    convolution.weight, convolution.bias = weight, bias
