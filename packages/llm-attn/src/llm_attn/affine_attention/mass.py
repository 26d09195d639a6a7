"""How much attention rows give, and to what: mass, entropy, first token, measured in a model at work.

The analyses of the paper's figures, for models with Affine-Scaled Attention, its rivals, or none of them (any
supported transformers model is looked at through a door that changes nothing). Maps are made for a block of rows of one
layer at a time, so memory stays linear in the length.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from llm_attn.affine_attention.door import NAME, apply_affine
from llm_attn.affine_attention.formula import masked_scores
from llm_attn.affine_attention.scale import AffineConfig, AffineScale, AttentionCall
from llm_attn.transformers.door import attention_layers, base_model
from llm_attn.transformers.saving import open_doors

ROWS = 128
"""Query rows whose weights exist at a time."""
EDGES = torch.linspace(-0.525, 2.525, 62)
"""Of the histogram of row masses, 0 and 1 in the middle of a bin; the outer bins take what lies beyond."""


@dataclass(frozen=True, kw_only=True)
class AttentionMass:
    """What the weights of every layer and head (L, H) come to, over all rows that are tokens and see at least one key.

    L are the layers that the method changes, all of them in a model without one.

    Weights are those that the values are summed with: alpha softmax + beta, not gated. They may be negative.
    """

    mass: Float[Tensor, "L H"]
    """Mean over rows of the sum of the weights; 1 for softmax."""
    mass_deviation: Float[Tensor, "L H"]
    """Standard deviation of that sum."""
    first_token: Float[Tensor, "L H"]
    """Mean weight of the first token of the text, 0 in rows that do not see it; rows of one key are left out."""
    entropy: Float[Tensor, "L H"]
    """Mean of -sum_j p_j ln p_j in nats, p the absolute weights over their sum; rows of one key are left out."""
    negative: Float[Tensor, "L H"]
    """Share of the visible weights that are below 0."""
    factor: Float[Tensor, "L H"]
    """Mean of what the softmax is multiplied by: 1, alpha (twice that with init="identity"), or what a sink leaves."""
    largest_logit: Float[Tensor, "L H"]
    """Largest absolute score that a row may use."""
    histogram: Int[Tensor, "bins"]
    """Rows by their mass, all layers and heads together, between `EDGES`."""


def attention_mass(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> AttentionMass:
    """Runs the model on token ids (B, N), or on a mapping of model inputs, in eval mode, and measures its attention.

    Models without a method of llm-attn are measured as they are; the model is left as it was. ValueError on a model
    that runs another attention method, and on a batch without tokens.
    """
    layers: dict[int, _Sums] = {}

    def look(index: int, call: AttentionCall) -> None:
        layers.setdefault(index, _Sums()).add(call)

    with watched(model, look):
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        model(**{**inputs, "use_cache": False})
    per_layer = [layers[index].finish() for index in sorted(layers)]
    histogram = torch.stack([found.pop("histogram") for found in per_layer]).sum(0)
    return AttentionMass(
        **{name: torch.stack([found[name] for found in per_layer]) for name in per_layer[0]}, histogram=histogram
    )


def attention_maps(model: nn.Module, batch: Tensor) -> list[tuple[Float[Tensor, "B H N N"], Float[Tensor, "B H N N"]]]:
    """Scores (-inf where not seen) and weights of each layer as whole maps, for short texts."""
    maps: list[tuple[Tensor, Tensor]] = []

    def look(_: int, call: AttentionCall) -> None:
        maps.append(weights_of_rows(call, slice(None))[:2])

    with watched(model, look):
        model(input_ids=batch, use_cache=False)
    return maps


@contextmanager
def watched(model: nn.Module, look: Callable[[int, AttentionCall], None]) -> Iterator[None]:
    """Calls `look(layer index, call)` in each attention call of the block, without gradients, in eval mode."""
    host = base_model(model)
    passing = None if NAME in open_doors(host) else apply_affine(model, AffineConfig(scaling="softmax"))
    scales = [
        (index, module)
        for index, layer in attention_layers(model).items()
        for module in layer.modules()
        if isinstance(module, AffineScale)
    ]
    was_training = {module: module.training for module in host.modules()}
    host.eval()
    try:
        for index, scale in scales:
            scale.observer = lambda call, index=index: look(index, call)
        with torch.no_grad():
            yield
    finally:
        for _, scale in scales:
            scale.observer = None
        for module, training in was_training.items():
            module.training = training
        if passing is not None:
            passing.remove()


def weights_of_rows(call: AttentionCall, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and weights (B, H, R, Nk), and what is visible (B or 1, 1, R, Nk), of some query rows."""
    visible = call.sight.dense()[:, :, rows]
    scores = masked_scores(call.query[:, :, rows], call.key, visible, scale=call.scale, softcap=call.softcap)
    softmax = scores.softmax(-1).masked_fill(~visible, 0)
    factor, bias = (t[:, :, rows, None].to(scores.dtype) for t in (call.factor, call.bias))
    return scores, factor * softmax + bias * visible, visible


