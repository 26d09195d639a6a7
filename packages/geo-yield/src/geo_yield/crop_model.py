"""Weather and a light-use-efficiency crop model: what an imaginary crop of the simulated region saw and yielded.

Biomass grows with the light that the canopy absorbs times an efficiency (Monteith, "Solar radiation and productivity in
tropical ecosystems", J. Appl. Ecol. 1972; "Climate and the efficiency of crop production in Britain", Phil. Trans. R.
Soc. B 1977), less where the soil, a one-bucket water balance with Hargreaves evaporation, runs dry. Canopy that does
not transpire gets warmer than the air; every degree above 30 C between flowering and ripeness takes its share of the
harvest index (degree days above 30 C as the measure of heat damage: Lobell et al., "The critical role of extreme heat
for maize production in the United States", Nature Climate Change 2013).
Left open there, decided here: all constants of `CropConstants`, chosen for US soybean yields of about 3.2 t/ha; one
crop everywhere. Nothing in this file knows how yields will be predicted.

Shapes: D days (from `FIRST_DAY`, one season), P pixels as (H, W), T composites of 8 days.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

FIRST_DAY, LAST_DAY = 49, 304
"""Day of year of the first and last simulated day: 32 composites of 8 days."""


@dataclass(frozen=True, kw_only=True)
class CropConstants:
    """Constants of the crop model; the docstring of each says its unit."""

    base_temperature: float = 10.0
    """C, below which the crop does not develop."""
    flowering: float = 560.0
    """Degree days from emergence to flowering."""
    ripeness: float = 700.0
    """Degree days from flowering to ripeness."""
    light_use_efficiency: float = 1.30
    """Grams of dry matter per MJ of absorbed photosynthetically active radiation."""
    extinction: float = 0.6
    """Beer-Lambert coefficient: fAPAR = 1 - exp(-extinction LAI)."""
    harvest_index: float = 0.42
    """Share of the dry matter that is grain, without heat."""
    heat_threshold: float = 30.0
    """C of the canopy at its daily maximum, above which heat damages grain filling."""
    heat_damage: float = 0.0025
    """Share of the harvest index lost per degree day above the threshold (exponential)."""
    dry_canopy_warming: float = 4.0
    """K by which a canopy without water is warmer than the air."""


@dataclass(frozen=True, kw_only=True)
class HotSpell:
    """A heat wave with drought. It is strongest in one place and fades from there."""

    year: int
    warming: float
    """K at the height of the spell, where it is strongest."""
    rain_lost: float
    """Share of the rain that does not fall at the height of the spell, 0..1."""
    centre: tuple[float, float]
    """Where it is strongest, as shares of the region's height and width from the north-west corner."""
    peak_day: int = 203
    """Day of year."""
    spread_days: float = 22.0
    """Days after which it has faded to 1/e."""


@dataclass(frozen=True, kw_only=True)
class Weather:
    """Daily weather of one season."""

    maximum: Float32[np.ndarray, "D H W"]
    """C, daily maximum of the air."""
    minimum: Float32[np.ndarray, "D H W"]
    rain: Float32[np.ndarray, "D H W"]
    """mm per day."""
    light: Float32[np.ndarray, "D"]
    """MJ per m2 and day, photosynthetically active."""

    @property
    def mean(self) -> Float32[np.ndarray, "D H W"]:
        return (self.maximum + self.minimum) / 2


@dataclass(frozen=True, kw_only=True)
class Land:
    """What stays the same from year to year and makes a county's history worth knowing."""

    water_capacity: Float32[np.ndarray, "H W"]
    """mm of water that the soil can hold for the crop."""
    fertility: Float32[np.ndarray, "H W"]
    """Factor on light-use efficiency, about 1."""


@dataclass(frozen=True, kw_only=True)
class Season:
    """What a satellite could see of the crop, per composite, and what the farmer got."""

    absorbed: Float32[np.ndarray, "T H W"]
    """fAPAR of the green canopy, 0..1."""
    withered: Float32[np.ndarray, "T H W"]
    """Share of the ground under dry leaves, 0..1."""
    soil_water: Float32[np.ndarray, "T H W"]
    """Share of the water capacity that is filled, 0..1."""
    thirst: Float32[np.ndarray, "T H W"]
    """1 - (actual / possible transpiration), 0..1."""
    maximum: Float32[np.ndarray, "T H W"]
    """C, mean daily maximum of the air."""
    minimum: Float32[np.ndarray, "T H W"]
    grain: Float32[np.ndarray, "H W"]
    """Grams of grain per m2 (multiply by 10 for kg/ha)."""


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> Float32[np.ndarray, "H W"]:
    """White noise blurred by a Gaussian of `scale` pixels, mean 0 and standard deviation 1."""
    margin = int(3 * scale)  # the Fourier transform wraps around; what is kept must not
    wide = (shape[0] + margin, shape[1] + margin)
    rows, columns = np.fft.fftfreq(wide[0])[:, None], np.fft.rfftfreq(wide[1])[None, :]
    blur = np.exp(-2 * (np.pi * scale) ** 2 * (rows**2 + columns**2))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(wide)) * blur, s=wide)[: shape[0], : shape[1]]
    return ((field - field.mean()) / field.std()).astype(np.float32)


