"""Which units stay when a size is given: those with the smallest scores, in numbers that the layout allows.

Gates give scores that can be compared across all kinds of units, log alpha; one threshold on it decides how many of
each kind stay, and is moved until the budget of parameters is met. With the layout "stock" the numbers are then made
even: as many heads in every layer as they have on average, a hidden width that these divide, and the feed-forward
width that uses the budget up.

Dutta et al., arXiv:2406.05276. Decided here: the threshold is moved to the budget instead of being 0, where the size
constraint leaves it only almost; so several sizes can be had from one training. At least one head and one
feed-forward unit of a layer stay, and at least one layer.

Shapes: d hidden, H heads, m feed-forward width, L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from llm_attn.vtrans.door import Gates
from llm_attn.vtrans.structure import Counts, SizeModel, Structure


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What orders units: the smallest stay."""

    hidden: Float[Tensor, "d"]
    heads: Sequence[Float[Tensor, "H"]]
    inter: Sequence[Float[Tensor, "m"]]
    layers: Float[Tensor, "L"] | None = None
    """None: all layers stay."""

    @classmethod
    def of(cls, gates: Gates) -> "Scores":
        """log alpha of every gate."""

        def score(gate: torch.nn.Module) -> Tensor:
            value: Tensor = gate.log_alpha.detach().cpu()  # type: ignore[operator]
            return value

        return cls(
            hidden=score(gates.hidden),
            heads=[score(gate) for gate in gates.heads],
            inter=[score(gate) for gate in gates.inter],
            layers=None if gates.layer is None else torch.cat([score(gate) for gate in gates.layer]),
        )


def choose_structure(scores: Scores, size: SizeModel, target_sparsity: float, *, multiple_of: int = 1) -> Structure:
    """The structure with the most parameters (or operations) that is within (1 - target_sparsity) of the whole model's.

    multiple_of: to which the hidden and feed-forward widths are rounded. ValueError where no structure is small enough,
    with the sparsity that can be had.
    """
    if not 0 < target_sparsity < 1:
        raise ValueError(f"target_sparsity must lie in (0, 1), got {target_sparsity}")
    check_target(size, target_sparsity, multiple_of=multiple_of)
    budget = (1 - target_sparsity) * size.total
    thresholds = _thresholds(scores)
    low, high, best = 0, len(thresholds) - 1, None
    while low <= high:
        middle = (low + high) // 2
        found = _at(scores, size, thresholds[middle], multiple_of, budget)
        if found is not None:
            best, low = found, middle + 1
        else:
            high = middle - 1
    if best is None:
        raise ValueError(
            f"no structure of sparsity {target_sparsity} was found for these gates; train them to it, or lower it"
        )
    return _filled(best, scores, size, budget) if size.layout == "ragged" and multiple_of == 1 else best


