"""The command gaze-oat: three jobs, files in and out, and what it says."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from gaze_oat import Layout, OATModel, ScanpathData, Scene, path_of_objects, read_csv, save_png, write_csv, write_json
from gaze_oat.cli import app
from gaze_oat.jobs import SEARCHER, most_typical, read_boxes
from gaze_oat.synthetic import GuidedSearcher, draw_shelf


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty shelves of six products, each searched by two: pictures, boxes and paths."""
    folder, rng = tmp_path_factory.mktemp("shelves"), np.random.default_rng(0)
    scenes, paths = [], []
    for number in range(20):
        shelf, target = draw_shelf(2, 3, rng=rng, cell=(40, 32)), number % 6
        name = f"shelf{number}"
        save_png(shelf.image, folder / f"{name}.png")
        scenes.append(Scene(name=name, width=96, height=80, target=target, layout=shelf.layout, group=str(number % 2)))
        for who in "ab":
            paths.append(path_of_objects(scenes[-1], who, GuidedSearcher().search(shelf, target, rng=rng)))
    data = ScanpathData(scenes, paths)
    write_json(data, folder / "people.json")
    write_csv(data, folder / "people.csv")
    return folder


def test_simulate_writes_paths_that_find_the_target(shelves: Path, tmp_path: Path) -> None:
    boxes = json.loads((shelves / "people.json").read_text())
    own = [a for a in boxes["annotations"] if a["image_id"] == "shelf3"]
    (tmp_path / "boxes.json").write_text(json.dumps([{"bbox": a["bbox"]} for a in own]))
    arguments = ("simulate", shelves / "shelf3.png", "--boxes", tmp_path / "boxes.json", "--target", 3, "--samples", 30)
    said = call(*arguments, "--out", tmp_path / "paths.csv")
    assert "30 scanpaths" in said
    data = read_csv(tmp_path / "paths.csv")
    assert (len(data), data.scenes["shelf3.png"].target) == (30, 3)
    ends = [path.objects[-1] for path in data if path.objects is not None]
    assert np.mean(np.array(ends) == 3) > 0.6
    call(*arguments, "--out", tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "paths.csv").read_text()
    call("simulate", shelves / "shelf3.png", "--grid", "2x3", "--target", 3, "--greedy", "--out", tmp_path / "one.csv")
    assert len(read_csv(tmp_path / "one.csv")) == 1


def test_evaluate_prints_and_writes_every_metric(shelves: Path, tmp_path: Path) -> None:
    said = call(
        "evaluate", shelves / "people.csv", shelves / "people.csv", "--resamples", 20,
        "--metrics", "ss,fed,multimatch,scanmatch,behaviour", "--out", tmp_path / "table.csv",
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "table.csv").set_index("metric")
    assert {"ss", "fed", "scanmatch", "multimatch", "delta"} <= set(table.index)
    assert table.loc["delta", "value"] == 0
    assert table.loc["ss", "value"] > table.loc["ss", "between people"]  # here paths meet themselves, there they do not
    assert f"{table.loc['ss', 'value']:.4f}" in said
    assert "every predicted with every human" in said


def test_train_learns_from_pictures_and_goes_on(shelves: Path, tmp_path: Path) -> None:
    small = ("--width", 16, "--layers", 1, "--lr", 0.003, "--monitor", "nll", "--mirror", "--offset-bias")
    data = shelves / "people.json"
    said = call("train", data, "--images", shelves, "--out", tmp_path / "m", *small, "--epochs", 1)
    assert "names the 2 scenes it has not seen" in said
    log = json.loads((tmp_path / "m/log.json").read_text())
    call("train", data, "--images", shelves, "--out", tmp_path / "m", *small, "--epochs", 2)
    longer = json.loads((tmp_path / "m/log.json").read_text())
    assert longer[:1] == log
    assert len(longer) == 2
    model = OATModel.load(tmp_path / "m")
    assert (model.config.crop_encoder, model.config.width, model.config.offset_bias) == ("cnn", 16, True)
    assert len(json.loads((tmp_path / "m/run.json").read_text())["test scenes"]) == 2
    call("train", data, "--out", tmp_path / "p", *small, "--epochs", 1)
    assert OATModel.load(tmp_path / "p").config.crop_encoder == "features"
    call(
        "simulate", shelves / "shelf3.png", "--grid", "2x3", "--target", 3, "--model", tmp_path / "p", "--samples", 2,
        "--out", tmp_path / "x.csv",
    )  # fmt: skip
    assert len(read_csv(tmp_path / "x.csv")) == 2


