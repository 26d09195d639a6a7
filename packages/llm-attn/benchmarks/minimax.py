"""A prompt through the lightning layers of MiniMax-01, as transformers has them and accelerated."""

import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

from llm_attn.transformers.minimax import accelerate_minimax

CLAIM = "A lightning layer of MiniMax-01 reads the second half of a prompt at least twice as fast when accelerated."
SWEEP = {"tokens": (256, 1_024, 4_096)}
BASELINE = "transformers"
TARGET = 2
TARGET_AT = {"tokens": (1_024, 4_096)}
THREADS = 2
ROUNDS = 5


def make(tokens):
    config = MiniMaxConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2)
    layer = torch.nn.ModuleList([MiniMaxLightningAttention(config, 1)])
    fast = torch.nn.ModuleList([MiniMaxLightningAttention(config, 1)])
    fast.load_state_dict(layer.state_dict())
    accelerate_minimax(fast)
    first, second = torch.randn(2, 1, tokens // 2, 256)
    with torch.no_grad():
        _, state = layer[0](first, None, None)
    return layer[0], fast[0], second, state


def read(layer, hidden, state):
    cache = MiniMaxCache()
    cache.set_linear_cache(1, state)
    cache.set_linear_cache(2, [])
    with torch.no_grad():
        return layer(hidden, None, None, cache)


RIVALS = {
    "transformers": lambda inputs: read(inputs[0], inputs[2], inputs[3]),
    "ours": lambda inputs: read(inputs[1], inputs[2], inputs[3]),
}


def check(out):
    """Up to what a sum of thousands of tokens, one after another, loses in float32."""
    for mine, theirs in zip(out["ours"], out["transformers"], strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()
