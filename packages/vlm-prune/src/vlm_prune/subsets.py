"""Visual tokens as sets of features, one set for each sample or each of its views, and what was chosen of them.

Decided here: with sets by view each gets an equal part of the sample's budget, rounded down, and a smaller view keeps
what it has; newline tokens come on top (ZOO-Prune's published code). A budget that leaves a view without a token is for
the whole sample.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm_prune.criterion import Context


@dataclass(frozen=True)
class TokenSets:
    """Visual tokens by set, R sets of at most M tokens, padded on the right.

    sample: (R,), whose tokens they are. places: (R, M), where in the sequence. present: (R, M), False on padding.
    num_kept: (R,), the budget of each set.
    """

    sample: Int[Tensor, "R"]
    places: Int[Tensor, "R M"]
    present: Bool[Tensor, "R M"]
    num_kept: Int[Tensor, "R"]

    def take(self, values: Float[Tensor, "B n *c"]) -> Float[Tensor, "R M *c"]:
        """Values of the sets' tokens; what stands at padding means nothing."""
        return values[self.sample[:, None], self.places]

    def most(self) -> int:
        """The largest budget."""
        return int(self.num_kept.max()) if self.num_kept.numel() else 0

    def kept(self, chosen: Int[Tensor, "R K"], like: Bool[Tensor, "B n"]) -> Bool[Tensor, "B n"]:
        """The first `num_kept` chosen elements of each set as a mask of the sequences; -1 stands for none."""
        rank = torch.arange(chosen.shape[1], device=chosen.device)
        wanted = (chosen >= 0) & (rank < self.num_kept[:, None])
        mask = torch.zeros_like(like)
        places = self.places.gather(1, chosen.clamp(min=0))
        sample = self.sample[:, None].expand_as(places)
        mask[sample[wanted], places[wanted]] = True
        return mask


def token_sets(context: Context, *, by_view: bool = False) -> TokenSets:
    """The visual tokens that are left, in order, in one set for each sample, or for each view of each sample."""
    view = context.view.clamp(min=0) if by_view else torch.zeros_like(context.view)
    sets = _sets(context.visual, view)
    if by_view:
        views = sets.sample.bincount(minlength=len(view))
        whole = context.num_kept < views
        if bool(whole.any()):
            sets = _sets(context.visual, view.masked_fill(whole[:, None], 0))
            views = sets.sample.bincount(minlength=len(view))
        budget = context.num_kept // views.clamp(min=1)
    else:
        budget = context.num_kept
    num_kept = torch.minimum(budget[sets.sample], sets.present.sum(1))
    return TokenSets(sets.sample, sets.places, sets.present, num_kept)


def _sets(visual: Bool[Tensor, "B n"], view: Int[Tensor, "B n"]) -> TokenSets:
    sample, place = visual.nonzero(as_tuple=True)
    width = int(view.max()) + 1 if view.numel() else 1
    key, order = (sample * width + view[visual]).sort(stable=True)
    names, counts = key.unique_consecutive(return_counts=True)
    longest = int(counts.max()) if len(counts) else 0
    present = torch.arange(longest, device=visual.device) < counts[:, None]
    places = torch.zeros(present.shape, dtype=torch.long, device=visual.device)
    places[present] = place[order]
    return TokenSets(names // width, places, present, counts)
