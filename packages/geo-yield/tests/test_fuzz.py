"""Every reader on damaged files: the answer is data or one clear sentence, never another exception.

Yield tables and histogram files are fuzzed in their own tests.
"""

import functools
import io
import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geo_yield.checkpoint import load_model
from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout
from geo_yield.modis import modis_layout, modis_scenes
from geo_yield.modis_files import sinusoidal
from geo_yield.regions import read_regions
from geo_yield.sentinel2 import find_products, read_metadata
from geo_yield.series import read_series
from geo_yield.stac import read_items, sentinel2_products

MTD = """<?xml version="1.0" encoding="UTF-8"?>
<n1:Level-2A_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_Level-2A.xsd">
<PROCESSING_BASELINE>05.09</PROCESSING_BASELINE><BOA_QUANTIFICATION_VALUE unit="none">10000</BOA_QUANTIFICATION_VALUE>
<Spectral_Information bandId="1" physicalBand="B2"/><BOA_ADD_OFFSET band_id="1">-1000</BOA_ADD_OFFSET>
</n1:Level-2A_User_Product>"""
ITEM = {
    "type": "Feature",
    "stac_version": "1.0.0",
    "id": "S2A_MSIL2A_20190629T212529_R043_T06VVN",
    "collection": "sentinel-2-l2a",
    "geometry": {"type": "Point", "coordinates": [-147.0, 62.0]},
    "bbox": [-147, 62, -147, 62],
    "properties": {"datetime": "2019-06-29T21:25:29Z", "eo:cloud_cover": 3.5, "s2:processing_baseline": "05.09"},
    "assets": {"B04": {"href": "B04.tif"}, "B08": {"href": "B08.tif"}, "SCL": {"href": "SCL.tif"}},
    "links": [],
}


def geojson():
    squares = [shapely.box(x, 40, x + 1, 41) for x in (-96, -95)]
    return geopandas.GeoDataFrame({"GEOID": ["01001", "01003"]}, geometry=squares, crs=4326).to_json().encode()


@functools.cache
def geotiff(dtype="int16"):
    profile = {"driver": "GTiff", "height": 6, "width": 9, "count": 1, "dtype": dtype, "crs": sinusoidal().to_wkt()}
    profile["transform"] = Affine(463.3127165, 0, -7783653.6, 0, -463.3127165, 4447802.1)
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile) as file:
            file.write(np.arange(54, dtype=dtype).reshape(1, 6, 9))
        return memory.read()


def read_geojson(folder, content):
    path = folder / "regions.geojson"
    path.write_bytes(content)
    return read_regions(path)


def read_geopackage(folder, content):
    path = folder / "regions.gpkg"
    path.write_bytes(content)
    return read_regions(path)


def read_kml_table(folder, content):
    path = folder / "regions.csv"
    path.write_bytes(content)
    return read_regions(path)


def read_layer(folder, content):
    for layer in [f"sur_refl_b{band:02d}" for band in range(1, 8)] + ["sur_refl_state_500m", "sur_refl_qc_500m"]:
        kind = {"sur_refl_state_500m": "uint16", "sur_refl_qc_500m": "uint32"}.get(layer, "int16")
        path = folder / f"MOD09A1.A2015049.h11v04.061.2015060000000_{layer}.tif"
        path.write_bytes(content if layer == "sur_refl_b03" else geotiff(kind))
    return [scene.read(modis_layout(mask="none")) for scene in modis_scenes(folder)]


def read_granule(folder, content):
    (folder / "MOD09A1.A2015049.h11v04.061.2015060000000.hdf").write_bytes(content)
    return [scene.read(modis_layout(mask="none")) for scene in modis_scenes(folder)]


def read_index_table(folder, content):
    path = folder / "ndvi.csv"
    path.write_bytes(content)
    return read_series([path])


def read_catalogue(folder, content):
    path = folder / "items.json"
    path.write_bytes(content)
    return sentinel2_products(read_items(path), assets_root=folder)


def read_xml(folder, content):
    path = folder / "MTD_MSIL2A.xml"
    path.write_bytes(content)
    return read_metadata(path)


def read_product_folder(folder, content):
    name = content.decode("latin-1").replace("/", "-").replace("\0", "")[:60]
    for band in ("B04", "B08", "SCL"):
        try:
            (folder / f"{name}_{band}.tif").write_bytes(geotiff("uint16"))
        except OSError:
            return None  # not a name on this file system
    return find_products(folder, offset=0.0)


def read_checkpoint(folder, content):
    (folder / "model.json").write_bytes(content)
    return load_model(folder)


def read_layout(folder, content):
    try:
        return HistogramLayout.from_json(content.decode("latin-1"))
    except (KeyError, TypeError, ValueError):
        return None  # the store that reads it turns these into its sentence; test_histograms holds it to that


def geopackage():
    buffer = io.BytesIO()
    geopandas.read_file(io.BytesIO(geojson())).to_file(buffer, driver="GPKG")
    return buffer.getvalue()


KML = b'GEOID,geometry\n01001,"<Polygon><outerBoundaryIs><LinearRing><coordinates>-96,40 -95,40 -95,41 -96,40</coordinates></LinearRing></outerBoundaryIs></Polygon>"\n'  # noqa: E501
SERIES = b"Year,County,NDVI1,NDVI2,NDVI3\n2018,ADAMS,0.2,0.5,0.7\n2018,BOND,0.1,,0.6\n"
READERS = {
    "GeoJSON": (read_geojson, geojson()),
    "GeoPackage": (read_geopackage, geopackage()),
    "KML table": (read_kml_table, KML),
    "GeoTIFF layer": (read_layer, geotiff()),
    "HDF granule": (read_granule, b"\x0e\x03\x13\x01" + bytes(600)),
    "index table": (read_index_table, SERIES),
    "STAC items": (read_catalogue, json.dumps({"type": "FeatureCollection", "features": [ITEM]}).encode()),
    "product metadata": (read_xml, MTD.encode()),
    "product folder": (read_product_folder, b"T06VVN_20190629T212529"),
    "checkpoint": (read_checkpoint, b'{"format": 1, "members": [], "layout": {}}'),
    "layout": (read_layout, b'{"sensor": "modis", "bands": ["a"], "doy": [1], "edges": [[0, 1]]}'),
}


@pytest.mark.parametrize("name", READERS)
@given(
    noise=st.binary(min_size=1, max_size=40),
    place=st.floats(0, 1),
    damage=st.sampled_from(["cut", "overwrite", "insert", "only noise", "remove"]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_a_sentence_or_data(name, tmp_path_factory, noise, place, damage):
    read, good = READERS[name]
    at = int(place * len(good))
    content = {
        "cut": good[:at],
        "overwrite": good[:at] + noise + good[at + len(noise) :],
        "insert": good[:at] + noise + good[at:],
        "only noise": noise,
        "remove": good[:at] + good[at + len(noise) :],
    }[damage]
    folder: Path = tmp_path_factory.mktemp("fuzz")
    try:
        read(folder, content)
    except InputProblem as problem:
        sentence = str(problem)
    else:
        return
    assert sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("name", [n for n in READERS if n not in ("HDF granule", "STAC items", "checkpoint", "layout")])
def test_undamaged_files_are_read(name, tmp_path):
    """Or the test above would prove nothing."""
    read, good = READERS[name]
    assert read(tmp_path, good) is not None
