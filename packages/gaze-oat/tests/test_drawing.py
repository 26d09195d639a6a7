"""Pictures show what they say."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from gaze_oat import Layout, ScanpathProblem, draw_scanpath, plot_paths, save_gif, save_png
from gaze_oat.drawing import _slots

GRID = Layout.grid(2, 3, width=60, height=40)


def test_fixations_are_where_their_objects_are() -> None:
    empty = np.array(draw_scanpath(None, GRID, [0], longest_side=600).convert("RGB")).astype(int)
    both = np.array(draw_scanpath(None, GRID, [0, 5], longest_side=600).convert("RGB")).astype(int)
    rows, cols = np.nonzero(np.abs(both - empty).sum(2) > 60)
    assert both.shape == (400, 600, 3)
    assert rows.max() > 220
    assert cols.max() > 420
    assert np.abs(both - empty)[:190, 420:].sum() == 0  # nothing drawn over object 2
    framed = np.array(draw_scanpath(None, GRID, [0], target=4, longest_side=600).convert("RGB"))
    assert framed[201, 300].tolist() == [214, 39, 40]


def test_numbers_on_one_object_do_not_cover_each_other() -> None:
    places = _slots(GRID, np.array([4, 4, 0, 4]))
    assert places[0].tolist() == GRID.centres[4].tolist()
    assert places[2].tolist() == GRID.centres[0].tolist()
    assert np.hypot(*(places[1] - places[0])) > 5
    assert np.hypot(*(places[3] - places[1])) > 10
    assert GRID.object_at(places).tolist() == [4, 4, 0, 4]


def test_the_picture_is_underneath(tmp_path: Path) -> None:
    blue = Image.new("RGB", (60, 40), (0, 0, 200))
    drawn = draw_scanpath(blue, GRID, [0], longest_side=300)
    assert drawn.getpixel((290, 190)) == (63, 63, 213)
    save_png(drawn, tmp_path / "a" / "b.png")
    with Image.open(tmp_path / "a/b.png") as again:
        assert again.size == (300, 200)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]


def test_a_film_has_a_frame_for_each_fixation(tmp_path: Path) -> None:
    save_gif(None, GRID, [0, 4, 5], tmp_path / "x.gif", target=5)
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 3
        film.seek(2)
        assert film.info["duration"] == 2000


def test_panels_hold_all_paths() -> None:
    figure, axes = plt.subplots()
    plot_paths(axes, GRID, [np.array([0, 5]), np.array([1])], target=3, title="two")
    assert len(axes.lines) == 6
    assert axes.get_title() == "two"
    assert axes.get_ylim() == (40, 0)
    plt.close(figure)


def test_bad_input_is_explained() -> None:
    with pytest.raises(ScanpathProblem, match="a path to draw needs objects 0 to 5"):
        draw_scanpath(None, GRID, [6])
    with pytest.raises(ScanpathProblem, match="longest_side must be at least 64"):
        draw_scanpath(None, GRID, [1], longest_side=5)
