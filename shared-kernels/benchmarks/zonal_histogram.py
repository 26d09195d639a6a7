"""zonal_histogram against what people write: a mask per region, and one bincount over searched bins."""

import numpy as np
import torch

from shared_kernels import zonal_histogram

CLAIM = "zonal_histogram counts a 2400 x 2400 tile for all regions in one pass, at over 100 million pixels per second."
SWEEP = {"side": (240, 2400), "regions": (100,), "values": ("int16", "float32")}
BASELINE = "numpy, a mask per region"
TARGET = 10
TARGET_RATE = 100e6
TARGET_AT = {"side": (2400,)}
DEVICES = ("cpu",)


def make(side: int, regions: int, values: str):
    """Square regions with wavy borders; reflectance as MODIS stores it (x 10,000), 32 bins."""
    across = int(regions**0.5)
    row = torch.arange(side) * across // side
    wave = (torch.arange(side) + (8 * torch.sin(torch.arange(side) / 20)).long()).clamp(0, side - 1) * across // side
    labels = (row[:, None] * across + wave[None, :] + 1).to(torch.int32)
    pixels = (torch.randn(1, side, side) * 1500 + 3000).clamp(-100, 16_000).to(torch.int16)
    edges = torch.linspace(0, 9300, 33, dtype=torch.float64)
    if values == "float32":
        pixels, edges = pixels.to(torch.float32) / 10_000, edges / 10_000
    return pixels, labels, edges[None], regions


def by_masks(inputs):
    pixels, labels, edges, regions = (x.numpy() if torch.is_tensor(x) else x for x in inputs)
    return np.stack([np.histogram(pixels[0][labels == zone + 1], bins=edges[0])[0] for zone in range(regions)])


def by_bincount(inputs):
    pixels, labels, edges, regions = (x.numpy() if torch.is_tensor(x) else x for x in inputs)
    bins = np.searchsorted(edges[0], pixels[0].ravel(), side="right")
    bins[pixels[0].ravel() == edges[0, -1]] -= 1
    key = labels.ravel().astype(np.int64) * (edges.shape[1] + 1) + bins
    counts = np.bincount(key, minlength=(regions + 1) * (edges.shape[1] + 1))
    return counts.reshape(regions + 1, -1)[1:, 1:-1]


RIVALS = {
    "numpy, a mask per region": by_masks,
    "numpy, searchsorted and bincount": by_bincount,
    "ours": lambda s: zonal_histogram(s[0], s[1], s[2], num_zones=s[3])[:, 0].numpy(),
}


def check(out):
    for name, counts in out.items():
        assert np.array_equal(counts, out[BASELINE]), name
    assert (out["ours"].sum(axis=1) > 0).all()


def work(inputs):
    return inputs[0].numel(), "pixels"
