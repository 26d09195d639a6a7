"""Trains the small network that `apps/follow_person.py` uses, on generated people only.

    uv run --package reid-robot python packages/reid-robot/proofs/train_small.py

ResNet-18 of width 16 with light attention after stages 2 to 4, crops of 64 x 32. The checkpoint is in half precision
and part of the package; what it scores on people it has not seen, before cameras it has, is written beside it. A run
that was stopped goes on; a minute or two on two cores.
"""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from reid_robot.network import ReidConfig, ReidNet
from reid_robot.ranking import Labels, evaluate_features
from reid_robot.training import TrainingConfig, extract, train
from reid_robot.walkers import CropSet, WalkerConfig, draw_walkers

CHECKPOINT = Path(__file__).parents[1] / "src" / "reid_robot" / "small.safetensors"
PEOPLE = WalkerConfig(cameras=6, images_per_camera=1, cast=0.15)
RECIPE = TrainingConfig(steps=600, rate=2e-3, warm_up=40, drops=(0.6, 0.85), erase=0.3)
stderr = Console(stderr=True)


def scores(net: ReidNet, people: CropSet) -> dict[str, float]:
    """mAP and rank 1, every crop searched for among those of other cameras."""
    features, labels = extract(net, people).numpy(), Labels(people.ids.numpy(), people.cameras.numpy())
    found = evaluate_features(features, features, labels, labels)
    return {"mAP": found.map, "rank 1": found.rank1}


def main(
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = CHECKPOINT,
    work: Annotated[Path, typer.Option(help="Where the run is saved, to go on from.")] = Path("runs/reid-small"),
    ids: Annotated[int, typer.Option(help="People to train on.")] = 300,
    seed: Annotated[int, typer.Option(help="Of weights, people and batches.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few steps on few people: does it run?")] = False,
) -> None:
    """Trains the small network, writes it and its scores."""
    recipe = TrainingConfig(**asdict(RECIPE) | {"seed": seed})
    if quick:
        ids, recipe = 20, TrainingConfig(steps=3, people=4, images=2, warm_up=1, seed=seed)
    people = draw_walkers(ids, PEOPLE, seed=seed)
    test = draw_walkers(10 if quick else 60, PEOPLE, seed=seed + 1_000_000)
    torch.manual_seed(seed)
    net = ReidNet(ReidConfig(backbone="resnet18_reid_w16", input_size=PEOPLE.size, num_ids=ids))
    before = scores(net, test)
    with Progress(console=stderr) as progress:
        task = progress.add_task("steps", total=recipe.steps)
        train(
            net, people, recipe, folder=work, save_every=50,
            on_step=lambda step, _, loss: progress.update(task, completed=step, description=f"loss {loss:.2f}"),
        )  # fmt: skip
    net.save(out, half=True)
    report = {
        "untrained": before, "trained": scores(ReidNet.load(out), test), "people": ids,
        "test people": len(test.ids.unique()),
        "parameters": sum(p.numel() for p in net.backbone.parameters()), "seed": seed,
        "generator": asdict(PEOPLE), "recipe": asdict(recipe), "torch": torch.__version__, "timm": version("timm"),
    }  # fmt: skip
    part = out.with_suffix(".part")
    part.write_text(json.dumps(report, indent=2) + "\n")
    part.replace(out.with_suffix(".json"))
    stderr.print(report)


if __name__ == "__main__":
    typer.run(main)
