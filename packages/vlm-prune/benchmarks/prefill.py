"""Reading a prompt of a random LLaVA of about 0.5 B parameters, 576 visual tokens and 24 of text, with and without
pruning before the language model: tower, projector, selection and language model together.
"""

import torch

import vlm_prune as vp
from vlm_prune.tiny_models import sized_llava, sized_prompt

CLAIM = (
    "Keeping 11 % of 576 visual tokens before a language model of 0.4 B parameters, a prompt is read at least 2.3 "
    "times as fast, and at 10 % its cache is 85 % smaller."
)
SWEEP = {"method": ("uniform", "fastervlm", "zoo", "agile", "divprune"), "layers": (2, 24)}
BASELINE = "unpruned"
TARGET = 2.3
TARGET_AT = {"layers": (24,)}
THREADS = 2
ROUNDS = 3


def make(method, layers):
    model = sized_llava(num_layers=layers)
    inputs = sized_prompt()
    device = torch.get_default_device()
    return model.to(device), {k: v.to(device) for k, v in inputs.items()}, method


def unpruned(inputs):
    model, prompt, _ = inputs
    with torch.inference_mode():
        return model(**prompt, logits_to_keep=1).logits


def pruned(inputs):
    model, _, method = inputs
    with vp.prune(model, method, keep=0.1112) as handle:
        return unpruned(inputs), handle.report


RIVALS = {"unpruned": unpruned, "ours": pruned}


def check(out):
    """64 of 576 tokens are left in every layer, and the cache is as much smaller as that says."""
    logits, report = out["ours"]
    assert logits.isfinite().all()
    assert report.num_visual.tolist() == [576]
    assert set(report.entering.flatten().tolist()) == {64 + 24}
    assert report.kv_bytes / report.kv_bytes_unpruned == (64 + 24) / 600


def price(out):
    """What is counted: bytes of the cache at this keep ratio and at one of ten, and multiply-adds."""
    _, report = out["ours"]
    tenth = (57 + 24) / 600
    assert tenth < 0.15
    return {
        "cache, share of the unpruned": round(report.kv_bytes / report.kv_bytes_unpruned, 3),
        "cache at keep 0.1": round(tenth, 3),
        "multiply-adds": round(report.flops_ratio, 3),
    }
