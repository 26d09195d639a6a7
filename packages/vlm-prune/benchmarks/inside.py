"""Pruning inside the language model against its ideal: the same layers run by hand over as many tokens, with nothing
scored, gathered or hooked.
"""

import torch
from transformers import DynamicCache

import vlm_prune as vp
from vlm_prune.tiny_models import sized_llava, sized_prompt

CLAIM = "Pruning inside the language model takes at most 10 % longer than its layers alone take for that many tokens."
SWEEP = {"method": ("fastv", "adaptinfer"), "layers": (4, 24)}
BASELINE = "layers alone"
TARGET = 0.9
TARGET_AT = {"layers": (24,)}
THREADS = 2
ROUNDS = 3


def make(method, layers):
    device = torch.get_default_device()
    model = sized_llava(num_layers=layers).to(device)
    prompt = {k: v.to(device) for k, v in sized_prompt().items()}
    with vp.prune(model, method, keep=0.1112) as handle, torch.inference_mode():
        model(**prompt, logits_to_keep=1)
        counts = handle.report.entering[0].tolist()
    return model, prompt, method, counts


def unpruned(inputs):
    model, prompt, *_ = inputs
    with torch.inference_mode():
        return model(**prompt, logits_to_keep=1).logits, None


def layers_alone(inputs):
    """Tower and projector by the host; then each layer for as many tokens as it has under pruning."""
    model, prompt, _, counts = inputs
    decoder, base = model.base_model.get_decoder(), model.base_model
    with torch.inference_mode():
        features = torch.cat(list(base.get_image_features(prompt["pixel_values"]).pooler_output))
        embeds = base.get_input_embeddings()(prompt["input_ids"])
        hidden = embeds.masked_scatter((prompt["input_ids"] == 31_999)[..., None], features)
        cache = DynamicCache(config=decoder.config)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        cos, sin = decoder.rotary_emb(hidden, position_ids=positions)
        for layer, n in zip(decoder.layers, counts, strict=True):
            hidden, cos, sin = hidden[:, -n:], cos[:, -n:], sin[:, -n:]
            hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin), past_key_values=cache)
        return model.lm_head(decoder.norm(hidden[:, -1:])), None


def ours(inputs):
    model, prompt, method, _ = inputs
    with vp.prune(model, method, keep=0.1112) as handle, torch.inference_mode():
        return model(**prompt, logits_to_keep=1).logits, handle.report


RIVALS = {"unpruned": unpruned, "layers alone": layers_alone, "ours": ours}


def check(out):
    """Tokens are dropped where they should be."""
    logits, report = out["ours"]
    counts = report.entering[0].tolist()
    assert logits.isfinite().all()
    assert counts[0] == 600
    assert counts[-1] < 0.2 * 600


def price(out):
    """Multiply-adds of the layers in proportion to no pruning, and the mean number of visual tokens."""
    report = out["ours"][1]
    return {"multiply-adds": round(report.flops_ratio, 3), "visual tokens, mean": round(report.average_true.item(), 1)}
