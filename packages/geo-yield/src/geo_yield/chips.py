"""Sentinel-2 L2A images cut into the 9 km false-colour chips that DFYP's fine-resolution branch is trained on.

CropNet (Lin et al., KDD 2024) and Tiny CropNet hold chips of 224 x 224 pixels for 9 x 9 km in the "agriculture"
rendering (B11, B08, B02), 8 bits, of Level-1C images with at most 20 % cloud. Chips made here come from Level-2A,
reflectance times 2.5, clipped to 0..1, times 255: an approximation of that rendering, whose atmosphere is corrected
where that of the training images is not. `DOMAIN_SHIFT` says so; carry it to whatever is predicted from the chips.

Decided here: the 9 km cells start at the lower left corner of the region's bounding box in the tile's UTM zone, snapped
to 20 m, row by row from the south; cells that do not meet the region are left out. Where no image reaches, chips are 0.

Shapes: G chips, S pixels per side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import geopandas as gpd
import numpy as np
from affine import Affine
from jaxtyping import Bool, Float32, UInt8
from pyproj import Transformer
from rasterio.enums import Resampling
from rasterio.warp import reproject
from shapely import box
from shapely.geometry.base import BaseGeometry

from geo_yield.errors import InputProblem
from geo_yield.sentinel2 import Product, Sentinel2Scene
from geo_yield.whole_files import whole_file

CHIP_BANDS = ("B11", "B08", "B02")
CHIP_METRES, CHIP_PIXELS = 9000, 224
GAIN = 2.5
DOMAIN_SHIFT = "chips from Sentinel-2 L2A, rendered like the L1C chips of CropNet; the atmosphere differs"
_PIXEL = 20


@dataclass(frozen=True, kw_only=True)
class RegionChips:
    """All chips of one region on one day."""

    region_id: str
    chips: UInt8[np.ndarray, "G S S 3"]
    """Channels B11, B08, B02."""
    coordinates: Float32[np.ndarray, "G 2 2"]
    """[[latitude, longitude] of the lower left, of the upper right corner] in degrees."""
    covered: Float32[np.ndarray, "G"]
    """Share of each chip that an image reaches."""


def chips_from_products(
    products: Sequence[Product], regions: gpd.GeoDataFrame, *, size: int = CHIP_PIXELS, metres: int = CHIP_METRES
) -> list[RegionChips]:
    """Chips of every region (columns region_id, geometry) from the products of one day, in the regions' order.

    Where products overlap the first that has data counts. Clouds stay, as in CropNet: choose clear days. Raises
    InputProblem without products, for products of several UTM zones, or if no region is met.
    """
    if not products:
        raise InputProblem("chips need at least one Sentinel-2 product")
    if any(product.crs != products[0].crs for product in products):
        zones = sorted({product.crs.name for product in products})
        raise InputProblem(f"chips need products of one UTM zone, got {', '.join(zones)}")
    if metres % _PIXEL:
        raise InputProblem(f"a chip's side must be a multiple of {_PIXEL} m, got {metres}")
    to_degrees = Transformer.from_crs(products[0].crs, 4326, always_xy=True)
    made = []
    for region_id, shape in zip(regions["region_id"], regions.to_crs(products[0].crs.to_wkt()).geometry, strict=True):
        cells = cells_of(shape, metres)
        pictures = [_chip(products, cell, metres, size) for cell in cells]
        covered = np.array([share for _, share in pictures], dtype=np.float32)
        if covered.any():
            made.append(
                RegionChips(
                    region_id=str(region_id),
                    chips=np.stack([picture for picture, _ in pictures]),
                    coordinates=np.array([_corners(cell, metres, to_degrees) for cell in cells], dtype=np.float32),
                    covered=covered,
                )
            )
    if not made:
        raise InputProblem(f"no region lies in the images of {', '.join(sorted({p.tile for p in products}))}")
    return made


def cells_of(shape: BaseGeometry, metres: int = CHIP_METRES) -> list[tuple[int, int]]:
    """Lower left corners of the cells that meet a region given in metres, row by row from the south west."""
    left, bottom, right, top = shape.bounds
    x = np.arange(np.floor(left / _PIXEL) * _PIXEL, right, metres).astype(int)
    y = np.arange(np.floor(bottom / _PIXEL) * _PIXEL, top, metres).astype(int)
    return [
        (int(west), int(south))
        for south in y
        for west in x
        if shape.intersection(box(west, south, west + metres, south + metres)).area > 0
    ]


def _chip(
    products: Sequence[Product], cell: tuple[int, int], metres: int, size: int
) -> tuple[UInt8[np.ndarray, "S S 3"], float]:
    side = metres // _PIXEL
    values = np.zeros((3, side, side), dtype=np.float32)
    seen = np.zeros((3, side, side), dtype=bool)
    for product in products:
        _paste(product, cell, values, seen)
    here = Affine(_PIXEL, 0, cell[0], 0, -_PIXEL, cell[1] + metres)
    there = Affine(metres / size, 0, cell[0], 0, -metres / size, cell[1] + metres)
    small = np.zeros((3, size, size), dtype=np.float32)
    crs = products[0].crs.to_wkt()
    reproject(
        values,
        small,
        src_transform=here,
        dst_transform=there,
        src_crs=crs,
        dst_crs=crs,
        resampling=Resampling.average,
    )
    picture = np.rint(np.clip(small * GAIN, 0, 1) * 255).astype(np.uint8)
    return picture.transpose(1, 2, 0), float(seen.mean())


def _paste(
    product: Product,
    cell: tuple[int, int],
    values: Float32[np.ndarray, "3 s s"],
    seen: Bool[np.ndarray, "3 s s"],
) -> None:
    """Fill what is not seen yet from the part of a product that lies in the cell."""
    left, bottom, right, top = product.bounds
    side = values.shape[1]
    row, column = round((top - cell[1]) / _PIXEL) - side, round((cell[0] - left) / _PIXEL)
    rows = slice(max(row, 0), min(row + side, int((top - bottom) // _PIXEL)))
    columns = slice(max(column, 0), min(column + side, int((right - left) // _PIXEL)))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    block = Sentinel2Scene(
        products=(product,),
        year=product.acquired.year,
        step=0,
        pixel_size=_PIXEL,
        row=rows.start,
        column=columns.start,
        height=rows.stop - rows.start,
        width=columns.stop - columns.start,
    )
    inside = np.s_[rows.start - row : rows.stop - row, columns.start - column : columns.stop - column]
    for channel, band in enumerate(CHIP_BANDS):
        found, usable = block.reflectance(product, band)
        fill = usable & ~seen[channel][inside]
        values[channel][inside][fill] = found[fill]
        seen[channel][inside] |= usable


def _corners(cell: tuple[int, int], metres: int, to_degrees: Transformer) -> list[list[float]]:
    points = ((cell[0], cell[1]), (cell[0] + metres, cell[1] + metres))
    return [list(to_degrees.transform(*point)[::-1]) for point in points]


def write_chips(path: Path, days: Mapping[date, Sequence[RegionChips]]) -> None:
    """HDF5 in CropNet's layout, /<region>/<YYYY-MM-DD>/{data, coordinates}, which `CropNetChips` reads.

    The file appears whole or not at all, and carries `DOMAIN_SHIFT` as its attribute domain_shift.
    Raises InputProblem without geo-yield[cropnet].
    """
    try:
        import h5py
    except ImportError:
        raise InputProblem("writing chips needs geo-yield[cropnet]: uv add 'geo-yield[cropnet]'") from None
    with whole_file(path) as partial, h5py.File(partial, "w") as stored:
        stored.attrs["domain_shift"] = DOMAIN_SHIFT
        for day, regions in days.items():
            for one in regions:
                group = stored.create_group(f"{one.region_id}/{day:%Y-%m-%d}")
                group.create_dataset("data", data=one.chips, compression="gzip", compression_opts=1)
                group.create_dataset("coordinates", data=one.coordinates)
