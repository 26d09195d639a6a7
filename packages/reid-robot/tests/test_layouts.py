"""Data set folders, written small and read back: who, by which camera, in which part."""

import pytest
import torch
from PIL import Image

from reid_robot.layouts import (
    DataProblem,
    read_dukemtmc,
    read_folder,
    read_market1501,
    read_msmt17,
    write_dukemtmc_like,
    write_folder_like,
    write_market1501_like,
    write_msmt17_like,
)
from reid_robot.ranking import evaluate_features
from reid_robot.walkers import CropSet


@pytest.fixture(scope="module")
def crops():
    """Person p by camera c is a picture of the colour (40 p, 100 c, 200), so that every file says what it is."""
    ids, cameras = torch.arange(5).repeat_interleave(6), torch.arange(2).repeat_interleave(3).repeat(5)
    images = torch.stack([40 * ids, 100 * cameras, 0 * ids + 200], 1).to(torch.uint8)
    return CropSet(images[:, :, None, None].expand(-1, 3, 32, 16).contiguous(), ids, cameras)


def colours(files):
    return files.load(torch.arange(len(files))).float().mean((2, 3)).round()


def check(split, first_person, first_camera):
    for part, people, count in ((split.train, {0, 1, 2}, 18), (split.query, {3, 4}, 4), (split.gallery, {3, 4}, 8)):
        assert len(part) == count
        assert {int(i) - first_person for i in part.ids} == people
        seen = colours(part)
        assert (seen[:, 0] - 40 * (part.ids - first_person)).abs().max() <= 4
        assert (seen[:, 1] - 100 * (part.cameras - first_camera)).abs().max() <= 4
        assert part.load(torch.tensor([0])).shape == (1, 3, 256, 128)


def test_market(crops, tmp_path):
    write_market1501_like(tmp_path, crops, train_ids=3, junk=2, distractors=3)
    assert len(list((tmp_path / "bounding_box_test").iterdir())) == 8 + 5
    split = read_market1501(tmp_path)
    distractors = split.gallery.ids == 0
    assert int(distractors.sum()) == 3, "distractors stay"
    assert (split.gallery.ids >= 0).all(), "junk is left out"
    split = type(split)(
        split.train,
        split.query,
        type(split.gallery)(
            tuple(p for p, d in zip(split.gallery.paths, distractors, strict=True) if not d),
            split.gallery.ids[~distractors],
            split.gallery.cameras[~distractors],
        ),
    )
    check(split, first_person=1, first_camera=1)
    features = colours(split.query).numpy() + 1, colours(split.gallery).numpy() + 1
    assert evaluate_features(*features, split.query.labels, split.gallery.labels).num_queries == 4


def test_real_names_of_market_and_duke(crops, tmp_path):
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / part).mkdir()
    picture = Image.new("RGB", (4, 8))
    for name in ("-1_c3s2_000451_03.jpg", "0000_c6s1_000001_00.jpg", "1501_c6s4_002552_06.jpg", "0005_c2_f0046985.jpg"):
        picture.save(tmp_path / "bounding_box_test" / name)
    (tmp_path / "bounding_box_test" / "Thumbs.db").write_text("not a picture")
    found = read_market1501(tmp_path).gallery
    assert (found.ids.tolist(), found.cameras.tolist()) == ([0, 5, 1501], [6, 2, 6])


def test_duke(crops, tmp_path):
    write_dukemtmc_like(tmp_path, crops, train_ids=3)
    assert (tmp_path / "query" / "0004_c1_f0000018.jpg").exists()
    check(read_dukemtmc(tmp_path), first_person=1, first_camera=1)


@pytest.mark.parametrize("masked", [False, True])
def test_msmt17(crops, tmp_path, masked):
    write_msmt17_like(tmp_path, crops, train_ids=3)
    if masked:
        (tmp_path / "train").rename(tmp_path / "mask_train_v2")
        (tmp_path / "test").rename(tmp_path / "mask_test_v2")
    assert len((tmp_path / "list_val.txt").read_text().splitlines()) == 3
    check(read_msmt17(tmp_path), first_person=0, first_camera=1)


def test_folder_in_time(crops, tmp_path):
    write_folder_like(tmp_path, crops)
    (tmp_path / "person9" / "camera0").mkdir(parents=True)
    Image.new("RGB", (16, 32)).save(tmp_path / "person9" / "camera0" / "00001.png")
    query, gallery = read_folder(tmp_path, first=0.5, size=(32, 16))
    assert (len(query), len(gallery)) == (15, 16)
    assert 5 in gallery.ids
    assert 5 not in query.ids, "a person with one picture cannot be searched for"
    for person in range(5):
        assert max(p.name for p, i in zip(gallery.paths, gallery.ids, strict=True) if i == person) < min(
            p.name for p, i in zip(query.paths, query.ids, strict=True) if i == person
        )
    assert not set(query.cameras.tolist()) & set(gallery.cameras.tolist())
    assert (colours(query)[:, 0] - 40 * query.ids).abs().max() <= 4


def test_refused(crops, tmp_path):
    with pytest.raises(DataProblem, match="no folder 'bounding_box_train'"):
        read_market1501(tmp_path)
    with pytest.raises(DataProblem, match="no 'list_train.txt'"):
        read_msmt17(tmp_path)
    with pytest.raises(DataProblem, match="no pictures in"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="first must lie"):
        read_folder(tmp_path, first=1.0)
    write_market1501_like(tmp_path, crops, train_ids=3)
    broken = tmp_path / "query" / "0009_c1s1_000001_00.jpg"
    broken.write_text("no picture")
    split = read_market1501(tmp_path)
    with pytest.raises(DataProblem, match="cannot read the picture"):
        split.query.load(torch.tensor([split.query.paths.index(broken)]))
    broken.rename(broken.with_name("someone.jpg"))
    with pytest.raises(DataProblem, match="is not named like"):
        read_market1501(tmp_path)
    for name in ("train", "val", "query", "gallery"):
        (tmp_path / f"list_{name}.txt").write_text("a/b.jpg\n")
    with pytest.raises(DataProblem, match="neither 'train'"):
        read_msmt17(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataProblem, match="line 1 of"):
        read_msmt17(tmp_path)
