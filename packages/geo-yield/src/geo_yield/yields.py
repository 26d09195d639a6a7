"""Tables of past yields: read from the layouts people have, checked, converted, and joined with imagery.

Every source becomes one table with columns region_id, year, crop, yield, unit, source. Nothing is guessed that changes
a number: a unit is read or given, withheld values are dropped and counted (never zero), and values no field can bear
are refused, since they mean that the unit is another. Units are converted here and nowhere else, with the bushel
weights of the US standards (soybean, wheat 60 lb, corn 56 lb). County figures: USDA NASS (quickstats.nass.usda.gov).

Region ids: US counties are text of 2 state and 3 county digits. Sources that only name counties give the name's letters
("LA SALLE" and "LaSalle" are LASALLE, "Saint Clair" is STCLAIR), after the state's if a file has several (IOWA:ADAIR).
"""

import csv
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int16, Shaped

from geo_yield.errors import InputProblem
from geo_yield.histograms import YieldTensor
from geo_yield.samples import IndexSeries, Samples

COLUMNS = ["region_id", "year", "crop", "yield", "unit", "source"]
KG_PER_LB, M2_PER_ACRE = 0.45359237, 4046.8564224
BUSHEL_LB = {"soybean": 60.0, "wheat": 60.0, "winter wheat": 60.0, "spring wheat": 60.0, "corn": 56.0}
UNITS = ("bu/acre", "lb/acre", "t/ha", "kg/ha")
PLAUSIBLE = {
    "soybean": (0.5, 8.0),
    "corn": (0.5, 22.0),
    "wheat": (0.4, 14.0),
    "winter wheat": (0.4, 14.0),
    "spring wheat": (0.4, 14.0),
    "cotton": (0.1, 4.0),
}
"""Crop -> t/ha that the median of a table must reach and no value may exceed; beyond them the unit is wrong."""
_UNIT_NAMES = {
    "bu/acre": "bu/acre|bu/ac|bushels/acre|bushelsperacre|buperacre",
    "lb/acre": "lb/acre|lb/ac|lbs/acre|poundsperacre",
    "t/ha": "t/ha|tonnes/ha|tonnesperhectare|mg/ha|tha-1",
    "kg/ha": "kg/ha|kgha-1|kgperhectare",
}
_CROP_NAMES = {
    "soybean": "soybean|soybeans|soy|soya",
    "corn": "corn|corn, grain|maize|grain maize",
    "wheat": "wheat",
    "winter wheat": "wheat, winter|winter wheat|winterwheat|winter_wheat",
    "spring wheat": "wheat, spring, (excl durum)|spring wheat",
    "cotton": "cotton|cotton, upland",
}
_DATA_ITEM = re.compile(r"(?P<crop>.+?) - YIELD, MEASURED IN (?P<unit>.+)")
_NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)?(\.\d*)?([eE][-+]?\d{1,3})?")
_WITHHELD = re.compile(r"\(\s*[A-Z]{1,3}\s*\)")

_log = logging.getLogger(__name__)


