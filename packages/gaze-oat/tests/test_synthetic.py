"""Made-up shelves and searchers."""

import numpy as np
import pytest

from gaze_oat import ScanpathProblem, crop_objects
from gaze_oat.synthetic import GuidedSearcher, draw_shelf, row_reader


def test_products_stand_in_their_boxes() -> None:
    shelf = draw_shelf(3, 4, rng=np.random.default_rng(0), kinds=2)
    assert shelf.layout.cells.tolist() == [[row, col] for row in range(3) for col in range(4)]
    assert len(np.unique(shelf.colours, axis=0)) == 2
    pixels = np.array(shelf.image)
    for box, colour in zip(shelf.layout.boxes.astype(int), shelf.colours, strict=True):
        x0, y0, x1, y1 = box
        assert (pixels[y0:y1, x0:x1] == colour).all(-1).mean() > 0.3
    assert crop_objects(shelf.image, shelf.layout, crop_size=(29, 29)).shape == (12, 3, 29, 29)


def test_the_reader_reads_to_the_target() -> None:
    assert row_reader(3).tolist() == [0, 1, 2, 3]


def test_the_searcher_goes_near_and_where_it_looks_like_the_target() -> None:
    rng = np.random.default_rng(0)
    shelf = draw_shelf(4, 8, rng=rng)
    paths = [GuidedSearcher(miss=0.0).search(shelf, 20, rng=rng) for _ in range(300)]
    assert np.mean([path[-1] == 20 for path in paths]) > 0.99
    assert all(20 not in path[:-1] for path in paths)
    cells = [shelf.layout.cells[path] for path in paths]
    steps = np.concatenate([np.abs(np.diff(own, axis=0)).sum(1) for own in cells])
    assert steps[steps > 0].mean() < 2.6  # random pairs: 4
    assert np.mean(steps == 0) == pytest.approx(0.17, abs=0.03)
    guided = np.mean([len(path) for path in paths])
    blind = np.mean([len(GuidedSearcher(guidance=0.0, miss=0.0).search(shelf, 20, rng=rng)) for _ in range(300)])
    assert guided < blind
    assert len(GuidedSearcher(miss=1.0, max_length=5).search(shelf, 20, rng=rng)) == 5


def test_bad_shelves_are_explained() -> None:
    with pytest.raises(ScanpathProblem, match="a shelf needs rows, columns and cells of at least 16 pixels"):
        draw_shelf(0, 3, rng=np.random.default_rng(0))
