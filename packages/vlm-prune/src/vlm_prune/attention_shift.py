"""Where the attention of text to the image shifts: the layers behind which AdaptInfer drops tokens (arXiv:2508.06084).

Over prompts of an unpruned model: for the visual tokens that get most attention from the text, the attention summed up
from layer to layer is a curve; where two constant levels fit it best, its one change point, is counted; peaks of the
histogram over tokens and prompts are the layers.

Decided here, where the published code is silent: attention is the mean over heads and the sum over text tokens; the
histogram is smoothed with [1, 2, 1] / 4 and its three highest local maxima at least an eighth of the depth apart are
taken. Change points need two layers on either side, so layer 1 and layer L - 3 are the outermost.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm_prune.families import family_of
from vlm_prune.layer_attention import Caught, LayerAttention, attach_probe
from vlm_prune.masks import real_tokens
from vlm_prune.prefill import Prefill, new_prefill

TOP_SHARE = 0.1
"""Share of the visual tokens that are followed: the published code takes 58 of 576."""


def change_points(curves: Float[Tensor, "V L"]) -> Int[Tensor, "V"]:
    """The layer before the split p in 2..L-2 with the least squared error of two levels: p - 1, the first on ties."""
    length = curves.shape[-1]
    if length < 4:
        raise ValueError(f"a change point needs at least 4 layers, got {length}")
    curves = curves.double()
    sums = torch.nn.functional.pad(curves.cumsum(-1), (1, 0))
    squares = torch.nn.functional.pad(curves.square().cumsum(-1), (1, 0))
    split = torch.arange(2, length - 1, device=curves.device)
    left = squares[:, split] - sums[:, split].square() / split
    right = squares[:, -1:] - squares[:, split] - (sums[:, -1:] - sums[:, split]).square() / (length - split)
    return split[(left + right).argmin(-1)] - 1


def shift_histogram(attention: Float[Tensor, "L V"], *, top_share: float = TOP_SHARE) -> Int[Tensor, "L"]:
    """How many of the most attended visual tokens of a prompt have their change point at each layer."""
    layers, tokens = attention.shape
    top = max(1, round(top_share * tokens))
    followed = attention.sum(0).topk(top).indices
    return change_points(attention[:, followed].T.cumsum(-1)).bincount(minlength=layers)


def shift_layers(histogram: Int[Tensor, "L"], *, number: int = 3) -> tuple[int, ...]:
    """The highest peaks of the smoothed histogram, at least L / 8 apart, in order. ValueError where there are fewer."""
    padded = torch.nn.functional.pad(histogram.double(), (1, 1))
    smooth = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    edge = torch.nn.functional.pad(smooth, (1, 1), value=-1.0)
    peak = (smooth > 0) & (smooth >= edge[:-2]) & (smooth > edge[2:])
    order = smooth.masked_fill(~peak, -1).sort(descending=True, stable=True).indices[: int(peak.sum())]
    found: list[int] = []
    for layer in order.tolist():
        if all(abs(layer - other) >= len(histogram) / 8 for other in found):
            found.append(layer)
    if len(found) < number:
        raise ValueError(
            f"the histogram has {len(found)} peaks far enough apart, {number} were asked for; use more prompts, or "
            f"choose layers by hand: counts are {histogram.tolist()}"
        )
    return tuple(sorted(found[:number]))


@dataclass(frozen=True)
class ShiftReport:
    """What an analysis found. histogram: change points at each layer. num_prompts: prompts that were read."""

    model_type: str
    histogram: tuple[int, ...]
    num_prompts: int

    def layers(self, number: int = 3) -> tuple[int, ...]:
        """Layers for `AdaptInferConfig(layers=...)`."""
        return shift_layers(torch.tensor(self.histogram), number=number)

    def save(self, path: str | Path) -> None:
        """Writes JSON, under a temporary name first."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(path)

    @staticmethod
    def load(path: str | Path) -> "ShiftReport":
        """Reads what `save` wrote."""
        found = json.loads(Path(path).read_text())
        return ShiftReport(found["model_type"], tuple(found["histogram"]), found["num_prompts"])


class _Watch:
    """Attention from text to visual tokens of every layer, while a model runs unpruned."""

    def __init__(self, model: nn.Module) -> None:
        host, base, self.family = family_of(model)
        self.model_type = host.config.model_type
        self.placeholders = self.family.placeholders(host.config)
        self.prefill: Prefill | None = None
        self.rows: list[Tensor] = []
        self.decoder = base.get_decoder()
        self.undo = [attach_probe(layer.self_attn, self._observe) for layer in self.decoder.layers]

    def _observe(self, caught: Caught, _: dict[str, Any]) -> None:
        if self.prefill is None:
            return
        attention = LayerAttention(caught, self.prefill.valid, plain=self.family.plain_causal)
        self.rows.append(attention.received(self.prefill.guidance()))

    def read(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Float[Tensor, "L V"]]:
        """Attention (L, V) of each sample with images."""
        ids = inputs["input_ids"]
        self.prefill = new_prefill(ids, real_tokens(inputs.get("attention_mask"), ids), self.placeholders)
        self.rows = []
        if self.prefill is None:
            return []
        model(**inputs)
        stacked = torch.stack(self.rows, 1)
        return [s[:, visual] for s, visual in zip(stacked, self.prefill.visual, strict=True) if bool(visual.any())]

    def close(self) -> None:
        while self.undo:
            self.undo.pop()()


def find_shift(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, on_batch: Callable[[int], None] | None = None
) -> ShiftReport:
    """Change points over batches of inputs for one forward pass each; `on_batch` gets the number of batches done.

    Newline tokens count as visual here. ValueError where no prompt has an image, or a method is at work in the model.
    """
    if getattr(model, "vlm_prune", None) is not None:
        raise ValueError("the analysis is of the unpruned model; leave the block of the method that is at work")
    watch = _Watch(model)
    histogram, prompts = None, 0
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches, 1):
                for attention in watch.read(model, batch):
                    found = shift_histogram(attention)
                    histogram = found if histogram is None else histogram + found
                    prompts += 1
                if on_batch is not None:
                    on_batch(number)
    finally:
        watch.close()
    if histogram is None:
        raise ValueError("no prompt with an image in these batches")
    return ShiftReport(watch.model_type, tuple(histogram.tolist()), prompts)
