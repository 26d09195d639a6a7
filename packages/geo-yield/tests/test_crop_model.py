"""The crop answers to water, heat and soil as its equations say."""

from dataclasses import replace

import numpy as np
import pytest

from geo_yield.crop_model import (
    CropConstants,
    HotSpell,
    Land,
    Season,
    Weather,
    draw_land,
    draw_weather,
    grow,
    red_noise,
    smooth_field,
)

SHAPE = (6, 10)
DAYS = 256


def even_weather(maximum: float = 29.0, rain: float = 4.0) -> Weather:
    full = np.ones((DAYS, *SHAPE), dtype=np.float32)
    light = np.full(DAYS, 9.0, dtype=np.float32)
    return Weather(maximum=maximum * full, minimum=(maximum - 12) * full, rain=rain * full, light=light)


def run(weather: Weather, *, fertility: float = 1.0, constants: CropConstants | None = None) -> Season:
    land = Land(
        water_capacity=np.full(SHAPE, 150, dtype=np.float32), fertility=np.full(SHAPE, fertility, dtype=np.float32)
    )
    return grow(weather, land, np.full(SHAPE, 130, dtype=np.float32), constants or CropConstants())


def test_a_good_season_yields_what_us_soybean_yields() -> None:
    season = run(even_weather())
    assert 250 < season.grain.mean() < 450  # g/m2, 37 to 67 bu/acre
    assert season.absorbed[0].max() == 0  # bare in February
    assert season.absorbed.max() > 0.85
    assert season.absorbed[-1].max() < 0.1  # ripe by the end of October


def test_drought_and_poor_soil_cost_yield_and_show() -> None:
    wet, dry = run(even_weather()), run(even_weather(rain=1.0))
    assert dry.grain.mean() < 0.75 * wet.grain.mean()
    assert dry.thirst.max() > 0.3 > wet.thirst.max()
    assert dry.absorbed[20:25].mean() < wet.absorbed[20:25].mean()
    assert run(even_weather(), fertility=0.9).grain.mean() < 0.95 * wet.grain.mean()


def test_heat_damage_is_exponential_in_degree_days() -> None:
    hot = even_weather(maximum=34.0, rain=30.0)  # never thirsty, so the canopy is 4 K above the threshold every day
    none, some, double = (
        run(hot, constants=replace(CropConstants(), heat_damage=damage)).grain.mean() for damage in (0, 0.002, 0.004)
    )
    assert some < none
    assert double / some == pytest.approx(some / none, rel=1e-4)
    degree_days = -np.log(some / none) / 0.002
    filling_days = 700 / (34 - 6 - 10)  # ripening takes 700 degree days above 10 C at a mean of 28 C
    assert degree_days == pytest.approx(4 * filling_days, rel=0.05)


def test_a_hot_spell_acts_in_its_year_and_where_it_is_centred() -> None:
    spell = HotSpell(year=2012, warming=5.0, rain_lost=0.5, centre=(0.5, 0.8))
    calm = draw_weather(np.random.default_rng(3), SHAPE, 2012)
    hot = draw_weather(np.random.default_rng(3), SHAPE, 2012, [spell])
    other = draw_weather(np.random.default_rng(3), SHAPE, 2013, [spell])
    warmer = hot.maximum - calm.maximum
    day, row, column = np.unravel_index(warmer.argmax(), warmer.shape)
    assert (day + 49, row, column) == (203, 3, 8)
    assert warmer.max() == pytest.approx(5.0, rel=1e-3)
    assert np.array_equal(other.maximum, calm.maximum)
    assert hot.rain.sum() < calm.rain.sum()


def test_land_and_noise_have_the_stated_statistics() -> None:
    field = smooth_field(np.random.default_rng(1), (40, 60), 5.0)
    assert field.mean() == pytest.approx(0, abs=1e-5)
    assert field.std() == pytest.approx(1, abs=1e-5)
    assert np.abs(np.diff(field, axis=1)).mean() < 0.3  # neighbours are alike
    series = red_noise(np.random.default_rng(2), 20_000, 0.9)
    assert np.corrcoef(series[1:], series[:-1])[0, 1] == pytest.approx(0.9, abs=0.02)
    assert series.std() == pytest.approx(1, abs=0.1)
    land = draw_land(np.random.default_rng(4), (40, 60))
    assert land.water_capacity.min() >= 50
    assert land.fertility.std() == pytest.approx(0.07, rel=0.1)
