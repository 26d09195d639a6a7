"""AS-ViT on DeiT-S shapes at the paper's budgets against the dense model, images per second."""

import timm
import torch

from vit_efficient import apply_adaptive_sparsity, fit_thresholds, model_macs, token_counts

CLAIM = (
    "At 65 % of the multiply-adds, deit_small_patch16_224 with AS-ViT takes at least 1.5 times as many images a second."
)
SWEEP = {"images": (2, 16), "budget": (0.65, 0.5)}
BASELINE = "dense"
TARGETS = ((1.5, {"images": (16,), "budget": (0.65,)}),)
THREADS = 2
ROUNDS = 5


def make(images, budget):
    """Random weights, sharpened so that scores differ from patch to patch, thresholds fitted to the budget."""
    dense = timm.create_model("deit_small_patch16_224").eval()
    with torch.no_grad():
        for block in dense.blocks:
            block.attn.qkv.weight.mul_(4)
    pruned = timm.create_model("deit_small_patch16_224").eval()
    pruned.load_state_dict(dense.state_dict())
    apply_adaptive_sparsity(pruned)
    x = torch.randn(images, 3, 224, 224)
    fit_thresholds(pruned, x, budget)
    return dense, pruned, x, budget


def run_dense(inputs):
    dense, _, x, _ = inputs
    with torch.inference_mode():
        return dense(x)


def run_pruned(inputs):
    _, pruned, x, budget = inputs
    with torch.inference_mode():
        return pruned(x), pruned, x, budget


RIVALS = {"dense": run_dense, "ours": run_pruned}


def check(out):
    """The counted cost is the budget."""
    _, pruned, x, budget = out["ours"]
    full = model_macs(pruned, torch.full((1, 12), 196))
    cost = (model_macs(pruned, token_counts(pruned, x)).mean() / full).item()
    assert abs(cost - budget) < 0.02


def work(inputs):
    """Images."""
    return len(inputs[2]), "images"
