"""The three jobs of the command line as functions: simulate scanpaths, evaluate them, train a model on human ones.

Everything between files and the method is here, so that a command only parses and shows.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from gaze_oat.baselines import layout_of, objects_of
from gaze_oat.errors import ScanpathProblem
from gaze_oat.layouts import Layout
from gaze_oat.oat import OATConfig, OATModel
from gaze_oat.object_encoder import crop_objects, position_features
from gaze_oat.readers import read_amazon_covers
from gaze_oat.scanpaths import (
    ScanpathData,
    Scene,
    path_of_objects,
    read_csv,
    read_json,
    read_json_file,
    scenes_of,
    write_text,
)
from gaze_oat.splits import split_scenes
from gaze_oat.training import EpochReport, OATTrainer, TrainingConfig, Trial

log = logging.getLogger(__name__)
SEARCHER = Path(__file__).parent / "simulated_searcher"


def open_image(path: Path) -> Image.Image:
    """A picture in RGB; ScanpathProblem where there is none."""
    if not path.is_file():
        raise ScanpathProblem(f"no image at '{path}'")
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as problem:
        raise ScanpathProblem(f"'{path}' is no image that can be read ({problem})") from None


def read_boxes(path: Path, *, width: float, height: float, rows: int | None = None, cols: int | None = None) -> Layout:
    """Boxes of one scene: JSON list of [x0, y0, x1, y1], COCO file of one image, COCO detections, or CSV."""
    size: dict[str, Any] = {"width": width, "height": height}
    if path.suffix.lower() == ".csv":
        return Layout.from_boxes(_boxes_of_csv(path), rows=rows, cols=cols, **size)
    document = read_json_file(path)
    if isinstance(document, dict) and {"images", "annotations"} <= set(document):
        scenes = scenes_of(document | {"images": [image | size for image in document["images"]]})
        if len(scenes) != 1 or scenes[0].layout is None:
            raise ScanpathProblem(f"'{path}' must hold the boxes of one image, it has {len(scenes)} images")
        found = scenes[0].layout
        return found if rows is cols is None else Layout.from_boxes(found.boxes, rows=rows, cols=cols, **size)
    records = document.get("boxes") if isinstance(document, dict) else document
    if not isinstance(records, list) or not records:
        raise ScanpathProblem(f"'{path}' holds no boxes: give a list of [x0, y0, x1, y1] in pixels, or a COCO file")
    if all(isinstance(record, dict) and "bbox" in record for record in records):
        corners = [[*r["bbox"][:2], r["bbox"][0] + r["bbox"][2], r["bbox"][1] + r["bbox"][3]] for r in records]
    else:
        corners = records
    try:
        boxes = np.array(corners, float).reshape(len(corners), 4)
    except (TypeError, ValueError):
        raise ScanpathProblem(f"'{path}' has a box that is not four numbers x0, y0, x1, y1") from None
    return Layout.from_boxes(boxes, rows=rows, cols=cols, **size)


def _boxes_of_csv(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ScanpathProblem(f"no file at '{path}': give boxes as JSON or CSV")
    lines = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
    names = ["x0", "y0", "x1", "y1"]
    header = [name.strip() for name in lines[0]] if lines else []
    if not set(names) <= set(header):
        raise ScanpathProblem(f"'{path}' needs a first line with the columns x0, y0, x1, y1, got {','.join(header)}")
    places = [header.index(name) for name in names]
    try:
        return np.array([[float(line[place]) for place in places] for line in lines[1:]]).reshape(-1, 4)
    except (ValueError, IndexError) as problem:
        raise ScanpathProblem(f"'{path}' has a box that is not four numbers ({problem})") from None


def objects_for(model: OATModel, image: Image.Image | None, layout: Layout, target: int) -> Tensor:
    """What the model's object encoder wants: crops of the picture, or features of the position alone."""
    if model.config.crop_encoder == "features":
        if model.config.feature_size != 2:
            raise ScanpathProblem(
                f"the model wants {model.config.feature_size} features an object: call model.generate in Python"
            )
        return position_features(layout, target)
    if image is None:
        raise ScanpathProblem("this model looks at pictures of the objects: give the image")
    return crop_objects(image, layout, crop_size=model.config.crop_size)


