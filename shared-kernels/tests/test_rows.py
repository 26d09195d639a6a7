"""The sparse primitives under attention at listed keys, against loops."""

import subprocess
import sys

import pytest
import torch

from shared_kernels import _rows
from shared_kernels.testing import Make

Z, R, N, D, E = 2, 5, 7, 4, 3


@pytest.fixture(params=[3, 1, 0], ids=lambda n: f"{n} keys a row")
def lists(request):
    generator = torch.Generator().manual_seed(1)
    columns = torch.rand(Z, R, N, generator=generator).argsort(-1)[..., : request.param]
    return columns.to(torch.int32)


@pytest.fixture(params=[torch.float64, torch.float32])
def make(request):
    return Make(request.param)


def test_scores(lists, make):
    query, key = make.normal(Z, R, D), make.normal(Z, N, D)
    scores = _rows.scores_at(query, key, _rows.flat_columns(lists, N))
    every = query @ key.mT
    torch.testing.assert_close(scores, every.gather(-1, lists.long()))


def test_scores_of_strided_tensors(make):
    lists = torch.tensor([[[1, 6], [0, 3]]], dtype=torch.int32)
    query, key = make.strided(1, 2, D), make.transposed(1, N, D)
    scores = _rows.scores_at(query, key, _rows.flat_columns(lists, N))
    torch.testing.assert_close(scores, (query @ key.mT).gather(-1, lists.long()))


def test_weighted_sums(lists, make):
    value, weight = make.normal(Z, N, E), make.normal(*lists.shape)
    sums = _rows.weighted_rows(_rows.flat_columns(lists, N), value, weight)
    dense = make.normal(Z, R, N, scale=0.0).scatter_(-1, lists.long(), weight)
    torch.testing.assert_close(sums, dense @ value)


def test_entries_by_key(lists):
    flat = _rows.flat_columns(lists, N)
    transposed = _rows.transpose_lists(flat, Z * N)
    assert transposed.starts[0] == 0
    assert transposed.starts[-1] == flat.numel()
    for key in range(Z * N):
        named = transposed.entries[transposed.starts[key] : transposed.starts[key + 1]]
        assert named.tolist() == (flat == key).nonzero().flatten().tolist()


def test_sums_by_key(lists, make):
    flat, n = _rows.flat_columns(lists, N), lists.shape[-1]
    rows, weight = make.normal(Z * R, E), make.normal(flat.numel())
    sums = _rows.summed_by_key(_rows.transpose_lists(flat, Z * N), rows, weight, n)
    expected = make.normal(Z * N, E, scale=0.0)
    for position, key in enumerate(flat.tolist()):
        expected[key] += weight[position] * rows[position // n]
    torch.testing.assert_close(sums, expected)


def test_no_rows():
    query, key = torch.ones(2, 0, D), torch.ones(2, N, D)
    flat = _rows.flat_columns(torch.zeros(2, 0, 3, dtype=torch.int32), N)
    assert _rows.scores_at(query, key, flat).shape == (2, 0, 0)
    assert _rows.weighted_rows(flat, key, torch.ones(2, 0, 3)).shape == (2, 0, D)


def test_nobody_is_warned_of_torch_s_sparse_tensors():
    code = (
        "import torch; from shared_kernels import _rows;"
        "print(_rows.scores_at(torch.ones(1, 1, 4), torch.ones(1, 2, 4), torch.tensor([1])))"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout == "tensor([[[4.]]])\n"
