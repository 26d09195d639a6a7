"""Scanpaths and the scenes they were looked at in: a small data model, checked, as JSON and CSV.

The JSON has COCO's tables, `images` and `annotations` (boxes as x, y, width, height), and a third, `scanpaths`, whose
records carry COCO-Search18's names: X, Y, T (durations, milliseconds), subject. The CSV has one row a fixation. Both
are written to a temporary name and renamed.

Decided here: object ids count from 0 in the order of a scene's boxes; a path's objects, where they are not given,
follow from its points by `Layout.object_at`, and its points, where they are not given, are the objects' centres;
fixations outside the image are refused, not moved (`drop_outside=True` leaves them out and says how many in the log);
nothing empty is accepted.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from gaze_oat.errors import ScanpathProblem
from gaze_oat.layouts import Layout

log = logging.getLogger(__name__)
COLUMNS = ("scene", "subject", "index", "x", "y", "object", "duration", "target", "width", "height")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """An image somebody searched."""

    name: str
    """What scanpaths call it by."""
    width: float
    """Pixels."""
    height: float
    """Pixels."""
    target: int | None = None
    """Object that was searched for, or None in free viewing."""
    layout: Layout | None = None
    """Where the objects are; None if only fixation points are known."""
    group: str = ""
    """What belongs together in a split, such as the target's category."""

    def __post_init__(self) -> None:
        if not (self.width > 0 and self.height > 0):
            raise ScanpathProblem(f"scene '{self.name}' is {self.width} x {self.height} pixels: both must be positive")
        if self.target is not None and self.layout is not None and not 0 <= self.target < len(self.layout):
            raise ScanpathProblem(
                f"scene '{self.name}' has target {self.target}, but its objects are 0 to {len(self.layout) - 1}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Scanpath:
    """One person's fixations on one scene, in order."""

    scene: str
    """Name of the scene."""
    subject: str
    """Who looked, or which sample of a model."""
    points: Float[np.ndarray, "n 2"]
    """x and y of each fixation, pixels."""
    objects: Int[np.ndarray, "n"] | None = None
    """Object that each fixation fell on."""
    durations: Float[np.ndarray, "n"] | None = None
    """Milliseconds."""

    def __post_init__(self) -> None:
        where = f"scanpath of '{self.subject}' on '{self.scene}'"
        if self.points.ndim != 2 or self.points.shape[1:] != (2,) or len(self.points) == 0:
            raise ScanpathProblem(
                f"{where} has points of shape {self.points.shape}: give (n, 2) with at least one fixation"
            )
        if not np.isfinite(self.points).all():
            raise ScanpathProblem(f"{where} has a fixation that is not a finite number: leave it out")
        for name, values in (("objects", self.objects), ("durations", self.durations)):
            if values is not None and values.shape != (len(self.points),):
                raise ScanpathProblem(f"{where} has {len(self.points)} fixations but {name} of shape {values.shape}")
        if self.durations is not None and not (self.durations >= 0).all():
            raise ScanpathProblem(
                f"{where} has a duration that is negative or not a number: durations are milliseconds"
            )

    def __len__(self) -> int:
        return len(self.points)


class ScanpathData:
    """Scenes and the scanpaths on them, checked against each other; ScanpathProblem where they disagree."""

    def __init__(self, scenes: Iterable[Scene], scanpaths: Iterable[Scanpath], *, drop_outside: bool = False) -> None:
        self.scenes: dict[str, Scene] = {}
        for scene in scenes:
            if scene.name in self.scenes:
                raise ScanpathProblem(f"two scenes are called '{scene.name}': names must differ")
            self.scenes[scene.name] = scene
        paths = [_checked(path, self.scenes, drop_outside) for path in scanpaths]
        self.scanpaths: list[Scanpath] = [path for path in paths if path is not None]
        if not self.scanpaths:
            raise ScanpathProblem("no scanpath was given: a data set needs at least one")

    def __len__(self) -> int:
        return len(self.scanpaths)

    def __iter__(self) -> Iterator[Scanpath]:
        return iter(self.scanpaths)

    @property
    def subjects(self) -> list[str]:
        """Everybody who looked, sorted."""
        return sorted({path.subject for path in self.scanpaths})

    def on_scene(self, name: str) -> list[Scanpath]:
        """All paths on one scene, in their order."""
        return [path for path in self.scanpaths if path.scene == name]

    def choose(self, *, scenes: Iterable[str] | None = None, subjects: Iterable[str] | None = None) -> "ScanpathData":
        """The part on these scenes and of these subjects; ScanpathProblem for a name that is not there."""
        names = list(self.scenes) if scenes is None else list(scenes)
        people = self.subjects if subjects is None else list(subjects)
        for kind, asked, known in (("scene", names, self.scenes), ("observer", people, self.subjects)):
            unknown = [name for name in asked if name not in known]
            if unknown:
                shown = ", ".join(list(known)[:8])
                raise ScanpathProblem(f"unknown {kind} '{unknown[0]}': there are {len(known)}, such as {shown}")
        paths = [path for path in self.scanpaths if path.scene in set(names) and path.subject in set(people)]
        return ScanpathData([self.scenes[name] for name in names], paths)

    def without_outliers(self, deviations: float = 3.0) -> "ScanpathData":
        """Without paths whose length is further than so many standard deviations from the mean (the paper: 3)."""
        lengths = np.array([len(path) for path in self.scanpaths])
        kept = np.abs(lengths - lengths.mean()) <= deviations * lengths.std()
        return ScanpathData(self.scenes.values(), [p for p, keep in zip(self.scanpaths, kept, strict=True) if keep])


def _checked(path: Scanpath, scenes: Mapping[str, Scene], drop_outside: bool) -> Scanpath | None:
    scene = scenes.get(path.scene)
    if scene is None:
        shown = ", ".join(list(scenes)[:8]) or "none"
        raise ScanpathProblem(f"scanpath of '{path.subject}' is on unknown scene '{path.scene}' (scenes: {shown})")
    outside = (path.points < 0).any(1) | (path.points >= (scene.width, scene.height)).any(1)
    if outside.any() and not drop_outside:
        first = int(outside.argmax())
        raise ScanpathProblem(
            f"fixation {first} of '{path.subject}' on '{path.scene}' is at {path.points[first].tolist()}, "
            f"outside the image of {scene.width:g} x {scene.height:g} pixels: "
            "correct it, or leave such fixations out with drop_outside=True"
        )
    if outside.any():
        log.info("left out %d fixations of '%s' outside '%s'", outside.sum(), path.subject, path.scene)
        if outside.all():
            return None
        kept: dict[str, Any] = {name: getattr(path, name) for name in ("points", "objects", "durations")}
        parts: Any = {name: None if part is None else part[~outside] for name, part in kept.items()}
        path = replace(path, **parts)
    if path.objects is None:
        return path if scene.layout is None else replace(path, objects=scene.layout.object_at(path.points))
    most = np.inf if scene.layout is None else len(scene.layout)
    if (path.objects < 0).any() or (path.objects >= most).any():
        raise ScanpathProblem(
            f"'{path.subject}' on '{path.scene}' looks at object {path.objects.max()}; there are 0 to {most - 1:g}"
        )
    return path


def path_of_objects(scene: Scene, subject: str, objects: Sequence[int] | Int[np.ndarray, "n"]) -> Scanpath:
    """A scanpath from object ids alone: its points are the centres of their boxes."""
    if scene.layout is None:
        raise ScanpathProblem(f"scene '{scene.name}' has no layout, so objects have no place: give it boxes or a grid")
    ids = np.asarray(objects, int).reshape(-1)
    if len(ids) == 0 or ids.min() < 0 or ids.max() >= len(scene.layout):
        raise ScanpathProblem(
            f"objects of '{scene.name}' are 0 to {len(scene.layout) - 1} and at least one, got {ids.tolist()}"
        )
    return Scanpath(scene=scene.name, subject=subject, points=scene.layout.centres[ids], objects=ids)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: written beside the file and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def read_json_file(path: Path) -> Any:
    """A JSON document; ScanpathProblem that says where it breaks."""
    if not path.is_file():
        raise ScanpathProblem(f"no file at '{path}': give a JSON file")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ScanpathProblem(f"'{path}' is no JSON ({problem})") from None


def write_json(data: ScanpathData, path: Path) -> None:
    """`images`, `annotations` and `scanpaths` in one COCO-like document."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for scene in data.scenes.values():
        record: dict[str, Any] = {"id": scene.name, "width": scene.width, "height": scene.height, "group": scene.group}
        record["target"] = scene.target
        if scene.layout is not None:
            record |= {"rows": scene.layout.rows, "cols": scene.layout.cols}
            for number, (box, cell) in enumerate(zip(scene.layout.boxes, scene.layout.cells, strict=True)):
                x0, y0, x1, y1 = box.tolist()
                annotations.append({
                    "id": len(annotations), "image_id": scene.name, "object": number,
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "cell": cell.tolist(),
                })  # fmt: skip
        images.append(record)
    paths = [
        {
            "image_id": path.scene,
            "subject": path.subject,
            "X": path.points[:, 0].tolist(),
            "Y": path.points[:, 1].tolist(),
        }
        | ({} if path.objects is None else {"objects": path.objects.tolist()})
        | ({} if path.durations is None else {"T": path.durations.tolist()})
        for path in data
    ]
    write_text(path, json.dumps({"images": images, "annotations": annotations, "scanpaths": paths}))


def read_json(path: Path, *, drop_outside: bool = False) -> ScanpathData:
    """What `write_json` writes, or a COCO file with `scanpaths`. Rows, cols, cells, T and objects may be missing."""
    document = read_json_file(path)
    missing = [name for name in ("images", "scanpaths") if not isinstance(document, dict) or name not in document]
    if missing:
        raise ScanpathProblem(f"'{path}' lacks the table '{missing[0]}': it needs images, annotations and scanpaths")
    try:
        scenes = scenes_of(document)
        paths = [
            Scanpath(
                scene=str(record["image_id"]),
                subject=str(record["subject"]),
                points=np.array([record["X"], record["Y"]], float).T,
                objects=np.array(record["objects"], int) if "objects" in record else None,
                durations=np.array(record["T"], float) if "T" in record else None,
            )
            for record in document["scanpaths"]
        ]
    except KeyError as problem:
        raise ScanpathProblem(f"'{path}' has a record without the field {problem}") from None
    except TypeError as problem:
        raise ScanpathProblem(f"'{path}' has a field of the wrong kind ({problem})") from None
    return ScanpathData(scenes, paths, drop_outside=drop_outside)


def scenes_of(document: Mapping[str, Any]) -> list[Scene]:
    """Scenes of a COCO-like document: `images`, and `annotations` as their boxes (x, y, width, height)."""
    boxes: dict[str, list[Mapping[str, Any]]] = {}
    for record in document.get("annotations", []):
        boxes.setdefault(str(record["image_id"]), []).append(record)
    scenes = []
    for image in document["images"]:
        name, own = str(image["id"]), boxes.get(str(image["id"]), [])
        layout = _layout(image, own) if own else None
        target = image.get("target")
        scenes.append(Scene(
            name=name, width=float(image["width"]), height=float(image["height"]), layout=layout,
            target=None if target is None else int(target), group=str(image.get("group", "")),
        ))  # fmt: skip
    return scenes


def _layout(image: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Layout:
    corners = np.array([record["bbox"] for record in records], float)
    corners = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
    size = {"width": float(image["width"]), "height": float(image["height"])}
    if all("cell" in record for record in records) and "rows" in image and "cols" in image:
        cells = np.array([record["cell"] for record in records], int)
        return Layout(boxes=corners, cells=cells, rows=int(image["rows"]), cols=int(image["cols"]), **size)
    return Layout.from_boxes(corners, rows=image.get("rows"), cols=image.get("cols"), **size)


def write_csv(data: ScanpathData, path: Path) -> None:
    """One row a fixation: scene, subject, index, x, y, object, duration, target, width, height."""
    rows = []
    for p in data:
        scene = data.scenes[p.scene]
        rows.append(pd.DataFrame({
            "scene": p.scene, "subject": p.subject, "index": np.arange(len(p)),
            "x": p.points[:, 0], "y": p.points[:, 1],
            "object": pd.array([None] * len(p) if p.objects is None else p.objects.tolist(), "Int64"),
            "duration": np.nan if p.durations is None else p.durations,
            "target": pd.array([scene.target] * len(p), "Int64"), "width": scene.width, "height": scene.height,
        }))  # fmt: skip
    write_text(path, pd.concat(rows).to_csv(index=False))


def read_csv(
    path: Path,
    *,
    scenes: Iterable[Scene] | None = None,
    screen: tuple[float, float] | None = None,
    drop_outside: bool = False,
) -> ScanpathData:
    """Fixations as rows: scene, subject, index, x, y; without `scenes` also width and height, or `screen` in pixels.

    Columns object, duration and target are used where they are. Raises ScanpathProblem for missing columns, cells that
    are no numbers, and one (scene, subject, index) given twice.
    """
    table = _table(path)
    if scenes is None:
        scenes = _scenes_of_table(table, path, screen)
    paths = []
    for (scene, subject), own in table.sort_values("index", kind="stable").groupby(["scene", "subject"], sort=False):
        given = {
            name: own[name].to_numpy() for name in ("object", "duration") if name in own and own[name].notna().all()
        }
        paths.append(Scanpath(
            scene=str(scene), subject=str(subject), points=own[["x", "y"]].to_numpy(float),
            objects=given["object"].astype(int) if "object" in given else None, durations=given.get("duration"),
        ))  # fmt: skip
    return ScanpathData(scenes, paths, drop_outside=drop_outside)


def _table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise ScanpathProblem(f"no file at '{path}': give a CSV of fixations")
    try:
        table = pd.read_csv(path, dtype={"scene": str, "subject": str}, keep_default_na=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as problem:
        raise ScanpathProblem(f"'{path}' is no CSV ({problem})") from None
    missing = [name for name in ("scene", "subject", "index", "x", "y") if name not in table]
    if missing:
        raise ScanpathProblem(f"'{path}' lacks the column '{missing[0]}': it needs scene, subject, index, x, y")
    for name in set(COLUMNS[2:]) & set(table):
        numbers = pd.to_numeric(table[name], errors="coerce")
        if (numbers.isna() & table[name].notna()).any():
            row = int((numbers.isna() & table[name].notna()).to_numpy().argmax())
            raise ScanpathProblem(
                f"'{path}' has '{table[name].iloc[row]}' in column {name}, line {row + 2}: numbers only"
            )
        table[name] = numbers
    twice = table.duplicated(["scene", "subject", "index"])
    if twice.any():
        double = table[twice].iloc[0]
        raise ScanpathProblem(
            f"'{path}' has fixation {double['index']} of '{double['subject']}' on '{double['scene']}' twice"
        )
    return table


def _scenes_of_table(table: pd.DataFrame, path: Path, screen: tuple[float, float] | None) -> list[Scene]:
    if screen is None and not {"width", "height"} <= set(table):
        raise ScanpathProblem(f"'{path}' has no columns width and height: add them, or give the screen's size")
    scenes = []
    for name, own in table.groupby("scene", sort=False):
        width, height = screen if screen is not None else (float(own["width"].iloc[0]), float(own["height"].iloc[0]))
        target = own["target"].iloc[0] if "target" in own else None
        scenes.append(
            Scene(name=str(name), width=width, height=height, target=None if pd.isna(target) else int(target))
        )
    return scenes
