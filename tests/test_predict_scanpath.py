"""apps/predict_scanpath.py as its users meet it: a process with arguments, files, two streams and an exit code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

APP = "predict_scanpath"
pytestmark = pytest.mark.xdist_group("app")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, app: Any) -> tuple[Path, str]:
    """The demonstration, without any argument but where to write."""
    out = tmp_path_factory.mktemp("demo") / "out"
    code, printed, said = app.run("--out", out, "--samples", 40)
    assert code == 0, said
    assert "no image given" in said
    assert "learnt from simulated search, not from people" in said
    return out, printed


def test_the_demonstration_searches_a_shelf(demo: tuple[Path, str]) -> None:
    out, printed = demo
    table = pd.read_csv(out / "scanpaths.csv")
    assert table["subject"].nunique() == 40
    assert set(table["target"]) == {14}
    last = table.groupby("subject")["object"].last()
    assert (last == 14).mean() > 0.6  # chance that a path ends there: 1 in 27
    assert f"{(last == 14).mean():.0%} end on the target" in printed
    lengths = table.groupby("subject").size()
    assert 2 < lengths.mean() < 25
    assert "14 (target)" in printed
    boxes = np.array(json.loads((out / "boxes.json").read_text())["boxes"])
    assert boxes.shape == (27, 4)
    np.testing.assert_allclose(table["x"], boxes[table["object"], ::2].mean(1))


def test_the_picture_and_the_film_show_the_typical_path(demo: tuple[Path, str]) -> None:
    out, printed = demo
    line = next(line for line in printed.splitlines() if line.startswith("typical path: "))
    path = [int(number) for number in line.removeprefix("typical path: ").split(" > ")]
    own = [group["object"].tolist() for _, group in pd.read_csv(out / "scanpaths.csv").groupby("subject")]
    assert path in own
    with Image.open(out / "scanpath.gif") as film:
        assert film.n_frames == len(path)
    drawn, shelf = Image.open(out / "scanpath.png").convert("RGB"), Image.open(out / "shelf.png")
    assert drawn.width / drawn.height == pytest.approx(shelf.width / shelf.height, rel=0.01)
    scale = drawn.width / shelf.width
    x0, y0, *_ = (round(edge * scale) for edge in json.loads((out / "boxes.json").read_text())["boxes"][14])
    assert drawn.getpixel((x0 + 1, y0 + 5)) == (214, 39, 40)  # the target's frame


def test_boxes_and_a_model_of_ones_own(demo: tuple[Path, str], app: Any, tmp_path: Path) -> None:
    """The same picture with its boxes as CSV gives the same paths; as a grid it gives others."""
    out = demo[0]
    boxes = json.loads((out / "boxes.json").read_text())["boxes"]
    lines = ["label,x0,y0,x1,y1", *("p," + ",".join(map(str, box)) for box in boxes)]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    common = [str(out / "shelf.png"), "--target", "14", "--samples", "40", "--out"]
    called = CliRunner().invoke(app.module.app, [*common, str(tmp_path / "a"), "--boxes", str(tmp_path / "boxes.csv")])
    assert called.exit_code == 0, called.output
    assert (tmp_path / "a/scanpaths.csv").read_text() == (out / "scanpaths.csv").read_text()
    called = CliRunner().invoke(app.module.app, [*common, str(tmp_path / "b"), "--grid", "2x5", "--target", "3"])
    assert called.exit_code == 0, called.output
    assert pd.read_csv(tmp_path / "b/scanpaths.csv")["object"].max() < 10
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["scanpath.gif", "scanpath.png", "scanpaths.csv"]


MISTAKES = {
    "no boxes": ("{image} --target 1", "with either --boxes FILE or --grid ROWSxCOLS"),
    "both": ("{image} --target 1 --grid 3x9 --boxes x.json", "with either --boxes FILE or --grid ROWSxCOLS"),
    "no target": ("{image} --grid 3x9", "say what is searched for with --target NUMBER"),
    "target": ("{image} --grid 3x9 --target 27", "target must be an object from 0 to 26, got 27"),
    "grid": ("{image} --grid 3by9 --target 2", "--grid must be two numbers like 3x9, got '3by9'"),
    "no image": ("{tmp}/none.png --grid 3x9 --target 2", "no image at"),
    "image": ("{boxes} --grid 3x9 --target 2", "is no image that can be read"),
    "boxes": ("{image} --boxes {tmp}/wrong.json --target 0", "box 0 is [5.0, 5.0, 5.0, 9.0], which has no area"),
    "model": ("{image} --grid 3x9 --target 2 --model {tmp}/none", "no file at"),
    "samples": ("{image} --grid 3x9 --target 2 --samples 0", "num_samples and temperature must be positive"),
    "boxes of what": ("--grid 3x9", "give the image too, or none of them"),
}


def test_mistakes_are_explained(demo: tuple[Path, str], app: Any, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text("[[5, 5, 5, 9]]")
    places = {"image": demo[0] / "shelf.png", "boxes": demo[0] / "boxes.json", "tmp": tmp_path}
    for name, (line, sentence) in MISTAKES.items():
        arguments = [*line.format(**places).split(), "--out", str(tmp_path / "out")]
        called = CliRunner().invoke(app.module.app, arguments)
        assert called.exit_code == 2, name
        assert sentence in called.stderr, name
        assert called.stdout == "", name
    assert not (tmp_path / "out").exists()


def test_help_teaches_without_loading_a_model(app: Any) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['predict_scanpath.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(app.path)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    assert 'torch' not in sys.modules\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    for words in ("--boxes", "--target", "gaze-oat train", "shelf.jpg --grid 3x9"):
        assert words in told.stdout
