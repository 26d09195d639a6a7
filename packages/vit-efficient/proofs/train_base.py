"""Trains the ViT that the methods of this package are judged on: 2 M parameters, 196 tokens, digits on clutter.

    uv run --package vit-efficient python packages/vit-efficient/proofs/train_base.py --digits samples/data/digits.png

Two stages, since a ViT learns to read before it learns to find: first on canvases that a digit fills (49 tokens), then
on the full canvases of 14 x 14 patches. Every epoch is saved; a second start goes on with the next. An hour on two
cores.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from vit_efficient.digits import CanvasConfig, Digits, batches, draw_canvases, load_digits

CHECKPOINT = Path(__file__).parent / "checkpoints" / "digits_vit.safetensors"
stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some epochs on one kind of canvas."""

    epochs: int
    canvas: CanvasConfig
    lr: float


STAGES = (
    Stage(epochs=40, canvas=CanvasConfig(size=56, digit=(36, 52), pieces=2), lr=1.5e-3),
    Stage(epochs=18, canvas=CanvasConfig(), lr=7e-4),
)
BATCH = 64


def digits_vit() -> VisionTransformer:
    """The architecture: 8 x 8 patches of a grey 112 x 112 image, 12 blocks of width 120, class token."""
    return VisionTransformer(
        img_size=112,
        patch_size=8,
        in_chans=1,
        num_classes=10,
        embed_dim=120,
        depth=12,
        num_heads=3,
        drop_path_rate=0.05,
        dynamic_img_size=True,
    )


def load_base(path: Path = CHECKPOINT) -> VisionTransformer:
    """The trained model in float32 and eval mode. FileNotFoundError where it was not trained yet."""
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: run train_base.py")
    model = digits_vit()
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, digits: Digits, canvas: CanvasConfig, *, seed: int, draws: int = 1) -> float:
    """Share of test canvases that the model reads right; every digit is drawn `draws` times."""
    generator, right = torch.Generator().manual_seed(seed), 0
    for _ in range(draws):
        for index in torch.arange(len(digits.labels)).split(100):
            canvases = draw_canvases(digits, index, generator, canvas)
            right += int((model(canvases.images).argmax(-1) == canvases.labels).sum())
    return right / (draws * len(digits.labels))


def train(digits: Digits, stages: tuple[Stage, ...], folder: Path, *, seed: int) -> VisionTransformer:
    """The trained model; goes on from the last epoch saved in `folder`."""
    training, test = digits.split()
    torch.manual_seed(seed)
    model = digits_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.05)
    saved, log = folder / "last.pt", []
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
    epochs = [(stage, i) for stage in stages for i in range(stage.epochs)]
    with Progress(console=stderr) as progress:
        task = progress.add_task("epochs", total=len(epochs), completed=len(log))
        for number, (stage, epoch) in enumerate(epochs):
            if number < len(log):
                continue
            loss = _epoch(model, optimizer, training, stage, epoch, seed * 1000 + number)
            scored = accuracy(model.eval(), test, stage.canvas, seed=10**6 + seed) if epoch % 4 == 3 else None
            log.append({"epoch": number, "loss": loss, "accuracy": scored})
            stderr.print(log[-1])
            _save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}, saved)
            progress.advance(task)
    return model.eval()


def _epoch(
    model: VisionTransformer, optimizer: torch.optim.Optimizer, digits: Digits, stage: Stage, epoch: int, seed: int
) -> float:
    model.train()
    generator, total = torch.Generator().manual_seed(seed), 0.0
    order = batches(len(digits.labels), BATCH, generator)
    for step, index in enumerate(order):
        done = (epoch + step / len(order)) / stage.epochs
        rate = stage.lr * min(1.0, done * stage.epochs / 2 + 0.02) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        canvases = draw_canvases(digits, index, generator, stage.canvas)
        loss = F.cross_entropy(model(canvases.images), canvases.labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
    return total / len(order)


def _save(state: dict[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def main(
    digits: Annotated[Path | None, typer.Option(help="OpenCV's digits.png; without it scikit-learn's digits.")] = None,
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = CHECKPOINT,
    work: Annotated[Path, typer.Option(help="Where epochs are saved, to go on from.")] = Path("runs/digits-vit"),
    seed: Annotated[int, typer.Option(help="Of weights, order and canvases.")] = 0,
    quick: Annotated[bool, typer.Option(help="Two short epochs on few digits: does it run?")] = False,
) -> None:
    """Trains the base model of the proofs and writes it in half precision, with its accuracy beside it."""
    data, stages = load_digits(digits), STAGES
    if quick:
        data = Digits(data.images[::40], data.labels[::40])
        stages = tuple(Stage(epochs=1, canvas=stage.canvas, lr=stage.lr) for stage in STAGES)
    model = train(data, stages, work, seed=seed)
    test = data.split()[1]
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": accuracy(model, test, stages[-1].canvas, seed=1, draws=1 if quick else 3),
        "test digits": len(test.labels), "seed": seed, "digits": "opencv" if digits else "scikit-learn",
        "stages": [asdict(stage) for stage in stages], "torch": torch.__version__, "timm": timm.__version__,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, out.with_suffix(".part"))
    out.with_suffix(".part").replace(out)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stderr.print(report)


if __name__ == "__main__":
    typer.run(main)
