"""Mean average precision and cumulative matching, exactly as Market-1501 is evaluated, fast and in little memory.

For each query: gallery images of the same person by the same camera are junk and leave the list; the rest are ordered
by distance, ties by gallery number. With m_i = 1 where the i-th of them is the same person (Zheng et al., ICCV 2015):

    CMC_k = is any of m_1 .. m_k 1      AP = sum_i m_i (m_1 + .. + m_i) / i / sum(m)      INP = sum(m) / rank of the
    last

means over queries that have a match at all. AP is the rectangular sum of fast-reid, not the trapezoid of the first
Matlab tool. Gallery images with person -1 are junk for everyone; person 0 are distractors: always wrong, never junk.
INP is of Ye et al., TPAMI 2021.

All of these follow from the ranks of the matches, and a rank is a count of nearer images: nothing is sorted. Also here:
several query images as one, re-ranking by k-reciprocal neighbours (Zhong et al., CVPR 2017), query expansion.

Shapes: Q queries, G gallery images, D width of features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

JUNK = -1
_COUNTED = 128  # matches up to which counting beats sorting


@dataclass(frozen=True)
class Scores:
    """map, minp: means over queries. cmc: (max_rank,), share of queries matched within the first 1, 2, ... images.

    ap: (Q,), NaN for queries that have no match, which are left out of the means. num_queries: those that count.
    """

    map: float
    minp: float
    cmc: Float[np.ndarray, "R"]
    ap: Float[np.ndarray, "Q"]
    num_queries: int

    @property
    def rank1(self) -> float:
        """Share of queries whose nearest image is right."""
        return float(self.cmc[0])


@dataclass(frozen=True)
class Labels:
    """ids, cameras: (N,) integers of queries or gallery images."""

    ids: Int[np.ndarray, "N"]
    cameras: Int[np.ndarray, "N"]

    def __post_init__(self) -> None:
        for name in ("ids", "cameras"):
            values = np.asarray(getattr(self, name))
            if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
                raise ValueError(f"{name} must be integers (N,), got {values.dtype} {values.shape}")
            object.__setattr__(self, name, values)
        if len(self.ids) != len(self.cameras):
            raise ValueError(f"ids and cameras must be as many, got {len(self.ids)} and {len(self.cameras)}")


def evaluate_distances(
    distances: Float[np.ndarray, "Q G"], query: Labels, gallery: Labels, *, max_rank: int = 50
) -> Scores:
    """Scores of a matrix of distances, smaller is nearer.

    Raises ValueError if shapes do not fit, a distance is NaN, the gallery is empty, or no query has a match.
    """
    if distances.shape != (len(query.ids), len(gallery.ids)):
        raise ValueError(
            f"distances must be (queries, gallery) = ({len(query.ids)}, {len(gallery.ids)}), got {distances.shape}"
        )
    return _scores(iter(distances), query, gallery, max_rank)


def evaluate_features(
    query_features: Float[np.ndarray, "Q D"],
    gallery_features: Float[np.ndarray, "G D"],
    query: Labels,
    gallery: Labels,
    *,
    max_rank: int = 50,
    chunk: int = 256,
) -> Scores:
    """The same for cosine distances of features; of the matrix only `chunk` rows exist at a time.

    Raises ValueError as `evaluate_distances` does, and for features of zero length.
    """
    for name, features, labels in (("query", query_features, query), ("gallery", gallery_features, gallery)):
        if features.ndim != 2 or len(features) != len(labels.ids):
            raise ValueError(f"{name}_features must be ({len(labels.ids)}, D), got {features.shape}")
    unit = _unit(gallery_features).T

    def rows() -> Iterator[np.ndarray]:
        for start in range(0, len(query_features), chunk):
            yield from 1 - _unit(query_features[start : start + chunk]) @ unit

    return _scores(rows(), query, gallery, max_rank)


def _unit(features: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(features, axis=1, keepdims=True)
    if len(length) and not length.min() > 0:
        raise ValueError("features must have positive, finite length; one is zero or not a number")
    return features / length


def _scores(rows: Iterator[np.ndarray], query: Labels, gallery: Labels, max_rank: int) -> Scores:
    if not len(gallery.ids):
        raise ValueError("the gallery is empty: there is nothing to find")
    if max_rank < 1:
        raise ValueError(f"max_rank must be positive, got {max_rank}")
    ap, inp, first = (np.full(len(query.ids), np.nan) for _ in range(3))
    order = np.argsort(gallery.ids, kind="stable")
    sorted_ids = gallery.ids[order]
    junk = np.flatnonzero(gallery.ids == JUNK)
    for q, row in enumerate(rows):
        if np.isnan(row).any():
            raise ValueError(f"the distances of query {q} hold NaN: look at its features")
        left, right = np.searchsorted(sorted_ids, [query.ids[q], query.ids[q] + 1])
        same = order[left:right]  # ascending, as the sort was stable
        seen_here = gallery.cameras[same] == query.cameras[q]
        matches = same[~seen_here] if query.ids[q] != JUNK else same[:0]
        if len(matches):
            ranks = _ranks(row, matches, np.concatenate([same[seen_here], junk]))
            ap[q] = (np.arange(1, len(ranks) + 1) / ranks).sum() / len(ranks)
            inp[q], first[q] = len(ranks) / ranks[-1], ranks[0]
    kept = ~np.isnan(ap)
    if not kept.any():
        raise ValueError("no query has a match by another camera: check identities and cameras")
    found = np.bincount(np.minimum(first[kept], max_rank + 1).astype(int), minlength=max_rank + 2)
    cmc = np.cumsum(found[1 : max_rank + 1]) / kept.sum()
    return Scores(float(ap[kept].mean()), float(inp[kept].mean()), cmc, ap, int(kept.sum()))


def _ranks(row: np.ndarray, matches: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Ranks of the matches, from 1, ascending, in the row without the dropped ones; ties by number."""
    keep = np.ones(len(row), dtype=bool)
    keep[dropped] = False
    numbers = np.cumsum(keep) - 1  # of each gallery image in the list that is left
    left, places = row[keep], numbers[matches]
    if len(places) > _COUNTED:
        rank = np.empty(len(left), dtype=np.int64)
        rank[np.argsort(left, kind="stable")] = np.arange(1, len(left) + 1)
        return np.sort(rank[places])
    ranks = [
        np.count_nonzero(left < left[place]) + np.count_nonzero(left[:place] == left[place]) + 1 for place in places
    ]
    return np.sort(np.array(ranks))


