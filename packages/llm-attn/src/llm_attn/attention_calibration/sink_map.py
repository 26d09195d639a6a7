"""Where the sinks of a model are: what each token of a text receives in every head, as numbers and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from transformers import PreTrainedModel

from llm_attn.attention_calibration.config import ACTConfig
from llm_attn.attention_calibration.door import apply_act
from llm_attn.transformers.door import attention_layers

_DEFAULT = ACTConfig()
_MOST_LABELS = 70  # tokens that can be named below a picture


@dataclass(frozen=True)
class SinkMap:
    """Sinks of one text in every head of every layer.

    received: attention of each token from the rows that see it, on average. sinks: those above the threshold, less the
    protected first token.
    """

    received: Float[Tensor, "layers heads tokens"]
    sinks: Bool[Tensor, "layers heads tokens"]


def sink_map(model: PreTrainedModel, input_ids: Int[Tensor, "1 tokens"], config: ACTConfig = _DEFAULT) -> SinkMap:
    """Runs the model, uncalibrated, on one text. `config` says what is a sink; its heads are not looked at.

    ValueError if there is not exactly one text, or it is empty.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be one text (1, tokens), got {tuple(input_ids.shape)}")
    received, sinks = {}, {}

    def on_sinks(layer: int, _: tuple[int, ...], of_keys: Tensor, above: Tensor) -> None:
        received[layer], sinks[layer] = of_keys[0].float().cpu(), above[0].cpu()

    layers = list(attention_layers(model))
    watching = replace(config, heads=None, beta=1.0, causal=False)
    with torch.inference_mode(), apply_act(model, watching, layers=layers, on_sinks=on_sinks):
        model(input_ids.to(model.device), use_cache=False)
    # a sliding window leaves keys of all tokens in a first call: all layers have as many
    return SinkMap(torch.stack([received[layer] for layer in layers]), torch.stack([sinks[layer] for layer in layers]))


def plot_sinks(
    found: SinkMap,
    path: Path | str,
    *,
    tokens: Sequence[str] | None = None,
    heads: Mapping[int, Sequence[int]] | None = None,
) -> Path:
    """Writes a PNG: how many sinks each head has, and what each token receives in the head that looks at it most.

    tokens: what is written below the second picture. heads: framed in the first one, such as those of an ACTConfig.
    """
    num_layers, num_heads, length = found.received.shape
    if tokens is not None and len(tokens) != length:
        raise ValueError(f"tokens must name the {length} tokens of the map, got {len(tokens)}")
    figure = Figure(
        figsize=(4 + max(4, 0.17 * min(length, _MOST_LABELS)), 2.5 + 0.17 * num_layers), layout="constrained"
    )
    widths = [1, max(1.5, 0.05 * min(length, _MOST_LABELS))]
    of_heads, of_tokens = figure.subplots(1, 2, sharey=True, width_ratios=widths)
    counts = found.sinks.sum(-1).numpy()
    image = of_heads.imshow(counts, aspect="auto", cmap="Blues", vmin=0, vmax=max(1, counts.max()))
    figure.colorbar(image, ax=of_heads, label="sinks beyond the first token")
    for layer, chosen in (heads or {}).items():
        for head in chosen:
            of_heads.add_patch(_frame(head, layer))
    of_heads.set(xlabel="head", ylabel="layer", xticks=range(0, num_heads, max(1, num_heads // 10)))
    most = found.received.amax(1).numpy()
    image = of_tokens.imshow(most, aspect="auto", cmap="magma", vmin=0, vmax=1)
    figure.colorbar(image, ax=of_tokens, label="attention received, highest head")
    above: np.ndarray = found.sinks.any(1).numpy()
    rows, columns = np.nonzero(above)
    of_tokens.scatter(columns, rows, s=9, marker="o", facecolors="none", edgecolors="cyan", linewidths=0.7)
    of_tokens.set_title("circles: sinks", fontsize=9)
    _name_tokens(of_tokens, tokens, np.asarray(above.any(0)))
    return _written(figure, Path(path))


def _frame(head: int, layer: int) -> Rectangle:
    return Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="crimson", linewidth=1.4)


def _name_tokens(axes: Axes, tokens: Sequence[str] | None, is_sink: np.ndarray) -> None:
    """All tokens, or where they are too many the sinks alone, or none if even these are."""
    axes.set_xlabel("token")
    if tokens is None:
        return
    places = range(len(tokens)) if len(tokens) <= _MOST_LABELS else np.nonzero(is_sink)[0].tolist()
    if len(places) <= _MOST_LABELS:
        names = [repr(tokens[place])[1:-1].replace("$", r"\$") for place in places]
        axes.set_xticks(list(places), names, rotation=90, fontsize=6)


def _written(figure: Figure, path: Path) -> Path:
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)
    return path
