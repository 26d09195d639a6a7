"""The suite itself: an op that is wrong must fail it, and the rule must tell rounding from errors."""

import pytest
import torch

from shared_kernels import backend
from shared_kernels.testing import (
    Make,
    OpSpec,
    Wrong,
    check_against_reference,
    check_laws,
    compare,
    operations,
)

OPS = operations()


def tail_ignored(op):
    """The last column of every output is left as it was."""

    def sabotaged(**arguments):
        out = op(**arguments)
        return torch.cat([out[..., :-1], torch.zeros_like(out[..., -1:])], dim=-1)

    return sabotaged


def rounded_once_too_often(op):
    """Three digits less than the dtype has."""

    def sabotaged(**arguments):
        out = op(**arguments)
        return out + (out.detach() * 1e-4).to(out.dtype)

    return sabotaged


def not_a_number_somewhere(op):
    def sabotaged(**arguments):
        out = op(**arguments).clone()
        out.view(-1)[0] = torch.nan
        return out

    return sabotaged


def gradient_scaled(op):
    """The forward pass is right, the backward pass 1 % too large."""

    def sabotaged(**arguments):
        out = op(**arguments)
        return out.detach() + 1.01 * (out - out.detach())

    return sabotaged


@pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))
@pytest.mark.parametrize("sabotage", [tail_ignored, rounded_once_too_often, not_a_number_somewhere, gradient_scaled])
def test_a_sabotaged_op_fails(spec, sabotage):
    sample = next(iter(spec.samples(Make(), "small").values()))
    check_against_reference(spec, sample)
    with pytest.raises(Wrong):
        check_against_reference(spec, sample, op=sabotage(spec.op))


@pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))
def test_an_argument_that_is_ignored_fails(spec):
    sample = next(iter(spec.samples(Make(), "small").values()))
    for name in set(spec.gradients) & set(sample):
        with pytest.raises((Wrong, RuntimeError)):
            check_against_reference(
                spec, sample, op=lambda name=name, **arguments: spec.op(**arguments | {name: arguments[name].detach()})
            )


@pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))
def test_laws_notice_another_function(spec):
    with pytest.raises(Wrong):
        check_laws(spec, op=lambda *args, **kwargs: 1.001 * spec.op(*args, **kwargs))


def doubled(x):
    return 2 * x


def test_the_rule():
    x = Make(torch.float32).normal(7, 5)
    truth, plain = {"output 0": 2 * x.double()}, {"output 0": 2 * x}
    compare({"output 0": 2 * x}, plain, truth)
    for spoiled, message in (
        (2 * x * (1 + 1e-6), "error"),
        ((2 * x).double(), "float64"),
        ((2 * x)[:6], r"\(6, 5\)"),
        (torch.where(x == x[3, 2], -torch.inf, 2 * x), "isneginf"),
    ):
        with pytest.raises(Wrong, match=message):
            compare({"output 0": spoiled}, plain, truth)


def test_an_op_that_drops_an_argument_is_told_by_name():
    spec = OpSpec(
        op=doubled, reference=doubled, samples=lambda make, _: {"one": {"x": make.normal(3)}}, gradients=("x",)
    )
    with pytest.raises(Wrong, match="x gets no gradient"):
        check_against_reference(
            spec, {"x": torch.ones(3)}, op=lambda x: 2 * x.detach() + torch.zeros(3, requires_grad=True)
        )


def test_make_is_seeded_and_rounds():
    make, again = Make(torch.bfloat16), Make(torch.float64)
    assert torch.equal(make.normal(4, 3), again.normal(4, 3).bfloat16())
    assert make.normal(2, wide=True).dtype == torch.float32
    transposed, strided = make.transposed(2, 3, 5), make.strided(2, 3, 5)
    assert transposed.shape == strided.shape == (2, 3, 5)
    assert transposed.stride() == (1, 2, 6)
    assert strided.storage_offset() > 0
    assert strided.stride(-1) == 2


def test_backend_is_restored_and_refuses():
    from shared_kernels import _backend

    with backend("cpu"):
        with backend("triton"):
            assert _backend.forced == "triton"
        assert _backend.forced == "cpu"
    assert _backend.forced is None
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, got 'gpu'"), backend("gpu"):
        pass
