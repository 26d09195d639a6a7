"""zonal_histogram against numpy.histogram, count by count: every dtype, edges that are hit, any order, any cut."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared_kernels import zonal_histogram
from shared_kernels.zones import _CHUNK, _WORTH_A_TABLE

SMALL, LARGE = (2, 13, 17), (2, 201, 233)  # below and above the number of pixels from which bins are looked up
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
FLOATS = (np.float16, np.float32, np.float64)
EDGES = np.array([[0, 10, 20.5, 21, 60, 99], [-8, -7.5, 0.1, 33, 34, 100]])


def by_masks(values, labels, edges, num_zones, valid=None):
    """The definition: one mask per zone, numpy.histogram on what is under it."""
    valid = np.broadcast_to(True if valid is None else valid, values.shape)
    counts = np.zeros((num_zones, len(values), edges.shape[1] - 1), np.int64)
    for zone in range(num_zones):
        for band, pixels in enumerate(values):
            inside = pixels[(labels == zone + 1) & valid[band]]
            counts[zone, band] = np.histogram(inside, bins=edges[band])[0]
    return counts


def ours(values, labels, edges, num_zones, valid=None):
    valid = None if valid is None else torch.from_numpy(valid)
    counts = zonal_histogram(
        torch.from_numpy(values), torch.from_numpy(labels), torch.from_numpy(edges), num_zones=num_zones, valid=valid
    )
    assert counts.dtype == torch.int64
    return counts.numpy()


def raster(dtype, shape, seed=0):
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(max(np.iinfo(dtype).min, -40), 120, shape).astype(dtype)
    values = rng.normal(40, 40, shape)
    values[rng.random(shape) < 0.2] = 21  # on an edge
    values[rng.random(shape) < 0.1] = 99  # on a last edge
    for odd in (np.nan, np.inf, -np.inf):
        values[rng.random(shape) < 0.03] = odd
    return values.astype(dtype)


def regions(shape, seed=1):
    """Labels 0..5 and 7: zone 5 (label 6) has no pixels, zone 7 (label 8) neither."""
    return np.random.default_rng(seed).choice([0, 1, 2, 3, 4, 5, 7], shape[1:]).astype(np.int32)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS, ids=lambda d: d.__name__)
def test_counts_are_numpys(dtype, shape):
    assert (np.prod(shape[1:]) >= _WORTH_A_TABLE) == (shape == LARGE)
    values, labels = raster(dtype, shape), regions(shape)
    truth = by_masks(values, labels, EDGES, 8)
    assert (truth.sum(axis=0) > 0).any(axis=-1).all()
    assert np.array_equal(ours(values, labels, EDGES, 8), truth)
    assert not truth[[5, 7]].any()


def test_bfloat16_counts_its_own_values():
    values = torch.from_numpy(raster(np.float32, LARGE)).bfloat16()
    labels, edges = torch.from_numpy(regions(LARGE)), torch.from_numpy(EDGES)
    widened = values.to(torch.float64)
    assert not torch.equal(widened, torch.from_numpy(raster(np.float64, LARGE)))
    counts = zonal_histogram(values, labels, edges, num_zones=8)
    assert torch.equal(counts, zonal_histogram(widened, labels, edges, num_zones=8))
    assert counts.sum() > 10_000


@pytest.mark.parametrize("bits", [16, 20, 40])
def test_wide_integers_with_wide_values(bits):
    """Values that 16 bits do not hold must not be folded into them."""
    values = np.random.default_rng(3).integers(-(1 << bits - 1), 1 << bits, LARGE)
    edges = np.stack([np.linspace(-(1 << bits - 1), 1 << bits, 7), np.linspace(-50.5, 1 << bits - 1, 7)])
    labels = regions(LARGE)
    truth = by_masks(values, labels, edges, 8)
    assert truth[:5].all()
    assert np.array_equal(ours(values, labels, edges, 8), truth)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32], ids=lambda d: d.__name__)
def test_edges_between_neighbouring_values(dtype):
    """Edges next to one another's last bit, where a table by the upper half of the bits cannot know."""
    values = np.repeat(np.nextafter(np.float32(0.3), np.float32([0, 1])), 20_000).reshape(1, 200, 200)
    if dtype == np.uint16:
        values = np.where(values > 0.3, 40_000, 39_999).astype(dtype)
        edges = np.array([[39_998.5, 39_999.5, 40_000.0]])
    else:
        edges = np.array([[0.1, 0.3, 0.5]])  # float64 0.3 lies between the two float32 neighbours of it
    labels = np.ones((200, 200), np.int32)
    assert ours(values, labels, edges, 1).tolist() == [[[20_000, 20_000]]]