def red_noise(rng: np.random.Generator, steps: int, memory: float) -> Float32[np.ndarray, "D"]:
    """First-order autoregressive series of standard deviation 1; `memory` is the correlation of neighbouring days."""
    series = rng.standard_normal(steps)
    for step in range(1, steps):
        series[step] = memory * series[step - 1] + np.sqrt(1 - memory**2) * series[step]
    return series.astype(np.float32)


def draw_land(rng: np.random.Generator, shape: tuple[int, int]) -> Land:
    """Soils that differ between counties (smooth part) and between fields (rough part)."""
    depth = 0.85 * smooth_field(rng, shape, 9.0) + 0.4 * smooth_field(rng, shape, 1.2)
    nutrients = 0.8 * smooth_field(rng, shape, 12.0) + 0.6 * smooth_field(rng, shape, 1.2)
    return Land(
        water_capacity=np.clip(150 + 55 * depth, 50, 280).astype(np.float32),
        fertility=(1 + 0.07 * nutrients).astype(np.float32),
    )


def draw_weather(
    rng: np.random.Generator, shape: tuple[int, int], year: int, spells: Sequence[HotSpell] = ()
) -> Weather:
    """One season of a continental summer climate at 41 degrees north, with the hot spells of `year` on top."""
    day = np.arange(FIRST_DAY, LAST_DAY + 1, dtype=np.float32)
    strength = sum(
        (_strength(spell, day, shape) * spell.warming for spell in spells if spell.year == year), np.float32(0)
    )
    dryness = sum(
        (_strength(spell, day, shape) * spell.rain_lost for spell in spells if spell.year == year), np.float32(0)
    )
    regional = rng.normal(0, 0.35) + 1.8 * red_noise(rng, len(day), 0.80)
    local = smooth_field(rng, shape, 22.0) * (rng.normal(0, 0.4) + 0.8 * red_noise(rng, len(day), 0.97))[:, None, None]
    normal = 9.3 + 13.7 * np.sin(2 * np.pi * (day - 107) / 365)
    southward = np.linspace(-0.4, 0.4, shape[0], dtype=np.float32)[:, None]
    mean = (normal + regional)[:, None, None] + local + southward + strength
    wet = rng.random(len(day)) < 0.34
    rain = _rain(rng, shape, wet) * np.clip(1 - dryness, 0, 1)
    swing = np.where(wet, 4.5, 6.5)[:, None, None]
    light = (5.8 + 4.9 * np.sin(2 * np.pi * (day - 80) / 365)) * np.where(wet, 0.65, 1.06)
    return Weather(
        maximum=(mean + swing).astype(np.float32),
        minimum=(mean - swing).astype(np.float32),
        rain=rain.astype(np.float32),
        light=light.astype(np.float32),
    )


def grow(weather: Weather, land: Land, sowing: Float32[np.ndarray, "H W"], constants: CropConstants) -> Season:
    """Run the crop through the season, day by day, every pixel by itself. `sowing` is the day of year of emergence."""
    state = _Crop(land, sowing, constants)
    days = [state.step(day, weather) for day in range(len(weather.light))]
    absorbed, withered, soil_water, thirst = (_composites(np.stack(series)) for series in zip(*days, strict=True))
    return Season(
        absorbed=absorbed,
        withered=withered,
        soil_water=soil_water,
        thirst=thirst,
        maximum=_composites(weather.maximum),
        minimum=_composites(weather.minimum),
        grain=(state.biomass * constants.harvest_index * np.exp(-constants.heat_damage * state.heat)).astype(
            np.float32
        ),
    )


