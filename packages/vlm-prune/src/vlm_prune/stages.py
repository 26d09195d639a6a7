"""When tokens are dropped, and how many stay: stages, and schedules that meet a budget.

Decided here: for every method, `keep` below 1 is the mean share of the visual tokens over the layers behind the first
stage, so that methods are compared at one budget and every budget is feasible in every model. Published presets that
count otherwise (AdaptInfer's nominal average over all layers) are there by their own names. An int is tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from vlm_prune.criterion import Criterion

BEFORE = -1
"""`after_layer` of a stage between projector and language model."""

Counts = Callable[[Int[Tensor, "B"], Int[Tensor, "B"]], Int[Tensor, "B"]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Tokens are dropped once.

    after_layer: the language layer behind which it happens, `BEFORE` for before the first.
    keep: share of the prompt's visual tokens that are left, a number of tokens, or a function of the number that the
        prompts have and the number that is left, both (B,).
    criterion: what chooses. min_kept: at least so many stay, 0 to allow none.
    """

    after_layer: int
    keep: float | int | Counts
    criterion: Criterion
    min_kept: int = 1

    def count(self, num_visual: Int[Tensor, "B"], num_left: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """How many visual tokens of each sample stay; `num_visual` the prompt had, `num_left` are left."""
        if callable(self.keep):
            wanted = self.keep(num_visual, num_left)
        elif isinstance(self.keep, int):
            wanted = torch.full_like(num_visual, self.keep)
        else:
            # the small term keeps 0.3 * 10 = 3.0000000000000004 and 0.29 * 100 = 28.999999999999996 where they belong
            wanted = (num_visual.double() * self.keep + 1e-6).long()
        return torch.minimum(wanted.clamp(min=self.min_kept), num_left)


def of_those_left(share: float) -> Counts:
    """A share of the tokens that are left, in place of a share of the prompt's."""
    return lambda _, left: (left.double() * share + 1e-6).long()


def check_keep(keep: float | int) -> None:
    """ValueError, TypeError where `keep` is neither a share in (0, 1] nor a positive number of tokens."""
    if isinstance(keep, bool) or not isinstance(keep, float | int):
        raise TypeError(f"keep must be a share in (0, 1] or a number of tokens, got {keep!r}")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"keep as a number of tokens must be at least 1, got {keep}")
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise ValueError(
            f"keep must lie in (0, 1], the share of visual tokens that stays, got {keep}; for a number give an int"
        )


def scaled_layers(layers: Sequence[int], published: int, num_layers: int) -> tuple[int, ...]:
    """Layers that were published for a model of `published` layers, at the same depth of one with `num_layers`.

    Distinct, and none the last, behind which nothing is left to save. ValueError where there are too few layers.
    """
    if num_layers < len(layers) + 1:
        raise ValueError(f"{len(layers)} stages need a language model of {len(layers) + 1} layers, it has {num_layers}")
    if num_layers == published:
        return tuple(layers)
    found: list[int] = []
    for i, layer in enumerate(layers):
        lowest = found[-1] + 1 if found else 0
        highest = num_layers - 1 - (len(layers) - i)
        found.append(min(max(round(layer / published * num_layers), lowest), highest))
    return tuple(found)


def shares_for(keep: float, shape: Sequence[float], layers: Sequence[int], num_layers: int) -> tuple[float, ...]:
    """Shares in the ratios of `shape`, none above 1, whose mean over the layers behind the first stage is `keep`.

    `shape` falls; stage i holds from layer layers[i] + 1 to layers[i + 1], or to the end. A share that would exceed 1
    is 1, and the others take up what that saves.
    """
    ends = [*layers[1:], num_layers - 1]
    spans = [end - layer for layer, end in zip(layers, ends, strict=True)]
    wanted = keep * sum(spans)
    for full in range(len(shape) + 1):  # that many stages keep everything
        rest = sum(span * part for span, part in zip(spans[full:], shape[full:], strict=True))
        factor = (wanted - sum(spans[:full])) / rest if rest else 0.0
        if full == len(shape) or factor * shape[full] <= 1:
            return (1.0,) * full + tuple(factor * part for part in shape[full:])
    raise AssertionError("one of the cases above holds")


def scheduled(
    keep: float | int, shape: Sequence[float], layers: Sequence[int], num_layers: int
) -> tuple[float | Counts, ...]:
    """What each stage keeps of a mean share or a mean number of tokens `keep`, see `shares_for`."""
    if not isinstance(keep, int):
        return shares_for(keep, shape, layers, num_layers)
    return tuple(_mean_number(keep, i, tuple(shape), tuple(layers), num_layers) for i in range(len(shape)))


def _mean_number(keep: int, i: int, shape: tuple[float, ...], layers: tuple[int, ...], num_layers: int) -> Counts:
    def counts(num_visual: Int[Tensor, "B"], _: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        found = []
        for number in num_visual.tolist():
            share = shares_for(min(1.0, keep / max(number, 1)), shape, layers, num_layers)[i]
            found.append(int(share * number + 1e-6))
        return torch.tensor(found, device=num_visual.device)

    return counts
