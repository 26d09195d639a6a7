"""The app that follows people through a video, as its users meet it."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from reid_robot import Gallery, film, read_frames, write_boxes
from reid_robot.clip import ClipConfig

APP = "follow_person"
pytestmark = pytest.mark.xdist_group("app")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sightings.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def film_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A film of 40 frames, boxes for it, and a picture of its best seen person."""
    folder = tmp_path_factory.mktemp("film")
    frames = list(film(ClipConfig(frames=40, people=3, seed=2)))
    height, width = frames[0].image.shape[:2]
    writer = cv2.VideoWriter(str(folder / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (width, height))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame.image[..., ::-1]))
    writer.release()
    write_boxes(folder / "boxes.csv", {n: f.boxes for n, f in enumerate(frames)})
    people = [person for frame in frames for person in frame.people]
    best = max(set(people), key=people.count)
    frame = next(f for f in frames[5:] if best in f.people)
    x, y, w, h = frame.truth[frame.people.index(best)].astype(int)
    crop = frame.image[max(y, 0) : y + h, max(x, 0) : x + w]
    cv2.imwrite(str(folder / "anna.png"), crop[..., ::-1])
    return folder / "film.avi", folder / "boxes.csv", folder / "anna.png"


def test_runs_without_arguments(tmp_path: Path, app: Any) -> None:
    code, printed, said = app.run("--limit", "25", cwd=tmp_path)
    assert code == 0, said
    seen = rows(tmp_path / "followed")
    assert len({row["person"] for row in seen}) >= 3
    assert {int(row["frame"]) for row in seen} <= set(range(25))
    assert "frames/s" in printed
    frames = list(read_frames(tmp_path / "followed" / "followed.avi"))
    assert len(frames) == 25
    assert frames[0].shape == (288, 512, 3)


def test_enrolled_people_are_named_and_kept(film_file: tuple[Path, Path, Path], tmp_path: Path, app: Any) -> None:
    video, boxes, anna = film_file
    known = tmp_path / "known.safetensors"
    code, _, said = app.run(
        video, "--boxes", boxes, "--enrol", f"anna={anna}", "--save-gallery", known, "--out", tmp_path
    )
    assert code == 0, said
    named = [row for row in rows(tmp_path) if row["name"] == "anna"]
    assert len(named) >= 8
    assert len({row["person"] for row in named}) <= 2, "one person has the name at a time"
    assert "anna" in Gallery.load(known).names
    assert any(name.startswith("person ") for name in Gallery.load(known).names)
    code, _, said = app.run(video, "--boxes", boxes, "--gallery", known, "--out", tmp_path / "again", "--limit", "15")
    assert code == 0, said
    assert {row["name"] for row in rows(tmp_path / "again")} - {""}


def test_hog_and_nobody(tmp_path: Path, app: Any) -> None:
    """A grey film: no people is a result, not an error."""
    writer = cv2.VideoWriter(str(tmp_path / "grey.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 160))
    for _ in range(3):
        writer.write(np.full((160, 96, 3), 90, np.uint8))
    writer.release()
    code, printed, said = app.run(tmp_path / "grey.avi", "--out", tmp_path / "out", "--overlap-only", "--enlarge", "1")
    assert code == 0, said
    assert "Nobody was found" in printed
    assert rows(tmp_path / "out") == []


MISTAKES = {
    "no video": ("{tmp}/none.avi", "no video at"),
    "no video inside": ("{tmp}/text.avi", "can be decoded"),
    "no boxes": ("--boxes {tmp}/none.csv", "no file of boxes"),
    "bad boxes": ("--boxes {tmp}/bad.csv", "line 2 of"),
    "no picture": ("--enrol anna={tmp}/none.png", "no picture of anna"),
    "enrol": ("--enrol anna", "must be NAME=PICTURE"),
    "no picture inside": ("--enrol anna={tmp}/text.avi", "as a picture of anna"),
    "no gallery": ("--gallery {tmp}/none", "no gallery at"),
    "no gallery inside": ("--gallery {tmp}/text.avi", "is no gallery"),
    "no model": ("--model {tmp}/none", "no checkpoint at"),
    "limit": ("--limit 0", "--limit must be at least 1"),
    "look": ("--look 3 --limit 1", "look must lie in (0, 2]"),
    "overlap only": ("--overlap-only --enrol a=b", "leave --overlap-only out"),
}


def test_mistakes_get_one_sentence(tmp_path: Path, app: Any) -> None:
    """In one process, as starting Python fourteen times takes longer than all the rest."""
    (tmp_path / "text.avi").write_text("no film")
    (tmp_path / "bad.csv").write_text("frame,x,y,width,height\n0,1,2,0,4\n")
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("follow_person", {str(app.path)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for name, line in {[(n, m[0].format(tmp=tmp_path)) for n, m in MISTAKES.items()]!r}:
    try:
        module.app(line.split() + ["--out", {str(tmp_path / "out")!r}], standalone_mode=False)
        print(name, "| went through")
    except module.Problem as problem:
        print(name, "|", problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" | ", 1) for line in done.stdout.splitlines() if " | " in line)
    assert {name: MISTAKES[name][1] in said.get(name, "") for name in MISTAKES} == dict.fromkeys(MISTAKES, True), said
    assert app.run(tmp_path / "none.avi")[0] == 2
    assert not (tmp_path / "out" / "followed.avi").exists()
