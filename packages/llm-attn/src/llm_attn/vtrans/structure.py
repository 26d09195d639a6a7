"""Which units of a model stay, and how many parameters and operations that leaves.

`Structure` lists kept units. `SizeModel` counts: with the kept numbers of units it gives the exact number of
parameters of the shrunk model; with the gates' keep probabilities the expected one, which the size constraint
differentiates:

    sum over weights of the product of their axes' kept sizes     (Llama: 4 D k_l K + 3 m_l K + 2 K a layer, and so on)

Dutta et al., arXiv:2406.05276; the accounting is that of the same authors' later work on language models. Decided here:
a layer's parameters are multiplied by the probability that the layer stays; parameters that are one vector (norms,
biases) count but send no gradient, as norms do there. Operations are 2 n times the parameters of matrices that
multiply n tokens, plus 4 n^2 for each channel of the context (scores, and values weighted by them).

Shapes: d hidden, H heads, m feed-forward width, L layers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from llm_attn.vtrans.families import Anatomy

Count = Any  # int, float or a scalar tensor: the same sums serve exact and expected sizes
Layout = str
LAYOUTS = ("stock", "ragged")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Indices of kept units, ascending. `heads` and `inter` have one entry for every layer of the original model, empty
    for a layer that goes."""

    hidden: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    inter: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.hidden:
            raise ValueError("no channel of the residual stream stays: the hidden width would be 0; lower the sparsity")
        if not self.layers:
            raise ValueError("no layer stays; lower the sparsity")
        for layer in self.layers:
            for what, kept in (("attention head", self.heads[layer]), ("feed-forward unit", self.inter[layer])):
                if not kept:
                    raise ValueError(
                        f"no {what} of layer {layer} stays: its width would be 0; lower the sparsity, or drop the layer"
                    )

    @classmethod
    def whole(cls, model: nn.Module) -> "Structure":
        """Everything stays."""
        a = Anatomy(model)
        layers = tuple(range(len(a.layers)))
        return cls(
            hidden=tuple(range(a.hidden)),
            heads=tuple(tuple(range(a.heads)) for _ in layers),
            inter=tuple(tuple(range(a.inter)) for _ in layers),
            layers=layers,
        )

    @property
    def counts(self) -> "Counts":
        """How many units stay."""
        return Counts(
            hidden=len(self.hidden),
            heads=[len(kept) for kept in self.heads],
            inter=[len(kept) for kept in self.inter],
            layers=[int(layer in self.layers) for layer in range(len(self.heads))],
        )

    def is_even(self) -> bool:
        """Whether all kept layers have as many heads, and as wide a feed-forward part."""
        sizes = {(len(self.heads[layer]), len(self.inter[layer])) for layer in self.layers}
        return len(sizes) == 1

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Structure":
        """The structure that `to_json` wrote."""
        return cls(
            hidden=tuple(record["hidden"]),
            heads=tuple(map(tuple, record["heads"])),
            inter=tuple(map(tuple, record["inter"])),
            layers=tuple(record["layers"]),
        )


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Kept units: their number, or the sum of their keep probabilities."""

    hidden: Count
    heads: Sequence[Count]
    inter: Sequence[Count]
    layers: Sequence[Count]


class SizeModel:
    """Counts parameters and operations of a model for any `Counts`.

    count_embeddings: whether embeddings and output head count (None: the family's habit). layout: "ragged" lets every
    layer have its own number of heads and feed-forward units; "stock" counts what the stock class of BERT and GPT-2
    needs, whose context is as wide as the residual stream. flops_of: a number of tokens makes `cost`, and with it
    sparsity, count the operations of one pass over so many; None: parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        count_embeddings: bool | None = None,
        layout: Layout = "stock",
        flops_of: int | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        self.anatomy = anatomy = Anatomy(model)
        family = anatomy.family
        self.layout, self.flops_of = layout, flops_of
        self.count_embeddings = family.count_embeddings if count_embeddings is None else count_embeddings
        self._weights = [
            (anatomy.axes(name), anatomy.layer_of(name), tuple(parameter.shape), anatomy.is_embedding(name))
            for name, parameter in model.named_parameters()
        ]
        self._vocabulary_product = any(name.endswith("lm_head.weight") for name in model.state_dict())
        self.total = int(self.cost(self._whole()))

    def _whole(self) -> Counts:
        a, layers = self.anatomy, len(self.anatomy.layers)
        return Counts(hidden=a.hidden, heads=[a.heads] * layers, inter=[a.inter] * layers, layers=[1] * layers)

    def parameters(self, counts: Counts, *, count_embeddings: bool | None = None) -> Count:
        """Parameters left, as an integer or a scalar tensor. Tied weights count once."""
        everything = self.count_embeddings if count_embeddings is None else count_embeddings
        left: Count = 0
        for axes, layer, shape, outside in self._weights:
            if outside and not everything:
                continue
            size = prod(self._length(axis, whole, layer, counts) for axis, whole in zip(axes, shape, strict=True))
            if len(axes) == 1 and isinstance(size, Tensor):
                size = size.detach()
            left = left + (size if layer is None else size * counts.layers[layer])
        return left

    def cost(self, counts: Counts) -> Count:
        """What is left of that which is counted: parameters, or operations."""
        return self.parameters(counts) if self.flops_of is None else self.flops(counts, self.flops_of)

    def sparsity(self, counts: Counts) -> Count:
        """1 - cost left / cost of the whole model."""
        return 1 - self.cost(counts) / self.total

    def flops(self, counts: Counts, tokens: int) -> Count:
        """Operations of one pass over one text of `tokens` tokens (a multiplication and an addition are two)."""
        total: Count = 0
        for axes, layer, shape, _ in self._weights:
            if len(axes) == 1 or (layer is None and "all" in axes):
                continue
            size = prod(self._length(axis, whole, layer, counts) for axis, whole in zip(axes, shape, strict=True))
            total = total + 2 * tokens * (size if layer is None else size * counts.layers[layer])
        for layer, kept in enumerate(counts.layers):
            context = self._length("query", self.anatomy.query_heads * self.anatomy.head_dim, layer, counts)
            total = total + 4 * tokens**2 * context * kept
        if self._vocabulary_product:
            total = total + 2 * tokens * self.anatomy.config.vocab_size * counts.hidden
        return total

    def _length(self, axis: str, whole: int, layer: int | None, counts: Counts) -> Count:
        kind = axis.rstrip("*/")
        if kind == "all" or layer is None:
            return counts.hidden if kind == "hidden" else whole
        if kind == "hidden":
            return counts.hidden
        if kind == "inter":
            return counts.inter[layer]
        blocks = 3 if kind == "qkv" else 1
        if self.layout == "stock" and self.anatomy.family.square_attention:
            return blocks * counts.hidden
        return whole // self.anatomy.heads * counts.heads[layer]


def fits_stock(model: nn.Module, structure: Structure) -> str | None:
    """None where the model's stock class can hold the structure, else what it cannot hold."""
    a = Anatomy(model)
    counts = structure.counts
    if not structure.is_even():
        return "layers differ in heads or feed-forward width"
    heads, hidden = counts.heads[structure.layers[0]], counts.hidden
    if a.family.square_attention and hidden != heads * a.head_dim:
        return f"{hidden} channels are not {heads} heads of {a.head_dim}"
    if hidden % (heads * a.group):
        return f"{hidden} channels are no multiple of {heads * a.group} query heads"
    return None


def keep_masks(kept: Sequence[int], length: int) -> Tensor:
    """True at the kept indices."""
    mask = torch.zeros(length, dtype=torch.bool)
    mask[list(kept)] = True
    return mask