@pytest.mark.parametrize("edges", [[-1e300, -2, -1.0625, 0, 1, 1 + 2**-20, 1 + 2**-19, 3e38], [-1e-44, 1e-45, 2e-45]])
def test_float32_at_the_seams_of_its_bits(edges):
    """Where the upper 16 bits change, several edges among values that share them, subnormals, every kind of NaN."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    seams = np.concatenate([upper, upper | 1, upper | 0xFFFF, upper | 8]).view(np.float32)
    with np.errstate(over="ignore"):
        near = np.array(edges).astype(np.float32)
    around = near.view(np.int32)[:, None] + np.arange(-4, 5)
    values = np.concatenate([seams, around.astype(np.int32).view(np.float32).ravel()])[None, None]
    counts = ours(values, np.ones(values.shape[1:], np.int32), np.array([edges]), 1)
    assert counts.tolist() == [[np.histogram(values.astype(np.float64), bins=edges)[0].tolist()]]
    assert counts.all()


@pytest.mark.parametrize("shape", [SMALL, SMALL[1:]], ids=["per band", "all bands"])
def test_a_mask_takes_pixels_away(shape):
    values, labels = raster(np.int16, SMALL), regions(SMALL)
    valid = np.random.default_rng(2).random(shape) < 0.4
    counts = ours(values, labels, EDGES, 8, valid)
    assert np.array_equal(counts, by_masks(values, labels, EDGES, 8, valid))
    assert 0 < counts.sum() < ours(values, labels, EDGES, 8).sum()
    assert not ours(values, labels, EDGES, 8, np.zeros(shape, bool)).any()


def test_infinite_edges_leave_nothing_out_but_nan():
    edges = np.array([[-np.inf, 20, np.inf]] * 2)
    for shape in (SMALL, LARGE):
        values, labels = raster(np.float32, shape), regions(shape)
        counts = ours(values, labels, edges, 8)
        assert counts.sum() == (~np.isnan(values))[:, labels > 0].sum()
        assert np.array_equal(counts, by_masks(values, labels, edges, 8))


def test_a_tile_of_several_chunks():
    shape = (1, 601, 911)
    assert shape[1] * shape[2] > 2 * _CHUNK
    values, labels, valid = raster(np.int16, shape), regions(shape), np.random.default_rng(6).random(shape) < 0.7
    truth = by_masks(values, labels, EDGES[:1], 8, valid)
    assert np.array_equal(ours(values, labels, EDGES[:1], 8, valid), truth)


def test_order_of_pixels_is_irrelevant():
    values, labels = raster(np.uint16, LARGE), regions(LARGE)
    order = np.random.default_rng(4).permutation(labels.size)
    shuffled = values.reshape(2, -1)[:, order].reshape(LARGE)
    again = ours(shuffled, labels.reshape(-1)[order].reshape(LARGE[1:]), EDGES, 8)
    assert np.array_equal(again, ours(values, labels, EDGES, 8))


@pytest.mark.parametrize("dtype", [np.int16, np.float32], ids=lambda d: d.__name__)
@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(0, 201), max_size=4), columns=st.lists(st.integers(0, 233), max_size=3))
def test_any_cut_adds_up_bit_by_bit(dtype, rows, columns):
    """Tiles of any size, also empty ones and ones too small for the table."""
    values, labels = raster(dtype, LARGE), regions(LARGE)
    whole = ours(values, labels, EDGES, 8)
    rows, columns = sorted([0, *rows, 201]), sorted([0, *columns, 233])
    total = sum(
        ours(np.ascontiguousarray(values[:, a:b, c:d]), np.ascontiguousarray(labels[a:b, c:d]), EDGES, 8)
        for a, b in pairwise(rows)
        for c, d in pairwise(columns)
    )
    assert np.array_equal(total, whole)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([np.int16, np.uint16, np.int64, np.float32, np.float64]))
def test_whatever_hypothesis_thinks_of(data, dtype):
    """Few distinct values, and edges drawn from them, so that edges are hit; half of the cases go through the table."""
    kind = np.dtype(dtype)
    elements = st.integers(0, 9) if kind.kind in "iu" else st.one_of(st.floats(-4, 9, width=32), st.just(float("nan")))
    shape = data.draw(st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 7)))
    values = data.draw(arrays.arrays(kind, shape, elements=elements))
    labels = data.draw(arrays.arrays(np.int16, shape[1:], elements=st.integers(0, 4)))
    on_values = [float(v) for v in values.ravel() if v == v]
    candidates = st.one_of(st.sampled_from(on_values), st.floats(-5, 10)) if on_values else st.floats(-5, 10)
    edges = np.array([sorted(data.draw(st.lists(candidates, min_size=2, max_size=6, unique=True)))])
    if data.draw(st.booleans()):
        tall = -(-_WORTH_A_TABLE // shape[2] // shape[1])
        values, labels = np.tile(values, (1, tall + 1, 1)), np.tile(labels, (tall + 1, 1))
    assert np.array_equal(ours(values, labels, edges, 4), by_masks(values, labels, edges, 4))


def test_views_and_other_integer_labels():
    values, labels = raster(np.int16, LARGE), regions(LARGE)
    truth = ours(values, labels, EDGES, 8)
    swapped = torch.from_numpy(values).permute(0, 2, 1).contiguous().permute(0, 2, 1)
    assert not swapped.is_contiguous()
    for dtype in (torch.uint8, torch.int16, torch.int64):
        again = zonal_histogram(swapped, torch.from_numpy(labels).to(dtype), torch.from_numpy(EDGES), num_zones=8)
        assert np.array_equal(again.numpy(), truth)


def test_no_pixels_and_no_zones_count_nothing():
    edges = torch.from_numpy(EDGES)
    none = zonal_histogram(
        torch.zeros(2, 0, 5, dtype=torch.int16), torch.zeros(0, 5, dtype=torch.int32), edges, num_zones=3
    )
    assert none.shape == (3, 2, 5)
    assert not none.any()
    nobody = zonal_histogram(torch.zeros(2, 4, 3), torch.zeros(4, 3, dtype=torch.int32), edges, num_zones=0)
    assert nobody.shape == (0, 2, 5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"values": torch.zeros(2, 4, 3, dtype=torch.bool)},
            TypeError,
            "values must be integer or floating, got torch.bool",
        ),
        ({"labels": torch.zeros(4, 3)}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": torch.zeros(3, 4, dtype=torch.int32)}, ValueError, r"got \(2, 4, 3\) and \(3, 4\)"),
        ({"labels": torch.full((4, 3), 6)}, ValueError, r"labels must lie in 0\.\.5 .*, got 6\.\.6"),
        ({"labels": torch.full((4, 3), -1)}, ValueError, r"labels must lie in 0\.\.5 .*, got -1\.\.-1"),
        ({"edges": torch.zeros(3, 4)}, ValueError, r"edges must be \(2, K \+ 1\) with K at least 1, got \(3, 4\)"),
        ({"edges": torch.tensor([[0.0, 1.0, 1.0]] * 2)}, ValueError, "edges must increase strictly"),
        ({"edges": torch.tensor([[0.0, float("nan"), 1.0]] * 2)}, ValueError, "edges must increase strictly"),
        ({"num_zones": -1}, ValueError, "num_zones must be at least 0"),
        ({"num_zones": 1 << 30}, ValueError, r"num_zones x bins below 2\^31, got 1073741824 zones"),
        ({"valid": torch.ones(4, 3)}, TypeError, "valid must be bool, got torch.float32"),
        ({"valid": torch.ones(1, 4, 3, dtype=torch.bool)}, ValueError, r"valid must be \(2, 4, 3\) or \(4, 3\)"),
    ],
)
def test_refused(changed, error, message):
    given = {
        "values": torch.zeros(2, 4, 3, dtype=torch.int16),
        "labels": torch.ones(4, 3, dtype=torch.int32),
        "edges": torch.tensor([[0.0, 1.0, 2.0]] * 2),
        "num_zones": 5,
    }
    assert zonal_histogram(**given).sum() == 24
    with pytest.raises(error, match=message):
        zonal_histogram(**(given | changed))
