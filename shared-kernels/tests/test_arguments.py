"""Checks that several ops share, where no op's refused inputs reach them."""

import pytest
import torch

from shared_kernels._arguments import (
    check_attention,
    check_block_size,
    check_broadcasts,
    check_optional,
    check_positive,
    check_same_dtype,
    check_shape,
    check_whole_number,
)


def tokens(*shape):
    return torch.ones(shape)


def test_what_fits_passes():
    query, key = tokens(2, 6, 5, 8), tokens(2, 3, 7, 8)
    check_attention(query, key, tokens(2, 3, 7, 256), scale=-0.5, widest=256)
    check_attention(tokens(2, 6, 1, 8), tokens(2, 3, 1, 8), layout=("batch", "heads", 1, "head_dim"))
    check_optional("lengths", None, (2,), query.device)
    check_broadcasts("mask", tokens(1, 7), 2, 5, 7)
    check_block_size([64, 1])
    check_shape("gain", torch.tensor(1.0))


def test_mixed_dtypes_pass_where_autocast_makes_them_one():
    given = {"query": tokens(3), "key": tokens(3).bfloat16()}
    with pytest.raises(TypeError, match=r"key must be of the dtype of query, torch.float32, got torch.bfloat16"):
        check_same_dtype(given)
    with torch.autocast("cpu", torch.bfloat16):
        check_same_dtype(given)
        with pytest.raises(TypeError, match=r"key must be of the dtype of query, torch.float32, got torch.float64"):
            check_same_dtype(given | {"key": tokens(3).double()})


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (
            lambda: check_attention(tokens(2, 3, 5, 0), tokens(2, 3, 5, 0)),
            ValueError,
            "head_dim of query must be at least",
        ),
        (
            lambda: check_attention(tokens(1, 1, 5, 257), tokens(1, 1, 5, 257), widest=256),
            ValueError,
            "head_dim of query must be from 1 to 256, got 257",
        ),
        (
            lambda: check_block_size((64,)),
            ValueError,
            r"block_size must be two numbers, \(block_q, block_k\), got \(64,\)",
        ),
        (lambda: check_block_size(64), ValueError, "block_size must be two numbers"),
        (lambda: check_block_size((64, 1.0)), TypeError, "block_size must be a whole number, got float"),
        (lambda: check_whole_number("radius", True, 0), TypeError, "radius must be a whole number, got bool"),
        (lambda: check_positive("eps", float("nan")), ValueError, "eps must be positive and finite, got nan"),
        (lambda: check_broadcasts("mask", tokens(2, 1), 1, 7), ValueError, r"broadcasts to \(1, 7\), got \(2, 1\)"),
        (lambda: check_shape("bias", tokens(3), 4), ValueError, r"bias must have shape \(4,\), got \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, exception, message):
    with pytest.raises(exception, match=message):
        call()
