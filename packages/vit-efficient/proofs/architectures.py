"""HaloNet and L2ViT of about 2 M parameters beside a Swin and a plain ViT, on the same digits for the same steps.

    uv run python packages/vit-efficient/proofs/architectures.py --digits samples/data/digits.png

Canvases of 56 x 56 pixels, filled by a digit among pieces of others (`train_base.py`'s first stage). Same canvases in
the same order, same optimiser, same steps for all; nothing was tuned for any. A few hundred steps show what the
architecture brings along, not what a long training would make of it. Half an hour to an hour on one core. Every model
saves as it goes; a second start goes on where the first stopped.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from compare import work, write
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from train_base import accuracy

from vit_efficient import HaloNet, HaloNetConfig, L2ViT
from vit_efficient.digits import CanvasConfig, Canvases, Digits, draw_canvases, load_digits

RESULTS = Path(__file__).parent / "results"
SIZE = 56
CANVAS = CanvasConfig(size=SIZE, digit=(36, 52), pieces=2)
stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The same for all. every: steps between two looks at the test canvases."""

    steps: int = 600
    batch: int = 48
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    every: int = 100


def plain_vit() -> nn.Module:
    return VisionTransformer(
        img_size=SIZE, patch_size=8, in_chans=1, num_classes=10, embed_dim=120, depth=12, num_heads=3
    )


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=SIZE, in_chans=1, num_classes=10, embed_dim=64, depths=(2, 2, 2), num_heads=(2, 4, 8), window_size=7
    )


def l2vit() -> nn.Module:
    return L2ViT((2, 2, 2), (64, 128, 256), in_chans=1, num_classes=10)


def halonet() -> nn.Module:
    config = HaloNetConfig(block=7, halo=2, layers=(3, 3, 3), heads=(4, 4, 8), width=64, expansion=2.0)
    return HaloNet(config, in_chans=1, num_classes=10)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "HaloNet": (halonet, "C3"),
    "L2ViT": (l2vit, "C1"),
    "Swin": (swin, "C0"),
    "ViT": (plain_vit, "C7"),
}


def train(name: str, training: Digits, test: Digits, recipe: Recipe, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The log of a training, [{step, loss, accuracy}]; goes on from what is saved in `folder`."""
    torch.manual_seed(seed)
    model = MODELS[name][0]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    saved, log, losses = folder / f"{name.lower()}_{seed}.pt", [], []
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
    for step in range(log[-1]["step"] if log else 0, recipe.steps):
        rate = recipe.lr * min(1.0, (step + 1) / 20) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / recipe.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        canvases = canvases_of(training, recipe, seed, step)
        loss = F.cross_entropy(model.train()(canvases.images), canvases.labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % recipe.every == 0 or step + 1 == recipe.steps:
            right = accuracy(model.eval(), test, CANVAS, seed=10**6)
            log.append({"step": step + 1, "loss": statistics.fmean(losses), "accuracy": right})
            losses = []
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log},
                saved.with_suffix(".part"),
            )
            saved.with_suffix(".part").replace(saved)
    return log


def canvases_of(digits: Digits, recipe: Recipe, seed: int, step: int) -> Canvases:
    """The canvases of a step, the same for all models."""
    generator = torch.Generator().manual_seed((seed + 1) * 10**6 + step)
    index = torch.randint(len(digits.labels), (recipe.batch,), generator=generator)
    return draw_canvases(digits, index, generator, CANVAS)


@torch.inference_mode()
def speeds(batch: int, rounds: int) -> dict[str, float]:
    """Images a second of every model, medians of turns, one thread."""
    torch.set_num_threads(1)
    models = {name: build().eval() for name, (build, _) in MODELS.items()}
    images = torch.randn(batch, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            began = time.process_time()
            model(images)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - began)
    return {name: batch / statistics.median(times) for name, times in seconds.items()}


def describe(logs: dict[str, list[list[dict[str, Any]]]], rates: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each model; `logs` holds a log for each seed."""
    rows = []
    for name, found in logs.items():
        model = MODELS[name][0]().eval()
        right = [log[-1]["accuracy"] for log in found]
        rows.append({
            "model": name, "parameters": sum(p.numel() for p in model.parameters()),
            "gmacs": work(model, torch.zeros(2, 1, SIZE, SIZE)), "images_per_second": rates[name],
            "accuracy": statistics.fmean(right), "lowest": min(right), "highest": max(right), "seeds": len(found),
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]], recipe: Recipe) -> str:
    lines = ["| model | parameters | MMACs | images/s | digits read right |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        spread = f" ({row['lowest']:.1%} to {row['highest']:.1%})" if row["seeds"] > 1 else ""
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e6:.2f} M | {row['gmacs'] * 1e3:.0f} "
            f"| {row['images_per_second']:.0f} | {row['accuracy']:.1%}{spread} |"
        )
    note = f"{recipe.steps} steps of {recipe.batch} canvases of {SIZE} x {SIZE}; 1,000 test digits; one thread."
    return "\n".join([*lines, "", note, ""])


def draw(logs: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Accuracy against steps; a band from lowest to highest of the seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, found in logs.items():
        steps = [entry["step"] for entry in found[0]]
        right = [[100 * log[i]["accuracy"] for log in found] for i in range(len(steps))]
        axis.plot(steps, [statistics.fmean(r) for r in right], "o-", ms=4, color=MODELS[name][1], label=name)
        axis.fill_between(steps, [min(r) for r in right], [max(r) for r in right], color=MODELS[name][1], alpha=0.2)
    axis.set_xlabel("steps")
    axis.set_ylabel("digits read right, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path.with_name(path.name + ".part"), format="png", dpi=150)
    path.with_name(path.name + ".part").replace(path)


def main(
    digits: Annotated[Path | None, typer.Option(help="OpenCV's digits.png; without it scikit-learn's digits.")] = None,
    out: Annotated[Path, typer.Option(help="Gets architectures.json, .md and .png.")] = RESULTS,
    work_folder: Annotated[Path, typer.Option("--work", help="Saved trainings, to go on from.")] = Path(
        "runs/architectures"
    ),
    seeds: Annotated[int, typer.Option(help="Trainings of each model.")] = 1,
    quick: Annotated[bool, typer.Option(help="Two steps on few digits: does it run?")] = False,
) -> None:
    """Trains the four models and writes what they reached."""
    recipe = Recipe(steps=2, batch=4, every=1) if quick else Recipe()
    training, test = load_digits(digits).split()
    if quick:
        test = Digits(test.images[::50], test.labels[::50])
    for folder in (out, work_folder):
        folder.mkdir(parents=True, exist_ok=True)
    logs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in MODELS}
    with Progress(console=stderr) as progress:
        task = progress.add_task("models", total=seeds * len(MODELS))
        for seed in range(seeds):
            for name in MODELS:
                logs[name].append(train(name, training, test, recipe, seed, work_folder))
                stderr.print(f"{name}, seed {seed}: {logs[name][-1][-1]}")
                progress.advance(task)
    rows = describe(logs, speeds(4 if quick else 32, 1 if quick else 7))
    write(out / "architectures.json", {
        "rows": rows, "logs": logs, "recipe": asdict(recipe), "canvas": asdict(CANVAS),
        "digits": "opencv" if digits else "scikit-learn", "torch": torch.__version__, "timm": timm.__version__,
    })  # fmt: skip
    (out / "architectures.md").write_text(table(rows, recipe))
    draw(logs, out / "architectures.png")
    stderr.print(table(rows, recipe))


if __name__ == "__main__":
    typer.run(main)