def read_yields(
    path: Path,
    *,
    source: str = "auto",
    crop: str | None = None,
    unit: str | None = None,
    id_column: str = "region_id",
    year_column: str = "year",
    yield_column: str = "yield",
    zeros: str = "refuse",
) -> pd.DataFrame:
    """A table of yields as columns region_id, year, crop, yield, unit, source; one row per region, year and crop.

    source: "plain" (CSV or Parquet with the three named columns, optionally crop and unit), "quickstats" (NASS
    download), "nass-short" (Year, State, Ag District, Ag District Code, County, Value), "you2017" (yield_final.csv of
    You et al., no header), "standardized" (usa_yields_standardized.csv), or "auto": told by the header.
    crop, unit: for files that do not say; crop also picks one of several. zeros: "refuse", "missing" (drop) or "keep".
    What was left out is logged and stands in `attrs["left_out"]`.
    Raises InputProblem for an unreadable file, a missing column, unit or crop, numbers that are none, negative, zero or
    implausible yields, and a region that has two different yields of one crop in one year.
    """
    path = Path(path)
    if zeros not in ("refuse", "missing", "keep"):
        raise InputProblem(f"zeros can be 'refuse', 'missing' or 'keep', got '{zeros}'")
    text = read_text_table(path, header=source != "you2017")
    if source == "auto":
        source = _recognise(text, path)
        text = read_text_table(path, header=False) if source == "you2017" else text
    if source not in _READERS:
        raise InputProblem(f"no source '{source}'; there are auto, {', '.join(_READERS)}")
    names = {"region_id": id_column, "year": year_column, "yield": yield_column}
    raw, left_out = _READERS[source](text, path, names)
    raw = _settle_crop(raw, crop, path, left_out)
    raw = _settle_unit(raw, unit, path)
    table = _settle_values(raw, path, "missing" if source == "you2017" else zeros, left_out)
    table["source"] = source
    refuse_implausible(table, str(path))
    table = _refuse_duplicates(table[COLUMNS], path, left_out)
    table.attrs["left_out"] = {reason: count for reason, count in left_out.items() if count}
    reasons = ", ".join(f"{count} {reason}" for reason, count in table.attrs["left_out"].items()) or "nothing"
    _log.info(
        "'%s' (%s): %d yields of %d regions; left out: %s",
        path,
        source,
        len(table),
        table["region_id"].nunique(),
        reasons,
    )
    return table


def read_text_table(path: Path, *, header: bool = True) -> pd.DataFrame:
    """A CSV (comma, semicolon or tab) or Parquet file with every cell as text, "" where empty.

    Raises InputProblem if it cannot be read, is empty, has a column twice, or rows of different length.
    """
    path = Path(path)
    if path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            # spreadsheets of most of Europe write semicolons
            delimiter = next((d for d in (",", ";", "\t") if d in first), ",")
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, delimiter=delimiter)]
    except FileNotFoundError:
        raise InputProblem(f"no file '{path}'") from None
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise InputProblem(f"'{path}' cannot be read as a CSV file in UTF-8: {problem}") from None
    numbered = [(i + 1, row) for i, row in enumerate(rows) if any(row)]
    if len(numbered) < 1 + header:
        raise InputProblem(f"'{path}' has no rows")
    width = len(numbered[0][1])
    if ragged := [(line, len(row)) for line, row in numbered if len(row) != width]:
        line, cells = ragged[0]
        raise InputProblem(
            f"'{path}' row {line} has {cells} cells, the first row {width}: is a quote or comma missing?"
        )
    columns = numbered[0][1] if header else [str(i) for i in range(width)]
    if twice := [c for c in columns if columns.count(c) > 1]:
        raise InputProblem(f"'{path}' has a column '{twice[0]}' twice")
    return pd.DataFrame([row for _, row in numbered[header:]], columns=columns, dtype=str)


