"""OAT's object attention: decoder states point at encoder states, so that there are as many outputs as objects.

    A_e^k = H_e W_e^k + b,  A_d^k = H_d W_d^k + b,  O^k = concat(A_d^k A_e^kT, 0) / sqrt(D), O = readout(O^1, ..., O^N)

Fang et al., ECCV 2024, arXiv:2407.13335, section 3.5. The zero column belongs to PAD, so PAD's logit is the readout's
bias, or 0 with one head, which has no readout.

Shapes: B scenes, L decoder tokens, S encoder tokens, D width, N heads.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PointerHead(nn.Module):
    """Scores of S encoder tokens for each of L decoder tokens, and a last column for PAD."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.width = width
        self.encoder_side = nn.ModuleList([nn.Linear(width, width) for _ in range(heads)])
        self.decoder_side = nn.ModuleList([nn.Linear(width, width) for _ in range(heads)])
        self.readout = nn.Linear(heads, 1) if heads > 1 else None

    def keys(self, memory: Float[Tensor, "B S D"]) -> Float[Tensor, "N B S D"]:
        """A_e of all heads: once for a scene."""
        return torch.stack([side(memory) for side in self.encoder_side])

    def scores(self, hidden: Float[Tensor, "B L D"], keys: Float[Tensor, "N B S D"]) -> Float[Tensor, "B L S+1"]:
        """Logits against keys that are there already."""
        asked = torch.stack([side(hidden) for side in self.decoder_side])
        products = nn.functional.pad(asked @ keys.transpose(-1, -2), (0, 1)) / self.width**0.5
        if self.readout is None:
            return products[0]
        return self.readout(products.movedim(0, -1))[..., 0]

    def forward(self, hidden: Float[Tensor, "B L D"], memory: Float[Tensor, "B S D"]) -> Float[Tensor, "B L S+1"]:
        """Logits over the S encoder tokens and PAD."""
        return self.scores(hidden, self.keys(memory))
