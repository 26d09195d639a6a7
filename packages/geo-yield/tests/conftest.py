"""Rows with something to learn, for the tests of training, checkpoints and Lightning."""

import numpy as np
import pytest

from geo_yield.histograms import HistogramLayout, YieldTensor
from geo_yield.samples import Samples


def _bumps(count, *, seed=0, bands=3, steps=32, bins=32, years=(2003, 2013)):
    """Mean bin 6 + 18 A exp(-((t - 16) / 8)^2) of 32, A uniform; yield 20 + 30 A with noise of deviation 1."""
    rng = np.random.default_rng(seed)
    amplitude = rng.uniform(0, 1, count)
    season = np.exp(-(((np.arange(steps) - steps / 2) / (steps / 4)) ** 2))
    centre = (6 + 18 * amplitude[:, None] * season) * bins / 32
    bump = np.exp(-0.5 * ((np.arange(bins) - centre[..., None]) / (bins / 16)) ** 2)
    image = np.repeat((bump / bump.sum(-1, keepdims=True))[:, None], bands, axis=1)
    target = (20 + 30 * amplitude + rng.normal(0, 1, count)).astype(np.float32)
    layout = HistogramLayout(
        sensor="modis",
        bands=tuple(f"b{band:02d}" for band in range(bands)),
        doy=tuple(49 + 8 * step for step in range(steps)),
        edges=(tuple(np.linspace(1, 4999, bins + 1).tolist()),) * bands,
    )
    tensor = YieldTensor(
        layout=layout,
        image=image.astype(np.float32),
        region_id=np.array([f"{19001 + i}" for i in range(count)]),
        year=rng.integers(*years, count).astype(np.int16),
        lon=rng.uniform(-97, -80, count).astype(np.float32),
        lat=rng.uniform(36, 48, count).astype(np.float32),
        valid_count=np.full((count, bands, steps), 50, np.int32),
        pixel_count=np.full(count, 60, np.int32),
    )
    history = (target - rng.normal(0, 3, count)).astype(np.float32)
    history[::7] = np.nan
    return Samples(inputs=tensor, target=target, history=history, trend=history.copy(), unit="bu/acre", crop="soybean")


@pytest.fixture
def bumps():
    """A function (count, *, seed, bands, steps, bins, years) that makes seeded samples."""
    return _bumps