def tie_averaged_ap(distances: Float[np.ndarray, "G"], matches: Int[np.ndarray, "G"]) -> float:
    """The mean AP over all orders of images at the same distance: what AP hides when a network maps many to one point.

    In a group of n images with r matches, after s images with R matches, the i-th is a match with probability r/n, and
    then (i - 1)(r - 1)/(n - 1) of those before it in the group are expected to be. NaN without a match.
    """
    matches = np.asarray(matches, dtype=bool)
    total, before, found = matches.sum(), 0, 0
    if not total:
        return float("nan")
    ap = 0.0
    for value in np.unique(distances):
        group = matches[distances == value]
        n, r = len(group), int(group.sum())
        i = np.arange(1, n + 1)
        inside = (i - 1) * (r - 1) / max(n - 1, 1)
        ap += float((r / n * (found + 1 + inside) / (before + i)).sum())
        before, found = before + n, found + r
    return ap / float(total)


def pool_queries(
    features: Float[np.ndarray, "N D"], labels: Labels, *, how: str = "mean"
) -> tuple[Float[np.ndarray, "Q D"], Labels]:
    """Multi-query: all images of a person by a camera become one query, by mean or maximum of their features."""
    if how not in ("mean", "max"):
        raise ValueError(f"how must be 'mean' or 'max', got {how!r}")
    pairs, group = np.unique(np.stack([labels.ids, labels.cameras], 1), axis=0, return_inverse=True)
    reduce = np.mean if how == "mean" else np.max
    pooled = np.stack([reduce(features[group.ravel() == g], axis=0) for g in range(len(pairs))])
    return pooled, Labels(pairs[:, 0], pairs[:, 1])


def expand_queries(
    query: Float[np.ndarray, "Q D"], gallery: Float[np.ndarray, "G D"], *, topk: int = 5
) -> Float[np.ndarray, "Q D"]:
    """Each query averaged with the topk gallery features nearest to it (all at unit length)."""
    if not 1 <= topk <= len(gallery):
        raise ValueError(f"topk must lie in [1, {len(gallery)}], the gallery's size, got {topk}")
    query, gallery = _unit(query), _unit(gallery)
    nearest = np.argpartition(-(query @ gallery.T), topk - 1, axis=1)[:, :topk]
    return _unit(query + gallery[nearest].sum(1))


def rerank(
    query: Float[np.ndarray, "Q D"],
    gallery: Float[np.ndarray, "G D"],
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
) -> Float[np.ndarray, "Q G"]:
    """Distances re-ranked by k-reciprocal neighbours (Zhong et al., CVPR 2017, eq. 5 to 12).

    weight: lambda, of the original distance against the Jaccard distance; 1 leaves the (squared, scaled) original.
    Takes (Q + G)^2 numbers of memory. Raises ValueError for k1 outside [1, Q + G) or k2 outside [1, k1].
    """
    every = _unit(np.concatenate([query, gallery])).astype(np.float32)
    if not 1 <= k1 < len(every) or not 1 <= k2 <= k1:
        raise ValueError(f"k1 must lie in [1, {len(every)}) and k2 in [1, k1], got {k1} and {k2}")
    original = np.maximum(2 - 2 * every @ every.T, 0)
    original /= original.max(axis=0, keepdims=True)
    order = np.argsort(original, axis=1, kind="stable")
    weights = _reciprocal_weights(original, order, k1)
    weights = np.stack([weights[order[i, :k2]].mean(0) for i in range(len(every))])
    jaccard = np.empty((len(query), len(every)), dtype=np.float32)
    for i in range(len(query)):
        shared = np.minimum(weights[i], weights).sum(1)
        jaccard[i] = 1 - shared / (2 - shared)  # rows of weights sum to 1
    return ((1 - weight) * jaccard + weight * original[: len(query)])[:, len(query) :]


def _reciprocal_weights(original: np.ndarray, order: np.ndarray, k1: int) -> np.ndarray:
    """Row i: exp(-d) over i's k-reciprocal neighbours, widened by those of neighbours that share two thirds, sum 1."""

    def reciprocal(i: int, k: int) -> np.ndarray:
        forward = order[i, : k + 1]
        return forward[(order[forward, : k + 1] == i).any(1)]

    weights = np.zeros_like(original)
    half = round(k1 / 2)
    near = [reciprocal(i, half) for i in range(len(original))]
    for i in range(len(original)):
        own = wide = reciprocal(i, k1)
        for candidate in own:
            theirs = near[candidate]
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                wide = np.union1d(wide, theirs)
        weights[i, wide] = np.exp(-original[i, wide])
        weights[i] /= weights[i].sum()
    return weights
