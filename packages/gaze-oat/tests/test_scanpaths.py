"""The data model: what goes out comes back, and what is wrong is told in a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest

from gaze_oat import (
    Layout,
    Scanpath,
    ScanpathData,
    ScanpathProblem,
    Scene,
    path_of_objects,
    read_csv,
    read_json,
    write_csv,
    write_json,
)


def a_scene(name: str = "shelf.png", **changes: object) -> Scene:
    settings = {"layout": Layout.grid(2, 3, width=60, height=20), "target": 4, "width": 60.0, "height": 20.0}
    return Scene(name=name, group="tea", **(settings | changes))  # type: ignore[arg-type]


def a_path(points: list[list[float]], **changes: object) -> Scanpath:
    settings = {"scene": "shelf.png", "subject": "7"}
    return Scanpath(points=np.array(points, float), **(settings | changes))  # type: ignore[arg-type]


@pytest.fixture
def data() -> ScanpathData:
    free = Layout.from_boxes([[0, 0, 5, 5], [10, 10, 30, 19]], width=60, height=20, rows=3, cols=4)
    paths = [
        a_path([[1, 1], [30, 15], [30.5, 15.25]], durations=np.array([200.0, 150.5, 300])),
        a_path([[59, 19]], subject="8"),
        a_path([[2, 2], [12, 12]], scene="free.png"),
    ]
    return ScanpathData([a_scene(), a_scene("free.png", layout=free, target=None)], paths)


def same(first: ScanpathData, second: ScanpathData, *, boxes: bool) -> None:
    assert list(first.scenes) == list(second.scenes)
    for name, scene in first.scenes.items():
        other = second.scenes[name]
        assert (scene.width, scene.height, scene.target) == (other.width, other.height, other.target)
        if boxes:
            assert scene.layout is not None
            assert other.layout is not None
            assert np.array_equal(scene.layout.boxes, other.layout.boxes)
            assert np.array_equal(scene.layout.cells, other.layout.cells)
            assert scene.group == other.group
    for ours, theirs in zip(first, second, strict=True):
        assert (ours.scene, ours.subject) == (theirs.scene, theirs.subject)
        assert np.array_equal(ours.points, theirs.points)
        assert np.array_equal(ours.objects, theirs.objects)
        assert (ours.durations is None) == (theirs.durations is None)
        assert ours.durations is None or np.array_equal(ours.durations, theirs.durations)


def test_objects_follow_from_points(data: ScanpathData) -> None:
    assert [path.objects.tolist() for path in data if path.objects is not None] == [[0, 4, 4], [5], [0, 1]]


def test_json_and_csv_come_back(data: ScanpathData, tmp_path: Path) -> None:
    write_json(data, tmp_path / "a" / "data.json")
    same(data, read_json(tmp_path / "a" / "data.json"), boxes=True)
    write_csv(data, tmp_path / "data.csv")
    same(data, read_csv(tmp_path / "data.csv"), boxes=False)
    same(data, read_csv(tmp_path / "data.csv", scenes=data.scenes.values()), boxes=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "data.csv"]


def test_coco_files_without_our_extras_are_read(tmp_path: Path) -> None:
    document = {
        "images": [{"id": 3, "width": 60, "height": 20}],
        "annotations": [{"image_id": 3, "bbox": [0, 0, 20, 10]}, {"image_id": 3, "bbox": [40, 10, 20, 10]}],
        "scanpaths": [{"image_id": 3, "subject": 2, "X": [1, 50], "Y": [2, 11]}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(document))
    data = read_json(tmp_path / "coco.json")
    layout = data.scenes["3"].layout
    assert layout is not None
    assert (layout.rows, layout.cols) == (2, 3)
    assert layout.cells.tolist() == [[0, 0], [1, 2]]
    assert data.scanpaths[0].objects is not None
    assert data.scanpaths[0].objects.tolist() == [0, 1]


def test_parts_and_outliers(data: ScanpathData) -> None:
    part = data.choose(scenes=["shelf.png"], subjects=["8"])
    assert [(path.subject, len(path)) for path in part] == [("8", 1)]
    with pytest.raises(ScanpathProblem, match="unknown observer '9': there are 2, such as 7, 8"):
        data.choose(subjects=["9"])
    with pytest.raises(ScanpathProblem, match="unknown scene 'x'"):
        data.choose(scenes=["x"])
    usual = [a_path([[1, 1]] * 4, subject=str(number)) for number in range(30)]
    many = ScanpathData([a_scene()], [*usual, a_path([[1, 1]] * 90, subject="slow")])
    assert many.without_outliers().subjects == sorted(str(number) for number in range(30))


def test_fixations_outside_are_refused_or_left_out() -> None:
    path = a_path([[1, 1], [60, 5], [3, 3]], durations=np.array([1.0, 2, 3]))
    with pytest.raises(
        ScanpathProblem, match=r"fixation 1 of '7' on 'shelf.png' is at \[60.0, 5.0\], outside the image"
    ):
        ScanpathData([a_scene()], [path])
    kept = ScanpathData([a_scene()], [path], drop_outside=True).scanpaths[0]
    assert kept.points.tolist() == [[1, 1], [3, 3]]
    assert kept.durations is not None
    assert kept.durations.tolist() == [1, 3]
    with pytest.raises(ScanpathProblem, match="no scanpath was given"):
        ScanpathData([a_scene()], [a_path([[99, 99]])], drop_outside=True)


def test_a_single_fixation_is_a_path_and_none_is_not() -> None:
    assert len(path_of_objects(a_scene(), "m", [4])) == 1
    assert path_of_objects(a_scene(), "m", [4, 0]).points.tolist() == [[30, 15], [10, 5]]
    for objects in ([], [6], [-1]):
        with pytest.raises(ScanpathProblem, match="objects of 'shelf.png' are 0 to 5 and at least one"):
            path_of_objects(a_scene(), "m", objects)
    with pytest.raises(ScanpathProblem, match="at least one fixation"):
        a_path([])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: a_path([[1, float("nan")]]), "not a finite number"),
        (lambda: a_path([[1, 1]], objects=np.array([1, 2])), "has 1 fixations but objects of shape"),
        (lambda: a_path([[1, 1]], durations=np.array([-1.0])), "durations are milliseconds"),
        (lambda: a_scene(target=6), "has target 6, but its objects are 0 to 5"),
        (lambda: a_scene(width=0), "both must be positive"),
        (lambda: ScanpathData([a_scene(), a_scene()], [a_path([[1, 1]])]), "two scenes are called 'shelf.png'"),
        (lambda: ScanpathData([a_scene("b")], [a_path([[1, 1]])]), "unknown scene 'shelf.png' .scenes: b"),
        (
            lambda: ScanpathData([a_scene()], [a_path([[1, 1]], objects=np.array([6]))]),
            "looks at object 6; there are 0",
        ),
    ],
)
def test_what_does_not_fit_is_explained(make: object, message: str) -> None:
    with pytest.raises(ScanpathProblem, match=message):
        make()  # type: ignore[operator]


FILES = {
    "x.json": ("{", "is no JSON"),
    "y.json": ('{"images": []}', "lacks the table 'scanpaths'"),
    "z.json": ('{"images": [], "scanpaths": [{"image_id": 1}]}', "a record without the field 'subject'"),
    "w.json": ('{"images": [], "scanpaths": [3]}', "a field of the wrong kind"),
    "a.csv": ("scene,subject,x,y\n", "lacks the column 'index'"),
    "b.csv": ("scene,subject,index,x,y\na,b,0,1,2\n", "no columns width and height"),
    "c.csv": ("scene,subject,index,x,y,width,height\na,b,0,1,q,9,9\n", "has 'q' in column y, line 2"),
    "d.csv": ("scene,subject,index,x,y,width,height\na,b,0,1,1,9,9\na,b,0,2,2,9,9\n", "fixation 0 of 'b' on 'a' twice"),
    "e.csv": ("", "is no CSV"),
}


@pytest.mark.parametrize("name", FILES)
def test_broken_files_are_explained(name: str, tmp_path: Path) -> None:
    text, message = FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ScanpathProblem, match=message):
        (read_csv if name.endswith("csv") else read_json)(tmp_path / name)
    for reader in (read_csv, read_json):
        with pytest.raises(ScanpathProblem, match="no file at"):
            reader(tmp_path / "none")


def test_the_screen_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("scene,subject,index,x,y\na,b,1,3,4\na,b,0,1,2\n")
    data = read_csv(tmp_path / "x.csv", screen=(10, 12))
    assert data.scanpaths[0].points.tolist() == [[1, 2], [3, 4]]
    assert (data.scenes["a"].width, data.scenes["a"].height, data.scenes["a"].target) == (10, 12, None)
