"""What the door does for every method: where it does not act, and what it refuses."""

import copy
import logging

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from diffusion_attn.block_sparse import BlockSparseConfig
from diffusion_attn.diffusers.door import Schedule
from diffusion_attn.diffusers.methods import apply_block_sparse, apply_sla
from diffusion_attn.sla import SLAConfig
from diffusion_attn.testing import inputs_of, output_of, tiny_model


def sparse(model, **schedule):
    return apply_block_sparse(model, BlockSparseConfig(density=0.2, block_size=(8, 8)), schedule=Schedule(**schedule))


def test_layers_that_stay_dense():
    model, inputs = tiny_model("wan"), inputs_of("wan")
    with sparse(model, dense_layers=(0,)) as handle:
        output_of(model, inputs)
        assert handle.layers_changed == (1,)
        assert handle.densities() == {1: pytest.approx(1 / 9)}
    with pytest.raises(ValueError, match="leaves none of the 2 layers"):
        sparse(model, dense_layers=(0, 1))


def test_steps_that_stay_dense():
    """Both calls of a step are dense, the next step is sparse, and a new picture begins anew."""
    model, inputs = tiny_model("wan"), inputs_of("wan")
    host = {time: output_of(model, inputs | {"timestep": torch.full((2,), time)}) for time in (900.0, 500.0)}
    with sparse(model, dense_steps=1):
        for time, dense in ((900.0, True), (900.0, True), (500.0, False), (900.0, True), (500.0, False)):
            found = output_of(model, inputs | {"timestep": torch.full((2,), time)})
            assert torch.equal(found, host[time]) == dense


def test_short_sequences_stay_dense_and_it_is_said_once(caplog):
    model, inputs = tiny_model("wan"), inputs_of("wan")
    host = output_of(model, inputs)
    with caplog.at_level(logging.WARNING), sparse(model, dense_below=100):
        assert torch.equal(output_of(model, inputs), host)
        output_of(model, inputs)
    assert [record.getMessage() for record in caplog.records] == [
        "attention stays dense: 72 visual tokens are fewer than dense_below=100"
    ]


def test_pictures_side_by_side_in_one_sequence_are_refused():
    model, inputs = tiny_model("flux"), inputs_of("flux")
    ids = inputs["img_ids"].clone()
    ids[0, 1] = 9
    with sparse(model), pytest.raises(ValueError, match="are no grid"):
        output_of(model, inputs | {"img_ids": ids})


class NoSDPA(WanAttnProcessor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return attn.to_out[0](attn.to_v(hidden_states))


def test_attention_that_is_not_sdpa_is_refused():
    """A backend that does not end in scaled_dot_product_attention must not stay dense in silence."""
    model, inputs = tiny_model("wan"), inputs_of("wan")
    for block in model.blocks:
        block.attn1.set_processor(NoSDPA())
    with sparse(model), pytest.raises(RuntimeError, match="native attention backend"):
        output_of(model, inputs)


def test_one_processor_for_all_layers_still_knows_its_layer():
    model, inputs = tiny_model("wan"), inputs_of("wan")
    model.set_attn_processor(WanAttnProcessor())
    with sparse(model, dense_layers=(1,)) as handle:
        output_of(model, inputs)
        assert set(handle.densities()) == {0}


def test_lora_goes_on_working():
    from peft import LoraConfig

    model, inputs = tiny_model("wan"), inputs_of("wan")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    tuned = output_of(model, inputs)
    with apply_block_sparse(model, BlockSparseConfig(density=1, block_size=(8, 8))):
        torch.testing.assert_close(output_of(model, inputs), tuned, atol=2e-5, rtol=1e-4)
        model.disable_adapters()
        assert (output_of(model, inputs) - tuned).norm() > 1e-3 * tuned.norm()


def test_fused_projections_go_on_working():
    model, inputs = tiny_model("wan"), inputs_of("wan")
    host = output_of(model, inputs)
    model.fuse_qkv_projections()
    with apply_block_sparse(model, BlockSparseConfig(density=1, block_size=(8, 8))):
        torch.testing.assert_close(output_of(model, inputs), host, atol=2e-5, rtol=1e-4)


def test_a_copy_works_with_its_own_weights():
    """As an average of weights does that is kept beside the model; also when the original's method is removed."""
    model, inputs = tiny_model("wan"), inputs_of("wan")
    handle = apply_sla(model, SLAConfig(critical=0.2, negligible=0.2, block_size=(8, 8)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for block in twin.blocks:
            block.attn1.diffusion_attn_sla.proj.weight.fill_(0.5)
    before, other = output_of(model, inputs), output_of(twin, inputs)
    assert (other - before).norm() > 1e-3 * before.norm()
    assert torch.equal(output_of(model, inputs), before)
    handle.remove()
    assert torch.equal(output_of(twin, inputs), other)


def test_tokens_that_fit_no_grid_are_refused():
    model, inputs = tiny_model("wan"), inputs_of("wan")
    with sparse(model):
        model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0][:, :-1], *args[1:]))
        model.rope.register_forward_hook(lambda *given: tuple(table[:, :-1] for table in given[-1]))
        with pytest.raises(ValueError, match="71 tokens attend to each other where a grid of"):
            output_of(model, inputs)


def test_wrong_schedules_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        Schedule(dense_steps=-1)


def test_guidance_in_one_call_or_in_two():
    """Both halves of a batch, and one after the other."""
    model, inputs = tiny_model("wan"), inputs_of("wan")
    with sparse(model):
        together = output_of(model, inputs)
        halves = [
            output_of(model, {n: v[i : i + 1] if isinstance(v, torch.Tensor) else v for n, v in inputs.items()})
            for i in (0, 1)
        ]
    torch.testing.assert_close(torch.cat(halves), together, atol=1e-5, rtol=1e-4)
