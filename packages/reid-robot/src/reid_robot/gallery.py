"""A gallery of known people: enrol, identify, follow changes, know strangers, save, load.

Each person is a handful of embeddings; a query belongs to the person with the nearest one, or to nobody if that is
farther than a threshold (open set). The threshold is a property of the network: `calibrate_threshold` sets it from
embeddings with known identities so that a stranger passes at a stated rate.

For robots that must re-recognise the person they accompany (Eisenbach et al., arXiv:2302.14574). Decided here: cosine
distance to the nearest stored embedding, not to a mean, since a person's front and back do not average; a full gallery
gives up the stored embedding that is nearest to another of the same person, so that what is kept stays different.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """When somebody counts as known, and how much is kept."""

    threshold: float = 0.3
    """Largest cosine distance to a known person, in (0, 2]."""
    margin: float = 0.0
    """The second nearest person must be this much farther, else the match is refused."""
    capacity: int = 16
    """Embeddings kept of each person."""
    update_below: float = 0.5
    """`observe` learns from matches nearer than this share of the threshold."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 2:
            raise ValueError(f"threshold must lie in (0, 2], a cosine distance, got {self.threshold}")
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {self.capacity}")
        if self.margin < 0 or not 0 <= self.update_below <= 1:
            raise ValueError(
                f"margin must not be negative and update_below in [0, 1], got {self.margin} and {self.update_below}"
            )


@dataclass(frozen=True)
class Match:
    """name: who it is, None for a stranger. distance: to the nearest known person, infinite if nobody is known.

    nearest: that person, even where too far. margin: how much farther the second nearest is, infinite without one.
    """

    name: str | None
    distance: float
    nearest: str | None
    margin: float


class Gallery:
    """Empty at first: everybody is a stranger until enrolled."""

    def __init__(self, config: GalleryConfig = GalleryConfig()) -> None:
        self.config = config
        self._people: dict[str, np.ndarray] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Who is known, in order of enrolment."""
        return tuple(self._people)

    def __len__(self) -> int:
        return len(self._people)

    def enrol(self, name: str, embeddings: Float[np.ndarray, "N D"]) -> None:
        """Adds embeddings to a person, who is new or known.

        Raises ValueError on an empty name, on no embedding, on another width than the gallery's, or on embeddings of
        zero length or with NaN.
        """
        if not name:
            raise ValueError("a person needs a name")
        unit = self._unit(embeddings)
        if not len(unit):
            raise ValueError(f"no embedding for '{name}': give at least one")
        kept = np.concatenate([self._people[name], unit]) if name in self._people else unit
        self._people[name] = _most_different(kept, self.config.capacity)

    def forget(self, name: str) -> None:
        """Takes a person out. KeyError, with who is known, for others."""
        if name not in self._people:
            raise KeyError(f"nobody called '{name}' is enrolled; known are {', '.join(self.names) or 'none'}")
        del self._people[name]

    def identify(self, embeddings: Float[np.ndarray, "N D"]) -> list[Match]:
        """A match for each. With an empty gallery everybody is a stranger at infinite distance."""
        unit = self._unit(embeddings)
        if not self._people:
            return [Match(None, math.inf, None, math.inf) for _ in unit]
        names = self.names
        every = np.concatenate([self._people[name] for name in names])
        starts = np.cumsum([0, *(len(self._people[name]) for name in names)])[:-1]
        distances = np.minimum.reduceat(1 - unit @ every.T, starts, axis=1)  # (N, people)
        return [self._match(row, names) for row in distances]

    def _match(self, row: np.ndarray, names: tuple[str, ...]) -> Match:
        order = np.argsort(row, kind="stable")
        nearest = float(row[order[0]])
        margin = float(row[order[1]]) - nearest if len(row) > 1 else math.inf
        known = nearest <= self.config.threshold and margin >= self.config.margin
        return Match(names[order[0]] if known else None, nearest, names[order[0]], margin)

    def observe(self, embedding: Float[np.ndarray, "D"]) -> Match:
        """Identifies one, and learns it if it is certain: changes of light and pose are followed, strangers are not."""
        match = self.identify(embedding[None])[0]
        if match.name is not None and match.distance < self.config.update_below * self.config.threshold:
            self.enrol(match.name, embedding[None])
        return match

    def _unit(self, embeddings: np.ndarray) -> np.ndarray:
        embeddings = np.asarray(embeddings, dtype=np.float32)
        if embeddings.ndim != 2:
            raise ValueError(f"embeddings must be (N, D), got {embeddings.shape}")
        width = next((len(kept[0]) for kept in self._people.values()), embeddings.shape[1])
        if embeddings.shape[1] != width:
            raise ValueError(f"embeddings must be {width} wide as the gallery's, got {embeddings.shape[1]}")
        length = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not (length > 0).all():
            raise ValueError("an embedding has no length or is not a number: was the crop empty?")
        return embeddings / length

    def save(self, path: Path) -> None:
        """Config, names and embeddings, to a safetensors file."""
        tensors = {str(i): np.ascontiguousarray(kept) for i, kept in enumerate(self._people.values())}
        tensors.setdefault("0", np.zeros((0, 1), np.float32))
        metadata = {"config": json.dumps(asdict(self.config)), "names": json.dumps(self.names)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Gallery":
        """What `save` wrote. FileNotFoundError; ValueError for other files."""
        if not path.exists():
            raise FileNotFoundError(f"no gallery at '{path}'")
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata()
            tensors = load_file(path)
            gallery = cls(GalleryConfig(**json.loads(metadata["config"])))
            gallery._people = {name: tensors[str(i)] for i, name in enumerate(json.loads(metadata["names"]))}
        except Exception as problem:
            raise ValueError(f"'{path}' is no gallery: {problem}") from problem
        return gallery


def _most_different(unit: np.ndarray, capacity: int) -> np.ndarray:
    while len(unit) > capacity:
        likeness = unit @ unit.T
        np.fill_diagonal(likeness, -np.inf)
        first, second = np.unravel_index(int(likeness.argmax()), likeness.shape)
        unit = np.delete(unit, min(first, second), axis=0)  # of the two the older
    return unit


def calibrate_threshold(
    embeddings: Float[np.ndarray, "N D"], ids: Int[np.ndarray, "N"], *, false_accept: float = 0.01
) -> float:
    """The largest distance at which at most this share of pairs of different people would be taken for one.

    Raises ValueError if there are fewer than two people, or the share does not lie in (0, 1).
    """
    if not 0 < false_accept < 1:
        raise ValueError(f"false_accept must lie in (0, 1), got {false_accept}")
    ids = np.asarray(ids)
    if len(np.unique(ids)) < 2:
        raise ValueError("a threshold needs embeddings of at least two people")
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    upper = np.triu(ids[:, None] != ids[None, :])
    impostors = np.sort((1 - unit @ unit.T)[upper])
    allowed = math.floor(false_accept * len(impostors))
    # just below the first impostor that is one too many
    return float(min(2.0, max(np.nextafter(impostors[allowed], -np.inf), 1e-6)))
