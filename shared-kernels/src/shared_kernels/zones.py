"""Histograms of raster values per zone: the counting behind every county or field statistic.

Integers only, so the result is exact, does not depend on the order of pixels, and the counts of the tiles of a region
add up to the counts of the region bit by bit, in whatever way it was cut.

The bins are those of `numpy.histogram` with explicit edges: [e0, e1), [e1, e2), ..., the last one closed. Decisions:
- The value's bin is found first and joined with its zone to one int32 key, so that a single `bincount` serves all
  zones; a mask per zone would read the tile once for each.
- A dtype of 16 bits has 65,536 values: their bins are found once per band and looked up, over ten times faster than
  searching the edges for each pixel. Wider integers that hold only such values (DN kept as int64) are narrowed first.
- The upper 16 bits of a float32 settle its bin too, up to the edges that lie among the values that share them: rarely
  more than one, so a lookup and a comparison or two do.
- Pixels pass through in chunks that stay in the cache. Sorting the pixels of a grid by zone beforehand was not worth an
  object to carry around: finding the zone's counter is a fifth of the time.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float32, Int, Int64, Shaped
from torch import Tensor

_CHUNK = 1 << 18
_WORTH_A_TABLE = 1 << 15  # pixels; for fewer, building it costs more than it saves
_SIXTEEN_BITS = (torch.int16, torch.uint16, torch.float16, torch.bfloat16)


def zonal_histogram(
    values: Shaped[Tensor, "C H W"],
    labels: Int[Tensor, "H W"],
    edges: Shaped[Tensor, "C K+1"],
    *,
    num_zones: int,
    valid: Bool[Tensor, "C H W"] | Bool[Tensor, "H W"] | None = None,
) -> Int64[Tensor, "Z C K"]:
    """How many pixels of each zone fall into each bin of each band.

    `labels` says whose a pixel is: 0 nobody's, i + 1 zone i. Zones without pixels count 0. `edges` increase strictly,
    infinite ones are allowed; values outside, NaN, and pixels that are not `valid` count nowhere. Values may be of any
    integer or floating dtype, and are compared with the edges in float64: exact, but for integers beyond 2^53.

    Raises TypeError on values that have no order (bool, complex) and on labels or a mask of the wrong dtype; ValueError
    if shapes disagree, edges do not increase, or a label lies outside 0..num_zones.
    """
    edges = torch.as_tensor(edges, device=values.device).to(torch.float64)
    _check(values, labels, edges, num_zones, valid)
    C, bins = values.shape[0], edges.shape[1] + 1  # one more on each side for what lies outside
    zone = labels.reshape(-1).to(torch.int32)
    counts = torch.zeros((C, num_zones + 1, bins), dtype=torch.int64, device=values.device)
    for band in range(C):
        keep = None if valid is None else (valid if valid.ndim == 2 else valid[band]).reshape(-1)
        pixels = _narrowed(values[band].reshape(-1))
        counts[band] = _count(pixels, zone, keep, edges[band], num_zones + 1)
    return counts[:, 1:, 1:-1].transpose(0, 1).contiguous()


def _count(
    pixels: Shaped[Tensor, "P"],
    zone: Int[Tensor, "P"],
    keep: Bool[Tensor, "P"] | None,
    edges: Shaped[Tensor, "K+1"],
    zones: int,
) -> Int64[Tensor, "zones K+2"]:
    bin_of = _bin_finder(pixels, edges)
    bins = len(edges) + 1
    counts = torch.zeros(zones * bins, dtype=torch.int64, device=pixels.device)
    # a GPU takes the band whole; with many zones, clearing and adding the counters must not outweigh the pixels
    step = max(_CHUNK, 4 * len(counts)) if pixels.device.type == "cpu" else max(len(pixels), 1)
    for start in range(0, len(pixels), step):
        part = slice(start, start + step)
        key = bin_of(pixels[part]).add_(zone[part], alpha=bins)
        if keep is not None:
            key.mul_(keep[part])  # key 0 is below the first edge of nobody's zone
        counts += torch.bincount(key, minlength=len(counts))
    return counts.reshape(zones, bins)


def _bin_finder(pixels: Shaped[Tensor, "P"], edges: Shaped[Tensor, "K+1"]) -> Callable[[Tensor], Int[Tensor, "P"]]:
    """Pixels to bins: 0 below all edges, 1..K inside, K + 1 above or NaN."""
    if len(pixels) >= _WORTH_A_TABLE and pixels.dtype in _SIXTEEN_BITS:
        return partial(_look_up, table=_search(_patterns(edges).view(pixels.dtype), edges))
    if len(pixels) >= _WORTH_A_TABLE and pixels.dtype == torch.float32 and bool(edges.isfinite().all()):
        low = _patterns(edges).to(torch.int32) << 16
        ends = torch.stack([low, low | 0xFFFF]).view(torch.float32)
        first, last = _search(ends, edges)
        last = torch.where(ends[1].isnan(), first, last)  # infinity shares its bits with some NaN, and both lie outside
        steps = int((last - first).abs().max())
        table = torch.minimum(first, last)
        return partial(_look_up_float32, table=table, thresholds=_thresholds(edges), steps=steps)
    return partial(_search, edges=edges)


def _patterns(like: Tensor) -> Int[Tensor, "65536"]:
    """All values of 16 bits, by their value as int16."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=like.device).to(torch.int16)


