"""MiniMax's lightning layers in chunks: the host's numbers, in every way that it is called."""

import pytest
import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from llm_attn.transformers.minimax import accelerate_minimax

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def tiny(**changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "block_size": 16}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "initializer_range": 0.2}
    return MiniMaxForCausalLM(MiniMaxConfig(**{**shape, **changes})).eval()


def tokens(batch, length, seed=1):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def same(found, right):
    torch.testing.assert_close(found, right, atol=1e-5 * max(1.0, right.abs().max().item()), rtol=0)


def test_layer_alone():
    """37 tokens in blocks of 16, the state too."""
    model = tiny()
    layer, x = model.model.layers[1].self_attn, torch.randn(2, 37, 32)
    with torch.no_grad():
        right, state = layer(x, None, None)
        with accelerate_minimax(model) as handle:
            found, after = layer(x, None, None)
    assert handle.layers_changed == (1, 3)
    same(found, right)
    same(after, state)


@pytest.mark.parametrize("pads", [0, 5])
def test_model_with_prompt_in_parts(pads):
    model, ids = tiny(), tokens(2, 37)
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0

    def run():
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, use_cache=False).logits
            first = model(ids[:, :20], attention_mask=mask[:, :20])
            parts, cache = [first.logits], first.past_key_values
            for start, end in ((20, 35), (35, 36), (36, 37)):
                options = {"attention_mask": mask[:, :end], "past_key_values": cache}
                parts.append(model(ids[:, start:end], **options).logits)
        return whole, torch.cat(parts, 1), model.generate(ids, attention_mask=mask, **GREEDY)

    right = run()
    with accelerate_minimax(model):
        found = run()
    rows = mask.bool()
    same(found[0][rows], right[0][rows])
    same(found[1][rows], right[0][rows])
    assert torch.equal(found[2], right[2])


def test_gradients():
    model, ids = tiny(), tokens(2, 21)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    right = gradients()
    with accelerate_minimax(model):
        found = gradients()
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        same(found[name], gradient)


def test_state_is_wide_in_half_precision():
    model, ids = tiny().to(torch.bfloat16), tokens(2, 21)
    with accelerate_minimax(model), torch.no_grad():
        out = model(ids)
        again = model(ids[:, :1], past_key_values=out.past_key_values)
        assert out.past_key_values.get_linear_cache(1).dtype == torch.float32
    assert again.logits.isfinite().all()


def test_removed_and_refused(tmp_path):
    model, ids = tiny(), tokens(2, 21)
    layer = model.model.layers[1].self_attn
    with torch.no_grad():
        right = model(ids).logits
        with accelerate_minimax(model):
            assert type(layer) is not MiniMaxLightningAttention
            with pytest.raises(ValueError, match="accelerated already"):
                accelerate_minimax(model)
            model.save_pretrained(tmp_path)
        assert type(layer) is MiniMaxLightningAttention
        assert torch.equal(model(ids).logits, right)
        assert torch.equal(MiniMaxForCausalLM.from_pretrained(tmp_path)(ids).logits, right)
    with pytest.raises(ValueError, match="Linear has no lightning layers of MiniMax-01"):
        accelerate_minimax(torch.nn.Linear(2, 3))
