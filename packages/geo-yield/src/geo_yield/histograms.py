"""The container that every sensor is reduced to: per region and year, one histogram per band and composite.

Reducing a region to the histogram of its pixel values keeps what matters for yield (how much of the county is how green
or how hot, and when) and drops where in the county it is: You et al., "Deep Gaussian Process for Crop Yield Prediction
Based on Remote Sensing Data", AAAI 2017. DFYP (arXiv:2507.05849) uses the same input for coarse sensors.

On disk a set of histograms is one Parquet file, a row per region and year in row groups of 64, so that reading streams;
the layout (sensor, bands, edges, days, masks) travels in the schema metadata and is compared before use.

Shapes: N rows (region, year), C bands, T composites, K bins.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int16, Int32, Shaped

from geo_yield.errors import InputProblem
from geo_yield.whole_files import whole_file

ROWS_PER_GROUP = 64
_LAYOUT_KEY = b"geo_yield.layout"


@dataclass(frozen=True, kw_only=True)
class HistogramLayout:
    """What the numbers of a histogram mean. Two sets with different layouts are never mixed."""

    sensor: str
    """"modis", "sentinel2-l2a" or "series" (county means, each a one-pixel histogram)."""
    bands: tuple[str, ...]
    """C band names, in order."""
    doy: tuple[int, ...]
    """T first days of the composites, day of year 1..366."""
    edges: tuple[tuple[float, ...], ...]
    """C rows of K + 1 increasing bin edges, in `unit`."""
    unit: str = "DN"
    """Unit of the values that were binned: "DN", "reflectance", "index"."""
    qa: str = "default"
    """"default": cloud, shadow, snow and bad retrievals dropped; "none": as published (You et al., DFYP)."""
    mask: str = "none"
    """Which pixels of a region counted, e.g. "mcd12q1:12" (cropland)."""
    axes: str = "band,time,bin"
    pixel_size: float | None = None
    """Side in metres of the pixels that were counted; None where the sensor leaves no choice."""

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.bands):
            raise InputProblem(f"{len(self.bands)} bands need as many rows of bin edges, got {len(self.edges)}")
        if len({len(row) for row in self.edges}) != 1 or any(np.any(np.diff(row) <= 0) for row in self.edges):
            raise InputProblem("bin edges must increase and be equally many for every band")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, T, K)."""
        return len(self.bands), len(self.doy), len(self.edges[0]) - 1

    def refuse_mismatch(self, other: "HistogramLayout", *, given: str, expected: str) -> None:
        """Raise InputProblem that names the first field in which `other` (described by `given`) differs from this."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                raise InputProblem(
                    f"{given} does not fit {expected}: {field.name} is {_brief(theirs)}, expected {_brief(mine)}"
                )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "HistogramLayout":
        raw = json.loads(text)
        raw["edges"] = tuple(tuple(row) for row in raw["edges"])
        raw["bands"], raw["doy"] = tuple(raw["bands"]), tuple(raw["doy"])
        return cls(**raw)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"


@dataclass(frozen=True, kw_only=True)
class YieldTensor:
    """Histograms of N (region, year) rows with where they are and how much of each region was seen."""

    layout: HistogramLayout
    image: Float32[np.ndarray, "N C T K"]
    """Shares: every (band, composite) histogram sums to 1, or is all zero where no valid pixel was seen."""
    region_id: Shaped[np.ndarray, "N"]
    """Text, leading zeros kept."""
    year: Int16[np.ndarray, "N"]
    lon: Float32[np.ndarray, "N"]
    lat: Float32[np.ndarray, "N"]
    valid_count: Int32[np.ndarray, "N C T"]
    """Pixels that were valid, per band and composite."""
    pixel_count: Int32[np.ndarray, "N"]
    """Pixels of the region that the mask lets count (e.g. cropland), seen or not."""

    def __post_init__(self) -> None:
        if self.image.shape != (len(self), *self.layout.shape):
            raise InputProblem(f"image must be {(len(self), *self.layout.shape)} by its layout, got {self.image.shape}")

    def __len__(self) -> int:
        return len(self.region_id)

    @property
    def valid_fraction(self) -> Float32[np.ndarray, "N"]:
        """Valid looks per pixel and composite, mean over bands; 0 for a region without pixels.

        With one look per composite (MODIS) the share of pixels that were seen; above 1 where looks add up (Sentinel-2).
        """
        seen = self.valid_count.mean(axis=(1, 2))
        return (seen / np.maximum(self.pixel_count, 1)).astype(np.float32)

    @property
    def missing_share(self) -> Float32[np.ndarray, "N"]:
        """Share of (band, composite) cells of a row without any valid pixel."""
        return (self.valid_count == 0).mean(axis=(1, 2)).astype(np.float32)

    def take(self, rows: Shaped[np.ndarray, "M"]) -> "YieldTensor":
        """The rows at integer positions or where a boolean mask is true."""
        return YieldTensor(
            layout=self.layout,
            **{f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "layout"},
        )

    @classmethod
    def concatenate(cls, parts: Sequence["YieldTensor"]) -> "YieldTensor":
        """All rows of `parts`, which must share one layout."""
        for part in parts[1:]:
            parts[0].layout.refuse_mismatch(part.layout, given="a set of histograms", expected="the first one")
        return cls(
            layout=parts[0].layout,
            **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls) if f.name != "layout"},
        )


def write_histograms(path: Path, layout: HistogramLayout, batches: Iterable[YieldTensor]) -> int:
    """Stream `batches` into one Parquet file and return the number of rows. The file appears whole or not at all."""
    schema = _schema(layout)
    rows = 0
    with (
        whole_file(path) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for batch in batches:
            layout.refuse_mismatch(batch.layout, given="a batch of histograms", expected=str(path))
            writer.write_table(_to_arrow(batch, schema), row_group_size=ROWS_PER_GROUP)
            rows += len(batch)
    return rows


class HistogramStore:
    """Histogram files (one, or all `*.parquet` of a folder) read by streaming; `layout` is known without reading rows.

    Raises InputProblem if nothing is there, a file is no histogram file, or two files differ in layout.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.files = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if not self.files or not self.files[0].exists():
            raise InputProblem(f"no histograms at '{path}'. Make them with: yield_predict.py prepare")
        layouts = [_read_layout(file) for file in self.files]
        self.layout = layouts[0]
        for file, layout in zip(self.files[1:], layouts[1:], strict=True):
            self.layout.refuse_mismatch(layout, given=f"'{file}'", expected=f"'{self.files[0]}'")

    def __len__(self) -> int:
        return sum(pq.read_metadata(file).num_rows for file in self.files)

    def batches(self, size: int = ROWS_PER_GROUP, *, years: Iterable[int] | None = None) -> Iterator[YieldTensor]:
        """Rows in file order, at most `size` at a time; memory does not depend on how many there are."""
        wanted = None if years is None else np.array(sorted(set(years)), dtype=np.int16)
        for file in self.files:
            for batch in _row_groups(file, size, _schema(self.layout)):
                tensor = from_arrow(batch, self.layout)
                if wanted is not None:
                    tensor = tensor.take(np.isin(tensor.year, wanted))
                if len(tensor):
                    yield tensor

    def years(self) -> list[int]:
        """Every year that has rows, in order."""
        found = (pq.read_table(file, columns=["year"])["year"].unique().to_pylist() for file in self.files)
        return sorted({year for years in found for year in years})

    def read(self, *, years: Iterable[int] | None = None) -> YieldTensor:
        """Everything (of `years`) at once. Raises InputProblem if no row is left or a (region, year) comes twice."""
        parts = list(self.batches(1024, years=years))
        if not parts:
            raise InputProblem(f"'{self.path}' has no imagery of {sorted(set(years or []))} (it has {self.years()})")
        tensor = YieldTensor.concatenate(parts)
        keys = list(zip(tensor.region_id.tolist(), tensor.year.tolist(), strict=True))
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InputProblem(f"region '{twice[0]}' has year {twice[1]} twice in '{self.path}'")
        return tensor


