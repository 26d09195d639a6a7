"""Which documents to keep: the highest scores of each domain (section 3.1 of the paper, the top 20 %).

Scores of different domains (web, textbooks, code, mathematics) are not comparable, so each domain keeps its own share
of documents. One machine sorts a domain exactly; a corpus that fits none has its scores counted in bins, counts of
parts are added, and a threshold is read from the sum.

Decided here: the share is of documents, not of tokens, and of those that have a score; of equal scores the longer
document is kept, then the earlier one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

_BINS = 1_000_000
_LOWEST, _HIGHEST = -2.0, 4.0  # of ln(1 + score), the logarithm of the ratio of losses


def num_kept(num_scored: int, share: float) -> int:
    """Documents that a domain keeps of those with a score: the share, rounded. ValueError outside (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"the share to keep must lie in (0, 1], got {share}")
    return round(share * num_scored)


def select_documents(
    score: Float[np.ndarray, "n"],
    tokens: Int[np.ndarray, "n"],
    domain: Sequence[str] | np.ndarray,
    *,
    share: float = 0.2,
) -> Bool[np.ndarray, "n"]:
    """Marks the best `share` of each domain; NaN scores are never kept. ValueError if lengths differ."""
    domain = np.asarray(domain)
    if not score.shape == tokens.shape == domain.shape:
        raise ValueError(f"score, tokens and domain must be as many, got {len(score)}, {len(tokens)}, {len(domain)}")
    kept = np.zeros(len(score), dtype=bool)
    for name in np.unique(domain):
        members = np.flatnonzero((domain == name) & ~np.isnan(score))
        order = np.lexsort((members, -tokens[members], -score[members]))
        kept[members[order[: num_kept(len(members), share)]]] = True
    return kept


@dataclass
class ScoreHistogram:
    """Counts of scores in a million bins; those of parts of a corpus add up. Bins are equal in ln(1 + score)."""

    counts: Int[np.ndarray, "bins"] = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))

    def add(self, score: Float[np.ndarray, "n"]) -> None:
        """Counts scores; NaN does not count."""
        self.counts += np.bincount(_bins(score[~np.isnan(score)]), minlength=_BINS)

    def merge(self, other: "ScoreHistogram") -> None:
        """Adds the counts of another part."""
        self.counts += other.counts

    def threshold(self, share: float) -> float:
        """Scores from here on are kept: the edge of a bin, chosen so that what is kept is closest to the share.

        Infinite where nothing is to be kept.
        """
        first = self._first_bin(share)
        return math.inf if first == _BINS else math.expm1(_LOWEST + first * (_HIGHEST - _LOWEST) / _BINS)

    def keeps(self, score: Float[np.ndarray, "n"], share: float) -> Bool[np.ndarray, "n"]:
        """Marks the scores of the kept bins."""
        return ~np.isnan(score) & (_bins(np.nan_to_num(score, nan=-1.0)) >= self._first_bin(share))

    def coarse(self, bars: int = 80) -> tuple[Float[np.ndarray, "bars+1"], Int[np.ndarray, "bars"]]:
        """Edges and counts for a picture, over the range that scores occupy."""
        occupied = np.flatnonzero(self.counts)
        first, last = (occupied[0], occupied[-1] + 1) if len(occupied) else (0, 1)
        marks = np.unique(np.linspace(first, last, bars + 1).astype(np.int64))
        counts = np.add.reduceat(self.counts, marks[:-1]) if len(occupied) else np.zeros(1, dtype=np.int64)
        if len(occupied):
            counts[-1] = self.counts[marks[-2] : marks[-1]].sum()
        return np.expm1(_LOWEST + marks * (_HIGHEST - _LOWEST) / _BINS), counts

    def _first_bin(self, share: float) -> int:
        wanted = num_kept(int(self.counts.sum()), share)
        if wanted == 0:
            return _BINS
        from_here_on = np.cumsum(self.counts[::-1])[::-1]
        occupied = np.flatnonzero(self.counts)
        return int(occupied[np.argmin(np.abs(from_here_on[occupied] - wanted))])


def _bins(score: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    with np.errstate(divide="ignore"):
        places = (np.log1p(np.maximum(score, -1.0)) - _LOWEST) / (_HIGHEST - _LOWEST) * _BINS
    return np.clip(places, 0, _BINS - 1).astype(np.int64)
