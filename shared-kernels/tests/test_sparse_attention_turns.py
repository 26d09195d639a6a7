"""What no sample of the spec is large enough to reach in sparse_attention's Triton host code."""

import pytest
import torch

pytest.importorskip("triton")

from shared_kernels import backend, sparse_attention
from shared_kernels.sparse_attention import triton as kernels


def gradients(heads_of_lists):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, tokens, 8, generator=generator).requires_grad_()
        for heads, tokens in ((4, 18), (2, 13), (2, 13))
    )
    lists = torch.rand(2, heads_of_lists, 2, 13, generator=generator).argsort(-1)[..., :5].int()
    with backend("triton"):
        out = sparse_attention(query, key, value, lists, block_size=(16, 1))
        return torch.autograd.grad(out, (query, key, value), torch.randn(out.shape, generator=generator))


@pytest.mark.parametrize("heads_of_lists", [1, 4])
def test_heads_that_take_turns_in_the_workspace(monkeypatch, heads_of_lists):
    """Lists per query head also sum over the heads that share a key; each way must agree with the other kernel."""
    at_once = gradients(heads_of_lists)
    monkeypatch.setattr(kernels, "_WORKSPACE", 1)
    for ours, expected in zip(gradients(heads_of_lists), at_once, strict=True):
        assert torch.equal(ours, expected)
    monkeypatch.setattr(kernels, "_EMPTY_ROWS", 10_000)
    for ours, expected in zip(gradients(heads_of_lists), at_once, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