def _filled(structure: Structure, scores: Scores, size: SizeModel, budget: float) -> Structure:
    """With as many more feed-forward units, smallest scores first, as the budget still holds."""
    kept = [set(units) for units in structure.inter]
    left = size.cost(structure.counts)
    waiting = sorted(
        (score, layer, unit)
        for layer in structure.layers
        for unit, score in enumerate(scores.inter[layer].tolist())
        if unit not in kept[layer]
    )
    cost = size.cost(_one_more(structure.counts, structure.layers[0])) - left
    for _, layer, unit in waiting[: int((budget - left) // cost)]:
        kept[layer].add(unit)
    return replace(structure, inter=tuple(tuple(sorted(units)) for units in kept))


def _one_more(counts: Counts, layer: int) -> Counts:
    return replace(counts, inter=[width + (index == layer) for index, width in enumerate(counts.inter)])


def check_target(size: SizeModel, target_sparsity: float, *, multiple_of: int = 1) -> None:
    """ValueError where even the smallest structure of the layout has more parameters than the target leaves."""
    a, layers = size.anatomy, len(size.anatomy.layers)
    step = _hidden_step(size, 1, multiple_of)
    inter = min(multiple_of, a.inter)
    smallest = Counts(hidden=min(step, a.hidden), heads=[1] * layers, inter=[inter] * layers, layers=[1] * layers)
    most = float(size.sparsity(smallest))
    if target_sparsity > most:
        raise ValueError(
            f"a sparsity of {target_sparsity} cannot be met: with one head and {inter} feed-forward units in each "
            f"layer and {smallest.hidden} channels it is {most:.3f}; lower target_sparsity"
        )


def _thresholds(scores: Scores) -> list[float]:
    parts = [scores.hidden, *scores.heads, *scores.inter] + ([] if scores.layers is None else [scores.layers])
    values = torch.cat(parts).unique()
    if len(values) > 2048:  # steps finer than a unit of the largest model's cost time and change nothing
        values = values[torch.linspace(0, len(values) - 1, 2048).long()]
    found: list[float] = values.tolist()
    return found


def _at(scores: Scores, size: SizeModel, threshold: float, multiple_of: int, budget: float) -> Structure | None:
    """The structure at one threshold; None where it is above the budget."""
    layers = _kept_layers(scores, threshold)
    hidden = _rounded(int((scores.hidden <= threshold).sum()), multiple_of, len(scores.hidden))
    heads = [max(1, int((scores.heads[layer] <= threshold).sum())) for layer in layers]
    inter = [
        _rounded(int((scores.inter[layer] <= threshold).sum()), multiple_of, len(scores.inter[layer]))
        for layer in layers
    ]
    if size.layout == "stock":
        return _even(scores, size, layers, (hidden, heads, inter), multiple_of, budget)
    structure = pick(scores, layers=layers, hidden=hidden, heads=heads, inter=inter)
    return structure if size.cost(structure.counts) <= budget else None


def _even(
    scores: Scores,
    size: SizeModel,
    layers: Sequence[int],
    wanted: tuple[int, list[int], list[int]],
    multiple_of: int,
    budget: float,
) -> Structure | None:
    """The stock structure nearest to what is wanted; its feed-forward width fills the budget."""
    hidden, heads, inter = wanted
    count = max(1, round(sum(heads) / len(heads)))
    mean = sum(inter) / len(inter)
    step = _hidden_step(size, count, multiple_of)
    options = []
    for width in {max(step, hidden // step * step), min(-(-hidden // step) * step, len(scores.hidden))}:
        if width % step or width > len(scores.hidden):
            continue
        each = width // size.anatomy.head_dim if size.anatomy.family.square_attention else count
        filled = _largest(scores, size, layers, width, each, multiple_of, budget)
        left = size.cost(_counts(scores, layers, width, each, filled))
        if filled and left <= budget:
            away = abs(width / hidden - 1) + abs(filled / mean - 1) + (1 - left / budget)
            options.append((away, width, each, filled))
    # at this threshold the wanted sizes must fit, or a larger threshold would be no larger model
    fits = size.cost(_counts(scores, layers, hidden, count, round(mean))) <= budget
    if not options or not fits:
        return None
    _, width, each, filled = min(options)
    n = len(layers)
    return pick(scores, layers=layers, hidden=width, heads=[each] * n, inter=[filled] * n)


def _largest(
    scores: Scores, size: SizeModel, layers: Sequence[int], hidden: int, heads: int, multiple_of: int, budget: float
) -> int:
    """The widest feed-forward part within the budget, 0 where none is."""
    empty = size.cost(_counts(scores, layers, hidden, heads, 0))
    one = size.cost(_counts(scores, layers, hidden, heads, 1)) - empty
    widest = min(len(scores.inter[0]), math.floor((budget - empty) / one))
    return max(0, widest // multiple_of * multiple_of)


def _counts(scores: Scores, layers: Sequence[int], hidden: int, heads: int, inter: int) -> Counts:
    kept = [int(layer in layers) for layer in range(len(scores.heads))]
    return Counts(hidden=hidden, heads=[heads * k for k in kept], inter=[inter * k for k in kept], layers=kept)


def _hidden_step(size: SizeModel, heads: int, multiple_of: int) -> int:
    """What the hidden width must be a multiple of."""
    a = size.anatomy
    if size.layout == "ragged":
        return multiple_of
    return math.lcm(multiple_of, a.head_dim if a.family.square_attention else heads * a.group)


def _kept_layers(scores: Scores, threshold: float) -> list[int]:
    if scores.layers is None:
        return list(range(len(scores.heads)))
    kept = [layer for layer, score in enumerate(scores.layers.tolist()) if score <= threshold]
    return kept or [int(scores.layers.argmin())]


def _rounded(count: int, multiple_of: int, most: int) -> int:
    """The nearest multiple, at least one and at most what there is."""
    nearest = (2 * count + multiple_of) // (2 * multiple_of) * multiple_of
    return max(min(multiple_of, most), min(nearest, most // multiple_of * multiple_of or most))


def pick(
    scores: Scores, *, layers: Sequence[int], hidden: int, heads: Sequence[int], inter: Sequence[int]
) -> Structure:
    """The structure of so many units, those with the smallest scores; `heads` and `inter` go with `layers`.

    ValueError where more are asked for than there are, or none.
    """
    of_heads, of_inter = dict(zip(layers, heads, strict=True)), dict(zip(layers, inter, strict=True))
    return Structure(
        hidden=_smallest(scores.hidden, hidden),
        heads=tuple(_smallest(score, of_heads.get(layer, 0)) for layer, score in enumerate(scores.heads)),
        inter=tuple(_smallest(score, of_inter.get(layer, 0)) for layer, score in enumerate(scores.inter)),
        layers=tuple(layers),
    )


def _smallest(score: Tensor, count: int) -> tuple[int, ...]:
    if count > len(score):
        raise ValueError(f"{count} units were asked for, there are {len(score)}")
    return tuple(sorted(score.argsort(stable=True)[:count].tolist()))