def _row_groups(file: Path, size: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    try:
        # pre_buffer would fetch a whole file ahead; off, memory stays at one row group.
        reader = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
        if not reader.schema_arrow.equals(schema):  # names and types; a damaged footer can still be read
            raise InputProblem(f"'{file}' has not the columns of a histogram file. Run prepare again.")
        yield from reader.iter_batches(batch_size=size)
    except (pa.ArrowException, OSError) as problem:
        raise InputProblem(f"'{file}' is damaged: {str(problem).splitlines()[0]}. Run prepare again.") from None


def _schema(layout: HistogramLayout) -> pa.Schema:
    C, T, K = layout.shape
    columns = {
        "region_id": pa.string(),
        "year": pa.int16(),
        "lon": pa.float32(),
        "lat": pa.float32(),
        "pixel_count": pa.int32(),
        "valid_count": pa.list_(pa.int32(), C * T),
        "image": pa.list_(pa.float32(), C * T * K),
    }
    return pa.schema(list(columns.items()), metadata={_LAYOUT_KEY: layout.to_json().encode()})


def _to_arrow(tensor: YieldTensor, schema: pa.Schema) -> pa.Table:
    arrays = []
    for field in schema:
        values = getattr(tensor, field.name)
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(np.ascontiguousarray(values).reshape(-1), field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, field.type.list_size))
        else:
            arrays.append(pa.array(values.tolist() if field.name == "region_id" else values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def from_arrow(batch: pa.RecordBatch | pa.Table, layout: HistogramLayout) -> YieldTensor:
    """Rows of a histogram file (as Arrow) to arrays."""
    C, T, K = layout.shape
    columns = {}
    for name in ("region_id", "year", "lon", "lat", "pixel_count", "valid_count", "image"):
        column = batch.column(name)
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        nested = pa.types.is_fixed_size_list(column.type)
        columns[name] = (column.flatten() if nested else column).to_numpy(zero_copy_only=False)
    n = batch.num_rows
    return YieldTensor(
        layout=layout,
        image=columns["image"].reshape(n, C, T, K),
        valid_count=columns["valid_count"].reshape(n, C, T),
        region_id=columns["region_id"].astype(str),
        **{name: columns[name] for name in ("year", "lon", "lat", "pixel_count")},
    )


def _read_layout(file: Path) -> HistogramLayout:
    try:
        metadata = pq.read_schema(file).metadata or {}
        return HistogramLayout.from_json(metadata[_LAYOUT_KEY].decode())
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as problem:
        reason = str(problem).splitlines()[0] if isinstance(problem, OSError) else type(problem).__name__
        raise InputProblem(f"'{file}' is not a histogram file of geo-yield: {reason}") from None
