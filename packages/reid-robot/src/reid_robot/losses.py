"""The two losses of the standard recipe: who is it, and is everybody nearer to themselves than to others.

Identity: cross-entropy with smoothed labels, (1 - e) onehot + e / classes (Szegedy et al., CVPR 2016). Triplet:
batch-hard (Hermans, Beyer and Leibe, arXiv:1703.07737, eq. 5), Euclidean, on features before the neck and not
normalised: mean over anchors of max(0, farthest of the same person - nearest of another + margin).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def batch_hard_triplet(
    features: Float[Tensor, "B D"], ids: Int[Tensor, "B"], *, margin: float = 0.3
) -> Float[Tensor, ""]:
    """The loss. A person with one image is its own farthest, at distance 0.

    Raises ValueError if shapes differ or all images are of one person: then nobody is another.
    """
    if features.ndim != 2 or ids.shape != features.shape[:1]:
        raise ValueError(f"features must be (B, D) and ids (B,), got {tuple(features.shape)} and {tuple(ids.shape)}")
    same = ids[:, None] == ids[None, :]
    if bool(same.all()):
        raise ValueError(f"a triplet needs at least two people in a batch, got {len(ids)} images of one")
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    distance = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    farthest = distance.masked_fill(~same, -torch.inf).amax(1)
    nearest = distance.masked_fill(same, torch.inf).amin(1)
    return F.relu(farthest - nearest + margin).mean()


def identity_loss(
    logits: Float[Tensor, "B ids"], ids: Int[Tensor, "B"], *, label_smoothing: float = 0.1
) -> Float[Tensor, ""]:
    """Cross-entropy against smoothed labels."""
    return F.cross_entropy(logits, ids, label_smoothing=label_smoothing)
