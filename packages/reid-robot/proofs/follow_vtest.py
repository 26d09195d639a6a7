"""Does appearance keep identities in a real street? OpenCV's vtest.avi, 300 frames, 8 people who hide and come back.

    uv run --package reid-robot python packages/reid-robot/proofs/follow_vtest.py --video samples/data/vtest.avi

The video is OpenCV's (folder samples/data; not part of this repository). `vtest_people.csv`: who is where, made by us,
by hand: boxes of the HOG detector on frames 0 to 299 were looked at in enlarged montages, joined into people,
corrected where two people share a box or one has none (from positions read off the pictures every 2 to 15 frames,
interpolated between), smoothed over five frames, and looked at again. Someone wholly hidden has no box. One far figure
on the lawn, of 35 pixels, is left out. `vtest_boxes.csv`: what the HOG detector of the package finds (it is made if
missing).

The tracker without appearance is the same code with no embedder (Tracker, tracking.py). The embeddings are of the
small network, which was trained on generated people and has seen no real one. Measures by motmetrics at an overlap of
0.5: IDF1 (Ristani et al., 2016), identity switches, MOTA. Thresholds were chosen on this clip, and there is only this
clip; so a grid of them is run, and its worst is reported too. About a minute.
"""

import csv
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import motmetrics
import numpy as np
import torch
import typer
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from reid_robot.detection import HogDetector, read_boxes, write_boxes
from reid_robot.following import read_frames
from reid_robot.network import ReidNet
from reid_robot.onnx_export import TorchEmbedder
from reid_robot.small import load_small
from reid_robot.tracking import Tracker, TrackerConfig, cut_out, overlaps

HERE = Path(__file__).parent
FRAMES = 300
GRID = {"look": (0.2, 0.25, 0.3, 0.4), "veto": (0.4, 0.5), "patience": (5, 10, 20)}
stderr = Console(stderr=True)
People = dict[int, list[tuple[int, list[float]]]]


def read_people(path: Path = HERE / "vtest_people.csv") -> People:
    """Frame -> (person, box)."""
    found: People = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            box = [float(row[key]) for key in ("x", "y", "width", "height")]
            found[int(row["frame"])].append((int(row["person"]), box))
    return found


def detections(frames: Sequence[np.ndarray], path: Path) -> dict[int, np.ndarray]:
    """Boxes of HOG for every frame; kept in a file."""
    if not path.exists():
        hog = HogDetector()
        found = {n: hog(frame)[0] for n, frame in track(list(enumerate(frames)), "detect", console=stderr)}
        write_boxes(path, found)
    boxes = read_boxes(path)
    return {n: boxes.get(n, np.zeros((0, 4))) for n in range(len(frames))}


def embeddings(frames: Sequence[np.ndarray], boxes: dict[int, np.ndarray], net: ReidNet) -> dict[int, np.ndarray]:
    """Of every box, once; trackers take them from here."""
    embed = TorchEmbedder(net)
    found = {}
    for n, frame in track(list(enumerate(frames)), "embed", console=stderr):
        crops = [np.ascontiguousarray(cut_out(frame, box)) for box in boxes[n]]
        found[n] = embed(crops) if crops else np.zeros((0, 1))
    return found


def run(
    boxes: dict[int, np.ndarray], looks: dict[int, np.ndarray] | None, config: TrackerConfig
) -> dict[int, list[tuple[int, np.ndarray]]]:
    """Frame -> (track number, box)."""
    now = 0
    tracker = Tracker(config, embed=None if looks is None else lambda _: looks[now])
    frame, found = np.zeros((576, 768, 3), np.uint8), {}
    for now in boxes:
        tracks = tracker.update(boxes[now], frame)
        found[now] = [(t.number, b) for t, b in zip(tracks, boxes[now], strict=True) if t is not None]
    return found


def measure(people: People, tracks: dict[int, list[tuple[int, np.ndarray]]]) -> dict[str, float]:
    """IDF1, identity switches and MOTA."""
    accumulator = motmetrics.MOTAccumulator(auto_id=True)
    for n, seen in tracks.items():
        true, ours = (np.array([b for _, b in found]).reshape(-1, 4) for found in (people[n], seen))
        overlap = overlaps(true, ours)
        cost = np.where(overlap >= 0.5, 1 - overlap, np.nan)
        accumulator.update([p for p, _ in people[n]], [t for t, _ in seen], cost)
    names = ["idf1", "num_switches", "mota", "num_misses", "num_false_positives"]
    table = motmetrics.metrics.create().compute(accumulator, metrics=names, name="clip")
    return {name: float(table[name].iloc[0]) for name in names}


