"""Readers of published scanpath data: Amazon book covers (Sattar et al. 2015) and COCO-Search18.

Amazon covers: one JSON, image name -> {fixations: {observer: [[x, y], ...]}, ground_truth: [box], size, target}. The
collages have 6 x 14 covers; OAT's objects are the cells of that grid and the target is the cell around the centre of
the ground truth. Sattar et al., "Prediction of Search Targets From Fixations in Open-World Settings", CVPR 2015; JSON
by Stauden et al., KI 2018.

Decided here: one record for each (image, observer), where the published OAT preprocessing aliases all six observers of
an image to the last one; the grid is uniform, as the covers' own boxes are not part of the data.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gaze_oat.errors import ScanpathProblem
from gaze_oat.layouts import Layout
from gaze_oat.scanpaths import Scanpath, ScanpathData, Scene, read_json_file, write_text

AMAZON_ROWS, AMAZON_COLS = 6, 14


def read_amazon_covers(
    path: Path, *, rows: int = AMAZON_ROWS, cols: int = AMAZON_COLS, drop_outside: bool = False
) -> ScanpathData:
    """Scenes named as the images, grouped by target picture; subjects named as in the file."""
    document = read_json_file(path)
    if not isinstance(document, dict) or not document:
        raise ScanpathProblem(f"'{path}' holds no collages: expected a JSON object, image name -> record")
    scenes, paths = [], []
    for name, record in document.items():
        try:
            scene = _amazon_scene(name, record, rows, cols)
            own = [
                Scanpath(scene=name, subject=str(who), points=np.array(fixations, float).reshape(-1, 2))
                for who, fixations in record["fixations"].items()
            ]
        except (KeyError, TypeError, IndexError) as problem:
            raise ScanpathProblem(
                f"collage '{name}' in '{path}' cannot be read ({type(problem).__name__}: {problem}): "
                "it needs fixations, ground_truth, size and target"
            ) from None
        scenes.append(scene)
        paths += own
    return ScanpathData(scenes, paths, drop_outside=drop_outside)


def _amazon_scene(name: str, record: Mapping[str, Any], rows: int, cols: int) -> Scene:
    width, height = float(record["size"]["width"]), float(record["size"]["height"])
    layout = Layout.grid(rows, cols, width=width, height=height)
    box = record["ground_truth"][0]
    centre = np.array([[(box["xmin"] + box["xmax"]) / 2, (box["ymin"] + box["ymax"]) / 2]])
    target = int(layout.object_at(centre)[0])
    return Scene(name=name, width=width, height=height, target=target, layout=layout, group=str(record["target"]))


def write_amazon_covers_like(data: ScanpathData, path: Path) -> None:
    """Scanpaths in the layout of the Amazon-cover file, for tests and for tools that read it."""
    document = {}
    for scene in data.scenes.values():
        if scene.layout is None or scene.target is None:
            raise ScanpathProblem(f"scene '{scene.name}' needs a layout and a target to be written as a collage")
        x0, y0, x1, y1 = scene.layout.boxes[scene.target].tolist()
        document[scene.name] = {
            "fixations": {p.subject: p.points.tolist() for p in data.on_scene(scene.name)},
            "ground_truth": [{"xmin": x0, "ymin": y0, "xmax": x1, "ymax": y1}],
            "size": {"width": scene.width, "height": scene.height},
            "target": scene.group,
        }
    write_text(path, json.dumps(document))


def read_coco_search18(
    path: Path,
    *,
    rows: int = 10,
    cols: int = 16,
    screen: tuple[float, float] = (1680.0, 1050.0),
    drop_outside: bool = True,
) -> ScanpathData:
    """The fixation file of COCO-Search18: a list of {name, task, subject, bbox, X, Y, T}; objects are cells of a grid.

    A scene is an image searched for one category ("name task"). Fixations off the screen are left out by default, since
    the published file has some.
    """
    records = read_json_file(path)
    if not isinstance(records, list) or not records:
        raise ScanpathProblem(f"'{path}' is no COCO-Search18 file: expected a list of records")
    layout = Layout.grid(rows, cols, width=screen[0], height=screen[1])
    scenes: dict[str, Scene] = {}
    paths = []
    for number, record in enumerate(records):
        try:
            name, task = f"{record['name']} {record['task']}", str(record["task"])
            points = np.array([record["X"], record["Y"]], float).T
            durations = np.array(record["T"], float) if "T" in record else None
            x, y, width, height = record["bbox"]
            subject = str(record["subject"])
        except (KeyError, TypeError, ValueError) as problem:
            raise ScanpathProblem(f"record {number} of '{path}' cannot be read ({problem})") from None
        target = int(layout.object_at(np.array([[x + width / 2, y + height / 2]]))[0])
        scenes[name] = Scene(name=name, width=screen[0], height=screen[1], target=target, layout=layout, group=task)
        paths.append(Scanpath(scene=name, subject=subject, points=points, durations=durations))
    return ScanpathData(scenes.values(), paths, drop_outside=drop_outside)
