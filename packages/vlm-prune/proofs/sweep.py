"""Accuracy of the trained model with few visual tokens, for every method of the package, at every budget.

    uv run --package vlm-prune python packages/vlm-prune/proofs/sweep.py

The model of `train_vlm.py` answers held-out questions (`--pictures` scenes, two questions of each kind to each) under
every method of `vlm_prune.METHODS` with its published defaults, and under Attention Debiasing around every method whose
first score is attention, with the bias strength fitted to this model on training scenes. Every method and budget is a
unit of its own in `--out`/sweep_units, so a second run goes on where the first stopped; units of methods that were
changed have to be deleted. Beside the accuracy: existence questions apart (yes too often is what hallucination is),
and how many of the patches that show what was asked about are among the tokens that reach the last layer.

Decided here: all methods answer the same questions, so differences (debiased or not, a method or random tokens) are
taken question by question, and their interval is that of the mean difference, 1.96 standard errors over pictures.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from shapes_vlm import CHECKPOINT, PATCH, SIZE, Batch, Example, answer, encode, interval, load_trained

from vlm_prune import METHODS, AttentionDebiasingConfig, fit_debias, prune
from vlm_prune.scenes import KINDS, SceneConfig, make_examples, patches_of

KEEPS = (0.5, 0.25, 0.11, 0.056)
PER_KIND = 2
WHOLE = "unpruned"
DEBIASED = "+ debias"
stderr = Console(stderr=True)


def labels(num_layers: int) -> list[str]:
    """Names of all methods, debiased ones behind those that they go around."""
    names = []
    for name, config in METHODS.items():
        names.append(name)
        if config().stages(num_layers)[0].criterion.attends:
            names.append(f"{name} {DEBIASED}")
    return names


def covered(batch: Batch, kept: Sequence[torch.Tensor], image_id: int) -> list[float | None]:
    """For each question the share of the patches it asks about that are kept; None where there are none."""
    shares: list[float | None] = []
    for question, ids, places in zip(batch.questions, batch.inputs["input_ids"], kept, strict=True):
        wanted = patches_of(question.boxes, size=SIZE, patch=PATCH)
        patches = places.numpy() - int((ids == image_id).nonzero()[0, 0])
        shares.append(float(wanted[patches].sum() / wanted.sum()) if wanted.any() else None)
    return shares


def run_unit(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    *,
    method: Any,
    keep: float,
    on_batch: Callable[[int], None],
) -> dict[str, Any]:
    """Answers to all questions under one method (a name, a config, or None for the whole picture)."""
    hits: list[bool] = []
    shares: list[float | None] = []
    handle = None if method is None else prune(model, method, keep=keep)
    try:
        for batch in answer(model, processor, examples):
            hits += batch.hits
            if handle is not None:
                kept = handle.report.kept
                shares += covered(batch, kept[max(kept)], model.config.image_token_id)
            on_batch(len(hits))
    finally:
        if handle is not None:
            handle.remove()
    return {"hits": "".join("01"[hit] for hit in hits), "covered": shares}


def debiased(model: Any, processor: Any, name: str, keep: float, pictures: int) -> AttentionDebiasingConfig:
    """The method with the bias strength that training scenes show in this model."""
    method = METHODS[name](keep=keep)
    examples = make_examples(pictures, seed=7, split="train", config=SceneConfig(size=SIZE))
    batches = (encode(processor, questions, [scene.image] * len(questions)) for scene, questions in examples)
    return AttentionDebiasingConfig(method=method, sigma=fit_debias(model, method, batches))


def run_all(out: Path, *, pictures: int, checkpoint: Path, keeps: Sequence[float], chosen: Sequence[str]) -> list[dict]:
    """All units, those on disk among them. ValueError where units on disk belong to another number of pictures."""
    model, processor = load_trained(checkpoint)
    examples = make_examples(pictures, seed=3 * 10**6, split="test", per_kind=PER_KIND, config=SceneConfig(size=SIZE))
    plan = [(WHOLE, 1.0), *((label, keep) for label in chosen for keep in keeps)]
    units = out / "sweep_units"
    units.mkdir(parents=True, exist_ok=True)
    rows = []
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), console=stderr) as progress:
        whole, inner = progress.add_task("units", total=len(plan)), progress.add_task("questions")
        for label, keep in plan:
            path = units / f"{label.replace(' + ', '_')}-{keep}.json"
            if not path.exists():
                progress.reset(inner, total=pictures * PER_KIND * len(KINDS), description=f"{label} {keep}")
                method: Any = None if label == WHOLE else label
                if label.endswith(DEBIASED):
                    method = debiased(model, processor, label.removesuffix(f" {DEBIASED}"), keep, max(2, pictures // 5))
                unit = run_unit(
                    model, processor, examples, method=method, keep=keep,
                    on_batch=lambda done: progress.update(inner, completed=done),
                )  # fmt: skip
                unit |= {"method": label, "keep": keep, "sigma": getattr(method, "sigma", None)}
                path.with_suffix(".part").write_text(json.dumps(unit))
                path.with_suffix(".part").replace(path)
            rows.append(json.loads(path.read_text()))
            if len(rows[-1]["hits"]) != pictures * PER_KIND * len(KINDS):
                raise ValueError(
                    f"{path} is of another number of pictures than {pictures}; delete {units} or change it"
                )
            progress.advance(whole)
    return [judged(row, examples) for row in rows]


def judged(row: dict, examples: Sequence[Example]) -> dict:
    """A unit with its accuracies: all, of each kind, and how often it says yes to what is not there."""
    questions = [question for _, asked in examples for question in asked]
    hits = np.array([hit == "1" for hit in row["hits"]])
    share = {}
    for kind in ("all", *KINDS):
        which = np.array([kind in (question.kind, "all") for question in questions])
        low, high = interval(int(hits[which].sum()), int(which.sum()))
        share[kind] = {"accuracy": round(float(hits[which].mean()), 4), "interval": [round(low, 4), round(high, 4)]}
    absent = np.array([question.kind == "existence" and question.answer == "no" for question in questions])
    shares = [value for value in row["covered"] if value is not None]
    return row | {
        "accuracy": share, "yes to what is absent": round(float(1 - hits[absent].mean()), 4),
        "asked-about patches kept": round(float(np.mean(shares)), 4) if shares else None,
        "by picture": hits.reshape(len(examples), -1).mean(1).tolist(),
    }  # fmt: skip


def difference(ours: dict, theirs: dict) -> tuple[float, float]:
    """Mean difference of accuracy on the same questions and half its 95 % interval, pictures being independent."""
    gap = np.array(ours["by picture"]) - np.array(theirs["by picture"])
    return float(gap.mean()), float(1.96 * gap.std(ddof=1) / np.sqrt(len(gap)))


def table(rows: Sequence[dict], keeps: Sequence[float]) -> str:
    """Markdown: a row for each method, a column for each budget; then what debiasing changes, and existence alone."""
    by = {(row["method"], row["keep"]): row for row in rows}
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != WHOLE))
    head = "| method | " + " | ".join(f"keep {keep}" for keep in keeps) + " |\n|---"
    head += "|---" * len(keeps) + "|"
    total = len(by[WHOLE, 1.0]["hits"])

    def block(title: str, cell: Callable[[dict], str], chosen: Sequence[str]) -> str:
        lines = [f"| {name} | " + " | ".join(cell(by[name, keep]) for keep in keeps) + " |" for name in chosen]
        return "\n".join([f"\n### {title}\n", head, *lines])

    def accuracy(kind: str) -> Callable[[dict], str]:
        def cell(row: dict) -> str:
            low, high = row["accuracy"][kind]["interval"]
            return f"{100 * row['accuracy'][kind]['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"

        return cell

    def gained(row: dict) -> str:
        mean, reach = difference(row, by[row["method"].removesuffix(f" {DEBIASED}"), row["keep"]])
        return f"{100 * mean:+.1f} ± {100 * reach:.1f} (sigma {row['sigma']:.2f})"

    unpruned = by[WHOLE, 1.0]
    parts = [
        f"{total} held-out questions. Unpruned: {accuracy('all')(unpruned)} %, existence questions "
        f"{accuracy('existence')(unpruned)} %, yes to what is absent {100 * unpruned['yes to what is absent']:.1f} %.",
        block("Accuracy in %, with 95 % intervals", accuracy("all"), names),
        block("Existence questions", accuracy("existence"), names),
        block("Yes to what is absent, in %", lambda row: f"{100 * row['yes to what is absent']:.1f}", names),
        block(
            "Patches of what was asked about that reach the last layer, in %",
            lambda row: f"{100 * row['asked-about patches kept']:.1f}", names,
        ),
    ]  # fmt: skip
    turned = [name for name in names if name.endswith(DEBIASED) and name.removesuffix(f" {DEBIASED}") in names]
    if turned:
        parts.append(block("What debiasing changes, in points", gained, turned))
    return "\n".join(parts) + "\n"


def figure(rows: Sequence[dict], keeps: Sequence[float], path: Path) -> None:
    """Accuracy over the budget, all questions and existence alone; debiased methods dashed in the same colour."""
    picture = Figure(figsize=(13, 6.5), layout="constrained")
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != WHOLE))
    bases = list(dict.fromkeys(name.removesuffix(f" {DEBIASED}") for name in names))
    markers = "osD^v<>PX*hdp8"
    for axes, kind, title in zip(
        picture.subplots(1, 2), ("all", "existence"), ("all questions", "existence questions"), strict=True
    ):
        for row in rows:
            if row["method"] == WHOLE:
                axes.axhline(100 * row["accuracy"][kind]["accuracy"], color="black", linewidth=1, label=WHOLE)
        for name in names:
            base = bases.index(name.removesuffix(f" {DEBIASED}"))
            line = {row["keep"]: 100 * row["accuracy"][kind]["accuracy"] for row in rows if row["method"] == name}
            axes.plot(
                list(line), list(line.values()), color=f"C{base % 10}", marker=markers[base % len(markers)],
                linestyle="--" if name.endswith(DEBIASED) else "-", label=name, markersize=5, linewidth=1.4,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(keeps, [str(keep) for keep in keeps])
        axes.minorticks_off()
        axes.set_xlabel("visual tokens kept")
        axes.set_ylabel("accuracy in %")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    picture.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    picture.savefig(path, dpi=90)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(__file__).parent / "results",
    checkpoint: Annotated[Path, typer.Option(help="Folder of the trained model.")] = CHECKPOINT,
    pictures: Annotated[int, typer.Option(help="Held-out pictures, of 12 questions each.")] = 100,
    only: Annotated[str, typer.Option(help="Methods, separated by commas; all if empty.")] = "",
    quick: Annotated[bool, typer.Option(help="Two pictures, two methods, one budget: does it run?")] = False,
) -> None:
    """Evaluates all methods at all budgets and writes sweep.json, sweep.md and sweep.png."""
    known = labels(load_trained(checkpoint)[0].config.text_config.num_hidden_layers)
    chosen = [name.strip() for name in only.split(",")] if only else known
    unknown = [name for name in chosen if name not in known]
    if unknown:
        stderr.print(f"no method {unknown}; there are {', '.join(known)}", style="red")
        raise typer.Exit(code=2)
    keeps = KEEPS
    if quick:
        pictures, keeps, chosen = 2, (0.25,), [name for name in known if name.startswith(("fastv", "random"))]
    rows = run_all(out, pictures=pictures, checkpoint=checkpoint, keeps=keeps, chosen=chosen)
    record = {"rows": rows, "torch": torch.__version__, "transformers": transformers.__version__}
    (out / "sweep.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "sweep.md").write_text(table(rows, keeps))
    figure(rows, keeps, out / "sweep.png")
    stderr.print(table(rows, keeps))


if __name__ == "__main__":
    typer.run(main)
