"""Visual tokens of a batch as sets of features, and chosen elements of the sets back as kept tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared_kernels import select_tokens
from vlm_prune.criterion import Context
from vlm_prune.layer_attention import padded_index


@dataclass(frozen=True)
class VisualSet:
    """Visual tokens of each sample, padded on the right."""

    index: Int[Tensor, "B V"]
    """Where they are in the sequence."""
    present: Bool[Tensor, "B V"]
    """False for padding."""

    def take(self, values: Float[Tensor, "B n *c"]) -> Float[Tensor, "B V *c"]:
        """Values of the visual tokens."""
        return select_tokens(self.index, values)[0]

    def kept(self, context: Context, chosen: Int[Tensor, "B K"]) -> Bool[Tensor, "B n"]:
        """The first `num_kept` of the chosen elements of each sample as a mask of the sequence; -1 stands for none."""
        places = torch.arange(chosen.shape[1], device=chosen.device)
        wanted = (chosen >= 0) & (places < context.num_kept[:, None])
        tokens = self.index.gather(1, chosen.clamp(min=0))
        # counted, since what is not wanted names a token too
        count = torch.zeros(context.visual.shape, dtype=torch.int32, device=chosen.device)
        return count.scatter_add(1, tokens, wanted.to(torch.int32)) > 0


def visual_set(context: Context) -> VisualSet:
    """The visual tokens that are left, in order."""
    return VisualSet(*padded_index(context.visual))
