"""What it costs to choose: scores and selection of one prompt by each method, against reading it without pruning."""

import torch

import vlm_prune as vp
from vlm_prune.tiny_models import sized_llava, sized_prompt

CLAIM = (
    "Choosing 11 % of 576 visual tokens takes at most 5 % of the time that reading the prompt takes without pruning; "
    "by ZOO-Prune's closed form at most 1 %."
)
_METHODS = (
    "zoo", "uniform", "random", "fastv", "pyramiddrop", "sparsevlm", "himap", "fastervlm", "visionzip", "vispruner",
    "divprune", "adaptinfer", "agile",
)  # fmt: skip
SWEEP = {"method": _METHODS, "layers": (4, 24)}
BASELINE = "unpruned prefill"
TARGETS = (
    (100.0, {"method": ("zoo",), "layers": (24,)}),
    (20.0, {"method": _METHODS[1:], "layers": (24,)}),
)
THREADS = 2
ROUNDS = 3


class Recorded:
    """A method whose stages keep what they were shown."""

    def __init__(self, config):
        self.config, self.name, self.seen = config, config.name, []

    def stages(self, num_layers):
        return tuple(self._recorded(stage) for stage in self.config.stages(num_layers))

    def _recorded(self, stage):
        def select(context, scores):
            self.seen.append((stage.criterion, context))
            return stage.criterion.select(context, scores)

        criterion = vp.Criterion(
            name=self.name, score=stage.criterion.score, select=select, needs=stage.criterion.needs
        )
        return vp.Stage(after_layer=stage.after_layer, keep=stage.keep, criterion=criterion)


def make(method, layers):
    device = torch.get_default_device()
    model = sized_llava(num_layers=layers).to(device)
    prompt = {k: v.to(device) for k, v in sized_prompt().items()}
    recorded = Recorded(vp.METHODS[method](keep=0.1112))
    with vp.prune(model, recorded), torch.inference_mode():
        model(**prompt, logits_to_keep=1)
    return model, prompt, recorded.seen


def prefill(inputs):
    model, prompt, _ = inputs
    with torch.inference_mode():
        return model(**prompt, logits_to_keep=1).logits


def ours(inputs):
    """All stages. What PyramidDrop computes to look ahead, a third of a layer's products, is not in it."""
    with torch.inference_mode():
        return [criterion(context).kept for criterion, context in inputs[2]]


RIVALS = {"unpruned prefill": prefill, "ours": ours}


def check(out):
    """Each stage keeps some and drops some."""
    assert out["ours"]
    for kept in out["ours"]:
        assert 0 < int(kept.sum()) < 576
