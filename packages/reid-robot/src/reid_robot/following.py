"""People followed through a video: detect, track, re-identify, draw; a table of boxes and frames per second.

What `apps/follow_person.py` runs. People who are enrolled in a gallery, from pictures or in an earlier video, are
called by their names; their tracks may then begin and end, and the name comes back. Re-identification: Eisenbach et
al., arXiv:2302.14574; tracker, gallery and detector as in their modules.

Decided here: a track is named once three of its embeddings in a row were nearest to the same enrolled person and within
the threshold; one frame does not name anybody, and two tracks of one frame never share a name (the nearer one has it).
"""

import csv
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from reid_robot.detection import VideoProblem
from reid_robot.gallery import Gallery
from reid_robot.tracking import Embed, Track, Tracker, TrackerConfig, cut_out

Detect = Callable[[int, np.ndarray], np.ndarray]
_COLOURS = ((230, 80, 60), (60, 160, 230), (70, 190, 90), (230, 180, 40), (170, 100, 220), (60, 200, 200),
            (240, 130, 180), (150, 150, 60), (120, 120, 240), (200, 120, 70))  # fmt: skip
_NAMED_AFTER = 3


@dataclass(frozen=True)
class Sighting:
    """A confirmed person in a frame. number: of the track. name: who it is, if enrolled. box: x, y, width, height."""

    frame: int
    number: int
    name: str | None
    box: tuple[float, float, float, float]


@dataclass
class Followed:
    """What came of a video. frames, seconds: read and worked on (detection to drawing). returned: people who were lost
    and recognised. stages: seconds of detecting, tracking with embedding, and drawing with writing.
    """

    frames: int = 0
    seconds: float = 0.0
    returned: int = 0
    sightings: list[Sighting] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=lambda: {"detect": 0.0, "track": 0.0, "draw": 0.0})

    @property
    def per_second(self) -> float:
        """Frames per second."""
        return self.frames / self.seconds if self.seconds else 0.0

    @property
    def people(self) -> int:
        """Different tracks seen."""
        return len({sighting.number for sighting in self.sightings})


