"""Published data formats, and the real book-cover scanpaths where they are at hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from gaze_oat import (
    Layout,
    ScanpathData,
    ScanpathProblem,
    Scene,
    path_of_objects,
    read_amazon_covers,
    read_coco_search18,
    step_statistics,
    write_amazon_covers_like,
)
from gaze_oat.baselines import cells_of, objects_of
from gaze_oat.behaviour import behaviour

REAL = Path(__file__).resolve().parents[4] / "shared/data/amazon-covers-gaze/Amazon.json"


def test_collages_give_a_record_for_each_image_and_observer(tmp_path: Path) -> None:
    layout = Layout.grid(6, 14, width=2555, height=1600)
    scenes = [
        Scene(name=f"{n}.jpg", width=2555, height=1600, target=n, layout=layout, group=f"t{n % 2}") for n in (3, 81)
    ]
    paths = [path_of_objects(s, who, [n, 40, s.target or 0]) for s in scenes for n, who in enumerate("ab")]
    write_amazon_covers_like(ScanpathData(scenes, paths), tmp_path / "Amazon.json")
    data = read_amazon_covers(tmp_path / "Amazon.json")
    assert [(p.scene, p.subject) for p in data] == [("3.jpg", "a"), ("3.jpg", "b"), ("81.jpg", "a"), ("81.jpg", "b")]
    assert [ids.tolist() for ids in objects_of(data)] == [[0, 40, 3], [1, 40, 3], [0, 40, 81], [1, 40, 81]]
    assert {name: (s.target, s.group) for name, s in data.scenes.items()} == {"3.jpg": (3, "t1"), "81.jpg": (81, "t1")}


def test_broken_collages_are_explained(tmp_path: Path) -> None:
    file = tmp_path / "Amazon.json"
    file.write_text("[]")
    with pytest.raises(ScanpathProblem, match="holds no collages"):
        read_amazon_covers(file)
    file.write_text(json.dumps({"1.jpg": {"fixations": {}, "size": {"width": 5, "height": 5}, "target": "t"}}))
    with pytest.raises(ScanpathProblem, match="collage '1.jpg' in .* needs fixations, ground_truth, size and target"):
        read_amazon_covers(file)


def test_coco_search18_records_become_paths_over_cells(tmp_path: Path) -> None:
    record = {"name": "x.jpg", "task": "mug", "subject": 4, "bbox": [1500, 900, 100, 100], "X": [840, 1550, 1700]}
    record |= {"Y": [525, 950, 5], "T": [100, 200, 300]}
    (tmp_path / "fixations.json").write_text(json.dumps([record]))
    data = read_coco_search18(tmp_path / "fixations.json")
    path = data.scanpaths[0]
    assert (path.scene, path.subject, data.scenes[path.scene].target) == ("x.jpg mug", "4", 9 * 16 + 14)
    assert path.objects is not None
    assert path.objects.tolist() == [5 * 16 + 8, 9 * 16 + 14]  # the third fixation is off the screen
    assert path.durations is not None
    assert path.durations.tolist() == [100, 200]
    (tmp_path / "fixations.json").write_text(json.dumps([{"name": "x"}]))
    with pytest.raises(ScanpathProblem, match="record 0 of .* cannot be read"):
        read_coco_search18(tmp_path / "fixations.json")


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="the book-cover scanpaths are not beside the checkout")
def test_people_search_as_published() -> None:
    """80 of the 100 collages are at hand, so figures are near those of all 585 paths: .850, 12.89, .783, .172, .045."""
    data = read_amazon_covers(REAL)
    assert (len(data.scenes), len(data), len(data.subjects)) == (80, 480, 6)
    kept = data.without_outliers()
    targets = [int(data.scenes[path.scene].target or 0) for path in kept]
    means = behaviour(objects_of(kept), targets).mean(0)
    assert means == pytest.approx([0.850, 12.89, 0.783, 0.172, 0.045], rel=0.06)
    assert means == pytest.approx([0.844017, 13.074786, 0.776907, 0.175566, 0.047527], abs=5e-7)
    steps = step_statistics(cells_of(kept))
    assert steps.lengths[:4] == pytest.approx([0.166, 0.250, 0.220, 0.134], abs=0.002)  # published of all collages
    assert steps.mean_length == pytest.approx(2.45, abs=0.02)
    assert np.array_equal(kept.on_scene("1.jpg")[0].points[0], [1289, 770])
