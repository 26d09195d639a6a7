"""A token of TransNormerLLM after short and long contexts, against a Llama of the same size."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_attn.transnormer import StateCache, TransNormerConfig, TransNormerForCausalLM

CLAIM = "TransNormerLLM makes a token in the same time, within 15 %, after 65,536 tokens as after 1,024."
SWEEP = {"context": (1_024, 8_192, 65_536)}
BASELINE = "ours after 1,024 tokens"
TARGET = 0.85
SIZE = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
SHORT = 1_024


def make(context):
    """Both models with caches as that many tokens leave them, and the next token."""
    state, short = (torch.randint(256, (1, n)) for n in (context, SHORT))
    model = TransNormerForCausalLM(TransNormerConfig(**SIZE, intermediate_size=704)).eval()
    llama = LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=704, max_position_embeddings=context + 1)).eval()
    with torch.no_grad():
        caches = [read(model, tokens) for tokens in (state, short)]
        keys = llama.model(short).past_key_values  # what is in the keys does not matter to the clock
    for layer in keys.layers:
        layer.keys, layer.values = (t.repeat(1, 1, context // SHORT, 1) for t in (layer.keys, layer.values))
    return model, caches, llama, keys, torch.randint(256, (1, 1))


def read(model, tokens):
    cache = StateCache(model.config)
    for part in tokens.split(SHORT, dim=1):
        model.model(part, past_key_values=cache)
    return cache


def ours(inputs):
    model, (cache, _), _, _, token = inputs
    with torch.no_grad():
        return model(token, past_key_values=cache).logits, cache


def ours_short(inputs):
    model, (_, cache), _, _, token = inputs
    with torch.no_grad():
        return model(token, past_key_values=cache).logits, cache


def llama(inputs):
    """Without taking the token in: its context would grow from call to call."""
    _, _, model, cache, token = inputs
    with torch.no_grad():
        logits = model(token, past_key_values=cache).logits
    cache.crop(-1)
    return logits


RIVALS = {"ours after 1,024 tokens": ours_short, "llama": llama, "ours": ours}


def check(out):
    """The state is as large after the long context as after the short one, and the outputs are numbers."""
    (logits, cache), (_, short) = out["ours"], out["ours after 1,024 tokens"]
    assert logits.isfinite().all()
    assert cache.get_seq_length() >= short.get_seq_length() > SHORT
    assert cache.nbytes() == short.nbytes() == 4 * 4 * 64 * 64 * (4 + 1)  # float32, 4 heads, one layer with LRPE
