# /// script
# requires-python = ">=3.11"
# dependencies = ["vit-efficient", "rich", "typer", "scikit-image"]
#
# [tool.uv]
# override-dependencies = [
#     "opencv-python ; sys_platform == 'never'",
#     "opencv-python-headless ; sys_platform == 'never'",
# ]
#
# [tool.uv.sources]
# vit-efficient = { path = "../packages/vit-efficient", editable = true }
# shared-kernels = { path = "../shared-kernels", editable = true }
# ///
"""Run a timm ViT on fewer tokens, and see what that gains and costs: images per second, work, agreement, a picture.

Without a folder it takes the photographs that scikit-image ships: uv run apps/accelerate_vit.py
"""

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:  # imported inside the command, so that --help answers at once
    import torch
    from torch import Tensor

stdout, stderr = Console(), Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Method(StrEnum):
    adaptive = "adaptive"
    evit = "evit"
    tome = "tome"
    random = "random"
    uniform = "uniform"


def _fail(message: str) -> typer.Exit:
    stderr.print(f"[red]{message}[/red]")
    return typer.Exit(2)


def _images(folder: Path | None, limit: int, size: tuple[int, int], channels: int) -> "Tensor":
    import numpy as np
    import torch
    from PIL import Image

    if folder is None:
        from skimage import data

        found: list[Any] = [getattr(data, name)() for name in ("astronaut", "cat", "coffee", "rocket")]
    else:
        if not folder.is_dir():
            raise _fail(f"{folder} is no folder: give one that holds images")
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:limit]
        if not paths:
            raise _fail(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
        found = []
        for path in paths:
            try:
                found.append(np.asarray(Image.open(path).convert("RGB")))
            except OSError as problem:
                stderr.print(f"left out {path.name}: {problem}")
        if not found:
            raise _fail(f"no image in {folder} could be read")
    resized = []
    for array in found[:limit]:
        picture = (
            Image.fromarray(array).convert("RGB" if channels == 3 else "L").resize(size[::-1], Image.Resampling.BICUBIC)
        )
        tensor = torch.from_numpy(np.array(picture)).float() / 255
        resized.append(tensor.permute(2, 0, 1) if channels == 3 else tensor[None])
    return torch.stack(resized)


def _apply(model: Any, method: Method, keep: float, images: "Tensor") -> Any:
    import vit_efficient as ve

    if method is Method.adaptive:
        handle = ve.apply_adaptive_sparsity(model)
        ve.fit_thresholds(model, images, keep)
        return handle
    if method is Method.evit:
        return ve.apply_evit(model, ve.EViTConfig(keep_ratio=keep))
    if method is Method.tome:
        patches, depth = model.patch_embed.num_patches, len(model.blocks)
        return ve.apply_tome(model, ve.ToMeConfig(r=round(patches * (1 - keep) / depth * 2 / (1 + keep))))
    choice: Any = method.value
    return ve.apply_fixed_tokens(model, ve.FixedTokensConfig(keep_ratio=keep, choice=choice))


def _rate(model: Any, images: "Tensor", seconds: float) -> tuple["Tensor", float]:
    import torch

    with torch.inference_mode():
        logits = model(images)
        began, runs = time.perf_counter(), 0
        while runs < 3 or time.perf_counter() - began < seconds:
            model(images)
            runs += 1
    return logits, runs * len(images) / (time.perf_counter() - began)


def _work(model: Any, images: "Tensor") -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2e9 / len(images)


def _load(name: str, checkpoint: Path | None, classes: int | None, device: "torch.device") -> Any:
    import timm
    import torch

    extra = {} if classes is None else {"num_classes": classes}
    try:
        model = timm.create_model(name, **extra)
    except (RuntimeError, ValueError) as problem:
        raise _fail(f"timm has no model {name!r}: {problem}") from problem
    if checkpoint is not None:
        if not checkpoint.exists():
            raise _fail(f"no checkpoint at {checkpoint}")
        from timm.models import load_checkpoint

        load_checkpoint(model, str(checkpoint))
    else:
        torch.manual_seed(0)
        stderr.print("no --checkpoint: weights are random, so speed and work mean something and agreement does not")
    return model.eval().to(device)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Name of a timm ViT, DeiT, DeiT-3, DINOv2 or CLIP model.")] = (
        "deit_small_patch16_224"
    ),
    images: Annotated[
        Path | None, typer.Option(help="Folder of images; photographs of scikit-image without it.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the model, as timm loads them.")] = None,
    classes: Annotated[
        int | None, typer.Option(help="Classes of the checkpoint, where they are not the model's own.")
    ] = None,
    method: Annotated[list[Method] | None, typer.Option(help="To compare; all of them without it.")] = None,
    keep: Annotated[
        float, typer.Option(help="Cost to aim at (adaptive), or patches that go on from each location.")
    ] = 0.65,
    limit: Annotated[int, typer.Option(help="Images at most.")] = 64,
    seconds: Annotated[float, typer.Option(help="Time to measure each model for.")] = 3.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for report.json and one PNG a method.")] = Path("accelerated"),
) -> None:
    """Compare methods that drop or merge tokens on one model and one set of images.

    [bold]adaptive[/bold] is AS-ViT with thresholds fitted to the budget, each image keeping what it needs;
    [bold]evit[/bold] and [bold]tome[/bold] drop or merge a fixed share by class attention and by similarity;
    [bold]random[/bold] and [bold]uniform[/bold] are the floor. Agreement is with the dense model's first, and first
    five, classes.
    """
    if not 0 < keep <= 1:
        raise _fail(f"--keep must be in (0, 1], got {keep}")
    import torch

    import vit_efficient as ve

    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise _fail("no CUDA device here: use --device cpu")
    host = _load(model, checkpoint, classes, where)
    _, *size = host.pretrained_cfg.get("input_size", (3, 224, 224))
    channels = host.patch_embed.proj.in_channels if hasattr(host, "patch_embed") else 3
    raw, cfg = _images(images, limit, (size[0], size[1]), channels), host.pretrained_cfg
    mean = torch.tensor(cfg.get("mean", (0.5,) * channels)[:channels]).view(-1, 1, 1)
    std = torch.tensor(cfg.get("std", (0.5,) * channels)[:channels]).view(-1, 1, 1)
    batch = ((raw - mean) / std).to(where)
    out.mkdir(parents=True, exist_ok=True)
    dense, dense_rate = _rate(host, batch, seconds)
    rows = [{"method": "dense", "images_per_second": dense_rate, "gmacs": _work(host, batch)}]
    for name in track(method or list(Method), description="measuring", console=stderr):
        try:
            handle = _apply(host, name, keep, batch)
        except (TypeError, ValueError) as problem:
            raise _fail(f"{name.value}: {problem}") from problem
        with handle:
            logits, rate = _rate(host, batch, seconds)
            with torch.inference_mode():
                counts = ve.token_counts(host, batch)
            top = dense.topk(min(5, dense.shape[1])).indices
            rows.append({
                "method": name.value, "images_per_second": rate, "gmacs": _work(host, batch),
                "tokens": [round(n, 1) for n in counts.float().mean(0).tolist()],
                "fewest_and_most": [int(counts[:, -1].min()), int(counts[:, -1].max())],
                "same_class": (logits.argmax(-1) == dense.argmax(-1)).float().mean().item(),
                "in_first_five": (top == logits.argmax(-1, keepdim=True)).any(-1).float().mean().item(),
            })  # fmt: skip
            ve.draw_token_maps(host, batch, out / f"{name.value}.png")
    _report(rows, out)


def _report(rows: list[dict[str, Any]], out: Path) -> None:
    table = Table("method", "images/s", "against dense", "GMACs", "patches left", "same class", "in first five")
    for row in rows:
        rate = row["images_per_second"]
        cells = [row["method"], f"{rate:.1f}", f"{rate / rows[0]['images_per_second']:.2f}x", f"{row['gmacs']:.2f}"]
        if "tokens" in row:
            fewest, most = row["fewest_and_most"]
            cells += [f"{fewest} to {most}", f"{row['same_class']:.0%}", f"{row['in_first_five']:.0%}"]
        table.add_row(*cells)
    temporary = out / "report.json.part"
    temporary.write_text(json.dumps(rows, indent=2) + "\n")
    temporary.replace(out / "report.json")
    stdout.print(table)
    stdout.print(f"report.json and a picture for each method are in {out}")


if __name__ == "__main__":
    app()
