"""Gram matrix of random heads in chunks against a loop over heads."""

import torch

from llm_attn.random_feature_theory import HeadFeatures, as_sets, gram, sphere_samples

CLAIM = (
    "The Gram matrix of 1,000 random heads, in chunks of heads, is at least three times as fast as a loop over heads."
)
SWEEP = {"samples": (256, 1_024)}
BASELINE = "loop over heads"
TARGET = 3.0
ROUNDS = 3
D = NUM_KEYS = 16
HEADS = 1_000


def make(samples):
    x = sphere_samples(samples, num_keys=NUM_KEYS, d=D, generator=torch.Generator("cpu").manual_seed(0))
    features = HeadFeatures(d=D, heads=HEADS)
    return features, as_sets(x), torch.from_numpy(features.weights(0, HEADS)).to(x)


def loop(inputs):
    _, sets, weights = inputs
    total = torch.zeros(len(sets), len(sets), dtype=torch.float64)
    for weight in weights:
        scores = ((sets.query @ weight)[:, None] @ sets.keys.mT).relu()
        phi = (scores @ sets.keys)[:, 0] / NUM_KEYS
        total += phi @ phi.T
    return total / HEADS


RIVALS = {"loop over heads": loop, "ours": lambda inputs: gram(inputs[0], inputs[1])}
DEVICES = ("cpu",)


def check(out):
    torch.testing.assert_close(out["ours"], out["loop over heads"], rtol=1e-4, atol=1e-6)


def work(inputs):
    return len(inputs[1]) ** 2, "pairs"
