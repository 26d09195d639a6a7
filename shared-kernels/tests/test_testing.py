"""The suite itself: an op that is wrong must fail it, and the rule must tell rounding from errors."""

import pytest
import torch
from torch.utils._pytree import tree_map

from shared_kernels import backend
from shared_kernels.testing import (
    Make,
    OpSpec,
    Wrong,
    check_against_reference,
    check_laws,
    compare,
    leaves_of,
    operations,
)

OPS = operations()


def spoiled_by(change):
    """An op whose first output is changed."""

    def sabotage(op):
        def sabotaged(**arguments):
            result = op(**arguments)
            return change(result) if isinstance(result, torch.Tensor) else (change(result[0]), *result[1:])

        return sabotaged

    sabotage.__name__ = change.__name__
    return sabotage


@spoiled_by
def tail_ignored(out):
    """The last column is left as it was."""
    return torch.cat([out[..., :-1], torch.zeros_like(out[..., -1:])], dim=-1)


@spoiled_by
def rounded_once_too_often(out):
    """Three digits less than the dtype has; of integers, one is another."""
    return out + (out.detach() * 1e-4).to(out.dtype) if out.is_floating_point() else put_first(out, out.view(-1)[0] + 1)


@spoiled_by
def not_a_number_somewhere(out):
    return put_first(out, torch.nan if out.is_floating_point() else -7)


@spoiled_by
def gradient_scaled(out):
    """The forward pass is right, the backward pass 1 % too large."""
    return out.detach() + 1.01 * (out - out.detach())


def put_first(out, value):
    out = out.clone()
    out.view(-1)[0] = value
    return out


SABOTAGES = (tail_ignored, rounded_once_too_often, not_a_number_somewhere, gradient_scaled)


@pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.__name__)
def test_a_sabotaged_op_fails(spec, sabotage):
    if sabotage is gradient_scaled and not spec.gradients:
        pytest.skip("not differentiable")
    sample = next(iter(spec.samples(Make(), "small").values()))
    check_against_reference(spec, sample)
    with pytest.raises(Wrong):
        check_against_reference(spec, sample, op=sabotage(spec.op))


@pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))
def test_an_argument_that_is_ignored_fails(spec):
    sample = next(iter(spec.samples(Make(), "small").values()))
    for name in leaves_of(spec, sample):
        ignoring = lambda name=name, **a: spec.op(**a | {name: tree_map(torch.detach, a[name])})  # noqa: E731
        with pytest.raises((Wrong, RuntimeError)):
            check_against_reference(spec, sample, op=ignoring)


@pytest.mark.parametrize("spec", OPS.values(), ids=list(OPS))
def test_laws_notice_another_function(spec):
    def larger(*args, **kwargs):
        return tree_map(lambda t: 1.001 * t if t.is_floating_point() else t + 1, spec.op(*args, **kwargs))

    with pytest.raises(Wrong):
        check_laws(spec, op=larger)


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


def test_integers_must_be_the_same():
    right = {"output 0": torch.tensor([3, 1, 2])}
    compare(right, right, right)
    with pytest.raises(Wrong, match="1 of 3 are other"):
        compare({"output 0": torch.tensor([3, 1, 4])}, right, right)


def total_of(parts):
    return sum(parts)


def test_lists_of_tensors_are_differentiated_each():
    spec = OpSpec(op=total_of, reference=total_of, samples=lambda *_: {}, gradients=("parts",))
    sample = {"parts": [Make().normal(3), Make(seed=1).normal(3)]}
    check_against_reference(spec, sample)
    with pytest.raises(Wrong, match=r"gradient of parts\[1\]"):
        check_against_reference(spec, sample, op=lambda parts: parts[0] + (parts[1] + parts[1] - parts[1].detach()))


def test_an_op_that_drops_an_argument_is_told_by_name():
    spec = OpSpec(
        op=doubled, reference=doubled, samples=lambda make, _: {"one": {"x": make.normal(3)}}, gradients=("x",)
    )
    with pytest.raises(Wrong, match="no gradient of x"):
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
