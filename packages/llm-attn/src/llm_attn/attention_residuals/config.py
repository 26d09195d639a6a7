"""Settings of Attention Residuals."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

TwoPhase = Literal["inference", "always", "never"]
Variant = Literal["report", "inkling2"]


@dataclass(frozen=True, kw_only=True)
class AttentionResidualsConfig:
    """How the layers of a model are grouped into blocks, and how blocks are mixed."""

    layers_per_block: int | None = None
    """Decoder layers whose outputs are summed into one block. None: an eighth of the model's, which gives the report's
    number of about eight blocks."""
    sublayers_per_block: int | None = None
    """The same in the report's unit S, which counts attention and MLP apart; instead of `layers_per_block`. 1 is Full
    Attention Residuals, where every attention and every MLP is a block of its own."""
    sum_scale: bool = False
    """Multiply each mix by the number of its sources. With the queries at zero the mix is then the host's residual
    stream itself: for the conversion of trained models. The report trains from scratch without."""
    variant: Variant = "report"
    """"inkling2": sources enter the mix normed, keys have no weight, logits are divided by sqrt(D), as in Inkling-2."""
    two_phase: TwoPhase = "inference"
    """When all queries of a block look at the closed blocks at once (algorithm 1). In training this keeps one tensor
    more for each layer, so "inference" does so without gradients only."""

    def __post_init__(self) -> None:
        for name in ("layers_per_block", "sublayers_per_block"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, or None, got {value!r}")
        if self.layers_per_block is not None and self.sublayers_per_block is not None:
            raise ValueError("give layers_per_block or sublayers_per_block, not both: they say the same in two units")
        for name, allowed in (("variant", get_args(Variant)), ("two_phase", get_args(TwoPhase))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.sum_scale and self.variant == "inkling2":
            raise ValueError("sum_scale restores the host's sum of raw outputs; variant 'inkling2' mixes normed ones")

    def block_size(self, num_layers: int, sublayers_per_layer: int) -> int:
        """S for a model of that many decoder layers. ValueError if a block would be longer than the model."""
        if self.sublayers_per_block is not None:
            size, given = self.sublayers_per_block, f"sublayers_per_block={self.sublayers_per_block}"
        else:
            layers = self.layers_per_block or math.ceil(num_layers / 8)
            size, given = layers * sublayers_per_layer, f"layers_per_block={layers}"
        if size > num_layers * sublayers_per_layer:
            raise ValueError(
                f"{given} is longer than the model: it has {num_layers} decoder layers of {sublayers_per_layer} "
                f"sub-layers each, so at most {num_layers * sublayers_per_layer} sub-layers fit into a block"
            )
        return size
