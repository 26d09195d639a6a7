"""Boxes, cells, and which object a fixation belongs to."""

import numpy as np
import pytest

from gaze_oat import Layout, ScanpathProblem, to_cells


def test_a_grid_is_numbered_row_by_row() -> None:
    layout = Layout.grid(2, 3, width=60, height=20)
    assert layout.cells.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert layout.boxes[4].tolist() == [20, 10, 40, 20]
    assert layout.centres[5].tolist() == [50, 15]


def test_fixations_belong_to_the_box_around_them_or_the_nearest_centre() -> None:
    layout = Layout.from_boxes([[0, 0, 10, 10], [40, 0, 50, 10], [4, 4, 12, 12]], width=60, height=30)
    points = [[1, 1], [10.5, 11], [7, 7], [30, 5], [24, 5], [41, 29], [5, 5]]
    # 7,7 lies in boxes 0 and 2, nearer to the centre of 2 (8, 8); 24,5 in none, nearer to 2 than to 1
    assert layout.object_at(np.array(points)).tolist() == [0, 2, 2, 1, 2, 1, 0]
    edge = Layout.grid(1, 2, width=20, height=10)
    assert edge.object_at(np.array([[10, 5], [9.99, 5]])).tolist() == [1, 0]


def test_rows_and_columns_of_free_boxes_are_those_of_their_centres() -> None:
    boxes = [[0, 0, 20, 10], [70, 18, 90, 28], [40, 31, 60, 39]]
    layout = Layout.from_boxes(boxes, width=100, height=40)
    assert (layout.rows, layout.cols) == (4, 5)
    assert layout.cells.tolist() == [[0, 0], [2, 4], [3, 2]]
    coarse = Layout.from_boxes(boxes, width=100, height=40, rows=2, cols=2)
    assert coarse.cells.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert to_cells(np.array([[99.9, 0], [100, 40]]), width=100, height=40, rows=4, cols=5).tolist() == [[0, 4], [3, 4]]


def test_a_mirror_changes_sides_and_nothing_else() -> None:
    layout = Layout.from_boxes([[0, 0, 20, 10], [70, 18, 90, 28]], width=100, height=40, rows=4, cols=5)
    mirrored = layout.mirrored()
    assert mirrored.boxes.tolist() == [[80, 0, 100, 10], [10, 18, 30, 28]]
    assert mirrored.cells.tolist() == [[0, 4], [2, 0]]
    assert np.array_equal(mirrored.mirrored().boxes, layout.boxes)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "at least one object"),
        ([[0, 0, 5, 5], [3, 3, 3, 8]], "box 1 is .3.0, 3.0, 3.0, 8.0., which has no area"),
        ([[5, 5, 2, 8]], "which has no area"),
        ([[0, 0, float("nan"), 8]], "which has no area"),
        ([[0, 0, 101, 8]], "outside the image of 100 x 40 pixels"),
        ([[-3, 0, 10, 8]], "outside the image"),
    ],
)
def test_bad_boxes_are_explained(boxes: list[list[float]], message: str) -> None:
    with pytest.raises(ScanpathProblem, match=message):
        Layout.from_boxes(boxes, width=100, height=40)


def test_bad_grids_are_explained() -> None:
    with pytest.raises(ScanpathProblem, match="at least one row and one column, got 0 x 3"):
        Layout.grid(0, 3, width=10, height=10)
    with pytest.raises(ScanpathProblem, match="has no area"):
        Layout.grid(1, 3, width=0, height=10)
    with pytest.raises(ScanpathProblem, match="cells must lie in a grid of 1 x 1"):
        Layout(boxes=np.array([[0.0, 0, 1, 1]]), cells=np.array([[0, 1]]), rows=1, cols=1, width=2, height=2)
