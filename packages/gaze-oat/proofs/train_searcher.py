"""Trains the built-in model of `gaze-oat simulate`: a small OAT that learns from a simulated searcher alone.

    python packages/gaze-oat/proofs/train_searcher.py

Shelves of 2 to 6 rows and 3 to 10 columns of made-up products, searched by `gaze_oat.synthetic.GuidedSearcher`. Every
epoch is saved; a second start goes on. About three minutes on one core; writes model.safetensors, config.json and
run.json.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from gaze_oat.jobs import SEARCHER
from gaze_oat.oat import OATConfig, OATModel
from gaze_oat.object_encoder import crop_objects
from gaze_oat.scanpaths import write_text
from gaze_oat.synthetic import GuidedSearcher, draw_shelf
from gaze_oat.training import OATTrainer, TrainingConfig, Trial

stderr = Console(stderr=True)
MODEL = OATConfig(
    width=64, feedforward=64, encoder_layers=2, decoder_layers=2, crop_size=(32, 32), grid_size=16, offset_bias=True,
    max_length=60, anisotropic=True,
)  # fmt: skip
TRAINING = TrainingConfig(epochs=8, lr=3e-3, schedule="cosine", patience=8, monitor="nll", mirror=True, batch_size=16)


def trials(count: int, searches: int, *, seed: int) -> list[Trial]:
    """`searches` paths on each of `count` shelves."""
    rng, searcher, found = np.random.default_rng(seed), GuidedSearcher(), []
    for number in range(count):
        shelf = draw_shelf(int(rng.integers(2, 7)), int(rng.integers(3, 11)), rng=rng, cell=(48, 36))
        crops = crop_objects(shelf.image, shelf.layout, crop_size=MODEL.crop_size)
        for _ in range(searches):
            target = int(rng.integers(len(shelf.layout)))
            path = searcher.search(shelf, target, rng=rng)
            name = f"shelf {number}"
            found.append(Trial(scene=name, objects=crops, layout=shelf.layout, target=target, path=path))
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder of the model.")] = SEARCHER,
    work: Annotated[Path, typer.Option(help="Where epochs are saved, to go on from.")] = Path(
        "runs/simulated-searcher"
    ),
    seed: Annotated[int, typer.Option(help="Of shelves, searches, weights and order.")] = 1234,
    quick: Annotated[bool, typer.Option(help="One epoch on few shelves: does it run?")] = False,
) -> None:
    """Trains the model and writes it, with its likelihood beside that of chance."""
    torch.set_num_threads(1)
    shelves, epochs = (12, 1) if quick else (250, TRAINING.epochs)
    training, watched = trials(shelves, 4, seed=seed), trials(shelves // 8, 1, seed=seed + 1)
    torch.manual_seed(seed)
    settings = TrainingConfig(**asdict(TRAINING) | {"epochs": epochs, "seed": seed})
    model = OATModel(MODEL)
    trainer = OATTrainer(model, training, watched, settings, folder=work, on_epoch=stderr.print)
    reports = trainer.run()
    # the schedule ends at 0, and which epoch is best on so few watched searches is luck: the last one is kept
    model.load_state_dict(torch.load(work / "last.pt", weights_only=True)["model"])
    model.save(out)
    chance = np.concatenate([np.full(len(t.path) + 1, np.log(len(t.layout) + 1)) for t in watched]).mean()
    report = {"validation NLL": reports[-1].score, "NLL of chance": float(chance), "epochs": len(reports), "seed": seed,
              "training": asdict(settings), "torch": torch.__version__}  # fmt: skip
    write_text(out / "run.json", json.dumps(report, indent=1) + "\n")
    stderr.print(report)


if __name__ == "__main__":
    typer.run(main)
