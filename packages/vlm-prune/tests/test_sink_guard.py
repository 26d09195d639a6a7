"""The guard: strength by its laws, sinks dropped first or kept, planted in a model."""

import pytest
import torch

import vlm_prune as vp
from vlm_prune.sink_guard import sink_strength
from vlm_prune.testing import MethodTests, shared_model
from vlm_prune.tiny_models import LONG, prompt


class TestGuardedFastV(MethodTests):
    families = ("llava",)

    def config(self, keep):
        return vp.SinkGuardConfig(method=vp.FastVConfig(keep=keep), dims=(3, 5), threshold=1.5)


def test_strength_is_scale_invariant_and_finds_spikes():
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    x[1, 4, 7] = 300.0
    strength = sink_strength(x, (2, 7))
    torch.testing.assert_close(sink_strength(5 * x, (2, 7), eps=0), sink_strength(x, (2, 7), eps=0))
    assert (strength > 3.5).nonzero().tolist() == [[1, 4]]
    wanted = max(abs(x[0, 0, 2]), abs(x[0, 0, 7])) / (x[0, 0].square().mean() + 1e-6).sqrt()
    assert strength[0, 0].item() == pytest.approx(wanted.item())


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_planted_sinks(policy):
    """Three visual tokens get a spike before the stage: they go first, or stay."""
    model, inputs = shared_model("llava"), prompt("llava", LONG)
    planted = torch.tensor([4, 9, 15])

    def plant(_, args, kwargs):
        hidden = args[0].clone()
        if hidden.shape[1] > 1:
            hidden[:, planted, 11] = 1e4
        return (hidden, *args[1:]), kwargs

    hook = model.base_model.get_decoder().layers[1].register_forward_pre_hook(plant, with_kwargs=True)
    try:
        for keep in (5, 15):
            method = vp.FastVConfig(keep=keep)
            config = vp.SinkGuardConfig(method=method, dims=(11,), threshold=7.0, policy=policy)
            with vp.prune(model, config) as handle, torch.no_grad():
                model(**inputs)
                kept = handle.report.kept[1][0]
                assert handle.report.notes[1]["sinks"].tolist() == [3]
            assert len(kept) == keep
            present = int(torch.isin(planted, kept).sum())
            assert present == (3 if policy == "keep" else max(0, keep - 13))
    finally:
        hook.remove()


def test_refusals():
    with pytest.raises(ValueError, match="prunes before the language model"):
        vp.prune(shared_model("llava"), vp.SinkGuardConfig(method=vp.UniformConfig(), dims=(1,)))
    with pytest.raises(ValueError, match="at least one dimension"):
        vp.SinkGuardConfig(method=vp.FastVConfig(), dims=())
    with pytest.raises(ValueError, match="policy must be"):
        vp.SinkGuardConfig(method=vp.FastVConfig(), dims=(1,), policy="hide")
    config = vp.SinkGuardConfig(method=vp.FastVConfig(keep=3), dims=(64,))
    with vp.prune(shared_model("llava"), config), pytest.raises(ValueError, match="below 64"):
        shared_model("llava")(**prompt("llava", LONG))
