"""Enrolling, identifying, strangers, following changes, saving; the threshold."""

import math

import numpy as np
import pytest

from reid_robot.gallery import Gallery, GalleryConfig, calibrate_threshold


def at(*degrees):
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


@pytest.fixture
def gallery():
    gallery = Gallery(GalleryConfig(threshold=1 - math.cos(math.radians(20))))
    gallery.enrol("anna", at(0, 10) * 3)
    gallery.enrol("ben", at(90))
    return gallery


def test_nearest_person_within_the_threshold(gallery):
    anna, ben, nobody = gallery.identify(at(-15, 105, 45) * 7)
    assert (anna.name, ben.name, nobody.name) == ("anna", "ben", None)
    assert anna.distance == pytest.approx(1 - math.cos(math.radians(15)), abs=1e-6)
    assert nobody.nearest == "anna"
    assert nobody.margin == pytest.approx(math.cos(math.radians(35)) - math.cos(math.radians(45)), abs=1e-6)


def test_empty_gallery():
    (match,) = Gallery().identify(at(3))
    assert (match.name, match.distance, match.nearest) == (None, math.inf, None)
    assert Gallery().identify(np.zeros((0, 2))) == []


def test_margin():
    gallery = Gallery(GalleryConfig(threshold=1.0, margin=0.1))
    gallery.enrol("a", at(0))
    gallery.enrol("b", at(60))
    assert [m.name for m in gallery.identify(at(5, 29))] == ["a", None]


def test_observing_follows_slow_change_and_no_stranger(gallery):
    for degree in range(10, 60, 4):
        gallery.observe(at(degree)[0])
    assert gallery.identify(at(56))[0].name == "anna"
    before = gallery.identify(at(200))[0].distance
    assert gallery.observe(at(200)[0]).name is None
    assert gallery.identify(at(200))[0].distance == before


def test_capacity_keeps_what_differs():
    gallery = Gallery(GalleryConfig(capacity=3))
    gallery.enrol("a", at(0, 1, 2, 90, 170))
    distances = [m.distance for m in gallery.identify(at(90, 170, 1))]
    assert max(distances) < 1e-3


def test_saved_and_loaded(gallery, tmp_path):
    gallery.save(tmp_path / "g.safetensors")
    again = Gallery.load(tmp_path / "g.safetensors")
    assert again.names == ("anna", "ben")
    assert again.config == gallery.config
    assert again.identify(at(33, 90)) == gallery.identify(at(33, 90))
    Gallery().save(tmp_path / "empty")
    assert len(Gallery.load(tmp_path / "empty")) == 0
    gallery.forget("anna")
    assert gallery.identify(at(0))[0].name is None


def test_threshold_lets_pass_what_it_says():
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(20), 5)
    embeddings = rng.normal(size=(20, 8))[ids] + 0.4 * rng.normal(size=(100, 8))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    impostors = (1 - unit @ unit.T)[np.triu(ids[:, None] != ids[None])]
    for wanted in (0.01, 0.1):
        threshold = calibrate_threshold(embeddings, ids, false_accept=wanted)
        accepted = (impostors <= threshold).mean()
        assert wanted - 0.001 < accepted <= wanted


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda g: g.enrol("", at(1)), ValueError, "needs a name"),
        (lambda g: g.enrol("x", np.zeros((0, 2))), ValueError, "no embedding for 'x'"),
        (lambda g: g.enrol("x", np.ones((1, 3))), ValueError, "2 wide as the gallery's, got 3"),
        (lambda g: g.identify(np.zeros((1, 2))), ValueError, "no length"),
        (lambda g: g.identify(np.full((1, 2), np.nan)), ValueError, "not a number"),
        (lambda g: g.identify(np.ones(2)), ValueError, r"must be \(N, D\)"),
        (lambda g: g.forget("carl"), KeyError, "known are anna, ben"),
        (lambda _: GalleryConfig(threshold=0), ValueError, "threshold must lie"),
        (lambda _: GalleryConfig(capacity=0), ValueError, "capacity must be"),
        (lambda _: calibrate_threshold(at(1, 2), np.array([3, 3])), ValueError, "at least two people"),
        (lambda _: calibrate_threshold(at(1, 2), np.array([3, 4]), false_accept=0), ValueError, "false_accept"),
    ],
)
def test_refused(gallery, act, error, message):
    with pytest.raises(error, match=message):
        act(gallery)


def test_refused_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no gallery at"):
        Gallery.load(tmp_path / "none")
    (tmp_path / "text").write_text("x")
    with pytest.raises(ValueError, match="is no gallery"):
        Gallery.load(tmp_path / "text")