def _read_parquet(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise InputProblem(f"no file '{path}'")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as problem:
        raise InputProblem(f"'{path}' cannot be read as Parquet: {str(problem).splitlines()[0]}") from None
    if table.empty:
        raise InputProblem(f"'{path}' has no rows")
    return table.map(lambda cell: "" if pd.isna(cell) else str(cell).strip()).reset_index(drop=True)


def _recognise(text: pd.DataFrame, path: Path) -> str:
    columns = {c.lower() for c in text.columns}
    if {"data item", "geo level"} <= columns:
        return "quickstats"
    if {"year", "state", "county", "value"} <= columns:
        return "nass-short"
    if {"region1", "region2", "yield"} <= columns:
        return "standardized"
    if len(text.columns) == 4 and all(_to_number(c) is not None for c in text.columns):
        return "you2017"
    if "year" in columns or "yield" in columns:
        return "plain"
    raise InputProblem(
        f"'{path}' is no yield table that is known by its header ({', '.join(text.columns[:8])}). "
        "A plain one has columns region_id, year, yield (and unit, crop); name others by options"
    )


# One reader per layout: text table -> columns region_id, year, yield, crop, unit as text; and counts of dropped rows.
_Read = tuple[pd.DataFrame, dict[str, int]]


def _columns(text: pd.DataFrame, path: Path, names: Iterable[str]) -> pd.DataFrame:
    """The named columns (any case), in order, under the given names."""
    found = {c.lower(): c for c in text.columns}
    if missing := [n for n in names if n.lower() not in found]:
        raise InputProblem(f"'{path}' has no column '{missing[0]}'; it has {', '.join(text.columns[:10])}")
    return text[[found[n.lower()] for n in names]].set_axis(list(names), axis=1)


def _read_plain(text: pd.DataFrame, path: Path, names: Mapping[str, str]) -> _Read:
    optional = [n for n in ("crop", "unit") if n in {c.lower() for c in text.columns}]
    table = _columns(text, path, [*names.values(), *optional])
    return table.set_axis([*names, *optional], axis=1), {}


def _read_quickstats(text: pd.DataFrame, path: Path, names: Mapping[str, str]) -> _Read:  # noqa: ARG001
    needed = ("Program", "Year", "Period", "Geo Level", "State ANSI", "County ANSI", "Data Item", "Value")
    table = _columns(text, path, needed)
    item = table["Data Item"].str.extract(_DATA_ITEM)
    # not strict: yields per net planted acre and the like are other items, not mistakes
    unit = item["unit"].fillna("").map(lambda u: unit_name(u, strict=False))
    survey = (table["Program"].str.upper() == "SURVEY") & (table["Period"].str.upper() == "YEAR")
    county = table["Geo Level"].str.upper() == "COUNTY"
    if "domain" in {c.lower() for c in text.columns}:
        survey &= _columns(text, path, ["Domain"])["Domain"].str.upper() == "TOTAL"
    yields = survey & county & unit.notna()
    coded = table["County ANSI"].str.fullmatch(r"\d{1,3}(\.0)?") & table["State ANSI"].str.fullmatch(r"\d{1,2}(\.0)?")
    left_out = {
        "of other programs, levels or items": int((~yields).sum()),
        "without a county code (combined counties)": int((yields & ~coded).sum()),
    }
    kept = table[yields & coded]
    if kept.empty:
        raise InputProblem(f"'{path}' has no county yields: download Program SURVEY, Geo Level COUNTY, Category YIELD")
    return (
        pd.DataFrame(
            {
                "region_id": _digits(kept["State ANSI"], 2) + _digits(kept["County ANSI"], 3),
                "year": kept["Year"],
                "yield": kept["Value"],
                "crop": item["crop"][yields & coded],
                "unit": unit[yields & coded],
            }
        ),
        left_out,
    )


def _read_nass_short(text: pd.DataFrame, path: Path, names: Mapping[str, str]) -> _Read:  # noqa: ARG001
    table = _columns(text, path, ("Year", "State", "County", "Value"))
    combined = table["County"].str.upper().str.contains(r"OTHER .*COUNTIES", regex=True) | (table["County"] == "")
    kept = table[~combined]
    counties = named_counties(kept["State"], kept["County"])
    out = pd.DataFrame({"region_id": counties, "year": kept["Year"], "yield": kept["Value"]})
    return out, {"of combined counties": int(combined.sum())}


def _read_you2017(text: pd.DataFrame, path: Path, names: Mapping[str, str]) -> _Read:  # noqa: ARG001
    if len(text.columns) != 4:
        raise InputProblem(f"'{path}' has {len(text.columns)} columns; yield_final.csv has year, state, county, yield")
    out = pd.DataFrame(
        {"region_id": _digits(text["1"], 2) + _digits(text["2"], 3), "year": text["0"], "yield": text["3"]}
    )
    return out.assign(crop="soybean", unit="bu/acre"), {}


def _read_standardized(text: pd.DataFrame, path: Path, names: Mapping[str, str]) -> _Read:  # noqa: ARG001
    table = _columns(text, path, ("Year", "Region1", "Region2", "Crop", "Yield"))
    counties = named_counties(table["Region1"], table["Region2"])
    out = pd.DataFrame({"region_id": counties, "year": table["Year"], "yield": table["Yield"], "crop": table["Crop"]})
    return out.assign(unit="bu/acre"), {}


_READERS: dict[str, Callable[[pd.DataFrame, Path, Mapping[str, str]], _Read]] = {
    "plain": _read_plain,
    "quickstats": _read_quickstats,
    "nass-short": _read_nass_short,
    "you2017": _read_you2017,
    "standardized": _read_standardized,
}


def county_key(name: str) -> str:
    """A county's name by its letters: "St. Clair", "SAINT CLAIR" -> "STCLAIR"; "La Salle County" -> "LASALLE"."""
    words = re.sub(r"[.'`\u2019]", "", name.upper())
    words = re.sub(r"\s+(COUNTY|PARISH)$", "", words.strip())
    words = re.sub(r"^SAINTE\b", "STE", re.sub(r"^SAINT\b", "ST", words))
    return re.sub(r"[^A-ZÀ-Þ]", "", words)


def named_counties(state: pd.Series, county: pd.Series) -> pd.Series:
    """Region ids of counties known by name: the county's letters, after the state's where there are several states."""
    keys = county.map(county_key)
    return keys if state.str.upper().nunique() == 1 else state.map(county_key) + ":" + keys


def match_key(region_id: str) -> str:
    """What decides whether two ids mean the same region: a name by its letters, anything with digits as it stands.

    A 4-digit number gets back the leading zero that spreadsheets take from county codes of ten states.
    """
    text = region_id.strip()
    if re.search(r"\d", text):
        return f"0{text}" if re.fullmatch(r"\d{4}", text) else text
    return ":".join(county_key(part) for part in text.split(":")) or text


def crop_name(text: str) -> str:
    """One name for a crop: "SOYBEANS" -> "soybean", "CORN, GRAIN" and "maize" -> "corn"; others in lower case."""
    lower = text.strip().lower()
    return next((crop for crop, names in _CROP_NAMES.items() if lower in names.split("|")), lower)


def unit_name(text: str, *, strict: bool = True) -> str | None:
    """One of UNITS: "BU / ACRE" and "bushels per acre" -> "bu/acre". Unknown: InputProblem, or None if not strict."""
    squeezed = re.sub(r"\s+", "", text.lower())
    for unit, names in _UNIT_NAMES.items():
        if squeezed in names.split("|"):
            return unit
    if strict:
        raise InputProblem(f"no unit '{text}'; yields can be in {', '.join(UNITS)}")
    return None


def _digits(codes: pd.Series, width: int) -> pd.Series:
    return codes.str.removesuffix(".0").str.zfill(width)


def _to_number(text: str) -> float | None:
    if not re.search(r"\d", text) or not _NUMBER.fullmatch(text):
        return None
    number = float(text.replace(",", ""))
    return number if np.isfinite(number) else None


def read_years(text: pd.Series, path: Path) -> Int16[np.ndarray, "N"]:
    """Years as numbers. Raises InputProblem for what is no year from 1900 to 2100, naming the row."""
    numbers = [_to_number(cell) for cell in text]
    for i, number in enumerate(numbers):
        if number is None or number != int(number) or not 1900 <= number <= 2100:
            raise InputProblem(f"'{path}' data row {i + 1}: '{text.iloc[i]}' is no year from 1900 to 2100")
    return np.array(numbers, dtype=np.int16)


def _settle_crop(raw: pd.DataFrame, crop: str | None, path: Path, left_out: dict[str, int]) -> pd.DataFrame:
    if "crop" not in raw:
        if crop is None:
            raise InputProblem(f"'{path}' does not say which crop it is of: pass crop, e.g. crop='soybean'")
        return raw.assign(crop=crop_name(crop))
    raw = raw.assign(crop=raw["crop"].map(crop_name))
    if crop is None:
        return raw
    wanted = raw["crop"] == crop_name(crop)
    if not wanted.any():
        raise InputProblem(
            f"'{path}' has no yields of {crop_name(crop)}; it has {', '.join(sorted(raw['crop'].unique())[:8])}"
        )
    left_out["of other crops"] = int((~wanted).sum())
    return raw[wanted]


def _settle_unit(raw: pd.DataFrame, unit: str | None, path: Path) -> pd.DataFrame:
    given = None if unit is None else unit_name(unit)
    if "unit" in raw:
        if (raw["unit"].fillna("") == "").any():
            raise InputProblem(
                f"'{path}' has rows without a unit in its column 'unit': fill it with one of {', '.join(UNITS)}"
            )
        raw = raw.assign(unit=raw["unit"].map(unit_name))
        if given is not None and (raw["unit"] != given).any():
            raise InputProblem(
                f"'{path}' is in {', '.join(sorted(raw['unit'].unique()))}, but unit '{given}' was given: leave it out"
            )
        return raw
    if given is None:
        raise InputProblem(
            f"'{path}' does not say its unit: pass unit, one of {', '.join(UNITS)}, or add a column 'unit'"
        )
    return raw.assign(unit=given)


def _settle_values(raw: pd.DataFrame, path: Path, zeros: str, left_out: dict[str, int]) -> pd.DataFrame:
    """Years and yields as numbers; withheld, empty and (if so asked) zero values dropped and counted."""
    empty = raw["yield"].str.upper().isin(["", "NA", "NAN", "NULL", "NONE"])
    withheld = raw["yield"].str.fullmatch(_WITHHELD)
    left_out |= {"empty": int(empty.sum()), "withheld, like (D) or (Z)": int(withheld.sum())}
    raw = raw[~empty & ~withheld]
    numbers = [_to_number(cell) for cell in raw["yield"]]
    for i, number in enumerate(numbers):
        if number is None or number < 0 or (number == 0 and zeros == "refuse"):
            raise InputProblem(f"'{path}': {_wrong_yield(number, raw.iloc[i])}")
    if (raw["region_id"] == "").any():
        raise InputProblem(f"'{path}' has a yield without a region id")
    table = raw.assign(year=read_years(raw["year"], path), **{"yield": np.array(numbers, dtype=np.float64)})
    if zeros == "missing":
        left_out["zero, a placeholder"] = int((table["yield"] == 0).sum())
        table = table[table["yield"] > 0]
    if table.empty:
        raise InputProblem(f"'{path}' has no yield left after dropping {left_out}")
    return table.reset_index(drop=True)


def _wrong_yield(number: float | None, row: pd.Series) -> str:
    where = f"of region '{row['region_id']}' in {row['year']}"
    if number is None:
        return f"yield '{row['yield']}' {where} is not a number"
    if number < 0:
        return f"yield {number:g} {where} is negative"
    return (
        f"yield 0 {where}: zero mostly stands for missing. "
        "Leave such cells empty, or pass zeros='missing' (drop them) or zeros='keep'"
    )


def refuse_implausible(table: pd.DataFrame, given: str) -> None:
    """Raise InputProblem if the yields of a crop cannot be in the unit they claim."""
    for (crop, unit), rows in _by_crop_and_unit(table):
        if crop not in PLAUSIBLE or (unit == "bu/acre" and crop not in BUSHEL_LB):
            continue
        tonnes = rows["yield"] * to_tonnes(crop, unit)
        low, high = (limit / to_tonnes(crop, unit) for limit in PLAUSIBLE[crop])
        if tonnes.max() > PLAUSIBLE[crop][1] or tonnes.median() < PLAUSIBLE[crop][0]:
            raise InputProblem(
                f"{given}: {crop} yields of {rows['yield'].min():g} to {rows['yield'].max():g} {unit} are implausible "
                f"(median at least {low:.3g}, none above {high:.3g}): is the unit another one of {', '.join(UNITS)}?"
            )


def _refuse_duplicates(table: pd.DataFrame, path: Path, left_out: dict[str, int]) -> pd.DataFrame:
    before = len(table)
    # overlapping downloads put together repeat rows exactly; that is no contradiction
    table = table.drop_duplicates(ignore_index=True)
    left_out["exact repeats"] = before - len(table)
    twice = table.duplicated(["region_id", "year", "crop"], keep=False)
    if twice.any():
        rows = table[twice].sort_values(["region_id", "year", "crop"]).iloc[:2]
        first = rows.iloc[0]
        raise InputProblem(
            f"'{path}' has two yields of {first['crop']} in region '{first['region_id']}' in {first['year']} "
            f"({rows['yield'].iloc[0]:g} and {rows['yield'].iloc[1]:g}): keep one"
        )
    return table


def to_tonnes(crop: str, unit: str) -> float:
    """t/ha in one `unit` of `crop`. Raises InputProblem for a bushel of a crop without a standard weight here."""
    if unit == "bu/acre":
        if crop not in BUSHEL_LB:
            raise InputProblem(
                f"a bushel of {crop} has no weight here ({', '.join(BUSHEL_LB)} have): use t/ha or kg/ha"
            )
        return BUSHEL_LB[crop] * to_tonnes(crop, "lb/acre")
    if unit not in UNITS:
        raise InputProblem(f"no unit '{unit}'; yields can be in {', '.join(UNITS)}")
    return {"lb/acre": KG_PER_LB / M2_PER_ACRE * 10, "t/ha": 1.0, "kg/ha": 1e-3}[unit]


def _by_crop_and_unit(table: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    for (crop, unit), rows in table.groupby(["crop", "unit"]):
        yield (str(crop), str(unit)), rows


def convert_yields(table: pd.DataFrame, unit: str) -> pd.DataFrame:
    """The same table in `unit`, by each row's crop and present unit. Raises InputProblem for an unknown one."""
    target = unit_name(unit)
    if target is None:
        raise InputProblem(f"no unit '{unit}'")
    factor = pd.Series(1.0, index=table.index)
    for (crop, present), rows in _by_crop_and_unit(table):
        if present != target:
            factor[rows.index] = to_tonnes(crop, present) / to_tonnes(crop, target)
    converted = table.copy()
    converted["yield"], converted["unit"] = table["yield"] * factor, target
    return converted


def county_history(
    yields: pd.DataFrame,
    region_id: Shaped[np.ndarray, "N"],
    year: Int16[np.ndarray, "N"],
    *,
    before: Int16[np.ndarray, "N"],
    window: int = 10,
) -> tuple[Float32[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    """What each row's region yielded before `before`: (mean over the `window` years before it, linear trend at `year`).

    The mean is NaN where those years have no yield. The trend is the least-squares line through all earlier yields, NaN
    where there are fewer than 3.
    """
    if window < 1:
        raise InputProblem(f"a history needs a window of at least 1 year, got {window}")
    keyed = yields.assign(key=yields["region_id"].map(match_key)).sort_values("year")
    past = {key: (rows["year"].to_numpy(), rows["yield"].to_numpy()) for key, rows in keyed.groupby("key")}
    history, trend = np.full((2, len(region_id)), np.nan, np.float32)
    for i, key in enumerate(map(match_key, region_id.tolist())):
        if key not in past:
            continue
        years, values = past[key]
        start, count = np.searchsorted(years, [int(before[i]) - window, int(before[i])])
        if count > start:
            history[i] = values[start:count].mean()
        if count >= 3:
            trend[i] = _line(years[:count], values[:count], int(year[i]))
    return history, trend


def _line(years: Shaped[np.ndarray, "M"], values: Shaped[np.ndarray, "M"], at: int) -> float:
    centred = years - years.mean()
    slope = (centred * values).sum() / (centred**2).sum()
    return float(values.mean() + slope * (at - years.mean()))


def join_yields(
    inputs: YieldTensor | IndexSeries,
    yields: pd.DataFrame,
    *,
    history: str = "previous-years",
    window: int = 10,
    unit: str | None = None,
    crop: str | None = None,
    district: Shaped[np.ndarray, "N"] | None = None,
) -> Samples:
    """Imagery rows with their yield (NaN where unknown), in `unit` (default: the table's), and their region's past.

    history: "previous-years" (yields of years before the row's; for leave-future-out and for real use) or
    "before-first-season" (yields before the first year of imagery, so that no label under test can enter).
    Rows without a yield and yields without imagery are counted in the log.
    Raises InputProblem if nothing matches, several crops are left, or a region has two yields in a year under one name.
    """
    if history not in ("previous-years", "before-first-season"):
        raise InputProblem(f"history can be 'previous-years' or 'before-first-season', got '{history}'")
    table = _one_crop(yields, crop)
    table = convert_yields(table, unit if unit is not None else _one_unit(table))
    keys = pd.MultiIndex.from_arrays([table["region_id"].map(match_key), table["year"]])
    if keys.has_duplicates:
        region, year = keys[keys.duplicated()][0]
        raise InputProblem(f"two yields of region '{region}' in {year}: their ids differ only in spelling")
    known = pd.Series(table["yield"].to_numpy(np.float32), index=keys)
    rows = pd.MultiIndex.from_arrays([[match_key(name) for name in inputs.region_id.tolist()], inputs.year.astype(int)])
    target = known.reindex(rows).to_numpy(np.float32)
    _report_unmatched(inputs, table, np.isfinite(target))
    first = int(inputs.year.min())  # of all rows, matched or not, so that a fold cannot move it
    before = inputs.year if history == "previous-years" else np.full(len(inputs), first, np.int16)
    mean, trend = county_history(table, inputs.region_id, inputs.year, before=before, window=window)
    return Samples(
        inputs=inputs,
        target=target,
        history=mean,
        trend=trend,
        unit=table["unit"].iloc[0],
        crop=table["crop"].iloc[0],
        district=district,
        past=history,
    )


def _one_crop(yields: pd.DataFrame, crop: str | None) -> pd.DataFrame:
    table = yields if crop is None else yields[yields["crop"] == crop_name(crop)]
    crops = sorted(table["crop"].unique())
    if len(crops) != 1:
        found = sorted(yields["crop"].unique())
        raise InputProblem(f"the yields are of {', '.join(found) or 'no crop'}: choose one by crop")
    return table


def _one_unit(table: pd.DataFrame) -> str:
    units = sorted(table["unit"].unique())
    if len(units) != 1:
        raise InputProblem(f"the yields are in {' and '.join(units)}: choose by unit which to convert to")
    return units[0]


def _report_unmatched(inputs: YieldTensor | IndexSeries, table: pd.DataFrame, matched: Shaped[np.ndarray, "N"]) -> None:
    seen = {match_key(name) for name in inputs.region_id.tolist()}
    strange = sorted(set(table["region_id"].map(match_key)) - seen)
    if not len(inputs):
        raise InputProblem("there are no imagery rows to join yields with")
    if not seen - set(strange) or len(strange) == table["region_id"].map(match_key).nunique():
        raise InputProblem(
            f"no region id of the yields (like '{table['region_id'].iloc[0]}') is among those of the imagery "
            f"(like '{inputs.region_id[0]}'): use one kind of id in both"
        )
    if strange:
        _log.info("%d regions of the yield table have no imagery, first '%s'", len(strange), strange[0])
    if not matched.all():
        missing = np.flatnonzero(~matched)
        first = f"'{inputs.region_id[missing[0]]}' in {inputs.year[missing[0]]}"
        _log.info("%d of %d imagery rows have no yield, first %s", len(missing), len(matched), first)
