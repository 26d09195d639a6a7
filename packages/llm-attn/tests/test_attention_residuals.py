"""Attention Residuals against its definition, and what follows from it; the doors are tested beside this file."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Inkling2TextConfig
from transformers.models.inkling2.modeling_inkling2 import Inkling2BlockAttentionResidual

from llm_attn.attention_residuals import (
    AttentionResiduals,
    AttentionResidualsConfig,
    BlockDelta,
    BlockState,
    attention_residuals,
    depth_weights,
    plot_depth_weights,
    reference,
)
from shared_kernels import depth_attention

EPS = 1e-6


def layers_of(count, width, *, seed=0, dtype=torch.float64):
    """Small pre-normed layers that differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    weights = [2 * torch.randn(width, generator=generator, dtype=dtype) for _ in range(count)]
    return [lambda h, w=w: torch.tanh(F.rms_norm(h, (width,), eps=EPS).roll(1, -1) * w) for w in weights]


def rows(count, width, *, seed=1, dtype=torch.float64):
    """Queries and key weights of `count` layers and of the final aggregation."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(count + 1, width, generator=generator, dtype=dtype) * width**-0.5
    return queries, 1 + 0.3 * torch.randn(count + 1, width, generator=generator, dtype=dtype)


def embedding_of(*tokens, width, dtype=torch.float64):
    return torch.randn(*tokens, width, generator=torch.Generator().manual_seed(2), dtype=dtype)


# ---- against the definition


@pytest.mark.parametrize("run", ["direct", "two phases"])
@pytest.mark.parametrize("sum_scale", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("count", "block_size", "width"), [(28, 1, 32), (13, 4, 32), (28, 2, 5), (6, 6, 1000)])
def test_is_what_the_equations_say(count, block_size, width, normed, sum_scale, run):
    embedding, layers = embedding_of(2, 3, width=width), layers_of(count, width)
    queries, key_weights = rows(count, width)
    given = {"block_size": block_size, "eps": EPS, "sum_scale": sum_scale, "normed": normed}
    expected = reference.attention_residuals(embedding, layers, queries, None if normed else key_weights, **given)[-1]
    steps = 0 if run == "direct" else 4 * block_size
    found = attention_residuals(embedding, layers, queries, None if normed else key_weights, run=steps, **given)
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


def test_single_precision():
    embedding, layers = embedding_of(7, width=96, dtype=torch.float32), layers_of(12, 96, dtype=torch.float32)
    queries, key_weights = rows(12, 96, dtype=torch.float32)
    for run in (0, 6):
        found = attention_residuals(embedding, layers, queries, key_weights, block_size=3, eps=EPS, run=run)
        wanted = reference.attention_residuals(embedding, layers, queries, key_weights, block_size=3, eps=EPS)[-1]
        assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("run", [0, 4])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_gradients_are_those_of_the_definition(block_size, run):
    if run % block_size:
        pytest.skip("a run is whole blocks")
    count, width = 7, 16
    layers = layers_of(count, width)
    leaves = [t.requires_grad_() for t in (embedding_of(3, width=width), *rows(count, width))]
    given = {"block_size": block_size, "eps": EPS}
    weight = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = attention_residuals(leaves[0], layers, *leaves[1:], run=run, **given)
    expected = reference.attention_residuals(leaves[0], layers, *leaves[1:], **given)[-1]
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        assert theirs.abs().max() > 1e-4
        assert (mine - theirs).abs().max() < 1e-10


def test_the_first_query_has_no_effect():
    """One source: its weight is 1 whatever the query, so nothing flows back to it."""
    queries, key_weights = (t.requires_grad_() for t in rows(3, 8))
    attention_residuals(
        embedding_of(4, width=8), layers_of(3, 8), queries, key_weights, block_size=2, eps=EPS
    ).sum().backward()
    assert queries.grad[0].abs().max() == 0
    assert (queries.grad[1:].abs().amax(1) > 0).all()


# ---- what follows from the equations


@pytest.mark.parametrize("block_size", [1, 3])
def test_zero_queries_give_the_mean_of_sources_and_their_sum_the_plain_network(block_size):
    embedding, layers = embedding_of(5, width=16), layers_of(9, 16)
    plain = embedding
    for layer in layers:
        plain = plain + layer(plain)
    zero = torch.zeros(10, 16, dtype=torch.float64)
    given = {"block_size": block_size, "eps": EPS}
    assert (attention_residuals(embedding, layers, zero, sum_scale=True, **given) - plain).abs().max() < 1e-12
    mean = attention_residuals(embedding, layers, zero, **given)
    sources = 1 + 9 // block_size
    assert (mean * sources - plain).abs().max() < 1e-4  # the norm's eps, against smaller inputs


def test_a_large_query_chooses_one_source():
    sources = [embedding_of(4, width=24) * (i + 1) for i in range(3)] + [torch.ones(4, 24, dtype=torch.float64)]
    mixed = depth_attention(sources, torch.full((24,), 1e4, dtype=torch.float64), eps=EPS)
    assert (mixed - 1).abs().max() < 1e-12


def test_weights_do_not_depend_on_the_size_of_a_source():
    torch.manual_seed(0)
    residuals = AttentionResiduals(4, 32, block_size=2, eps=EPS)
    nn.init.normal_(residuals.queries)
    embedding = torch.randn(6, 32)
    layers = layers_of(4, 32, dtype=torch.float32)

    def weights(factor):
        scaled = [*layers[:2], lambda h: factor * layers[2](h), layers[3]]
        return depth_weights(residuals, {"embedding": embedding, "layers": scaled}), residuals(embedding, scaled)

    (one, mixed), (hundred, mixed_of_hundred) = weights(1), weights(100)
    assert (one[3] - hundred[3]).abs().max() < 1e-4  # the layer that first sees the larger output
    assert (mixed - mixed_of_hundred).abs().max() > 1


def test_tokens_do_not_mix():
    embedding, layers = embedding_of(11, width=16), layers_of(6, 16)
    queries, key_weights = rows(6, 16)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    given = {"block_size": 2, "eps": EPS}
    whole = attention_residuals(embedding, layers, queries, key_weights, **given)
    assert torch.allclose(
        attention_residuals(embedding[order], layers, queries, key_weights, **given), whole[order], atol=1e-14
    )


def test_the_stream_stays_bounded():
    """48 random layers: the input of the last grows with plain residuals and does not with attention over depth."""
    torch.manual_seed(0)
    width = 64
    maps = [[torch.randn(width, width) * width**-0.5 for _ in range(2)] for _ in range(48)]
    layers = [lambda h, m=m: F.silu(F.rms_norm(h, (width,)) @ m[0]) @ m[1] for m in maps]
    plain = embedding = torch.randn(200, width)
    for layer in layers:
        plain = plain + layer(plain)
    assert plain.square().mean().sqrt() >= 3
    for block_size in (1, 6, 12):
        for scale in (0, 0.5):
            queries = torch.randn(49, width) * scale
            mixed = attention_residuals(embedding, layers, queries, block_size=block_size, eps=EPS)
            assert mixed.square().mean().sqrt() <= 2.2


# ---- blocks


def sizes(state):
    return [int(source) for source in state.sources]


def test_blocks_are_summed_and_closed_as_in_equations_5_and_6():
    state = BlockState.start(torch.tensor(1000.0), block_size=3)
    seen = []
    for output in (1, 2, 4, 8, 16):
        state = state.add(torch.tensor(float(output)))
        seen.append(sizes(state))
    assert seen == [[1000, 1], [1000, 3], [1000, 7], [1000, 7, 8], [1000, 7, 24]]
    assert state.num_layers == 5


@pytest.mark.parametrize(("count", "block_size", "sources"), [(54, 6, 10), (54, 54, 2), (54, 1, 55), (10, 4, 4)])
def test_number_of_sources_at_the_end(count, block_size, sources):
    state = BlockState.start(torch.zeros(1), block_size)
    for _ in range(count):
        state = state.add(torch.zeros(1))
    assert len(state.sources) == sources


def test_states_are_values():
    """A checkpointed layer adds twice to the same state; nothing may grow."""
    state = BlockState.start(torch.zeros(2), 2).add(torch.ones(2))
    first, second = state.add(torch.ones(2)), state.add(torch.ones(2))
    assert len(first.done) == len(second.done) == 2
    assert state.part.tolist() == [1, 1]


def test_a_merged_delta_is_the_senders_state():
    blocks = [torch.full((1,), float(i)) for i in range(5)]
    sender = BlockState(tuple(blocks), torch.ones(1), 1, 2)
    receiver = BlockState(tuple(blocks[:3]), None, 0, 2)
    delta = sender.delta(3)
    assert [int(block) for block in delta.blocks] == [3, 4]
    merged = receiver.merge(delta)
    assert (sizes(merged), merged.num_layers) == (sizes(sender), sender.num_layers)
    with pytest.raises(ValueError, match="begins at block 4, but only 3 blocks are here"):
        receiver.merge(BlockDelta(4, (), None, 0))
    with pytest.raises(ValueError, match=r"since must lie in \[0, 5\]"):
        sender.delta(6)


def test_the_stream_has_the_dtype_of_the_hosts_sum():
    state = BlockState.start(torch.zeros(2, dtype=torch.float32), 4).add(torch.full((2,), 1 / 3, dtype=torch.bfloat16))
    assert state.part.dtype == torch.float32
    assert BlockState.start(torch.zeros(2, dtype=torch.bfloat16), 4).add(torch.zeros(2)).part.dtype == torch.float32


# ---- others' code


@pytest.mark.parametrize("num_queries", [1, 3])
def test_inkling2_variant_is_the_block_of_transformers(num_queries):
    torch.manual_seed(0)
    config = Inkling2TextConfig(hidden_size=24)
    config._attn_implementation = "eager"
    block = Inkling2BlockAttentionResidual(config, num_queries=num_queries)
    nn.init.normal_(block.query, std=3.0)
    closed, partial = torch.randn(2, 5, 4, 24), torch.randn(2, 5, 24)
    expected = block(closed, partial)
    sources = [*closed.unbind(-2), partial]
    found = depth_attention(sources, block.query, eps=1e-6, scale=24**-0.5, normed_values=True)
    found = found.unbind(0) if num_queries > 1 else [found]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs.view(2, 5, 24)).abs().max() < 1e-5


def test_inkling2_variant_of_the_module_is_that_block_at_every_layer():
    torch.manual_seed(0)
    config = Inkling2TextConfig(hidden_size=24)
    config._attn_implementation = "eager"
    residuals = AttentionResiduals(6, 24, block_size=2, eps=1e-6, variant="inkling2", two_phase="always")
    assert residuals.key_weights is None
    nn.init.normal_(residuals.queries, std=3.0)
    layers, embedding = layers_of(6, 24, dtype=torch.float32), torch.randn(1, 5, 24)
    closed, partial = embedding.new_zeros(1, 5, 0, 24), embedding
    for index, layer in enumerate(layers):  # the loop of Inkling2TextModel, for a model without attention
        mixed = partial if index == 0 else theirs(config, residuals.queries[index], closed, partial)
        if index % 2 == 0:
            closed, partial = torch.cat([closed, partial.unsqueeze(-2)], -2), layer(mixed)
        else:
            partial = partial + layer(mixed)
    expected = theirs(config, residuals.queries[6], closed, partial)
    assert (residuals(embedding, layers) - expected).abs().max() < 1e-5


def theirs(config, query, closed, partial):
    block = Inkling2BlockAttentionResidual(config)
    block.query.data = query.detach()
    return block(closed, partial)[0].view(partial.shape)


def test_agrees_with_the_formula_of_flash_linear_attention():
    """softmax over sources of q . rms_norm(v, weight), as fla-org's naive_attnres writes it."""
    torch.manual_seed(0)
    sources, query, weight = [torch.randn(3, 7, 40) for _ in range(5)], torch.randn(40), torch.rand(40) + 0.5
    stacked = torch.stack(sources, dim=2)
    keys = stacked * torch.rsqrt(stacked.pow(2).mean(-1, keepdim=True) + EPS) * weight
    weights = torch.einsum("btld,d->btl", keys, query).softmax(-1)
    expected = torch.einsum("btl,btld->btd", weights, stacked)
    assert (depth_attention(sources, query, key_weight=weight, eps=EPS) - expected).abs().max() < 1e-5


