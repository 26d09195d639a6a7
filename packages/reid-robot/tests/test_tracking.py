"""Boxes into tracks: motion, crossings, people who were hidden, by overlap alone and with looks."""

import numpy as np
import pytest

from reid_robot.tracking import Tracker, TrackerConfig, cut_out, overlaps

LOOKS = np.eye(4)
FRAME = np.zeros((200, 400, 3), np.uint8)


def walk(*people):
    """people: (first look, {frame: box}); -> per frame (boxes, looks)."""
    last = max(max(places) for _, places in people)
    for frame in range(last + 1):
        seen = [(places[frame], LOOKS[look]) for look, places in people if frame in places]
        yield np.array([box for box, _ in seen], float).reshape(-1, 4), [look for _, look in seen]


def track(film, config=None, *, looks=True):
    now = []
    embed = (lambda _: np.array(now)) if looks else None
    tracker, found = Tracker(config or TrackerConfig(confirm=1, patience=3), embed=embed), []
    for boxes, seen in film:
        now[:] = seen
        found.append([t.number for t in tracker.update(boxes, FRAME)])
    return found


def steady(start, speed, frames, y=50):
    return {f: (start + speed * f, y, 20, 50) for f in frames}


def test_overlap_by_hand():
    boxes = np.array([[0, 0, 10, 10], [5, 0, 10, 10], [20, 20, 4, 4]], float)
    assert overlaps(boxes[:1], boxes)[0].tolist() == pytest.approx([1, 1 / 3, 0])


def test_one_person_is_one_track():
    assert track(walk((0, steady(10, 5, range(20)))), looks=False) == [[1]] * 20


def test_speed_carries_over_a_gap():
    """Twelve pixels a frame: after two frames without a box nothing overlaps where it was, but where it should be."""
    places = steady(10, 12, [f for f in range(16) if f not in (8, 9)])
    assert [n for frame in track(walk((0, places)), looks=False) for n in frame] == [1] * 14


def hidden():
    """Behind a pillar for 8 frames, longer than patience, while another person stays."""
    return walk((0, steady(10, 6, [*range(8), *range(16, 24)])), (1, steady(300, 0, range(24), y=120)))


def test_after_an_occlusion_only_looks_know():
    alone, looks = track(hidden(), looks=False), track(hidden())
    assert alone[0] == looks[0] == [1, 2]
    assert alone[-1] == [3, 2]
    assert looks[-1] == [1, 2]


def test_another_person_is_not_taken_for_the_lost_one():
    film = walk((0, steady(10, 6, range(8))), (2, dict.fromkeys(range(14, 20), (120, 50, 20, 50))))
    assert track(film)[-1] == [2]


def test_lost_people_cannot_have_flown():
    film = list(walk((0, steady(10, 0, range(8))), (0, dict.fromkeys(range(13, 18), (300, 50, 20, 50)))))
    near = TrackerConfig(confirm=1, patience=3, speed=0.2)
    assert track(film, near)[-1] == [2]
    assert track(film)[-1] == [1]


def test_memory_ends():
    film = list(walk((0, steady(10, 0, [*range(5), *range(40, 45)]))))
    assert track(film, TrackerConfig(confirm=1, patience=2, memory=20))[-1] == [2]
    assert track(film, TrackerConfig(confirm=1, patience=2, memory=60))[-1] == [1]


def test_looks_hold_people_who_swap_places():
    """Two people turn where they meet: by motion they went through each other, by looks they did not."""
    left = {f: (100 + 6 * min(f, 20 - f), 50, 20, 50) for f in range(20)}
    right = {f: (230 - 6 * min(f, 20 - f), 50, 20, 50) for f in range(20)}
    found = track(walk((0, left), (1, right)))
    assert found[-1] == found[0] == [1, 2]


def test_ghosts_are_not_people():
    film = list(walk((0, {0: (10, 10, 20, 50)}), (1, steady(100, 2, range(6)))))
    tracker = Tracker(TrackerConfig(confirm=3))
    found = [[t and t.number for t in tracker.update(boxes)] for boxes, _ in film]
    assert found[0] == [None, None]
    assert found[-1] == [2]


def test_frames_without_people():
    tracker = Tracker(embed=lambda crops: np.ones((len(crops), 2)))
    assert tracker.update(np.zeros((0, 4)), FRAME) == []
    assert tracker.update(np.array([]), FRAME) == []


def test_boxes_past_the_edge():
    assert cut_out(FRAME, np.array([-10, 150, 30, 100.0])).shape == (50, 20, 3)
    assert cut_out(FRAME, np.array([500, 10, 30, 100.0])).size == 0
    tracker = Tracker(TrackerConfig(confirm=1), embed=lambda crops: np.ones((len(crops), 2)))
    assert [t.number for t in tracker.update(np.array([[500, 10, 30, 100], [10, 10, 20, 40.0]]), FRAME)] == [1, 2]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (np.zeros((2, 3)), r"boxes must be \(N, 4\)"),
        (np.array([[0, 0, 5, 5], [1, 1, 0, 3.0]]), "box 1 has no area"),
        (np.array([[0, np.nan, 5, 5]]), "box 0 has no area or is not finite"),
    ],
)
def test_refused_boxes(boxes, message):
    with pytest.raises(ValueError, match=message):
        Tracker().update(boxes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_overlap": 0}, "min_overlap"),
        ({"confirm": 0}, "confirm must be positive"),
        ({"memory": -1}, "memory must not"),
        ({"look": 3}, "look must lie"),
        ({"veto": 0}, "veto in"),
    ],
)
def test_refused_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        TrackerConfig(**fields)


def test_an_embedder_needs_the_frame():
    with pytest.raises(ValueError, match="needs the frame"):
        Tracker(embed=lambda crops: crops).update(np.array([[0, 0, 5, 5.0]]))
