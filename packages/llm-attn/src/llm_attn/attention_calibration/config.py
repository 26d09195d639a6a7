"""Settings of attention calibration, and which heads they name."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Protect = Literal["first", "first_flagged"]
Decode = Literal["running", "frozen", "off"]
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*/\s*S")


@dataclass(frozen=True, kw_only=True)
class ACTConfig:
    """Attention calibration; the defaults are those of the official code."""

    heads: Mapping[int, Sequence[int]] | None = None
    """Query heads to calibrate, by layer; None is every head of every layer but the first two and the last."""
    beta: float = 0.4
    """What is left of the attention on sinks, 0 to 1; 1 switches calibration off."""
    tau: float | str = 0.1
    """A key that receives more than tau from a row on average is a sink; "5/S" is 5 shares of S tokens (the paper)."""
    protect: Protect = "first"
    """What is never scaled down: the first token of a text, or the first key above tau (the official code)."""
    min_rows: int = 1
    """Keys that fewer rows have seen are not judged (8 spares the noisy last ones; 1 is the official code)."""
    causal: bool = False
    """Judge each row of the prompt by the rows up to it, so that no row depends on later tokens."""
    decode: Decode = "running"
    """After the prompt: go on counting, keep the sinks of the prompt ("frozen"), or do not calibrate ("off")."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")
        absolute, share = _parse_tau(self.tau)
        if not (0 < absolute < math.inf or 0 < share < math.inf):
            raise ValueError(f'tau must be a number above 0, or a string such as "5/S", got {self.tau!r}')
        if self.protect not in get_args(Protect):
            raise ValueError(f"protect must be one of {', '.join(get_args(Protect))}, got {self.protect!r}")
        if self.decode not in get_args(Decode):
            raise ValueError(f"decode must be one of {', '.join(get_args(Decode))}, got {self.decode!r}")
        if self.min_rows < 1:
            raise ValueError(f"min_rows must be at least 1, got {self.min_rows}")
        if self.heads is not None:
            object.__setattr__(self, "heads", _sorted_heads(self.heads))

    def threshold(self, length: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """Tau of texts of that many tokens."""
        absolute, share = _parse_tau(self.tau)
        if share:
            return share / length.clamp(min=1).float()
        return torch.full(length.shape, absolute, device=length.device)

    def threshold_at(self, length: int) -> float:
        """Tau of a text of that many tokens."""
        absolute, share = _parse_tau(self.tau)
        return absolute or share / length

    def heads_of(self, layer: int, *, num_layers: int, num_heads: int) -> tuple[int, ...]:
        """Heads to calibrate in a layer. ValueError if the layer has no such head."""
        if self.heads is None:
            return tuple(range(num_heads)) if 2 <= layer < num_layers - 1 else ()
        chosen = tuple(self.heads.get(layer, ()))
        if chosen and chosen[-1] >= num_heads:
            raise ValueError(f"layer {layer} has heads 0 to {num_heads - 1}, got head {chosen[-1]}")
        return chosen


def _parse_tau(tau: float | str) -> tuple[float, float]:
    """Absolute, and in shares of the length; 0 is neither."""
    if not isinstance(tau, str):
        return float(tau), 0.0
    found = _SHARE.fullmatch(tau.strip())
    return (0.0, float(found[1])) if found else (0.0, 0.0)


def _sorted_heads(heads: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    # JSON has layers as strings and heads as lists
    chosen = {int(layer): tuple(sorted(int(head) for head in of_layer)) for layer, of_layer in heads.items()}
    for layer, of_layer in chosen.items():
        if layer < 0 or len(set(of_layer)) < len(of_layer) or (of_layer and of_layer[0] < 0):
            raise ValueError(f"heads must name layers and heads from 0 on, each head once, got {layer}: {of_layer}")
    chosen = {layer: chosen[layer] for layer in sorted(chosen) if chosen[layer]}
    if not chosen:
        raise ValueError("heads names no head; a search that kept none leaves nothing to calibrate")
    return chosen
