"""A training step of AS-ViT with masked tokens against one of the dense model."""

import timm
import torch

from vit_efficient import AdaptiveSparsityLoss, apply_adaptive_sparsity, masked_forward

CLAIM = "A training step with masked tokens costs at most 15 % more than a dense one."
SWEEP = {"images": (2, 8)}
BASELINE = "dense training"
TARGET = 1 / 1.15
TARGET_AT = {"images": (8,)}
THREADS = 2
ROUNDS = 5


def make(images):
    """Two copies of deit_small_patch16_224 in training mode."""
    dense, pruned = (timm.create_model("deit_small_patch16_224", num_classes=10) for _ in range(2))
    apply_adaptive_sparsity(pruned)
    return dense.train(), pruned.train(), torch.randn(images, 3, 224, 224), torch.arange(images) % 10


def run_dense(inputs):
    dense, _, x, labels = inputs
    loss = torch.nn.functional.cross_entropy(dense(x), labels)
    loss.backward()
    return loss.detach()


def run_masked(inputs):
    _, pruned, x, labels = inputs
    loss = AdaptiveSparsityLoss(pruned, 0.65)(masked_forward(pruned, x), labels).total
    loss.backward()
    return loss.detach()


RIVALS = {"dense training": run_dense, "ours": run_masked}


def check(out):
    """Both are losses."""
    assert all(loss.isfinite() for loss in out.values())