class _Sums:
    """Running sums over the rows of one layer, (H,) each."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.largest: Tensor | None = None

    def add(self, call: AttentionCall) -> None:
        real = call.sight.real_tokens()
        everywhere = torch.ones(1, call.query.shape[2], dtype=torch.bool, device=call.query.device)
        real = (everywhere if real is None else real).expand(call.query.shape[0], -1)
        for start in range(0, call.query.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            self._add_rows(*weights_of_rows(call, rows), call.factor[:, :, rows], real[:, rows], _first_token(real))

    def _add_rows(
        self, scores: Tensor, weights: Tensor, visible: Tensor, factor: Tensor, real: Tensor, first: Tensor
    ) -> None:
        seen_keys = visible.sum(-1)[:, 0].expand(real.shape[0], -1)
        counted = (real & (seen_keys > 0))[:, None].double()  # (B, 1, R)
        several = counted * (seen_keys > 1)[:, None]
        mass = weights.double().sum(-1)
        share = weights.abs().double()
        share = share / share.sum(-1, keepdim=True).clamp_min(1e-30)
        on_first = weights.gather(-1, first[:, None, None, None].expand(*weights.shape[:3], 1))[..., 0]
        found = {
            "rows": counted.expand_as(mass),
            "several": several.expand_as(mass),
            "mass": mass * counted,
            "square": mass**2 * counted,
            "first_token": on_first.double() * several,
            "entropy": -torch.xlogy(share, share).sum(-1) * several,
            "negative": ((weights < 0) & visible).sum(-1) * counted,
            "keys": (seen_keys[:, None] * counted).expand_as(mass),
            "factor": factor.double() * counted,
        }
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0) + value.sum((0, 2))
        self.sums["histogram"] = self.sums.get("histogram", 0) + _histogram(mass[counted.expand_as(mass) > 0])
        largest = scores.masked_fill(~visible | (counted == 0)[..., None], 0).abs().amax((0, 2, 3))
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def finish(self) -> dict[str, Tensor]:
        rows, several = self.sums["rows"], self.sums["several"].clamp_min(1)
        if not rows.any() or self.largest is None:
            raise ValueError("batch must hold at least one token that is not padding")
        mass = self.sums["mass"] / rows
        return {
            "mass": mass.float(),
            "mass_deviation": (self.sums["square"] / rows - mass**2).clamp_min(0).sqrt().float(),
            "first_token": (self.sums["first_token"] / several).float(),
            "entropy": (self.sums["entropy"] / several).float(),
            "negative": (self.sums["negative"] / self.sums["keys"]).float(),
            "factor": (self.sums["factor"] / rows).float(),
            "largest_logit": self.largest.float(),
            "histogram": self.sums["histogram"],
        }


def _first_token(real: Tensor) -> Tensor:
    """Place of the first token that is not padding, (B,)."""
    return real.to(torch.uint8).argmax(-1)


def _histogram(mass: Tensor) -> Tensor:
    inside = mass.float().cpu().clamp(EDGES[0].item(), EDGES[-1].item() - 1e-6)
    return torch.bincount(torch.bucketize(inside, EDGES, right=True) - 1, minlength=len(EDGES) - 1)


# ---- the figure


def draw_attention_mass(found: Mapping[str, AttentionMass], path: Path | str) -> None:
    """A PNG that compares models: histogram of row masses, first-token weight and entropy by layer, mass by head."""
    if not found:
        raise ValueError("found must name at least one AttentionMass to draw")
    path = Path(path)
    figure = Figure(figsize=(4 * max(3, len(found)), 7), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    _draw_lines(above.subplots(1, 3), found)
    _draw_heads(below, below.subplots(1, len(found), squeeze=False)[0], found)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.part.png")
    figure.savefig(unfinished, dpi=110)
    unfinished.replace(path)


def _draw_lines(panels: Any, found: Mapping[str, AttentionMass]) -> None:
    middles = ((EDGES[1:] + EDGES[:-1]) / 2).tolist()
    for name, one in found.items():
        layers = range(one.mass.shape[0])
        panels[0].step(middles, (one.histogram / one.histogram.sum()).tolist(), where="mid", label=name)
        panels[1].plot(layers, one.first_token.mean(1).tolist(), marker="o", label=name)
        panels[2].plot(layers, one.entropy.mean(1).tolist(), marker="o", label=name)
    panels[0].set(title="mass of a row", xlabel="sum of the weights", ylabel="share of rows")
    panels[1].set(title="weight of the first token", xlabel="layer")
    panels[2].set(title="entropy, nats", xlabel="layer")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[1:]:
        low, high = panel.get_ylim()
        panel.set_ylim(min(0.0, low), 1.1 * max(high, 1e-3))
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].legend(frameon=False)


def _draw_heads(figure: Any, panels: Any, found: Mapping[str, AttentionMass]) -> None:
    highest = max(1.0, max(one.mass.max().item() for one in found.values()))
    image = None
    for panel, (name, one) in zip(panels, found.items(), strict=True):
        image = panel.imshow(one.mass.numpy(force=True), vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        panel.set(title=f"{name}: mean mass", xlabel="head", ylabel="layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(panels))