def simulate(
    model: OATModel,
    image: Image.Image | None,
    layout: Layout,
    target: int,
    *,
    name: str,
    num_samples: int = 100,
    temperature: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
) -> ScanpathData:
    """Scanpaths of one scene as data: subjects are called sample 0, sample 1, ..."""
    if not 0 <= target < len(layout):
        raise ScanpathProblem(f"target must be an object from 0 to {len(layout) - 1}, got {target}")
    if max(layout.rows, layout.cols) > model.config.grid_size:
        most = model.config.grid_size
        layout = Layout.from_boxes(
            layout.boxes,
            width=layout.width,
            height=layout.height,
            rows=min(layout.rows, most),
            cols=min(layout.cols, most),
        )
        log.warning(
            "the layout was quantised to %d x %d cells, the most that the model knows", layout.rows, layout.cols
        )
    generator = torch.Generator().manual_seed(seed)
    found = model.generate(
        objects_for(model, image, layout, target), layout, target,
        num_samples=num_samples, temperature=temperature, greedy=greedy, generator=generator,
    )  # fmt: skip
    scene = Scene(name=name, width=layout.width, height=layout.height, target=target, layout=layout)
    return ScanpathData([scene], [path_of_objects(scene, f"sample {i}", ids) for i, ids in enumerate(found.paths)])


def most_typical(data: ScanpathData) -> int:
    """Number of the path with the highest mean Sequence Score with all the others."""
    from gaze_oat.pairing import all_pairs
    from gaze_oat.sequence_alignment import sequence_score

    ids = objects_of(data)
    return int(sequence_score(ids, ids, all_pairs(len(ids), len(ids))).reshape(len(ids), -1).mean(1).argmax())


def read_scanpaths(
    path: Path, *, screen: tuple[float, float] | None = None, scenes: Path | None = None, drop_outside: bool = False
) -> ScanpathData:
    """By the file's kind: .csv (one row a fixation), or .json (COCO-like, or the Amazon covers' layout)."""
    if path.suffix.lower() == ".csv":
        known = None if scenes is None else read_json_file(scenes)
        return read_csv(
            path, scenes=None if known is None else scenes_of(known), screen=screen, drop_outside=drop_outside
        )
    if path.suffix.lower() != ".json":
        raise ScanpathProblem(f"'{path}' must end in .csv or .json")
    document = read_json_file(path)
    if isinstance(document, dict) and "scanpaths" not in document and document:
        return read_amazon_covers(path, drop_outside=drop_outside)
    return read_json(path, drop_outside=drop_outside)


def trials_of(data: ScanpathData, objects: Mapping[str, Tensor]) -> list[Trial]:
    """One trial a path, with its scene's objects."""
    trials = []
    for path, ids in zip(data, objects_of(data), strict=True):
        target = data.scenes[path.scene].target
        if target is None:
            raise ScanpathProblem(f"scene '{path.scene}' has no target: OAT models search")
        layout = layout_of(data, path.scene)
        trials.append(Trial(scene=path.scene, objects=objects[path.scene], layout=layout, target=target, path=ids))
    return trials


def train(
    data: ScanpathData,
    out: Path,
    *,
    images: Path | None,
    model: OATConfig,
    training: TrainingConfig,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> tuple[OATModel, ScanpathData]:
    """Trains on 80 % of the scenes, validates on 10 %, gives model and the last 10 %. Goes on where it was stopped.

    Without `images` (a folder with a file for each scene's name) objects are known by position alone, and crop_encoder
    must be 'features'. Grid size and longest path are taken from the data. `out` gets the model, log.json and run.json.
    """
    parts = split_scenes(data.without_outliers(), seed=training.seed)
    layouts = [layout_of(data, name) for name in data.scenes]
    longest = max(len(path) for path in parts[0])
    size = max(max(layout.rows, layout.cols) for layout in layouts)
    model = replace(model, grid_size=max(2, size), max_length=longest)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = OATModel(model)
    objects = {}
    for scene in data.scenes.values():
        image = None if images is None else open_image(_image_of(images, scene.name))
        if scene.target is None:
            raise ScanpathProblem(f"scene '{scene.name}' has no target: OAT models search")
        objects[scene.name] = objects_for(network, image, layout_of(data, scene.name), scene.target)
    run = {
        "trials": [len(part) for part in parts], "test scenes": list(parts[2].scenes), "seed": training.seed,
        "torch": torch.__version__, "gaze-oat": version("gaze-oat"),
    }  # fmt: skip
    write_text(out / "run.json", json.dumps(run, indent=2) + "\n")
    trainer = OATTrainer(
        network, trials_of(parts[0], objects), trials_of(parts[1], objects), training, folder=out, on_epoch=on_epoch
    )
    trainer.run()
    return network, parts[2]


def _image_of(folder: Path, name: str) -> Path:
    tried: Sequence[Path] = [folder / name, *(folder / f"{name}{suffix}" for suffix in (".png", ".jpg", ".jpeg"))]
    for path in tried:
        if path.is_file():
            return path
    raise ScanpathProblem(f"no image of scene '{name}' in '{folder}': expected {name}, or with .png, .jpg, .jpeg")