# ---- the module


def test_module_begins_at_zero_queries_and_unit_keys():
    residuals = AttentionResiduals(4, 8, block_size=2, eps=EPS)
    assert residuals.queries.abs().max() == 0
    assert (residuals.key_weights == 1).all()
    assert {name for name, _ in residuals.named_parameters()} == set(residuals.no_weight_decay)


@pytest.mark.parametrize(("count", "block_size", "run"), [(60, 8, 8), (60, 1, 8), (60, 3, 9), (4, 4, 4)])
def test_full_residuals_look_ahead_in_runs(count, block_size, run):
    assert AttentionResiduals(count, 8, block_size=block_size, eps=EPS).run_length == run


@pytest.mark.parametrize(
    ("two_phase", "gradients", "together"),
    [("inference", True, False), ("inference", False, True), ("always", True, True), ("never", False, False)],
)
def test_when_two_phases_are_used(two_phase, gradients, together):
    residuals = AttentionResiduals(4, 8, block_size=2, eps=EPS, two_phase=two_phase)
    with torch.set_grad_enabled(gradients):
        assert (residuals.start(torch.randn(3, 8)).look is not None) == together


def test_two_phases_read_each_closed_block_once(monkeypatch):
    """The point of algorithm 1: S queries for one sweep over the blocks."""
    from llm_attn.attention_residuals import stream

    reads = []

    def counting(sources, query, **given):
        reads.append((len(sources), query.ndim))
        return depth_attention(sources, query, **given)

    monkeypatch.setattr(stream, "depth_attention", counting)
    embedding, layers, (queries, _) = embedding_of(3, width=8), layers_of(12, 8), rows(12, 8)
    attention_residuals(embedding, layers, queries, block_size=4, eps=EPS, run=4)
    assert reads == [(1, 2), (2, 2), (3, 2), (4, 2)]
    reads.clear()
    attention_residuals(embedding, layers, queries, block_size=4, eps=EPS)
    assert sum(sources for sources, _ in reads) == 2 * 3 + 2 + 3 * 3 + 3 + 4 * 3 + 4


