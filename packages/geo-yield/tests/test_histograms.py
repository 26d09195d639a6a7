"""The histogram container: what goes in comes out, layouts are never mixed, half-written files never appear."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout, HistogramStore, YieldTensor, write_histograms

BANDS, STEPS, BINS = 3, 5, 7


def layout(**changes):
    edges = tuple(tuple(np.linspace(1, 100 + band, BINS + 1).tolist()) for band in range(BANDS))
    fields = {"sensor": "modis", "bands": ("red", "nir", "lst"), "doy": (49, 57, 65, 73, 81), "edges": edges}
    return HistogramLayout(**fields | changes)


def rows(count, *, seed=0, year=2015, first=0, **changes):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, (count, BANDS, STEPS, BINS))
    counts[0, 1, 2] = 0  # one (band, composite) that nothing was seen in
    seen = counts.sum(axis=-1)
    return YieldTensor(
        layout=layout(**changes),
        image=(counts / np.maximum(seen, 1)[..., None]).astype(np.float32),
        region_id=np.array([f"{first + i:05d}" for i in range(count)]),
        year=np.full(count, year, np.int16),
        lon=rng.uniform(-97, -80, count).astype(np.float32),
        lat=rng.uniform(36, 48, count).astype(np.float32),
        valid_count=seen.astype(np.int32),
        pixel_count=np.full(count, 60, np.int32),
    )


def same(a, b):
    return all(
        np.array_equal(getattr(a, n), getattr(b, n))
        for n in ("image", "region_id", "year", "lon", "lat", "valid_count", "pixel_count")
    )


def test_round_trip_over_row_groups_and_files(tmp_path):
    first, second = rows(150), rows(13, seed=1, year=2016)
    assert (
        write_histograms(
            tmp_path / "2015.parquet", layout(), [first.take(np.arange(70)), first.take(np.arange(70, 150))]
        )
        == 150
    )
    write_histograms(tmp_path / "2016.parquet", layout(), [second])
    store = HistogramStore(tmp_path)
    assert store.layout == layout()
    assert (len(store), store.years()) == (163, [2015, 2016])
    assert same(store.read(years=[2015]), first)
    assert same(store.read(), YieldTensor.concatenate([first, second]))
    sizes = [len(batch) for batch in store.batches(64)]
    assert sum(sizes) == 163
    assert max(sizes) == 64


def test_shares_of_what_was_seen():
    tensor = rows(4)
    assert tensor.missing_share[0] >= 1 / (BANDS * STEPS)
    expected = tensor.valid_count[2].mean() / 60
    assert tensor.valid_fraction[2] == pytest.approx(expected)
    nothing = YieldTensor(
        **{**vars(tensor), "pixel_count": np.zeros(4, np.int32), "valid_count": np.zeros_like(tensor.valid_count)}
    )
    assert nothing.valid_fraction.tolist() == [0, 0, 0, 0]
    assert nothing.missing_share.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sensor": "sentinel2-l2a"}, "sensor"),
        ({"bands": ("nir", "red", "lst")}, "bands"),
        ({"doy": (49, 57, 65, 73, 89)}, "doy"),
        ({"edges": tuple(tuple(range(BINS + 1)) for _ in range(BANDS))}, "edges"),
        ({"unit": "reflectance"}, "unit"),
        ({"qa": "none"}, "qa"),
        ({"mask": "mcd12q1:12"}, "mask"),
        ({"axes": "band,bin,time"}, "axes"),
    ],
)
def test_a_mismatch_is_refused_and_named(changes, field, tmp_path):
    with pytest.raises(InputProblem, match=rf"this file does not fit the model: {field} is .*, expected "):
        layout().refuse_mismatch(layout(**changes), given="this file", expected="the model")
    write_histograms(tmp_path / "a.parquet", layout(), [rows(2)])
    write_histograms(tmp_path / "b.parquet", layout(**changes), [rows(2, first=7, **changes)])
    with pytest.raises(InputProblem, match=field):
        HistogramStore(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path):
    def batches():
        yield rows(3)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="disk"):
        write_histograms(tmp_path / "h.parquet", layout(), batches())
    assert list(tmp_path.iterdir()) == []


def test_duplicates_and_missing_years_are_said(tmp_path):
    write_histograms(tmp_path / "a.parquet", layout(), [rows(3)])
    write_histograms(tmp_path / "b.parquet", layout(), [rows(1, first=2)])
    with pytest.raises(InputProblem, match="region '00002' has year 2015 twice"):
        HistogramStore(tmp_path).read()
    with pytest.raises(InputProblem, match=r"no imagery of \[2013\] \(it has \[2015\]\)"):
        HistogramStore(tmp_path).read(years=[2013])
    with pytest.raises(InputProblem, match="no histograms at .*prepare"):
        HistogramStore(tmp_path / "nowhere")


def test_a_column_of_another_name_is_a_damaged_file(tmp_path):
    path = tmp_path / "h.parquet"
    write_histograms(path, layout(), [rows(5)])
    table = pq.read_table(path)
    names = ["valid_coun" if name == "valid_count" else name for name in table.schema.names]
    pq.write_table(table.rename_columns(names).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(InputProblem, match="not the columns of a histogram file"):
        HistogramStore(path).read()


@given(st.binary(max_size=300), st.integers(0, 4000), st.sampled_from(["cut", "noise", "flip"]))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_a_clear_error_or_the_rows(tmp_path_factory, noise, position, damage):
    """A damaged file never crashes with anything but one sentence, and never yields rows of another shape."""
    path = tmp_path_factory.mktemp("fuzz") / "h.parquet"
    write_histograms(path, layout(), [rows(5)])
    good = path.read_bytes()
    position = position % len(good)
    damaged = {"cut": good[:position], "noise": noise, "flip": good[:position] + noise + good[position + len(noise) :]}
    path.write_bytes(damaged[damage])
    try:
        tensor = HistogramStore(path).read()
    except InputProblem:
        return
    assert tensor.image.shape[1:] == (BANDS, STEPS, BINS)
