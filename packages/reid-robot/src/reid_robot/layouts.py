"""Readers for the folders that re-identification data sets come in, and writers of small folders laid out the same.

Market-1501 (Zheng et al., ICCV 2015) and DukeMTMC-reID (Zheng, Zheng and Yang, ICCV 2017): `bounding_box_train`,
`query`, `bounding_box_test`, names like 0002_c1s1_000451_03.jpg: person, camera, sequence, frame, box; person -1 is
junk, 0 a distractor. MSMT17 (Wei et al., CVPR 2018): lists of `path person`, the camera being the third part of the
name. Folder: anybody's own pictures as person/camera/frame.jpg, split in time: what a robot saw first is the gallery,
what it saw later are the queries.

No data set is shipped: people's pictures are personal data.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from reid_robot.ranking import JUNK, Labels
from reid_robot.walkers import CropSet

_MARKET = re.compile(r"(-1|\d{4})_c(\d+)")
_MSMT = re.compile(r"\d+_\d+_(\d+)_")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


class DataProblem(ValueError):
    """A data set that cannot be read; the message says what was sought, where, and what to do."""


@dataclass(frozen=True)
class CropFiles:
    """Crops on disk, read when asked for. paths, ids, cameras: N of each. size: (height, width) they are scaled to."""

    paths: tuple[Path, ...]
    ids: Int[Tensor, "N"]
    cameras: Int[Tensor, "N"]
    size: tuple[int, int] = (256, 128)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: Int[Tensor, "B"]) -> UInt8[Tensor, "B 3 H W"]:
        """The crops of these numbers, RGB, bilinear. DataProblem names a file that cannot be read."""
        return torch.stack([_picture(self.paths[int(i)], self.size) for i in index])

    @property
    def labels(self) -> Labels:
        """Identities and cameras for ranking."""
        return Labels(self.ids.numpy(), self.cameras.numpy())


@dataclass(frozen=True)
class Split:
    """Training crops, and queries and gallery of people who are not among them."""

    train: CropFiles
    query: CropFiles
    gallery: CropFiles


def read_market1501(root: Path, *, size: tuple[int, int] = (256, 128)) -> Split:
    """Market-1501. Junk (person -1) is left out of the gallery, distractors (person 0) stay. Cameras count from 1."""
    return _read_market_like(root, size, "Market-1501")


def read_dukemtmc(root: Path, *, size: tuple[int, int] = (256, 128)) -> Split:
    """DukeMTMC-reID, named as Market-1501 is: 0005_c2_f0046985.jpg."""
    return _read_market_like(root, size, "DukeMTMC-reID")


def _read_market_like(root: Path, size: tuple[int, int], name: str) -> Split:
    parts = {}
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        folder = root / part
        if not folder.is_dir():
            raise DataProblem(f"no folder '{part}' in '{root}': give the folder of {name} that holds it")
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        parts[part] = _crop_files(paths, size, _market_name, keep_junk=False)
    return Split(parts["bounding_box_train"], parts["query"], parts["bounding_box_test"])


def _market_name(path: Path) -> tuple[int, int]:
    found = _MARKET.match(path.name)
    if found is None:
        raise DataProblem(f"'{path}' is not named like 0002_c1s1_000451_03.jpg (person, camera): rename or remove it")
    return int(found[1]), int(found[2])


def read_msmt17(root: Path, *, size: tuple[int, int] = (256, 128)) -> Split:
    """MSMT17 with its lists list_train.txt, list_val.txt (added to the training set), list_query.txt, list_gallery.txt.

    Pictures lie in `train` and `test` (MSMT17_V1), or in `mask_train_v2` and `mask_test_v2`.
    """
    lists = {part: _msmt_list(root, part) for part in ("train", "val", "query", "gallery")}
    paths = {part: [path for path, _ in rows] for part, rows in lists.items()}
    person = {path: number for rows in lists.values() for path, number in rows}

    def label(path: Path) -> tuple[int, int]:
        found = _MSMT.match(path.name)
        if found is None:
            raise DataProblem(
                f"'{path}' is not named like 0000_000_01_0303morning_0008_0.jpg (the third is the camera)"
            )
        return person[path], int(found[1])

    sets = [
        _crop_files(chosen, size, label) for chosen in (paths["train"] + paths["val"], paths["query"], paths["gallery"])
    ]
    return Split(*sets)


def _msmt_list(root: Path, part: str) -> list[tuple[Path, int]]:
    file = root / f"list_{part}.txt"
    if not file.exists():
        raise DataProblem(f"no 'list_{part}.txt' in '{root}': give the folder of MSMT17 that holds it")
    kind = "train" if part in ("train", "val") else "test"
    folder = next((root / f for f in (kind, f"mask_{kind}_v2") if (root / f).is_dir()), None)
    if folder is None:
        raise DataProblem(f"neither '{kind}' nor 'mask_{kind}_v2' in '{root}': the pictures of MSMT17 are missing")
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line.split()
        if len(words) != 2 or not words[1].isdigit():
            raise DataProblem(f"line {number} of '{file}' must be 'path person', is '{line}'")
        rows.append((folder / words[0], int(words[1])))
    return rows


def read_folder(root: Path, *, first: float = 0.5, size: tuple[int, int] = (256, 128)) -> tuple[CropFiles, CropFiles]:
    """(query, gallery) of root/person/camera/frame.jpg, split in time: the first share of each person's frames, by
    name, is the gallery, later ones are queries.

    A person with one picture is in the gallery alone. Persons and cameras are numbered by name, from 0. Since earlier
    and later frames are told apart by time, a query may be matched by its own camera: the two sets get different camera
    numbers. Raises DataProblem if there is no picture, ValueError for a share outside (0, 1).
    """
    if not 0 < first < 1:
        raise ValueError(f"first must lie in (0, 1), got {first}")
    found = sorted(p for p in root.glob("*/*/*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise DataProblem(
            f"no pictures in '{root}': they must lie like person/camera/frame.jpg ({', '.join(SUFFIXES)})"
        )
    people = sorted({path.parts[-3] for path in found})
    cameras = sorted({path.parts[-2] for path in found})
    query, gallery = [], []
    for person in people:
        own = sorted((p for p in found if p.parts[-3] == person), key=lambda p: (p.name, p.parts[-2]))
        early = max(1, int(first * len(own)))
        gallery += own[:early]
        query += own[early:]

    def numbered(later: int) -> Callable[[Path], tuple[int, int]]:
        return lambda p: (people.index(p.parts[-3]), cameras.index(p.parts[-2]) + later * len(cameras))

    return _crop_files(query, size, numbered(1)), _crop_files(gallery, size, numbered(0))


def _crop_files(
    paths: Sequence[Path], size: tuple[int, int], label: Callable[[Path], tuple[int, int]], *, keep_junk: bool = True
) -> CropFiles:
    rows = [(path, *label(path)) for path in paths]
    rows = [row for row in rows if keep_junk or row[1] != JUNK]
    ids, cameras = (torch.tensor([row[column] for row in rows], dtype=torch.long) for column in (1, 2))
    return CropFiles(tuple(row[0] for row in rows), ids, cameras, size)


def _picture(path: Path, size: tuple[int, int]) -> Tensor:
    try:
        with Image.open(path) as file:
            scaled = file.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    except OSError as problem:
        raise DataProblem(f"cannot read the picture '{path}': {problem}") from problem
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)


def write_market1501_like(root: Path, crops: CropSet, *, train_ids: int, junk: int = 0, distractors: int = 0) -> None:
    """Crops laid out as Market-1501 is: the first `train_ids` people to train on; of the others the first picture by
    each camera is a query, the rest gallery, with `junk` and `distractors` pictures made of the last crop.
    """
    _write_market_like(root, crops, train_ids, lambda camera, frame: f"c{camera}s1_{frame:06d}_00")
    last = crops.images[-1]
    for person, count in (("-1", junk), ("0000", distractors)):
        for frame in range(count):
            _write(root / "bounding_box_test" / f"{person}_c1s1_{frame:06d}_01.jpg", last)


def write_dukemtmc_like(root: Path, crops: CropSet, *, train_ids: int) -> None:
    """The same, named as DukeMTMC-reID is."""
    _write_market_like(root, crops, train_ids, lambda camera, frame: f"c{camera}_f{frame:07d}")


def _write_market_like(root: Path, crops: CropSet, train_ids: int, name: Callable[[int, int], str]) -> None:
    for i, (person, camera, part) in enumerate(_parts(crops, train_ids)):
        folder = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}[part]
        _write(root / folder / f"{person + 1:04d}_{name(camera + 1, i)}.jpg", crops.images[i])


def write_msmt17_like(root: Path, crops: CropSet, *, train_ids: int) -> None:
    """The same, laid out as MSMT17 is; every fifth training picture is in the list of validation."""
    lists: dict[str, list[str]] = {part: [] for part in ("train", "val", "query", "gallery")}
    for i, (person, camera, part) in enumerate(_parts(crops, train_ids)):
        folder = "train" if part == "train" else "test"
        path = f"{person:04d}/{person:04d}_{i:03d}_{camera + 1:02d}_0303morning_{i:04d}_0.jpg"
        _write(root / folder / path, crops.images[i])
        lists["val" if part == "train" and i % 5 == 4 else part].append(f"{path} {person}")
    for part, lines in lists.items():
        (root / f"list_{part}.txt").write_text("\n".join(lines) + "\n")


def write_folder_like(root: Path, crops: CropSet) -> None:
    """The same, as person/camera/frame.jpg."""
    for i, (person, camera) in enumerate(zip(crops.ids.tolist(), crops.cameras.tolist(), strict=True)):
        _write(root / f"person{person}" / f"camera{camera}" / f"{i:05d}.jpg", crops.images[i])


def _parts(crops: CropSet, train_ids: int) -> list[tuple[int, int, str]]:
    seen, rows = set(), []
    for person, camera in zip(crops.ids.tolist(), crops.cameras.tolist(), strict=True):
        first = (person, camera) not in seen
        seen.add((person, camera))
        rows.append((person, camera, "train" if person < train_ids else "query" if first else "gallery"))
    return rows


def _write(path: Path, crop: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(crop.permute(1, 2, 0).numpy()).save(path, quality=95)