def read_frames(path: Path, *, limit: int | None = None) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Frames of a video, RGB. VideoProblem if it is missing or nothing in it can be decoded."""
    if not path.exists():
        raise VideoProblem(f"no video at '{path}'")
    capture = cv2.VideoCapture(str(path))
    try:
        read = 0
        while limit is None or read < limit:
            worked, frame = capture.read()
            if not worked:
                break
            read += 1
            yield np.ascontiguousarray(frame[..., ::-1])
        if not read:
            raise VideoProblem(f"no frame of '{path}' can be decoded: convert it to MJPEG in .avi or H.264 in .mp4")
    finally:
        capture.release()


def frame_rate(path: Path) -> float:
    """Of a video, frames per second; 10 where the file does not say."""
    capture = cv2.VideoCapture(str(path))
    rate = float(capture.get(cv2.CAP_PROP_FPS))
    capture.release()
    return rate if 0 < rate < 1000 else 10.0


def follow(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    detect: Detect,
    *,
    embed: Embed | None = None,
    config: TrackerConfig = TrackerConfig(),  # noqa: B008 - frozen
    gallery: Gallery | None = None,
    out: Path | None = None,
    rate: float = 10.0,
    on_frame: Callable[[int], None] = lambda _: None,
) -> Followed:
    """Follows people through frames. detect: (frame number, frame) -> boxes (N, 4).

    embed: None for overlap alone. gallery: enrolled people, needs `embed`. out: annotated video (.avi or .mp4). A frame
    without people is a frame without boxes. Raises ValueError for a gallery without embedder, VideoProblem if `out`
    cannot be written.
    """
    if gallery is not None and embed is None:
        raise ValueError("a gallery is of use only with an embedder: people are told by their embeddings")
    tracker, naming, result = Tracker(config, embed=embed), _Naming(gallery), Followed()
    tracks: dict[int, Track] = {}
    writer = _Writer(out, rate)
    try:
        for number, frame in enumerate(frames):
            clock = [time.perf_counter()]
            boxes = detect(number, frame)
            clock.append(time.perf_counter())
            found = [(t, b) for t, b in zip(tracker.update(boxes, frame), boxes, strict=True) if t is not None]
            names = naming([track for track, _ in found])
            seen = [Sighting(number, t.number, names.get(t.number), _plain(b)) for t, b in found]
            tracks |= {track.number: track for track, _ in found}
            clock.append(time.perf_counter())
            writer(draw_sightings(frame, seen) if out is not None else frame)
            clock.append(time.perf_counter())
            for stage, before, after in zip(result.stages, clock, clock[1:], strict=False):
                result.stages[stage] += after - before
            result.seconds += clock[-1] - clock[0]
            result.frames += 1
            result.sightings += seen
            on_frame(number + 1)
    finally:
        writer.close()
    writer.keep()
    result.returned = sum(track.returned for track in tracks.values())
    return result


def _plain(box: np.ndarray) -> tuple[float, float, float, float]:
    x, y, w, h = (float(v) for v in box)
    return x, y, w, h


class _Naming:
    """Track number -> name, from what the gallery says of each new embedding."""

    def __init__(self, gallery: Gallery | None) -> None:
        self.gallery = gallery
        self.names: dict[int, str] = {}
        self.streaks: dict[int, tuple[str | None, int]] = {}

    def __call__(self, tracks: list[Track]) -> dict[int, str]:
        fresh = [track for track in tracks if track.looks]
        if self.gallery is None or not len(self.gallery) or not fresh:
            return {}
        matches = self.gallery.identify(np.stack([track.looks[-1] for track in fresh]))
        distance = {}
        for track, match in zip(fresh, matches, strict=True):
            before, length = self.streaks.get(track.number, (None, 0))
            length = length + 1 if match.name is not None and match.name == before else 1
            self.streaks[track.number] = (match.name, length)
            if match.name is not None and length >= _NAMED_AFTER:
                self.names[track.number] = match.name
            distance[track.number] = match.distance
        taken: dict[str, int] = {}
        for number in sorted(distance, key=lambda n: distance[n]):
            if number in self.names:
                taken.setdefault(self.names[number], number)
        return {number: name for name, number in taken.items()}


class _Writer:
    """A video under a temporary name, which it loses when it is whole."""

    def __init__(self, path: Path | None, rate: float) -> None:
        self.path, self.rate = path, rate
        self.part = None if path is None else path.with_name(f"part-{path.name}")
        self._writer: cv2.VideoWriter | None = None

    def __call__(self, frame: np.ndarray) -> None:
        if self.part is None or self.path is None:
            return
        if self._writer is None:
            codes = {".avi": "MJPG", ".mp4": "mp4v"}
            if self.path.suffix not in codes:
                raise VideoProblem(f"cannot write '{self.path}': the name must end in .avi or .mp4")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            code = cv2.VideoWriter.fourcc(*codes[self.path.suffix])
            self._writer = cv2.VideoWriter(str(self.part), code, self.rate, (frame.shape[1], frame.shape[0]))
            if not self._writer.isOpened():
                raise VideoProblem(f"OpenCV cannot write '{self.path}' here: try a name that ends in .avi")
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()

    def keep(self) -> None:
        if self.part is not None and self.path is not None and self._writer is not None:
            self.part.replace(self.path)


def draw_sightings(frame: UInt8[np.ndarray, "H W 3"], seen: Iterable[Sighting]) -> UInt8[np.ndarray, "H W 3"]:
    """A copy of the frame with a box and a label in the track's colour for each."""
    drawn = frame.copy()
    size = max(0.4, frame.shape[0] / 1100)
    for one in seen:
        colour = _COLOURS[one.number % len(_COLOURS)]
        x, y, w, h = (round(v) for v in one.box)
        cv2.rectangle(drawn, (x, y), (x + w, y + h), colour, 2 if one.name is None else 3)
        label = one.name or str(one.number)
        (wide, high), base = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
        top = y - high - base - 2 if y > high + base + 2 else y
        cv2.rectangle(drawn, (x, top), (x + wide + 4, top + high + base + 2), colour, -1)
        cv2.putText(
            drawn, label, (x + 2, top + high + 1), cv2.FONT_HERSHEY_SIMPLEX, size, (255, 255, 255), 1, cv2.LINE_AA
        )
    return drawn


def write_sightings(path: Path, sightings: Iterable[Sighting]) -> None:
    """CSV: frame, person, name, x, y, width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("frame", "person", "name", "x", "y", "width", "height"))
        for one in sightings:
            writer.writerow((one.frame, one.number, one.name or "", *(f"{v:.1f}" for v in one.box)))
    temporary.replace(path)


def enrol_pictures(gallery: Gallery, name: str, pictures: Iterable[Path], embed: Embed) -> None:
    """Adds a person to a gallery from files with their picture, cut out. VideoProblem for files that are no
    pictures.
    """
    crops = []
    for path in pictures:
        image = cv2.imread(str(path))
        if image is None:
            raise VideoProblem(f"cannot read '{path}' as a picture of {name}")
        crops.append(np.ascontiguousarray(image[..., ::-1]))
    if not crops:
        raise VideoProblem(f"no picture of {name}: give at least one")
    gallery.enrol(name, embed(crops))


def enrol_from_video(gallery: Gallery, name: str, frame: np.ndarray, box: Float[np.ndarray, "4"], embed: Embed) -> None:
    """Adds the person under a box of a frame. VideoProblem if the box lies outside the frame."""
    crop = cut_out(frame, np.asarray(box, dtype=float))
    if not crop.size:
        raise VideoProblem(f"the box {list(box)} of {name} lies outside the frame, {frame.shape[1]} x {frame.shape[0]}")
    gallery.enrol(name, embed([crop]))
