"""What the pictures and the page say agrees with the rows they are made from."""

import re
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely
from matplotlib.image import imread

from geo_yield.errors import InputProblem
from geo_yield.report import Subject, draw_map, draw_predictions, draw_skill, skill_table, write_report

SUBJECT = Subject(crop="soybean", unit="bu/acre", simulated=True)
REGIONS = [f"0300{number}" for number in range(1, 7)]


@pytest.fixture
def regions() -> geopandas.GeoDataFrame:
    boxes = [
        shapely.box(-92 + 0.3 * (i % 3), 40 + 0.2 * (i // 3), -91.7 + 0.3 * (i % 3), 40.2 + 0.2 * (i // 3))
        for i in range(6)
    ]
    return geopandas.GeoDataFrame({"region_id": REGIONS}, geometry=boxes, crs=4326)


@pytest.fixture
def rows() -> pd.DataFrame:
    truth = {2021: np.array([50, 44, 47, 52, 49, 46.0]), 2022: np.array([30, 41, 28, 35, 44, 39.0])}
    parts = []
    for year, values in truth.items():
        for method, offset in {"county history": 6.0, "DFYP": -2.0, "ridge": 3.0}.items():
            prediction = values + offset
            parts.append(
                pd.DataFrame(
                    {
                        "protocol": "leave-future-out",
                        "region_id": REGIONS,
                        "year": year,
                        "fold": str(year),
                        "method": method,
                        "truth": values,
                        "prediction": prediction,
                        "spread": 0.5,
                        "lower": prediction - 2.5,
                        "upper": prediction + 2.5,
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def test_report_states_the_figures_of_the_rows(
    rows: pd.DataFrame, regions: geopandas.GeoDataFrame, tmp_path: Path
) -> None:
    seen = pd.DataFrame(
        {"region_id": REGIONS, "valid_fraction": [0.9, 0.2, 0.8, 0.7, 0.6, 0.5], "missing_share": [0, 0.3, 0, 0, 0, 0]}
    )
    done = ["Simulated the region.", "Trained on 2015-2020."]
    path = write_report(rows, SUBJECT, tmp_path, regions=regions, done=done, settings={"seed": 7}, seen=seen)
    text = path.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["map.png", "report.md", "skill.png"]
    assert "| **DFYP** | 12 | 2.00 | 2.00 |" in text
    assert "| county history | 12 | 6.00 | 6.00 |" in text
    assert "| +2.00 | 100% | 5.0 |" in text  # DFYP is 2 too low, so observed minus predicted is +2
    assert "| -6.00 | 0% | 5.0 |" in text
    assert "The difference is -4.00 bu/acre (95 % from -4.00 to -4.00" in text
    assert "| **DFYP** | 2.00 | 2.00 |" in text  # by season
    assert "**simulated**" in text
    assert "2. Trained on 2015-2020." in text
    assert '"seed": 7' in text
    assert '"torch": "2' in text
    worst = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| 03")]
    assert worst == ["03002", "03006", "03005", "03004", "03003", "03001"]
    assert "| 03002 | 20% | 30% |" in text


def test_the_best_method_is_named_even_if_it_is_not_ours(rows: pd.DataFrame, tmp_path: Path) -> None:
    worse = rows.assign(prediction=np.where(rows["method"] == "DFYP", rows["truth"] + 4, rows["prediction"]))
    text = write_report(worse, SUBJECT, tmp_path).read_text()
    assert "Lowest RMSE of all methods: **ridge**" in text
    assert skill_table(worse)["method"].tolist() == ["ridge", "DFYP", "county history"]
    assert not (tmp_path / "map.png").exists()  # no regions, no map


def test_real_data_is_not_called_simulated(rows: pd.DataFrame, tmp_path: Path) -> None:
    text = write_report(rows, Subject(crop="soybean", unit="t/ha"), tmp_path).read_text()
    assert "simulated" not in text
    assert "RMSE (t/ha)" in text


def colours(picture: Path) -> np.ndarray:
    return np.round(imread(picture)[..., :3] * 255).astype(int)


def test_map_shows_high_yields_dark_and_overestimates_red(
    rows: pd.DataFrame, regions: geopandas.GeoDataFrame, tmp_path: Path
) -> None:
    picture = colours(draw_map(rows, regions, SUBJECT, tmp_path / "map.png", year=2022))
    height, width = picture.shape[:2]
    left, right = (
        picture[height // 2 :, : int(0.42 * width)],
        picture[height // 2 :, int(0.46 * width) : int(0.85 * width)],
    )
    # DFYP is 2 too low everywhere, county history 6 too high: a pale blue panel beside a dark red one
    assert (left[..., 2] > left[..., 0] + 10).mean() > 0.3
    assert not (left[..., 0] > left[..., 2] + 40).any()
    assert (right[..., 0] > right[..., 2] + 40).mean() > 0.3
    again = draw_map(rows, regions, SUBJECT, tmp_path / "again.png", year=2022)
    assert again.read_bytes() == (tmp_path / "map.png").read_bytes()


def test_map_keeps_the_proportions_of_the_regions(
    rows: pd.DataFrame, regions: geopandas.GeoDataFrame, tmp_path: Path
) -> None:
    tall = regions.set_geometry(regions.geometry.affine_transform([1, 0, 0, 4, 0, -120]))
    flat_picture = colours(draw_map(rows, regions, SUBJECT, tmp_path / "flat.png", year=2022))
    tall_picture = colours(draw_map(rows, tall, SUBJECT, tmp_path / "tall.png", year=2022))
    assert tall_picture.shape[0] > 1.5 * flat_picture.shape[0]


def test_regions_without_a_row_are_left_out_or_hatched_and_no_overlap_is_refused(
    rows: pd.DataFrame, regions: geopandas.GeoDataFrame, tmp_path: Path
) -> None:
    fewer = rows[~((rows["region_id"] == "03003") & (rows["method"] == "county history"))]
    assert draw_map(fewer, regions, SUBJECT, tmp_path / "map.png", year=2022).exists()
    with pytest.raises(InputProblem, match="none of the 6 predicted regions"):
        draw_map(rows, regions.assign(region_id="99999"), SUBJECT, tmp_path / "none.png", year=2022)
    with pytest.raises(InputProblem, match=r"no rows of 2019 by 'DFYP'; there are \[2021, 2022\]"):
        draw_map(rows, regions, SUBJECT, tmp_path / "none.png", year=2019)
    assert not (tmp_path / "none.png").exists()


def test_skill_needs_its_two_methods_and_one_protocol(rows: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(InputProblem, match="no rows of method 'DFYP'; there are"):
        draw_skill(rows[rows["method"] != "DFYP"], SUBJECT, tmp_path / "skill.png")
    mixed = pd.concat([rows, rows.assign(protocol="spatial")])
    with pytest.raises(InputProblem, match="one protocol"):
        draw_skill(mixed, SUBJECT, tmp_path / "skill.png")


def test_skill_draws_without_intervals(rows: pd.DataFrame, tmp_path: Path) -> None:
    bare = rows.assign(lower=np.nan, upper=np.nan)
    with_interval = draw_skill(rows, SUBJECT, tmp_path / "with.png").read_bytes()
    assert draw_skill(bare, SUBJECT, tmp_path / "without.png").read_bytes() != with_interval
    figures = write_report(bare, SUBJECT, tmp_path / "out").read_text()
    assert re.search(r"\| \*\*DFYP\*\* \| 12 \|.*\| - \| - \|", figures)


def test_predictions_without_a_harvest_are_drawn_too(regions: geopandas.GeoDataFrame, tmp_path: Path) -> None:
    table = regions.assign(
        year=2023,
        crop="soybean",
        unit="bu/acre",
        prediction=[30.0, 41, 28, 35, 44, 39],
        spread=[1.0, 2, 1, 3, 2, 1],
        lower=20.0,
        upper=50.0,
    )
    picture = colours(draw_predictions(table, tmp_path / "next.png", year=2023))
    assert (picture[..., 1] > picture[..., 0] + 30).mean() > 0.05  # green yields
    with pytest.raises(InputProblem, match=r"no predictions of 2024 to draw \(there are \[2023\]\)"):
        draw_predictions(table, tmp_path / "never.png", year=2024)
