"""What VTrans is measured against: units chosen by the size of their weights, and whole layers dropped evenly.

Both give a `Structure`, so they are shrunk, fine-tuned and judged by the same code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llm_attn.vtrans.choosing import Scores, pick
from llm_attn.vtrans.families import Anatomy
from llm_attn.vtrans.structure import SizeModel, Structure


@torch.no_grad()
def magnitude_scores(model: nn.Module) -> Scores:
    """Minus the Euclidean norm of all weights that a unit owns: large weights stay."""
    a = Anatomy(model)
    layers = len(a.layers)
    squares = {"hidden": torch.zeros(a.hidden)}
    squares |= {f"heads {layer}": torch.zeros(a.heads) for layer in range(layers)}
    squares |= {f"inter {layer}": torch.zeros(a.inter) for layer in range(layers)}
    for name, parameter in model.named_parameters():
        layer, axes = a.layer_of(name), a.axes(name)
        if len(axes) < 2:
            continue
        for dim, axis in enumerate(axes):
            kind = axis.rstrip("*/")
            if kind == "all":
                continue
            mine = "hidden" if kind == "hidden" else f"{'inter' if kind == 'inter' else 'heads'} {layer}"
            squares[mine] += _of_units(parameter, dim, kind, a)
    return Scores(
        hidden=-squares["hidden"].sqrt(),
        heads=[-squares[f"heads {layer}"].sqrt() for layer in range(layers)],
        inter=[-squares[f"inter {layer}"].sqrt() for layer in range(layers)],
    )


def _of_units(parameter: Tensor, dim: int, kind: str, a: Anatomy) -> Tensor:
    """Sum of squares of each unit's entries."""
    total = parameter.detach().float().square().sum(1 - dim).cpu()
    if kind in ("hidden", "inter"):
        return total
    return total.reshape(3 if kind == "qkv" else 1, a.heads, -1).sum((0, 2))


def magnitude_structure(model: nn.Module, like: Structure) -> Structure:
    """As many units of each kind in each layer as `like` has, those with the largest weights."""
    counts, layers = like.counts, like.layers
    return pick(
        magnitude_scores(model),
        layers=layers,
        hidden=counts.hidden,
        heads=[counts.heads[layer] for layer in layers],
        inter=[counts.inter[layer] for layer in layers],
    )


def layer_drop_structure(model: nn.Module, size: SizeModel, target_sparsity: float) -> Structure:
    """As many whole layers as the budget holds, evenly spread over the depth.

    Where embeddings leave no room for even one, half of the layers stay and the channels of the residual stream with
    the smallest weights go, as few as the budget asks for. ValueError where that is not enough.
    """
    whole, budget = Structure.whole(model), (1 - target_sparsity) * size.total
    depth = len(whole.layers)
    for kept in range(depth, 0, -1):
        structure = _with_layers(whole, spread(depth, kept))
        if size.parameters(structure.counts) <= budget:
            return structure
    return _narrowed(model, size, _with_layers(whole, spread(depth, max(1, depth // 2))), budget)


def spread(depth: int, kept: int) -> list[int]:
    """So many layers of a depth, first and last among them where there are two, the others evenly between."""
    if kept == 1:
        return [0]
    return [round(index * (depth - 1) / (kept - 1)) for index in range(kept)]


def _with_layers(whole: Structure, layers: Sequence[int]) -> Structure:
    stays = [layer in layers for layer in range(len(whole.heads))]
    return Structure(
        hidden=whole.hidden,
        heads=tuple(kept if stay else () for kept, stay in zip(whole.heads, stays, strict=True)),
        inter=tuple(kept if stay else () for kept, stay in zip(whole.inter, stays, strict=True)),
        layers=tuple(layers),
    )


def _narrowed(model: nn.Module, size: SizeModel, structure: Structure, budget: float) -> Structure:
    a, scores = size.anatomy, magnitude_scores(model)
    square, layers = a.family.square_attention, structure.layers
    step = a.head_dim if square else a.heads * a.group
    for hidden in range(a.hidden // step * step, 0, -step):
        narrow = pick(
            scores,
            layers=layers,
            hidden=hidden,
            heads=[hidden // a.head_dim if square else a.heads for _ in layers],
            inter=[a.inter for _ in layers],
        )
        if size.parameters(narrow.counts) <= budget:
            return narrow
    raise ValueError(f"no width of {len(layers)} layers is within {budget:,.0f} parameters; lower target_sparsity")
