"""Boxes of people, frame by frame, into tracks: by overlap alone, or by overlap and appearance.

Overlap: boxes move on at their recent speed, and are paired with the new ones so that the sum of intersections over
unions is largest (the scheme of SORT, Bewley et al., ICIP 2016, with a running mean in place of its Kalman filter). A
track without a box for more than a few frames is lost. Appearance: embeddings of a track go into a `Gallery`; a box
that no track claims by overlap is compared with the people who are missing, and takes up the track of the one that it
looks like, if that one can have walked there. Pairs by overlap weigh looks too, so that people who cross are not
exchanged, and crops that show two people teach nothing. Without an embedder the very same code is the overlap tracker.

The embeddings are those of Eisenbach et al. (arXiv:2302.14574), whose robot must re-recognise its user after losing
sight.

Boxes are (x, y, width, height) in pixels, top left corner first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

_HIDDEN = 0.3  # overlap of two boxes from which both crops show two people
_FAR = 10.0  # a cost that no pair has
Embed = Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """When a box goes on with a track."""

    min_overlap: float = 0.2
    """Smallest intersection over union between where a track is expected and a box."""
    patience: int = 10
    """Frames that a track may go without a box before it is lost."""
    confirm: int = 3
    """Boxes before a track counts as a person; detectors see ghosts."""
    memory: int = 150
    """Frames for which a lost person is remembered. Only with an embedder."""
    look: float = 0.25
    """Largest cosine distance at which a box is taken for a lost person."""
    weight: float = 0.5
    """How much of overlap a unit of cosine distance outweighs when tracks and boxes are paired."""
    veto: float = 0.4
    """Cosine distance from which a box that overlaps is not the person after all."""
    samples: int = 12
    """Embeddings kept of a track."""
    speed: float = 1.0
    """Body heights per frame that a lost person may have moved (a generous walk at 10 frames per second is 0.15)."""

    def __post_init__(self) -> None:
        if not 0 < self.min_overlap <= 1:
            raise ValueError(f"min_overlap must lie in (0, 1], got {self.min_overlap}")
        for name in ("confirm", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("patience", "memory"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.look <= 2 or self.speed <= 0:
            raise ValueError(f"look must lie in (0, 2] and speed be positive, got {self.look} and {self.speed}")
        if self.weight < 0 or not 0 < self.veto <= 2:
            raise ValueError(f"weight must not be negative and veto in (0, 2], got {self.weight} and {self.veto}")


@dataclass
class Track:
    """One person as far as the tracker knows. hits: boxes so far. misses: frames since the last.

    returned: how often appearance took it up again. looks: embeddings, unit norm, newest last.
    """

    number: int
    box: np.ndarray
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(4))
    hits: int = 1
    misses: int = 0
    returned: int = 0
    looks: list[np.ndarray] = field(default_factory=list)

    @property
    def expected(self) -> np.ndarray:
        """Where its box should be in the frame after the last box and the misses since."""
        return self.box + self.velocity * (self.misses + 1)


class Tracker:
    """Fed frame by frame with `update`. embed: pictures (RGB) -> (N, D); None for overlap alone."""

    def __init__(self, config: TrackerConfig = TrackerConfig(), *, embed: Embed | None = None) -> None:
        self.config, self.embed = config, embed
        self.active: list[Track] = []
        self.lost: list[Track] = []
        self._next = 1

    def update(self, boxes: Float[np.ndarray, "N 4"], frame: np.ndarray | None = None) -> list[Track | None]:
        """The track of each box, None while it is not confirmed. frame: (H, W, 3) RGB, needed with an embedder.

        Raises ValueError on boxes that are not (N, 4), not finite or without area, and if the frame is missing.
        """
        boxes = check_boxes(boxes)
        looks = self._looks(boxes, frame)
        owner: list[Track | None] = [None] * len(boxes)
        hidden = [bool((row > _HIDDEN).any()) for row in overlaps(boxes, boxes) - np.eye(len(boxes))]
        clear = [
            None if hidden[i] else look for i, look in enumerate(looks)
        ]  # of two people in one crop nothing is learned
        pairs = self._pair(boxes, looks)
        for track, i in pairs:
            self._go_on(track, boxes[i], clear[i])
            owner[i] = track
        claimed = {id(track) for track, _ in pairs}
        for track in self.active:
            track.misses += id(track) not in claimed
        for track in self.lost:
            track.misses += 1
        self._retire()
        free = [i for i in range(len(boxes)) if owner[i] is None]
        for track, i in self._recognise(free, boxes, clear):
            if track in self.lost:
                self.lost.remove(track)
                self.active.append(track)
            track.velocity = np.zeros(4)
            track.box, track.returned = boxes[i], track.returned + 1
            self._go_on(track, boxes[i], clear[i])
            owner[i] = track
        for i in free:
            if owner[i] is None:
                owner[i] = self._begin(boxes[i], clear[i])
        return [track if track is not None and track.hits >= self.config.confirm else None for track in owner]

    def _looks(self, boxes: np.ndarray, frame: np.ndarray | None) -> list[np.ndarray | None]:
        if self.embed is None or not len(boxes):
            return [None] * len(boxes)
        if frame is None:
            raise ValueError("a tracker with an embedder needs the frame that the boxes are of")
        crops = [cut_out(frame, box) for box in boxes]
        seen = [i for i, crop in enumerate(crops) if crop.size]
        found: list[np.ndarray | None] = [None] * len(boxes)
        if seen:
            for i, look in zip(seen, self.embed([crops[i] for i in seen]), strict=True):
                found[i] = look
        return found

    def _begin(self, box: np.ndarray, look: np.ndarray | None) -> Track:
        track = Track(self._next, box, looks=[] if look is None else [look])
        self._next += 1
        self.active.append(track)
        return track

    def _pair(self, boxes: np.ndarray, looks: list[np.ndarray | None]) -> list[tuple[Track, int]]:
        if not self.active or not len(boxes):
            return []
        overlap = overlaps(np.stack([track.expected for track in self.active]), boxes)
        score, refused = overlap.copy(), overlap < self.config.min_overlap
        for r, track in enumerate(self.active):
            for c in np.flatnonzero(~refused[r]):
                if (distance := _distance(track, looks[c])) is not None:
                    score[r, c] -= self.config.weight * distance
                    refused[r, c] = distance > self.config.veto
        score[refused] = -_FAR
        rows, columns = linear_sum_assignment(-score)
        return [(self.active[r], int(c)) for r, c in zip(rows, columns, strict=True) if not refused[r, c]]

    def _go_on(self, track: Track, box: np.ndarray, look: np.ndarray | None) -> None:
        steps = track.misses + 1
        if track.hits > 1 or track.misses == 0:
            track.velocity = 0.7 * track.velocity + 0.3 * (box - track.box) / steps
        track.box, track.misses, track.hits = box, 0, track.hits + 1
        if look is not None:
            track.looks = [*track.looks, look][-self.config.samples :]

    def _retire(self) -> None:
        """Lost are those without a box for too long; ghosts and people lost for too long are forgotten."""
        gone = [track for track in self.active if track.misses > self.config.patience]
        self.active = [track for track in self.active if track.misses <= self.config.patience]
        if self.embed is not None:
            self.lost += [track for track in gone if track.hits >= self.config.confirm and track.looks]
            self.lost = [track for track in self.lost if track.misses <= self.config.memory]

    def _recognise(self, free: list[int], boxes: np.ndarray, looks: list[np.ndarray | None]) -> list[tuple[Track, int]]:
        """Missing tracks and free boxes that look alike and are within reach, so that distances are smallest in sum."""
        missing = [t for t in (*self.lost, *self.active) if t.misses and t.hits >= self.config.confirm]
        if not free or not missing:
            return []
        cost = np.full((len(missing), len(free)), _FAR)
        for r, track in enumerate(missing):
            for c, i in enumerate(free):
                distance = _distance(track, looks[i])
                if distance is not None and distance <= self.config.look and self._in_reach(track, boxes[i]):
                    cost[r, c] = distance
        rows, columns = linear_sum_assignment(cost)
        return [(missing[r], free[c]) for r, c in zip(rows, columns, strict=True) if cost[r, c] < _FAR]

    def _in_reach(self, track: Track, box: np.ndarray) -> bool:
        moved = np.hypot(*(box[:2] + box[2:] / 2 - track.box[:2] - track.box[2:] / 2))
        return bool(moved <= self.config.speed * track.box[3] * (track.misses + 1))


def _distance(track: Track, look: np.ndarray | None) -> float | None:
    """Cosine distance to the nearest embedding of the track; None where one of the two has none."""
    if look is None or not track.looks:
        return None
    return 1 - float(np.max(np.stack(track.looks) @ look))


def check_boxes(boxes: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 4"]:
    """The boxes as float64. ValueError unless they are (N, 4), finite, and have an area."""
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.size == 0:
        return boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (N, 4): x, y, width, height; got {boxes.shape}")
    bad = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] <= 0).any(1)
    if bad.any():
        raise ValueError(f"box {int(bad.argmax())} has no area or is not finite: {boxes[bad.argmax()].tolist()}")
    return boxes


def overlaps(first: Float[np.ndarray, "N 4"], second: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "N M"]:
    """Intersection over union of every pair."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum((first[:, :2] + first[:, 2:])[:, None], (second[:, :2] + second[:, 2:])[None])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = first[:, 2:].prod(1)[:, None] + second[:, 2:].prod(1)[None]
    return shared / np.maximum(areas - shared, 1e-9)


def cut_out(frame: np.ndarray, box: Float[np.ndarray, "4"]) -> np.ndarray:
    """The part of the frame under the box; empty if it lies outside."""
    height, width = frame.shape[:2]
    x0, y0 = (max(0, round(float(v))) for v in box[:2])
    x1, y1 = min(width, round(float(box[0] + box[2]))), min(height, round(float(box[1] + box[3])))
    return frame[y0:y1, x0:x1] if x1 > x0 and y1 > y0 else frame[:0, :0]