MISTAKES = {
    "no place": ("simulate {shelves}/shelf3.png --target 1", "with either --boxes FILE or --grid ROWSxCOLS"),
    "grid": ("simulate {shelves}/shelf3.png --target 1 --grid 2", "--grid must be two numbers like 3x9, got '2'"),
    "target": ("simulate {shelves}/shelf3.png --target 6 --grid 2x3", "target must be an object from 0 to 5, got 6"),
    "image": ("simulate {tmp}/none.png --target 1 --grid 2x3", "no image at"),
    "metric": ("evaluate {shelves}/people.csv {shelves}/people.csv --metrics ss,speed", "unknown metric 'speed'"),
    "reduce": ("evaluate {shelves}/people.csv {shelves}/people.csv --reduce max", "--reduce must be mean or best"),
    "kind": ("evaluate {shelves}/people.csv {shelves}/people.txt", "must end in .csv or .json"),
    "file": ("evaluate {shelves}/people.csv {shelves}/none.csv", "no file at"),
    "images": ("train {shelves}/people.json --out {tmp}/m --images {tmp} --width 16 --layers 1", "no image of scene"),
    "monitor": ("train {shelves}/people.json --out {tmp}/m --monitor loss", "monitor must be 'delta' or 'nll'"),
    "width": ("train {shelves}/people.json --out {tmp}/m --width 7", "width must be even"),
}


def test_mistakes_are_explained(shelves: Path, tmp_path: Path) -> None:
    for name, (line, sentence) in MISTAKES.items():
        result = CliRunner().invoke(app, line.format(shelves=shelves, tmp=tmp_path).split())
        assert result.exit_code == 2, name
        assert sentence in result.stderr, name
        assert result.stdout == "", name


def test_boxes_are_read_in_every_form(tmp_path: Path) -> None:
    expected = [[0.0, 0, 10, 20], [30, 5, 40, 25]]
    forms = {
        "list.json": expected,
        "named.json": {"boxes": expected},
        "detections.json": [{"bbox": [0, 0, 10, 20], "score": 0.9}, {"bbox": [30, 5, 10, 20]}],
        "coco.json": {
            "images": [{"id": 1, "width": 7, "height": 7}],
            "annotations": [{"image_id": 1, "bbox": [0, 0, 10, 20]}, {"image_id": 1, "bbox": [30, 5, 10, 20]}],
        },
    }
    for name, document in forms.items():
        (tmp_path / name).write_text(json.dumps(document))
        assert read_boxes(tmp_path / name, width=50, height=40).boxes.tolist() == expected, name
    (tmp_path / "boxes.csv").write_text("x0,y0,x1,y1\n0,0,10,20\n30,5,40,25\n")
    assert read_boxes(tmp_path / "boxes.csv", width=50, height=40, rows=2, cols=2).cells.tolist() == [[0, 0], [0, 1]]
    wrong = {"a.json": "[]", "b.json": "[[1, 2, 3]]", "c.csv": "x,y\n1,2\n", "d.csv": "x0,y0,x1,y1\n1,2,3\n"}
    messages = ("holds no boxes", "not four numbers", "needs a first line with the columns", "not four numbers")
    for (name, text), message in zip(wrong.items(), messages, strict=True):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_boxes(tmp_path / name, width=50, height=40)


def test_the_most_typical_path_is_nearest_to_all_others() -> None:
    scene = Scene(name="s", width=4, height=1, layout=Layout.grid(1, 4, width=4, height=1), target=3)
    paths = [[0, 3], [0, 1, 3], [0, 1, 2, 3], [3, 3, 3, 3, 3]]
    assert most_typical(ScanpathData([scene], [path_of_objects(scene, str(n), p) for n, p in enumerate(paths)])) == 1


def test_the_built_in_searcher_is_there() -> None:
    run = json.loads((SEARCHER / "run.json").read_text())
    assert run["validation NLL"] < run["NLL of chance"] - 0.3
    assert sum(p.numel() for p in OATModel.load(SEARCHER).parameters()) < 300_000
