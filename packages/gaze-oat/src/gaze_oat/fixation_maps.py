"""NSS: how far a map of predicted fixations stands out, in standard deviations, where people looked.

Peters, Iyer, Itti, Koch, "Components of bottom-up gaze allocation in natural images", Vision Research 45, 2005; OAT's
evaluation takes the binary map of all sampled fixations of a trial (Fang et al., ECCV 2024, arXiv:2407.13335).

Decided here: a constant map has no standard deviation, so NSS is NaN there; the map's resolution is the caller's:
pixels as in OAT's evaluation, or grid cells (`width=cols, height=rows`), where single fixations can coincide.

Shapes: N points; H rows, W columns of the map.
"""

import numpy as np
from jaxtyping import Float

from gaze_oat.errors import ScanpathProblem


def fixation_map(
    points: Float[np.ndarray, "N 2"], *, width: int, height: int, binary: bool = True
) -> Float[np.ndarray, "H W"]:
    """Map of points (x, y): 1 where one fell (binary), or how many. ScanpathProblem for points outside."""
    column, row = _places(points, width, height)
    found = np.zeros((height, width))
    np.add.at(found, (row, column), 1.0)
    return np.minimum(found, 1.0) if binary else found


def nss(saliency: Float[np.ndarray, "H W"], points: Float[np.ndarray, "N 2"]) -> float:
    """Mean of the z-scored map at the points (x, y); 0 is chance, NaN for a constant map."""
    saliency = np.asarray(saliency, float)
    if saliency.ndim != 2 or not np.isfinite(saliency).all():
        raise ScanpathProblem(f"the map must be (H, W) and finite, got {saliency.shape}")
    column, row = _places(points, saliency.shape[1], saliency.shape[0])
    deviation = saliency.std()
    return float((saliency[row, column].mean() - saliency.mean()) / deviation) if deviation > 0 else float("nan")


def _places(points: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    points = np.asarray(points, float)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ScanpathProblem(f"points must be (N, 2) with at least one point, got {points.shape}")
    place = np.floor(points)
    if not np.isfinite(points).all() or (place < 0).any() or (place >= (width, height)).any():
        raise ScanpathProblem(f"points must lie in a map of {width} x {height}: leave out or move those that do not")
    column, row = place.astype(int).T
    return column, row
