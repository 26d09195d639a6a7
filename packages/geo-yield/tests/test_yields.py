"""Yield tables: each layout gives the same six columns, bad input is refused in a sentence, ids join by meaning."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geo_yield.errors import InputProblem
from geo_yield.samples import IndexSeries
from geo_yield.yields import (
    COLUMNS,
    convert_yields,
    county_history,
    county_key,
    crop_name,
    join_yields,
    match_key,
    read_text_table,
    read_yields,
    unit_name,
)

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
QUICKSTATS = [
    *(
        "Program",
        "Year",
        "Period",
        "Week Ending",
        "Geo Level",
        "State",
        "State ANSI",
        "Ag District",
        "Ag District Code",
    ),
    *("County", "County ANSI", "Zip Code", "Region", "watershed_code", "Watershed", "Commodity", "Data Item", "Domain"),
    *("Domain Category", "Value", "CV (%)"),
]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def quickstats(path, *changes):
    """A NASS download with one row for each dict of changes to an ordinary row."""
    usual = {
        "Program": "SURVEY",
        "Year": "2019",
        "Period": "YEAR",
        "Geo Level": "COUNTY",
        "State": "ILLINOIS",
        "State ANSI": "17",
        "County": "ADAMS",
        "County ANSI": "001",
        "Commodity": "SOYBEANS",
        "Data Item": "SOYBEANS - YIELD, MEASURED IN BU / ACRE",
        "Domain": "TOTAL",
        "Value": "49.8",
    }
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, QUICKSTATS, restval="", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(usual | change for change in changes)
    return path


def as_rows(table):
    return [(r.region_id, r.year, r.crop, pytest.approx(r[3]), r.unit) for r in table.itertuples(index=False)]


def plain(**changes):
    columns = {"region_id": ["01001", "17163", "17163"], "year": [2014, 2014, 2015], "yield": [31.5, 44.25, 40.0]}
    table = pd.DataFrame(columns | {"crop": "soybean", "unit": "bu/acre", "source": "plain"} | changes)
    return table[COLUMNS]


def series(ids, years):
    n = len(ids)
    return IndexSeries(
        values=np.zeros((n, 1, 3), np.float32),
        bands=("NDVI",),
        doy=(91, 98, 105),
        region_id=np.array(ids),
        year=np.array(years, np.int16),
        lon=np.zeros(n, np.float32),
        lat=np.zeros(n, np.float32),
    )


def test_plain_csv_keeps_leading_zeros_and_takes_crop_and_unit(tmp_path):
    path = write(
        tmp_path / "y.csv", 'Year,region_id,Yield,area\n2014,01001,31.5,9\n2015,17163,"1,044.5",8\n2015,x,,7\n'
    )
    with pytest.raises(InputProblem, match="does not say which crop"):
        read_yields(path, unit="kg/ha")
    with pytest.raises(InputProblem, match="does not say its unit"):
        read_yields(path, crop="soybean")
    table = read_yields(path, crop="rye", unit="kg/ha")
    assert as_rows(table) == [("01001", 2014, "rye", 31.5, "kg/ha"), ("17163", 2015, "rye", 1044.5, "kg/ha")]
    assert table.attrs["left_out"] == {"empty": 1}
    assert list(table.columns) == COLUMNS


def test_plain_parquet_semicolons_and_named_columns_read_alike(tmp_path):
    given = pd.DataFrame(
        {"fips": ["05001", "19003"], "season": [2012, 2013], "t": [2.5, 3.125], "unit": "t/ha", "crop": "Soy"}
    )
    given.to_parquet(tmp_path / "y.parquet")
    given.to_csv(tmp_path / "y.csv", sep=";", index=False)
    names = {"id_column": "fips", "year_column": "season", "yield_column": "t"}
    tables = [read_yields(tmp_path / f, source="plain", **names) for f in ("y.parquet", "y.csv")]
    expected = [("05001", 2012, "soybean", 2.5, "t/ha"), ("19003", 2013, "soybean", 3.125, "t/ha")]
    assert [as_rows(t) for t in tables] == [expected, expected]


def test_quickstats_keeps_county_survey_yields_and_counts_the_rest(tmp_path):
    path = quickstats(
        tmp_path / "nass.csv",
        {},
        {
            "State ANSI": "5",
            "County ANSI": "7",
            "Value": "1,234.5",
            "Data Item": "COTTON, UPLAND - YIELD, MEASURED IN LB / ACRE",
        },
        {"County ANSI": "163", "Value": " 61.2"},
        {"County ANSI": "099", "Value": "(D)"},
        {"County ANSI": "101", "Value": " (Z)"},
        {"County ANSI": "", "County": "OTHER (COMBINED) COUNTIES", "Value": "50"},
        {"Program": "CENSUS", "County ANSI": "003"},
        {"Period": "YEAR - AUG FORECAST", "County ANSI": "003"},
        {"Geo Level": "STATE", "County ANSI": ""},
        {"Data Item": "SOYBEANS - PRODUCTION, MEASURED IN BU", "County ANSI": "003", "Value": "5,000,000"},
        {"Data Item": "SOYBEANS - YIELD, MEASURED IN BU / NET PLANTED ACRE", "County ANSI": "003"},
        {"Domain": "IRRIGATION STATUS", "County ANSI": "003"},
    )
    table = read_yields(path, crop="SOYBEANS")
    assert as_rows(table) == [("17001", 2019, "soybean", 49.8, "bu/acre"), ("17163", 2019, "soybean", 61.2, "bu/acre")]
    assert table.attrs["left_out"] == {
        "of other programs, levels or items": 6,
        "without a county code (combined counties)": 1,
        "of other crops": 1,
        "withheld, like (D) or (Z)": 2,
    }
    assert as_rows(read_yields(path, crop="cotton")) == [("05007", 2019, "cotton", 1234.5, "lb/acre")]


def test_short_nass_table_names_counties(tmp_path):
    head = "Year,State,Ag District,Ag District Code,County,Value\n"
    one = "2020,ILLINOIS,WEST,30,LA SALLE,54.8\n2020,ILLINOIS,WEST,30,OTHER COUNTIES,50\n"
    one += "2020,ILLINOIS,SW,80,ST. CLAIR,44\n"
    table = read_yields(write(tmp_path / "a.csv", head + one), crop="soybeans", unit="BU / ACRE")
    assert as_rows(table) == [
        ("LASALLE", 2020, "soybean", 54.8, "bu/acre"),
        ("STCLAIR", 2020, "soybean", 44, "bu/acre"),
    ]
    assert table.attrs["left_out"] == {"of combined counties": 1}
    two = one + "2020,IOWA,WEST,30,ADAMS,54.8\n"
    table = read_yields(write(tmp_path / "b.csv", head + two), crop="soybeans", unit="bu/acre")
    assert table["region_id"].tolist() == ["ILLINOIS:LASALLE", "ILLINOIS:STCLAIR", "IOWA:ADAMS"]


def test_table_of_you_et_al_pads_codes_and_drops_placeholders(tmp_path):
    path = write(tmp_path / "yield_final.csv", "2015,1,47,29.7\n2016,1,47,0.0\n2015,17,163,41\n")
    table = read_yields(path)
    assert as_rows(table) == [("01047", 2015, "soybean", 29.7, "bu/acre"), ("17163", 2015, "soybean", 41, "bu/acre")]
    assert table.attrs["left_out"] == {"zero, a placeholder": 1}


def test_standardised_table_is_keyed_by_state_and_county(tmp_path):
    head = "Year,Region2,Crop,Region1,Area harvested,Area planted,Production,Yield\n"
    path = write(tmp_path / "s.csv", head + "2003,adair,soybeans,ia,1,1,1,28.1\n2003,adair,soybeans,mo,1,1,1,31.8\n")
    assert as_rows(read_yields(path)) == [
        ("IA:ADAIR", 2003, "soybean", 28.1, "bu/acre"),
        ("MO:ADAIR", 2003, "soybean", 31.8, "bu/acre"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("01001,2014,-3", "yield -3 of region '01001' in 2014 is negative"),
        ("01001,2014,0", "zero mostly stands for missing"),
        ("01001,2014,3.2", r"implausible .*is the unit another one"),  # t/ha called bu/acre
        ("01001,2014,3100", "implausible"),  # kg/ha called bu/acre
        ("01001,2014,abc", "yield 'abc' of region '01001' in 2014 is not a number"),
        ("01001,2014,3,5", "row 2 has 4 cells, the first row 3"),
        ("01001,214,40", "'214' is no year from 1900 to 2100"),
        ("01001,2014,40\n01001,2014,41", r"two yields of soybean in region '01001' in 2014 \(40 and 41\)"),
        (",2014,40", "without a region id"),
        ("", "has no rows"),
        ("01001,2014,(D)", "no yield left"),
    ],
)
def test_bad_rows_are_refused(tmp_path, rows, message):
    path = write(tmp_path / "bad.csv", f"region_id,year,yield\n{rows}\n")
    with pytest.raises(InputProblem, match=message):
        read_yields(path, crop="soybean", unit="bu/acre")


def test_bad_files_and_options_are_refused(tmp_path):
    path = write(tmp_path / "y.csv", "region_id,year,yield,unit,crop\n01001,2014,40,bu/acre,soybean\n")
    with pytest.raises(InputProblem, match="no file"):
        read_yields(tmp_path / "absent.csv")
    with pytest.raises(InputProblem, match="no yield table that is known by its header"):
        read_yields(write(tmp_path / "other.csv", "a,b\n1,x\n"))
    with pytest.raises(InputProblem, match="no source 'nas'; there are auto, plain"):
        read_yields(path, source="nas")
    with pytest.raises(InputProblem, match="no column 'fips'; it has region_id, year"):
        read_yields(path, id_column="fips")
    with pytest.raises(InputProblem, match="is in bu/acre, but unit 't/ha' was given"):
        read_yields(path, unit="t/ha")
    with pytest.raises(InputProblem, match="no unit 'stones'"):
        read_yields(path, unit="stones")
    with pytest.raises(InputProblem, match="no yields of corn; it has soybean"):
        read_yields(path, crop="maize")
    with pytest.raises(InputProblem, match="has a column 'a' twice"):
        read_text_table(write(tmp_path / "twice.csv", "a,a\n1,2\n"))
    (tmp_path / "y.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputProblem, match="cannot be read as Parquet"):
        read_yields(tmp_path / "y.parquet")
    (tmp_path / "latin.csv").write_bytes("region_id,year,yield\nL\xe9on,2014,3\n".encode("latin-1"))
    with pytest.raises(InputProblem, match="UTF-8"):
        read_yields(tmp_path / "latin.csv")


def test_zeros_and_exact_repeats_as_asked(tmp_path):
    path = write(tmp_path / "z.csv", "region_id,year,yield\na,2014,0\na,2015,3\na,2015,3\nb,2014,2\n")
    dropped = read_yields(path, crop="soybean", unit="t/ha", zeros="missing")
    assert dropped[["region_id", "year"]].to_numpy().tolist() == [["a", 2015], ["b", 2014]]
    assert dropped.attrs["left_out"] == {"zero, a placeholder": 1, "exact repeats": 1}
    assert read_yields(path, crop="soybean", unit="t/ha", zeros="keep")["yield"].tolist() == [0, 3, 2]


CELLS = st.one_of(
    st.sampled_from(
        ["", "2014", "40", "-1", "0", "1e309", "(D)", "nan", "1,234", "soybean", "bu/acre", '"', "\x00", "é;"]
    ),
    st.text(max_size=6),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.sampled_from(
        ["region_id,year,yield", ",".join(QUICKSTATS), "Year,State,County,Value", "2014,1,2,30", ""]
    ),
    rows=st.lists(st.lists(CELLS, min_size=3, max_size=5), max_size=4),
    tail=st.binary(max_size=12),
)
def test_no_file_crashes_the_reader(tmp_path, header, rows, tail):
    path = tmp_path / "fuzz.csv"
    path.write_bytes("\n".join([header, *(",".join(row) for row in rows)]).encode("utf-8", "surrogatepass") + tail)
    try:
        table = read_yields(path, crop="soybean", unit="bu/acre")
    except InputProblem:
        return
    assert (table["yield"] > 0).all()
    assert table["year"].between(1900, 2100).all()


def test_units_convert_by_crop_and_back():
    table = plain()
    tonnes = convert_yields(table, "t/ha")
    assert tonnes["yield"].to_numpy() == pytest.approx(table["yield"].to_numpy() * 0.0672511, rel=1e-5)
    assert convert_yields(tonnes, "bu/acre")["yield"].to_numpy() == pytest.approx(table["yield"].to_numpy(), rel=1e-12)
    corn = convert_yields(plain(crop="corn"), "kg/ha")
    assert corn["yield"].to_numpy() == pytest.approx(table["yield"].to_numpy() * 62.7677, rel=1e-5)
    pounds = convert_yields(plain(crop="cotton", unit="lb/acre"), "kg/ha")
    assert pounds["yield"].to_numpy() == pytest.approx(table["yield"].to_numpy() * 1.12085, rel=1e-5)
    assert set(tonnes["unit"]) == {"t/ha"}
    assert table["unit"].tolist() == ["bu/acre"] * 3  # the input is left alone
    with pytest.raises(InputProblem, match="a bushel of rye has no weight here"):
        convert_yields(plain(crop="rye"), "t/ha")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("LA SALLE", "LaSalle"),
        ("St. Clair", "SAINT CLAIR"),
        ("De Kalb County", "DEKALB"),
        ("O'Brien", "OBRIEN"),
        ("1001", "01001"),
    ],
)
def test_spellings_of_one_region_match(one, other):
    assert match_key(one) == match_key(other)


@pytest.mark.parametrize(
    ("one", "other"), [("parcel 1", "parcel 11"), ("A-12", "A12"), ("IA:ADAIR", "MO:ADAIR"), ("Lee", "Leed")]
)
def test_different_regions_do_not(one, other):
    assert match_key(one) != match_key(other)


def test_names_of_crops_and_units():
    assert [crop_name(c) for c in ("SOYBEANS", "Corn, Grain", " maize", "Rye")] == ["soybean", "corn", "corn", "rye"]
    assert [unit_name(u) for u in ("BU / ACRE", "bushels per acre", "Kg ha-1")] == ["bu/acre", "bu/acre", "kg/ha"]
    assert unit_name("furlongs", strict=False) is None
    assert county_key("ST JOHN THE BAPTIST PARISH") == "STJOHNTHEBAPTIST"


def test_history_is_the_mean_of_the_years_before_and_trend_a_line():
    years = np.arange(2004, 2014)
    table = pd.DataFrame({"region_id": "01001", "year": years, "yield": 20 + 1.5 * (years - 2004.0)}).drop(index=[7])
    region = np.array(["1001", "01001", "01001", "99999"])
    year = np.array([2014, 2010, 2006, 2014], np.int16)
    history, trend = county_history(table, region, year, before=year, window=3)
    assert history[0] == pytest.approx((20 + 1.5 * 8 + 20 + 1.5 * 9) / 2)  # 2011 is missing: the mean of 2012 and 2013
    assert history[1] == pytest.approx(20 + 1.5 * 4)
    assert history[2] == pytest.approx(20 + 1.5 * 0.5)
    assert trend[:2] == pytest.approx([35, 29])  # on the line, whatever is missing
    assert np.isnan([trend[2], history[3], trend[3]]).all()  # two yields make no trend, none no history


def test_join_takes_yields_by_region_and_year_and_hides_the_test_seasons_from_history():
    table = pd.concat([plain(), plain(year=[2012, 2013, 2012], **{"yield": [20.0, 30.0, 50.0]})], ignore_index=True)
    inputs = series(["17163", "1001", "17163", "17163"], [2015, 2014, 2014, 2016])
    previous = join_yields(inputs, table, unit="bu/acre")
    assert previous.target.tolist()[:3] == [40.0, 31.5, 44.25]
    assert np.isnan(previous.target[3])
    assert previous.history == pytest.approx([(50 + 30 + 44.25) / 3, 20, 40, (50 + 30 + 44.25 + 40) / 4])
    before = join_yields(inputs, table, history="before-first-season", unit="t/ha")
    assert before.history == pytest.approx(np.array([40, 20, 40, 40]) * 0.0672511, rel=1e-5)
    assert (before.unit, before.crop, before.past) == ("t/ha", "soybean", "before-first-season")


def test_join_refuses_what_cannot_be_meant():
    inputs = series(["17163"], [2015])
    with pytest.raises(
        InputProblem, match=r"no region id of the yields \(like 'ADAMS'\) is among those of the imagery"
    ):
        join_yields(inputs, plain(region_id="ADAMS", year=[1, 2, 3]))
    with pytest.raises(InputProblem, match="corn, soybean: choose one by crop"):
        join_yields(inputs, plain(crop=["corn", "soybean", "soybean"]))
    with pytest.raises(InputProblem, match="bu/acre and t/ha: choose by unit"):
        join_yields(inputs, plain(unit=["bu/acre", "t/ha", "t/ha"]))
    with pytest.raises(InputProblem, match="two yields of region '01001' in 2014: their ids differ only in spelling"):
        join_yields(inputs, plain(region_id=["1001", "01001", "17163"]))
    with pytest.raises(InputProblem, match="history can be"):
        join_yields(inputs, plain(), history="all")


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not beside the checkout")
def test_real_tables_have_the_rows_they_are_known_to_have():
    us, illinois = SHARED / "us-soybean-county-yields", SHARED / "illinois-hls-soybean"
    you = read_yields(us / "yield_final.csv")
    assert (len(you), you.attrs["left_out"], you["year"].max()) == (19_120, {"zero, a placeholder": 1834}, 2015)
    standard = read_yields(us / "usa_yields_standardized.csv")
    assert (len(standard), standard["year"].max()) == (10_876, 2016)
    nass = read_yields(illinois / "nass_raw_Illinois19802022.csv", crop="soybean", unit="bu/acre")
    assert (len(nass), nass["region_id"].nunique()) == (3956, 96)
    adams = nass[(nass["region_id"] == "ADAMS") & (nass["year"] == 2020)]
    assert adams["yield"].tolist() == [54.8]
