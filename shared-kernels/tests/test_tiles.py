"""Tile loads, softmax steps and tile tables: what can be seen of them without a GPU."""

import sys
import types

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from shared_kernels import _tiles  # noqa: E402
from shared_kernels._tiles import Tile, load_rows, load_tile, softmax_end, softmax_step, store_rows, store_tile  # noqa: E402
from shared_kernels.triton_compiler import TARGETS, compile_only  # noqa: E402
from shared_kernels.triton_interpreter import interpreted  # noqa: E402


@triton.jit
def copy_kernel(
    source, out, row_numbers, num_rows, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows num_rows - 1 .. 0 and beyond both ends by `load_tile` and, chosen by number, by `load_rows`."""
    lines, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    tile = load_tile(source, num_rows - 1 - lines, columns, stride, num_rows, COLUMNS)
    store_tile(out, tile, lines, columns, WIDTH, ROWS, WIDTH)
    numbers = tl.load(row_numbers + lines)
    chosen = load_rows(source, numbers.to(tl.int64) * stride, numbers >= 0, columns, COLUMNS)
    target = out + ROWS * WIDTH
    store_rows(target, chosen, lines.to(tl.int64) * WIDTH, numbers < num_rows - 1, columns, WIDTH)


@triton.jit
def softmax_kernel(scores, lse, out, rows, length, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Softmax to base 2 over rows in steps; the weights summed are those of the running form."""
    lines, columns = tl.arange(0, ROWS), tl.arange(0, STEP)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS,), tl.float32)
    for start in range(0, length, STEP):
        mask = (lines < rows)[:, None] & (start + columns < length)[None, :]
        x = tl.load(scores + lines[:, None] * length + (start + columns)[None, :], mask=mask, other=float("-inf"))
        top, total, weights, shrink = softmax_step(x, top, total)
        acc = acc * shrink + tl.sum(weights * (start + columns)[None, :], 1)
    inverse, natural = softmax_end(top, total)
    tl.store(lse + lines, natural, mask=lines < rows)
    tl.store(out + lines, acc * inverse, mask=lines < rows)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels above where the interpreter looks for them."""
    module = types.ModuleType("shared_kernels.kernels_of_this_test")
    module.copy_kernel, module.softmax_kernel = copy_kernel, softmax_kernel
    monkeypatch.setitem(sys.modules, module.__name__, module)
    # what kernels call is swapped where their names are
    monkeypatch.setitem(sys.modules, "shared_kernels.this_test", sys.modules[__name__])
    return module


def test_tiles_hold_zeros_outside(kernels):
    source = torch.arange(1.0, 8 * 11 + 1).view(8, 11)[:, :9]
    numbers = torch.tensor([5, -1, 0, 6, 2, 3, -7, 1], dtype=torch.int32)
    out = torch.full((2, 8, 16), -1.0)
    with interpreted():
        kernels.copy_kernel[(1,)](source, out, numbers, 7, source.stride(0), COLUMNS=9, ROWS=8, WIDTH=16)
    expected = torch.zeros(2, 8, 16)
    expected[0, :7, :9] = source[:7].flip(0)
    for line, number in enumerate(numbers.tolist()):
        expected[1, line, :9] = source[number] if number >= 0 else 0.0
    expected[1, 3] = -1.0  # row 6 was loaded and not stored
    assert torch.equal(out, expected)


def test_softmax_in_steps(kernels):
    scores = torch.randn(5, 21, generator=torch.Generator().manual_seed(0)) * 40
    scores[1, :9], scores[3] = -torch.inf, -torch.inf  # its first step sees nothing; no step sees anything
    lse, out = torch.empty(5), torch.empty(5)
    with interpreted():
        kernels.softmax_kernel[(1,)](scores, lse, out, 5, 21, ROWS=8, STEP=8)
    natural = scores.double() * 0.6931471805599453
    expected = (natural.softmax(-1).nan_to_num() * torch.arange(21)).sum(-1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), natural.logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert lse[3] == -torch.inf
    assert out[3] == 0


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_finds_its_row(name):
    with compile_only(name):
        assert _tiles.target(torch.empty(3, device="meta")) == name


@pytest.mark.parametrize(
    ("capability", "row"), [(86, "sm_89"), (87, "sm_80"), (103, "sm_100"), (121, "sm_120"), (130, "sm_120")]
)
def test_relatives_of_targets(monkeypatch, capability, row):
    gpu(monkeypatch, capability)
    assert _tiles.target(torch.empty(3, device="meta")) == row


def gpu(monkeypatch, capability):
    current = types.SimpleNamespace(backend="cuda", arch=capability)
    active = types.SimpleNamespace(get_current_target=lambda: current)
    monkeypatch.setattr(_tiles, "driver", types.SimpleNamespace(active=active))


def test_what_kernels_refuse(monkeypatch):
    gpu(monkeypatch, 75)
    with pytest.raises(RuntimeError, match=r"compute capability 8.0 or later, got 7\.5"):
        _tiles.target(torch.empty(3, device="meta"))
    with pytest.raises(TypeError, match=r"take float16, bfloat16 and float32, got torch\.float64"):
        _tiles.no_float64(torch.empty(3), torch.empty(2, dtype=torch.float64))


def test_rows_of_a_table():
    table = {"interpreter": {"one": {64: Tile(7, 5, 4, 2), 128: Tile(6, 5, 4, 2), 256: Tile(3, 2, 4, 1)}}}
    chosen = [
        _tiles.table_tile(table, "one", torch.empty(1, dtype=dtype), columns).rows
        for dtype, columns in [
            (torch.bfloat16, 64),
            (torch.bfloat16, 65),
            (torch.float32, 64),
            (torch.float32, 65),
            (torch.float16, 999),
        ]
    ]
    assert chosen == [7, 6, 6, 3, 3]


def test_width_and_rows():
    assert [_tiles.width(n) for n in (1, 16, 17, 80)] == [16, 16, 32, 128]
    x = torch.arange(12.0).view(3, 4)
    assert _tiles.strided_rows(x[:, 1:3]).data_ptr() == x[:, 1:3].data_ptr()
    assert torch.equal(_tiles.strided_rows(x.T), x.T)
    assert _tiles.strided_rows(x.T).stride() == (3, 1)


def test_precision_of_products(monkeypatch):
    x = torch.empty(2, device="meta")
    assert _tiles.dot_precision(torch.empty(2)) == "ieee"
    gpu(monkeypatch, 90)
    assert (_tiles.dot_precision(x), _tiles.dot_precision(x.bfloat16())) == ("tf32x3", "ieee")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert _tiles.dot_precision(x) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
