"""Trains the small video model that sparse attention is judged on: a Wan transformer in pixel space, 2,016 tokens.

    uv run --package diffusion-attn python packages/diffusion-attn/proofs/train_wan.py

WanTransformer3DModel of diffusers, 8 layers of width 160, patches of 4 x 4 pixels, trained by flow matching on
generated clips of moving shapes with captions (`diffusion_attn.moving_shapes`). Three stages, since most is learnt on
small clips at a hundredth of the cost: 4 frames of 24 x 24, 8 of 36 x 36, and 14 of 48 x 48 pixels; shapes have the
same size in all. Clips, noise and times of a step come from its number, and the state is saved every few steps, so a
second start goes on as if nothing had happened. About an hour on two cores.

Writes the averaged weights in half precision as a diffusers folder, its validation losses, and clips sampled from it.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from diffusion_attn.moving_shapes import ClipConfig, Clips, draw_clips, embed_captions
from diffusion_attn.training import euler_sample, flow_matching_loss

CHECKPOINT = Path(__file__).parent / "checkpoints" / "moving_shapes_wan"
SAVE_EVERY = 25
HELD_OUT = 10**9  # seeds of validation clips
stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some steps on clips of one size."""

    steps: int
    batch: int
    clips: ClipConfig
    lr: float


STAGES = (
    Stage(steps=2_400, batch=24, clips=ClipConfig(frames=4, size=24), lr=2e-3),
    Stage(steps=900, batch=6, clips=ClipConfig(frames=8, size=36), lr=1e-3),
    Stage(steps=500, batch=3, clips=ClipConfig(), lr=5e-4),
)
QUICK = (Stage(steps=2, batch=2, clips=ClipConfig(frames=2, size=24), lr=1e-3),)


def small_wan() -> nn.Module:
    """The architecture: 3.1 M parameters, 2,016 tokens for 14 frames of 48 x 48 pixels."""
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=4, attention_head_dim=40, in_channels=3, out_channels=3, text_dim=32,
        freq_dim=64, ffn_dim=400, num_layers=8, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )  # fmt: skip


def load_small_wan(folder: Path = CHECKPOINT) -> Any:
    """The trained model in float32 and eval mode. FileNotFoundError where it was not trained yet."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no checkpoint in {folder}: run train_wan.py")
    return diffusers.WanTransformer3DModel.from_pretrained(str(folder), torch_dtype=torch.float32).eval()


def conditions_of(clips: Clips) -> dict[str, Tensor]:
    """What the model is told about clips."""
    return {"encoder_hidden_states": embed_captions(clips.captions)}


def loss_of(model: nn.Module, clips: Clips, generator: torch.Generator) -> Tensor:
    """Flow-matching loss at times whose logit is normal, a bit towards noise."""
    times = torch.sigmoid(0.4 + torch.randn(len(clips.captions), generator=generator))
    noise = torch.randn(clips.pixels.shape, generator=generator)
    return flow_matching_loss(model, clips.pixels, conditions_of(clips), times=times, noise=noise)


@torch.no_grad()
def validation_loss(model: nn.Module, config: ClipConfig, *, clips: int) -> float:
    """On clips that training never draws, always the same ones with the same noise."""
    total = 0.0
    for number in range(clips):
        generator = torch.Generator().manual_seed(HELD_OUT + number)
        total += loss_of(model, draw_clips(1, config, generator=generator), generator).item()
    return total / clips


def train(
    stages: tuple[Stage, ...], work: Path, *, seed: int, validation: int
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The averaged model and the log; goes on from the last state saved in `work`."""
    torch.manual_seed(seed)
    model = small_wan()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    done, log = _resume(parts, work / "last.pt")
    plan = [(stage, step) for stage in stages for step in range(stage.steps)]
    with Progress(console=stderr) as progress:
        bar = progress.add_task("steps", total=len(plan), completed=done)
        for number, (stage, step) in enumerate(plan):
            if number < done:
                continue
            loss = _step(model, optimizer, stage, step, seed * 10**6 + number)
            average.update_parameters(model)
            progress.update(bar, completed=number + 1, description=f"{stage.clips.size} pixels, loss {loss:.3f}")
            if step + 1 == stage.steps or (step + 1) % 200 == 0:
                held_out = validation_loss(average.module.eval(), stage.clips, clips=validation)
                log.append({"step": number + 1, "size": stage.clips.size, "loss": loss, "held out": held_out})
                stderr.print(log[-1])
            if (number + 1) % SAVE_EVERY == 0 or number + 1 == len(plan):
                _save(
                    {name: part.state_dict() for name, part in parts.items()} | {"done": number + 1, "log": log}, work
                )
    return average.module.eval(), log


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, stage: Stage, step: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    part = (step + 1) / stage.steps
    for group in optimizer.param_groups:
        group["lr"] = stage.lr * min(1.0, (step + 1) / 100) * (0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2)
    loss = loss_of(model.train(), draw_clips(stage.batch, stage.clips, generator=generator), generator)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _resume(parts: dict[str, Any], path: Path) -> tuple[int, list[dict[str, Any]]]:
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["done"], state["log"]


def _save(state: dict[str, Any], work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    torch.save(state, work / "last.part")
    (work / "last.part").replace(work / "last.pt")


def contact_sheet(pixels: Tensor, *, columns: int = 7, zoom: int = 2) -> Image.Image:
    """Clips (B, 3, T, H, W) as rows of evenly spaced frames."""
    chosen = torch.linspace(0, pixels.shape[2] - 1, min(columns, pixels.shape[2])).long()
    rows = [torch.cat([clip[:, t] for t in chosen.tolist()], 2) for clip in pixels]
    sheet = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(sheet)
    return picture.resize((zoom * picture.width, zoom * picture.height))


def samples(model: nn.Module, config: ClipConfig, *, count: int, steps: int) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Clips that the model makes for held-out captions."""
    generator = torch.Generator().manual_seed(HELD_OUT)
    clips = draw_clips(count, config, generator=generator)
    noise = torch.randn(clips.pixels.shape, generator=generator)
    return euler_sample(model, noise, conditions_of(clips), steps=steps, shift=2.0), clips.captions


def main(
    out: Annotated[Path, typer.Option(help="Gets the model, its report and sampled clips.")] = CHECKPOINT,
    work: Annotated[Path, typer.Option(help="Where its state is kept.")] = Path("runs/moving-shapes-wan"),
    seed: Annotated[int, typer.Option(help="Of weights, clips and noise.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Two steps on tiny clips: does it run?")] = False,
) -> None:
    """Trains a small Wan transformer on generated clips of moving shapes."""
    stages = QUICK if quick else STAGES
    model, log = train(stages, work, seed=seed, validation=2 if quick else 16)
    final = stages[-1].clips
    made, captions = samples(model, final, count=1 if quick else 6, steps=2 if quick else 25)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()), "seed": seed, "log": log,
        "stages": [asdict(stage) for stage in stages], "sampled captions": captions,
        "torch": torch.__version__, "diffusers": diffusers.__version__,
    }  # fmt: skip
    host: Any = model
    host.half().save_pretrained(out)
    contact_sheet(made).save(out / "samples.part", format="png")
    (out / "samples.part").replace(out / "samples.png")
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    stderr.print(f"wrote {out}: held-out loss {log[-1]['held out']:.4f}")


if __name__ == "__main__":
    typer.run(main)
