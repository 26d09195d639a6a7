"""Detector, boxes in files, videos in and out, names; and the real street, if the video is there."""

import importlib.util
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from reid_robot.clip import ClipConfig, film
from reid_robot.detection import HogConfig, HogDetector, VideoProblem, read_boxes, suppress, write_boxes
from reid_robot.following import draw_sightings, enrol_from_video, follow, frame_rate, read_frames
from reid_robot.gallery import Gallery, GalleryConfig
from reid_robot.onnx_export import TorchEmbedder
from reid_robot.small import load_small
from reid_robot.tracking import TrackerConfig

PACKAGE = Path(__file__).resolve().parents[1]
STREET = PACKAGE.parents[2] / "shared" / "data" / "opencv-samples" / "vtest.avi"


@pytest.fixture(scope="module")
def embed():
    return TorchEmbedder(load_small())


@pytest.fixture(scope="module")
def clip():
    return list(film(ClipConfig(frames=60, people=3, pillars=1, seed=4, miss=0.0)))


def test_generated_people_are_followed_and_drawn(clip, embed, tmp_path):
    out = tmp_path / "out.avi"
    seen = []
    result = follow(
        [f.image for f in clip], lambda n, _: clip[n].boxes, embed=embed, out=out, rate=7.0, on_frame=seen.append
    )
    assert seen == list(range(1, 61))
    assert result.frames == 60
    assert result.people >= 2
    assert result.per_second > 0
    assert sum(result.stages.values()) == pytest.approx(result.seconds, rel=0.05)
    assert frame_rate(out) == pytest.approx(7.0)
    written = list(read_frames(out))
    assert len(written) == 60
    drawn = draw_sightings(clip[30].image, [s for s in result.sightings if s.frame == 30])
    assert np.abs(written[30].astype(int) - drawn).mean() < 6, "compressed, but the same picture"
    assert np.abs(drawn.astype(int) - clip[30].image).max() > 100
    assert not list(tmp_path.glob("part-*"))


def test_enrolled_people_are_called_by_name(clip, embed):
    gallery = Gallery(GalleryConfig(threshold=0.3))
    frame = next(f for f in clip if f.people)
    person = frame.people[0]
    enrol_from_video(gallery, "anna", frame.image, frame.truth[0], embed)
    result = follow([f.image for f in clip], lambda n, _: clip[n].boxes, embed=embed, gallery=gallery)
    right = wrong = 0
    for one in result.sightings:
        if one.name == "anna":
            truth = clip[one.frame]
            middle = np.array(one.box[:2]) + np.array(one.box[2:]) / 2
            centres = truth.truth[:, :2] + truth.truth[:, 2:] / 2
            if truth.people[int(np.linalg.norm(centres - middle, axis=1).argmin())] == person:
                right += 1
            else:
                wrong += 1
    assert right >= 10
    assert wrong <= 0.2 * right
    numbers = {s.frame: [] for s in result.sightings}
    for one in result.sightings:
        numbers[one.frame].append(one.name)
    assert all(names.count("anna") <= 1 for names in numbers.values())


def test_nobody_there(tmp_path):
    result = follow([np.full((64, 64, 3), 9, np.uint8)] * 3, lambda *_: np.zeros((0, 4)))
    assert (result.frames, result.people, result.sightings) == (3, 0, [])


def test_overlapping_windows_give_way():
    boxes = np.array([[0, 0, 10, 20], [1, 1, 10, 20], [30, 0, 10, 20], [32, 4, 5, 8], [60, 0, 10, 20]], float)
    scores = np.array([1.0, 2.0, 1.5, 1.4, 0.1])
    assert suppress(boxes, scores, min_score=0.2, max_overlap=0.4).tolist() == [1, 2]


def test_hog_of_nothing_and_of_small_frames():
    hog = HogDetector(HogConfig(enlarge=1.0))
    for size in ((140, 80, 3), (20, 20, 3)):
        boxes, scores = hog(np.full(size, 100, np.uint8))
        assert (boxes.shape, scores.shape) == ((0, 4), (0,))


def test_boxes_in_files(tmp_path):
    boxes = {3: np.array([[1.5, 2, 30, 40]]), 0: np.array([[5, 6, 7, 8.0], [1, 1, 1, 1]])}
    write_boxes(tmp_path / "b.csv", boxes)
    found = read_boxes(tmp_path / "b.csv")
    assert {n: b.tolist() for n, b in found.items()} == {n: b.tolist() for n, b in boxes.items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frame,x,y,w,h\n", "lacks the columns width, height"),
        ("frame,x,y,width,height\n0,1,1,2,3\n0,1,x,2,3\n", "line 3 of"),
        ("frame,x,y,width,height\n0,1,1,0,3\n", "no area"),
        ("frame,x,y,width,height\n-1,1,1,2,3\n", "frame -1"),
        ("frame,x,y,width,height\n0,1,nan,2,3\n", "no area or place"),
    ],
)
def test_refused_boxes(text, message, tmp_path):
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(VideoProblem, match=message):
        read_boxes(tmp_path / "b.csv")


def test_refused_videos(tmp_path, embed):
    with pytest.raises(VideoProblem, match="no video at"):
        next(read_frames(tmp_path / "none.avi"))
    (tmp_path / "text.avi").write_text("no film")
    with pytest.raises(VideoProblem, match="can be decoded"):
        next(read_frames(tmp_path / "text.avi"))
    frame = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(VideoProblem, match=r"must end in \.avi or \.mp4"):
        follow([frame], lambda *_: np.zeros((0, 4)), out=tmp_path / "out.gif")
    with pytest.raises(ValueError, match="only with an embedder"):
        follow([frame], lambda *_: np.zeros((0, 4)), gallery=Gallery())
    with pytest.raises(VideoProblem, match="outside the frame"):
        enrol_from_video(Gallery(), "anna", frame, np.array([90, 0, 10, 10]), embed)


@pytest.mark.real
@pytest.mark.skipif(not STREET.exists(), reason="OpenCV's vtest.avi lies in shared data beside the checkout")
def test_looks_keep_identities_in_a_real_street(embed):
    """240 frames: people cross at a sign, go behind it, leave and come back."""
    spec = importlib.util.spec_from_file_location("follow_vtest", PACKAGE / "proofs" / "follow_vtest.py")
    sys.modules["follow_vtest"] = proof = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(proof)
    frames = list(read_frames(STREET, limit=240))
    people, found = proof.read_people(), proof.detections(frames, PACKAGE / "proofs" / "vtest_boxes.csv")
    looks = proof.embeddings(frames, found, load_small())
    alone = proof.measure(people, proof.run(found, None, TrackerConfig()))
    ours = proof.measure(people, proof.run(found, looks, TrackerConfig()))
    assert ours["idf1"] > alone["idf1"] + 0.08
    assert ours["num_switches"] < 0.6 * alone["num_switches"]
    boxes, _ = HogDetector()(frames[100])
    assert np.abs(boxes - found[100]).max() < 0.1, "the committed boxes are this detector's"
    assert cv2.VideoCapture(str(STREET)).get(cv2.CAP_PROP_FRAME_COUNT) == 795