def owners(people: People, tracks: dict[int, list[tuple[int, np.ndarray]]]) -> dict[int, dict[int, int]]:
    """Person -> frame -> track that covers them best, from an overlap of 0.5 on."""
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for n, seen in tracks.items():
        if not seen:
            continue
        overlap = overlaps(np.array([b for _, b in people[n]]).reshape(-1, 4), np.array([b for _, b in seen]))
        for row, (person, _) in zip(overlap, people[n], strict=True):
            if row.max() >= 0.5:
                found[person][n] = seen[int(row.argmax())][0]
    return found


def draw_timeline(people: People, arms: dict[str, dict[int, list[tuple[int, np.ndarray]]]], out: Path) -> None:
    """For each person, frame by frame, which track had them: one colour throughout is what one wants."""
    figure = Figure(figsize=(11, 2.6 * len(arms)), layout="constrained")
    colours = [*colormaps["tab10"].colors, *colormaps["Dark2"].colors, *colormaps["Set3"].colors]
    for axes, (name, tracks) in zip(
        np.atleast_1d(figure.subplots(len(arms), 1, sharex=True)), arms.items(), strict=True
    ):
        order: dict[int, int] = {}
        for person in sorted({p for seen in people.values() for p, _ in seen}):
            visible = [n for n, seen in people.items() if any(p == person for p, _ in seen)]
            axes.scatter(visible, [person] * len(visible), color="0.85", marker="s", s=30, linewidths=0)
            for n, number in owners(people, tracks)[person].items():
                order.setdefault(number, len(order))
                axes.scatter(n, person, color=colours[order[number] % len(colours)], marker="s", s=16, linewidths=0)
        score = measure(people, tracks)
        axes.set_title(
            f"{name}: IDF1 {score['idf1']:.2f}, {score['num_switches']:.0f} switches", loc="left", fontsize=11
        )
        axes.set_ylabel("person")
        axes.set_yticks(range(1, 9))
        axes.invert_yaxis()
    figure.axes[-1].set_xlabel("frame (grey: seen, but no track covers them; another colour: another identity)")
    figure.savefig(out, dpi=120)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| tracker | IDF1 | identity switches | MOTA |", "| --- | --- | --- | --- |"]
    for name, r in rows.items():
        lines.append(f"| {name} | {r['idf1']:.3f} | {r['num_switches']:.0f} | {r['mota']:.3f} |")
    return "\n".join(lines) + "\n"


def main(
    video: Annotated[Path, typer.Option(help="OpenCV's vtest.avi.")],
    out: Annotated[Path, typer.Option(help="Folder for results.")] = HERE / "results",
    boxes: Annotated[Path, typer.Option(help="Detections; made by HOG if missing.")] = HERE / "vtest_boxes.csv",
    seed: Annotated[int, typer.Option(help="Of the untrained network's weights.")] = 0,
    quick: Annotated[bool, typer.Option(help="40 frames and no grid: does it run?")] = False,
) -> None:
    """Tracks with and without appearance, and writes follow_vtest.json, .md and .png."""
    frames = list(read_frames(video, limit=40 if quick else FRAMES))
    people, found = read_people(), detections(frames, boxes)
    people = {n: people[n] for n in range(len(frames))}
    looks, config = embeddings(frames, found, load_small()), TrackerConfig()
    torch.manual_seed(seed)
    untrained = embeddings(frames, found, ReidNet(load_small().config).eval())
    arms = {
        "overlap alone": run(found, None, config),
        "overlap and looks": run(found, looks, config),
        "overlap and looks, untrained network": run(found, untrained, config),
    }
    rows = {name: measure(people, tracks) for name, tracks in arms.items()}
    grid: list[dict[str, Any]] = []
    for values in [] if quick else itertools.product(*GRID.values()):
        chosen = dict(zip(GRID, values, strict=True))
        grid.append(chosen | measure(people, run(found, looks, replace(config, **chosen))))
    alone = [measure(people, run(found, None, replace(config, patience=p))) for p in GRID["patience"]]
    rows["overlap alone, best patience"] = max(alone, key=lambda r: r["idf1"])
    if grid:
        rows["overlap and looks, worst of the grid"] = min(grid, key=lambda r: r["idf1"])
    result = {"rows": rows, "grid": grid, "config": asdict(config), "frames": len(frames), "people": 8}
    for name, text in (("json", json.dumps(result, indent=1) + "\n"), ("md", table(rows))):
        out.mkdir(parents=True, exist_ok=True)
        (out / f"follow_vtest.{name}.part").write_text(text)
        (out / f"follow_vtest.{name}.part").replace(out / f"follow_vtest.{name}")
    two = {name: arms[name] for name in ("overlap alone", "overlap and looks")}
    draw_timeline(people, two, out / "follow_vtest.png")
    stderr.print(table(rows))


if __name__ == "__main__":
    typer.run(main)
