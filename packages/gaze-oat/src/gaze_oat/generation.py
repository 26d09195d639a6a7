"""Scanpaths step by step, all samples of a scene at once: one decoder token in, one object out, keys and values kept.

The first step is a softmax over the P objects (a path has at least one fixation), later steps over the objects and
stopping; PAD is never a choice. Fang et al., ECCV 2024, arXiv:2407.13335, section 3.7. The published loop encodes the
scene anew at each step of each sample; here the encoder runs once and a step costs one token. The weights are those of
torch's own layers, so the result is the full computation's (tested step by step).

Shapes: R paths still going, H heads, D width, P objects.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from gaze_oat.oat import Encoded, OATModel


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedPaths:
    """Sampled scanpaths of one scene."""

    paths: list[Int[np.ndarray, "n"]]
    """Object ids in order, at least one each."""
    ended: Bool[np.ndarray, "S"]
    """False where a path was cut at the longest length allowed."""


class StepDecoder:
    """The decoder of one scene, a token at a time. `step` gives what the model's forward gives at that position."""

    def __init__(self, model: "OATModel", encoded: "Encoded", rows: int, longest: int) -> None:
        self.model, self.encoded = model, encoded
        self.layers: list[Any] = list(model.decoder.layers)
        self.heads = model.config.num_heads
        self.keys = model.pointer.keys(encoded.memory)
        self.cross = [self._cross(layer) for layer in self.layers]
        size = (len(self.layers), 2, rows, self.heads, longest, model.config.width // self.heads)
        self.cache = encoded.memory.new_empty(size)
        self.length = 0

    def keep(self, rows: Int[Tensor, "R"]) -> None:
        """Goes on with these rows alone."""
        self.cache = self.cache[:, :, rows]

    def step(self, last: Int[Tensor, "R"] | None, rows: int) -> Float[Tensor, "R P+2"]:
        """Logits after one more token: BOS if `last` is None, else the objects just looked at."""
        tokens = self.encoded.tokens[0]
        time = self.model.time_code(torch.tensor([self.length], device=tokens.device))
        x = (tokens[-1:].expand(rows, -1) if last is None else tokens[last]) + time
        for number, layer in enumerate(self.layers):
            x = self._layer(number, layer, x)
        self.length += 1
        logits = self.model.pointer.scores(x[None], self.keys)[0]
        if self.encoded.offset is not None and last is not None:
            logits[:, : tokens.shape[0] - 1] += self.encoded.offset[0, last]
        return logits

    def _layer(self, number: int, layer: Any, x: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        own = layer.self_attn
        q, k, v = (
            nn.functional.linear(x, own.in_proj_weight, own.in_proj_bias).unflatten(-1, (3, self.heads, -1)).unbind(1)
        )
        cache = self.cache[number]
        cache[0, :, :, self.length], cache[1, :, :, self.length] = k, v
        until = self.length + 1
        seen = nn.functional.scaled_dot_product_attention(q[:, :, None], cache[0, :, :, :until], cache[1, :, :, :until])
        x = layer.norm1(x + own.out_proj(seen.flatten(1)))
        other, width = layer.multihead_attn, x.shape[-1]
        asked = nn.functional.linear(x, other.in_proj_weight[:width], other.in_proj_bias[:width])
        keys, values = self.cross[number]
        # the samples are the queries of one attention over the scene
        found = nn.functional.scaled_dot_product_attention(
            asked.unflatten(-1, (self.heads, -1)).transpose(0, 1), keys, values
        )
        x = layer.norm2(x + other.out_proj(found.transpose(0, 1).flatten(1)))
        return layer.norm3(x + layer.linear2(layer.linear1(x).relu()))

    def _cross(self, layer: Any) -> tuple[Tensor, Tensor]:
        other, width = layer.multihead_attn, self.encoded.memory.shape[-1]
        both = nn.functional.linear(self.encoded.memory[0], other.in_proj_weight[width:], other.in_proj_bias[width:])
        keys, values = both.unflatten(-1, (2, self.heads, -1)).movedim(0, 2).unbind(0)
        return keys, values


def roll_out(
    model: "OATModel",
    encoded: "Encoded",
    *,
    count: int,
    temperature: float | None,
    generator: torch.Generator | None,
    longest: int,
) -> GeneratedPaths:
    """`count` paths of the one scene in `encoded`; the most probable one where temperature is None.

    Rows that ended are dropped from the batch once they are a quarter of it.
    """
    stop = encoded.memory.shape[1] - 1
    decoder = StepDecoder(model, encoded, count, longest)
    chosen = torch.full((count, longest), stop, dtype=torch.long)
    rows = torch.arange(count)
    last: Tensor | None = None
    for step in range(longest):
        logits = decoder.step(last, len(rows))[:, :-1]
        if step == 0:
            logits[:, stop] = -torch.inf
        if temperature is None:
            picked = logits.argmax(-1)
        else:
            chances = (logits.double() / temperature).softmax(-1)
            picked = torch.multinomial(chances, 1, generator=generator)[:, 0]
        going = (picked != stop) & (chosen[rows, step - 1].to(picked.device) != stop if step else True)
        chosen[rows, step] = torch.where(going, picked, stop).cpu()
        if not going.any():
            break
        last = picked.clamp(max=stop - 1)
        if going.float().mean() < 0.75:
            kept = going.nonzero()[:, 0]
            decoder.keep(kept)
            rows, last = rows[kept.cpu()], last[kept]
    lengths = (chosen != stop).sum(1)
    paths = [own[:length].numpy() for own, length in zip(chosen, lengths.tolist(), strict=True)]
    return GeneratedPaths(paths=paths, ended=(lengths < longest).numpy())
