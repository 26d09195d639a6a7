"""A prompt through a whole model of SmolLM2-135M's build, DHSA against SDPA, and the peak memory of both and of eager.

Weights are random: what a layer costs does not depend on them. The boundary predictor is one without training, made to
cut as often as it may.
"""

import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_attn.dhsa import BoundaryPredictor, DHSAConfig, PredictorConfig, apply_dhsa

CLAIM = "With DHSA and a budget of 1,024 keys, SmolLM2-135M reads a prompt of 8,192 tokens at least 1.3 times as fast."
SWEEP = {"tokens": (2_048, 8_192)}
BASELINE = "sdpa"
TARGET = 1.3
TARGET_AT = {"tokens": (8_192,)}
THREADS = 2
ROUNDS = 3
SLOW = True
EAGER = 4_096  # tokens up to which eager attention's maps fit


def make(tokens):
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100_000.0, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, torch.randint(0, 49152, (1, tokens))


def sdpa(inputs):
    model, ids = inputs
    with torch.no_grad():
        return model(ids, logits_to_keep=1).logits, len(ids[0])


def ours(inputs):
    model, ids = inputs
    settings = DHSAConfig(budget=1024, block_size=256, threshold=-100.0)
    with apply_dhsa(model, settings, predictor=BoundaryPredictor(PredictorConfig(channels=192))):
        return sdpa((model, ids))


RIVALS = {"sdpa": sdpa, "ours": ours}


def check(out):
    """The last token attends to everything in both; what it finds there was computed from fewer keys."""
    (dense, _), (sparse, _) = out["sdpa"], out["ours"]
    assert sparse.isfinite().all()
    assert 0 < (sparse - dense).norm() < dense.norm()


def price(out):
    """Peak memory of a process that does nothing else, less what the model itself needs."""
    tokens = out["ours"][1]
    ways = ("sdpa", "ours", "eager") if tokens <= EAGER else ("sdpa", "ours")
    weights = _peak("nothing", tokens)
    return {f"MiB beside the weights, {way}": _peak(way, tokens) - weights for way in ways}


def _peak(way, tokens):
    script = f"import runpy; runpy.run_path({__file__!r})['run_alone']({way!r}, {tokens})"
    return int(subprocess.check_output([sys.executable, "-c", script], text=True).split()[-1])


def run_alone(way, tokens):
    import resource

    torch.set_num_threads(THREADS)
    inputs = make(tokens)
    if way == "eager":
        inputs[0].set_attn_implementation("eager")
    if way != "nothing":
        (ours if way == "ours" else sdpa)(inputs)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