def test_depth_weights_are_those_of_the_definition(tmp_path):
    torch.manual_seed(0)
    residuals = AttentionResiduals(5, 16, block_size=2, eps=EPS)
    nn.init.normal_(residuals.queries)
    layers, embedding = layers_of(5, 16, dtype=torch.float32), torch.randn(7, 16)
    weights = depth_weights(residuals, {"embedding": embedding, "layers": layers})
    assert [w.shape[-1] for w in weights] == [1, 2, 2, 3, 3, 4]
    h, state = embedding, BlockState.start(embedding, 2)
    for index, weight in enumerate(weights):
        assert (weight.sum(-1) - 1).abs().max() < 1e-6
        h = (weight.unsqueeze(-1) * torch.stack(state.sources, -2)).sum(-2)
        if index < 5:
            state = state.add(layers[index](h))
    assert (h - residuals(embedding, layers)).abs().max() < 1e-5
    plot_depth_weights(weights, tmp_path / "weights.png", block_size=2)
    assert (tmp_path / "weights.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="found them 0 times"):
        depth_weights(nn.Linear(2, 2), {})


def test_memory_beyond_what_the_network_keeps_is_small():
    """Per layer one mix and one partial sum are kept for the backward pass, as the report has it with checkpointing."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    count, width = 12, 64
    embedding, layers = torch.randn(100, width, requires_grad=True), [torch.sin for _ in range(count)]
    queries = torch.randn(count + 1, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attention_residuals(embedding, layers, queries, block_size=4, eps=EPS)
    large = sum(size >= 100 * width for size in kept.values())
    assert large <= 1 + count + count  # embedding, inputs of the layers (sine keeps them), partial sums
    assert out.requires_grad


# ---- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers_per_block": 0}, "layers_per_block must be a whole number of at least 1"),
        ({"sublayers_per_block": 1.5}, "sublayers_per_block must be a whole number"),
        ({"layers_per_block": True}, "layers_per_block must be a whole number"),
        ({"layers_per_block": 2, "sublayers_per_block": 4}, "not both"),
        ({"variant": "kimi"}, "variant must be one of report, inkling2, got 'kimi'"),
        ({"two_phase": "training"}, "two_phase must be one of inference, always, never"),
        ({"variant": "inkling2", "sum_scale": True}, "sum_scale restores"),
    ],
)
def test_refused_settings(given, message):
    with pytest.raises(ValueError, match=message):
        AttentionResidualsConfig(**given)


@pytest.mark.parametrize(
    ("given", "layers", "size"),
    [({}, 27, 8), ({}, 2, 2), ({"layers_per_block": 3}, 27, 6), ({"sublayers_per_block": 1}, 27, 1)],
)
def test_block_size_in_both_units(given, layers, size):
    assert AttentionResidualsConfig(**given).block_size(layers, 2) == size


def test_a_block_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="layers_per_block=3 is longer than the model: it has 2 decoder layers"):
        AttentionResidualsConfig(layers_per_block=3).block_size(2, 2)


def test_the_function_refuses_what_does_not_fit():
    embedding, layers = embedding_of(3, width=8), layers_of(4, 8)
    with pytest.raises(ValueError, match="a row for each of the 4 layers and one for the final aggregation, got 6"):
        attention_residuals(embedding, layers, rows(5, 8)[0], block_size=2, eps=EPS)
    with pytest.raises(ValueError, match="run must be a multiple of block_size, got 3 and 2"):
        attention_residuals(embedding, layers, rows(4, 8)[0], block_size=2, eps=EPS, run=3)


def test_nothing_but_adding_and_mixing():
    stream = AttentionResiduals(4, 8, block_size=2, eps=EPS).start(torch.randn(3, 8))
    with pytest.raises(TypeError, match="added to and mixed, nothing else"):
        torch.mul(stream, 2)
    with pytest.raises(TypeError):
        stream + 1
    assert (stream.shape, stream.dtype, stream.device.type) == ((3, 8), torch.float32, "cpu")