class _Crop:
    """State of every pixel's crop and soil between two days."""

    def __init__(self, land: Land, sowing: Float32[np.ndarray, "H W"], constants: CropConstants) -> None:
        self.land, self.sowing, self.constants = land, sowing, constants
        self.water = 0.85 * land.water_capacity
        zero = np.zeros_like(self.water)
        self.degree_days, self.biomass, self.heat, self.withered = zero.copy(), zero.copy(), zero.copy(), zero.copy()
        self.leaf_area = zero.copy()
        self.most_leaves = 4.6 * land.fertility**3

    def step(self, day: int, weather: Weather) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Advance one day; returns fAPAR, withered cover, soil water and thirst at its end."""
        c = self.constants
        mean = (weather.maximum[day] + weather.minimum[day]) / 2
        absorbed = 1 - np.exp(-c.extinction * self.leaf_area)
        fill = self.water / self.land.water_capacity
        supply = np.clip(fill / 0.5, 0, 1)  # transpiration falls once half of the water is gone
        possible = _evaporation(weather, day, mean) * (0.2 + 0.85 * absorbed)
        self.water = np.clip(self.water + weather.rain[day] - possible * supply, 0, self.land.water_capacity)
        sown = self.sowing <= FIRST_DAY + day
        self.degree_days += np.where(sown, np.clip(mean - c.base_temperature, 0, 22), 0)
        self._fill_grain(day, weather, absorbed, supply, mean)
        self._grow_leaves(mean, supply, sown)
        return absorbed, self.withered.copy(), fill, 1 - supply

    def _fill_grain(
        self, day: int, weather: Weather, absorbed: np.ndarray, supply: np.ndarray, mean: np.ndarray
    ) -> None:
        c = self.constants
        growing = (self.degree_days > 0) & (self.degree_days < c.flowering + c.ripeness)
        warmth = np.clip((mean - 8) / 12, 0, 1)
        light = c.light_use_efficiency * self.land.fertility * weather.light[day] * absorbed
        self.biomass += np.where(growing, light * supply * warmth, 0)
        filling = (self.degree_days > c.flowering) & growing
        canopy = weather.maximum[day] + c.dry_canopy_warming * (1 - supply)
        self.heat += np.where(filling, np.clip(canopy - c.heat_threshold, 0, None), 0)

    def _grow_leaves(self, mean: np.ndarray, supply: np.ndarray, sown: np.ndarray) -> None:
        c = self.constants
        age = self.degree_days / (c.flowering + c.ripeness)
        self.leaf_area = np.where(sown & (self.leaf_area == 0), 0.06, self.leaf_area)
        gain = 0.16 * self.leaf_area * (1 - self.leaf_area / self.most_leaves) * np.clip((mean - 8) / 14, 0, 1) * supply
        gain = np.where(age < 0.65, gain, 0)
        loss = (0.11 * np.clip((age - 0.78) / 0.22, 0, 1) + 0.022 * (1 - supply) * (age > 0.3)) * self.leaf_area
        self.leaf_area = np.clip(self.leaf_area + gain - loss, 0, None)
        self.withered = np.clip(self.withered + 0.28 * loss, 0, 0.8)


def _strength(spell: HotSpell, day: np.ndarray, shape: tuple[int, int]) -> Float32[np.ndarray, "D H W"]:
    """0..1: how far the spell is on at each day and place; half as strong 0.4 of the longer side away."""
    row, column = np.ogrid[0 : shape[0], 0 : shape[1]]
    distance2 = (row - spell.centre[0] * shape[0]) ** 2 + (column - spell.centre[1] * shape[1]) ** 2
    place = 2.0 ** (-distance2 / (0.40 * max(shape)) ** 2)
    time = np.exp(-(((day - spell.peak_day) / spell.spread_days) ** 2))
    return (time[:, None, None] * place).astype(np.float32)


def _rain(rng: np.random.Generator, shape: tuple[int, int], wet: np.ndarray) -> Float32[np.ndarray, "D H W"]:
    """mm per day: showers of a week share a pattern; a season as a whole is wetter here and drier there."""
    amount = np.where(wet, rng.gamma(3.0, 3.7, len(wet)), 0)
    weekly = [np.exp(0.5 * smooth_field(rng, shape, 10.0) - 0.125) for _ in range(len(wet) // 8 + 1)]
    seasonal = np.exp(0.14 * smooth_field(rng, shape, 20.0))
    return np.stack([amount[day] * weekly[day // 8] for day in range(len(wet))]) * seasonal


def _evaporation(weather: Weather, day: int, mean: np.ndarray) -> np.ndarray:
    """Hargreaves' reference evaporation in mm per day, with the sun above the atmosphere at 41 degrees north."""
    sun = 11.0 + 5.8 * np.sin(2 * np.pi * (FIRST_DAY + day - 80) / 365)
    swing = weather.maximum[day] - weather.minimum[day]
    return np.clip(0.0023 * (mean + 17.8) * np.sqrt(swing) * sun, 0, None)


def _composites(daily: Float32[np.ndarray, "D H W"]) -> Float32[np.ndarray, "T H W"]:
    return daily.reshape(-1, 8, *daily.shape[1:]).mean(axis=1).astype(np.float32)
