"""The two losses of AttentionInfluence against plain forward passes of the same model on the same documents."""

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from llm_attn import HeadMaskingConfig, apply_head_masking
from llm_attn.attention_influence import pair_losses

CLAIM = (
    "The intact and the masked loss of documents together cost at most 2.1 forward passes with loss; they need two, "
    "less the layers below the first masked head, and logits are never in memory."
)
SWEEP = {"vocabulary": (4_096, 49_152), "tokens": (256, 1_024), "first masked layer": (0, 4)}
BASELINE = "one pass"
TARGET = 1 / 2.1
THREADS = 2
ROUNDS = 5
DOCUMENTS, LAYERS, HEADS = 2, 8, 8


def make(vocabulary, tokens, **other):
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=1_024, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=4, max_position_embeddings=4_096, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    first = other["first masked layer"]
    heads = {first: (1,), LAYERS - 1: (0, 5)}
    return model, torch.randint(vocabulary, (DOCUMENTS, tokens)), heads


@torch.inference_mode()
def losses(model, ids):
    logits = model(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.mT.float(), ids[:, 1:], reduction="none").sum(-1)


def two_passes(inputs):
    model, ids, heads = inputs
    base = losses(model, ids)
    with apply_head_masking(model, HeadMaskingConfig(heads=heads)):
        return torch.stack([base, losses(model, ids)])


def ours(inputs):
    model, ids, heads = inputs
    return pair_losses(model, HeadMaskingConfig(heads=heads), ids, ids[:, 1:])


RIVALS = {"one pass": lambda inputs: losses(*inputs[:2]), "two passes": two_passes, "ours": ours}


def check(out):
    torch.testing.assert_close(out["ours"], out["two passes"], rtol=1e-4, atol=0)
    torch.testing.assert_close(out["ours"][0], out["one pass"], rtol=1e-4, atol=0)


def work(inputs):
    return inputs[1].numel(), "tokens"