def _search(pixels: Tensor, edges: Shaped[Tensor, "K+1"]) -> Int[Tensor, "P"]:
    exact = pixels.to(torch.float64)
    bins = torch.bucketize(exact, edges, right=True, out_int32=True)
    return bins.sub_((exact == edges[-1]).int())  # the last edge itself belongs to bin K


def _look_up(pixels: Tensor, table: Int[Tensor, "65536"]) -> Int[Tensor, "P"]:
    # torch indexes several times faster by int32 than by int64, and not at all by int16
    return table.index_select(0, pixels.view(torch.int16).to(torch.int32).add_(1 << 15))


def _look_up_float32(
    pixels: Tensor, table: Int[Tensor, "65536"], thresholds: Float32[Tensor, "K+2"], steps: int
) -> Int[Tensor, "P"]:
    bins = table.index_select(0, (pixels.view(torch.int32) >> 16).add_(1 << 15))
    for _ in range(steps):
        bins.add_((pixels >= thresholds.index_select(0, bins)).int())
    return bins


def _thresholds(edges: Shaped[Tensor, "K+1"]) -> Float32[Tensor, "K+2"]:
    """What leads from each bin to the next: the least float32 of bins 1, 2, ..., K + 1, then NaN, which none passes."""
    near = edges.to(torch.float32)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    least = torch.where(near.to(torch.float64) < edges, above, near)
    least[-1] = near[-1] if near[-1].to(torch.float64) > edges[-1] else above[-1]  # the last edge is still in bin K
    return torch.cat([least, least.new_full((1,), torch.nan)])


def _narrowed(pixels: Shaped[Tensor, "P"]) -> Shaped[Tensor, "P"]:
    """Integers in 16 bits where their values allow it; everything else as it is."""
    if pixels.is_floating_point() or pixels.dtype in _SIXTEEN_BITS or len(pixels) < _WORTH_A_TABLE:
        return pixels
    if pixels.dtype in (torch.int8, torch.uint8):
        return pixels.to(torch.int16)
    if pixels.dtype not in (torch.int32, torch.int64):  # torch finds no minimum of unsigned 32 and 64 bits
        return pixels
    low, high = (int(end) for end in pixels.aminmax())
    fitting = (d for d in (torch.int16, torch.uint16) if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max)
    return pixels.to(next(fitting, pixels.dtype))


def _check(values: Tensor, labels: Tensor, edges: Tensor, num_zones: int, valid: Tensor | None) -> None:
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"values must be integer or floating, got {values.dtype}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if values.ndim != 3 or labels.shape != values.shape[1:]:
        raise ValueError(
            f"values must be (C, H, W) and labels (H, W), got {tuple(values.shape)} and {tuple(labels.shape)}"
        )
    if edges.ndim != 2 or edges.shape[0] != values.shape[0] or edges.shape[1] < 2:
        raise ValueError(f"edges must be ({values.shape[0]}, K + 1) with K at least 1, got {tuple(edges.shape)}")
    if not bool((edges[:, 1:] > edges[:, :-1]).all()):  # so written, NaN is refused too
        raise ValueError("edges must increase strictly along every band")
    if num_zones < 0 or (num_zones + 1) * (edges.shape[1] + 1) >= 1 << 31:
        raise ValueError(f"num_zones must be at least 0 and num_zones x bins below 2^31, got {num_zones} zones")
    low, high = (int(end) for end in labels.aminmax()) if labels.numel() else (0, 0)
    if low < 0 or high > num_zones:
        raise ValueError(f"labels must lie in 0..{num_zones} (0: no zone, i + 1: zone i), got {low}..{high}")
    if valid is not None and valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
    if valid is not None and valid.shape not in (values.shape, labels.shape):
        raise ValueError(
            f"valid must be {tuple(values.shape)} or {tuple(labels.shape)}, like values or labels, "
            f"got {tuple(valid.shape)}"
        )
