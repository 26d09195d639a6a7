"""diverse_subset against the loop over a distance matrix that DivPrune and ZOO-Prune publish."""

import torch
from torch.nn.functional import normalize

from shared_kernels import diverse_subset

CLAIM = "Choosing 320 of 2,880 image tokens takes diverse_subset a 36th of the time of the loop over a distance matrix."
SWEEP = {"choice": ((576, 64), (2880, 320)), "width": (1024, 4096), "method": ("max_min", "dpp")}
BASELINE = "loop"
TARGET = 36
TARGET_AT = {"choice": ((2880, 320),), "method": ("max_min",)}
THREADS = 2
ROUNDS = 3
_RANK = 96  # effective rank of image tokens, about what AgilePruner reports (95)


def make(choice, width, method):
    tokens, kept = choice
    features = torch.randn(tokens, _RANK) @ torch.randn(_RANK, width) + torch.randn(tokens, width)
    return features, torch.rand(tokens), kept, method


def through(minimum):
    """The matrix of all distances, then choices one by one."""

    def run(inputs):
        features, weight, kept, method = inputs
        unit = normalize(features, dim=-1)
        cosine = unit @ unit.T
        return determinant(cosine, weight, kept) if method == "dpp" else greedy(1 - cosine, weight, kept, minimum)

    return run


def greedy(distance, weight, kept, minimum):
    """Every step takes the minimum over all chosen tokens again."""
    chosen, blocked = torch.empty(kept, dtype=torch.int64, device=weight.device), torch.zeros_like(weight)
    for i in range(kept):
        score = weight * minimum(distance, chosen[:i]) if i else weight
        chosen[i] = torch.argmax(score + blocked)
        blocked[chosen[i]] = -torch.inf
    return chosen


def over_columns(distance, chosen):
    """As the formula reads: min over j of D_ij."""
    return distance[:, chosen].min(dim=1).values


def over_rows(distance, chosen):
    """As DivPrune's code has it, with the symmetric matrix turned: neighbours in memory."""
    return torch.index_select(distance, 0, chosen).min(dim=0).values


def determinant(cosine, weight, kept):
    """As CDPruner's code has it: every step reads all earlier factors."""
    kernel = weight[:, None] * cosine * weight
    gain, chosen = kernel.diagonal().clone(), torch.empty(kept, dtype=torch.int64, device=weight.device)
    factors = torch.zeros(kept, len(weight), device=weight.device)
    for i in range(kept):
        j = chosen[i] = torch.argmax(gain)
        factors[i] = (kernel[j] - torch.einsum("t,tn->n", factors[:i, j], factors[:i])) / gain[j].sqrt()
        gain -= factors[i].square()
        gain[j] = -torch.inf
    return chosen


def ours(inputs):
    features, weight, kept, method = inputs
    return diverse_subset(features[None], num_kept=kept, weight=weight[None], method=method)[0]


RIVALS = {"loop": through(over_columns), "loop over rows": through(over_rows), "ours": ours}


def check(out):
    """The same tokens, but where two are as good as each other to the last digits."""
    same = set(out["ours"].tolist()) & set(out["loop"].tolist())
    assert len(out["ours"].unique()) == len(out["ours"])
    assert len(same) >= 0.98 * len(out["ours"]), len(same)
