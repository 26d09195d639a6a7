"""Does OAT search as people do? Cross-validation on human scanpaths, against every baseline and people themselves.

    python packages/gaze-oat/proofs/amazon_covers.py --data Amazon.json --out packages/gaze-oat/proofs/results

Collages are dealt into folds; nothing of a collage that is tested is ever trained on. The collages' pictures are not
part of the data, so objects are known by their position and by being the target or not; OAT therefore learns how people
move, not what draws them. Every model is fitted on the same training collages. Baselines get human lengths and endings.
Folds are saved as they come; a second start goes on. About 6 minutes of one core; --quick does two folds of few
epochs.

Data: Sattar et al., CVPR 2015; JSON by Stauden et al., KI 2018 (CC BY-NC-SA 4.0: not to be shipped in products).
"""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from rich.progress import Progress

from gaze_oat.baselines import KERNELS, MarkovKernel, fit_baselines, layout_of
from gaze_oat.drawing import plot_paths
from gaze_oat.evaluation import EvaluationConfig, between_observers, evaluate
from gaze_oat.jobs import trials_of
from gaze_oat.likelihood import done_probabilities
from gaze_oat.oat import OATConfig, OATModel
from gaze_oat.object_encoder import position_features
from gaze_oat.readers import read_amazon_covers
from gaze_oat.scanpaths import ScanpathData, path_of_objects, write_text
from gaze_oat.splits import scene_folds
from gaze_oat.training import OATTrainer, TrainingConfig

matplotlib.use("Agg")
stderr = Console(stderr=True)
DATA = Path(__file__).resolve().parents[4] / "shared/data/amazon-covers-gaze/Amazon.json"
MODEL = OATConfig(
    width=64, feedforward=64, encoder_layers=2, decoder_layers=2, crop_encoder="features", feature_size=2,
    offset_bias=True,
)  # fmt: skip
TRAINING = TrainingConfig(epochs=30, lr=2e-3, schedule="cosine", patience=30, monitor="nll", mirror=True)
NAMES = ["OAT", *KERNELS]
COLUMNS = {
    "nll": "NLL", "sim": "SIM", "delta": "delta", "step length": "step length",
    "step direction": "direction", "step turn": "turn", "ss": "SS",
    "fed": "FED", "scanmatch": "ScanMatch", "multimatch": "MultiMatch", "nss": "NSS",
}  # fmt: skip
LOWER = {"nll", "delta", "step length", "step direction", "step turn", "fed"}


def run_fold(
    data: ScanpathData, test: list[str], watch: list[str], folder: Path, *, seed: int, samples: int, epochs: int
) -> dict[str, Any]:
    """Fits all models on the other collages; gives sampled paths and the probability of each human decision."""
    train = data.choose(scenes=[name for name in data.scenes if name not in {*test, *watch}])
    fitted = fit_baselines(data.choose(scenes=[name for name in data.scenes if name not in test]))
    objects = {
        name: position_features(layout_of(data, name), int(scene.target or 0)) for name, scene in data.scenes.items()
    }
    torch.manual_seed(seed)
    longest = max(len(path) for path in train)
    model = OATModel(OATConfig(**asdict(MODEL) | {"max_length": longest}))
    model.start_from_steps(MarkovKernel.fit(train).steps)
    settings = TrainingConfig(**asdict(TRAINING) | {"epochs": epochs, "seed": seed})
    validation = trials_of(data.choose(scenes=watch), objects)
    reports = OATTrainer(model, trials_of(train, objects), validation, settings, folder=folder).run()
    found: dict[str, Any] = {"epochs": len(reports), "best": reports[-1].best, "models": {}}
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    for name in NAMES:
        paths, chances = {}, {}
        for scene in test:
            layout, target = layout_of(data, scene), int(data.scenes[scene].target or 0)
            human = [path.objects for path in data.on_scene(scene) if path.objects is not None]
            if name == "OAT":
                drawn = model.generate(objects[scene], layout, target, num_samples=samples, generator=generator).paths
                given = model.probabilities(objects[scene], layout, target, human)
            else:
                drawn = fitted[name].sample(layout, target, num_samples=samples, rng=rng, max_length=longest)
                given = fitted[name].probabilities(layout, target, human)
            paths[scene] = [path.tolist() for path in drawn]
            chances[scene] = [
                done_probabilities(p, path.tolist()).tolist() for p, path in zip(given, human, strict=True)
            ]
        found["models"][name] = {"paths": paths, "done": chances}
    return found


def all_folds(
    data: ScanpathData, out: Path, *, folds: int, count: int, seed: int, samples: int, epochs: int
) -> list[dict[str, Any]]:
    """Results of the first `count` of the folds, each computed once and kept in `out`."""
    dealt, results = scene_folds(data, folds, seed=seed), []
    with Progress(console=stderr) as progress:
        for number in progress.track(range(count), description="folds"):
            file = out / f"fold_{number}.json"
            if not file.exists():
                watch = dealt[(number + 1) % folds]
                found = run_fold(
                    data,
                    dealt[number],
                    watch,
                    out / f"fold_{number}",
                    seed=seed + number,
                    samples=samples,
                    epochs=epochs,
                )
                write_text(file, json.dumps(found))
            results.append(json.loads(file.read_text()))
            stderr.print(f"fold {number}: {results[-1]['epochs']} epochs, validation NLL {results[-1]['best']:.4f}")
    return results


def predicted(data: ScanpathData, results: list[dict[str, Any]], name: str) -> ScanpathData:
    """The sampled paths of a model on all tested collages."""
    paths = [
        path_of_objects(data.scenes[scene], f"sample {number}", ids)
        for fold in results
        for scene, own in fold["models"][name]["paths"].items()
        for number, ids in enumerate(own)
    ]
    return ScanpathData(data.scenes.values(), paths)


def likelihood_rows(results: list[dict[str, Any]], name: str, *, seed: int, resamples: int) -> list[dict[str, Any]]:
    """NLL and SIM with intervals: means over decisions, collages drawn anew."""
    done = {scene: np.concatenate(own) for fold in results for scene, own in fold["models"][name]["done"].items()}
    parts = np.array([[len(p), -np.log(p).sum(), p.sum()] for p in done.values()])
    draws = np.random.default_rng(seed).multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=resamples)
    total = np.concatenate([np.ones((1, len(parts))), draws]) @ parts
    rows = []
    for metric, column in (("nll", 1), ("sim", 2)):
        values = total[:, column] / total[:, 0]
        low, high = np.quantile(values[1:], [0.025, 0.975])
        rows.append({"metric": metric, "value": values[0], "low": low, "high": high})
    return rows


def score(data: ScanpathData, results: list[dict[str, Any]], *, seed: int, resamples: int) -> pd.DataFrame:
    """Every metric of every model and of people: model, metric, value, low, high."""
    config, tables = EvaluationConfig(resamples=resamples, seed=seed), []
    for name in NAMES:
        stderr.print(f"scoring {name}")
        table = evaluate(predicted(data, results, name), data, config)
        extra = pd.DataFrame(likelihood_rows(results, name, seed=seed, resamples=resamples))
        tables.append(pd.concat([extra, table], ignore_index=True).assign(model=name))
    tables.append(between_observers(data, config).assign(model="people"))
    return pd.concat(tables, ignore_index=True)


def as_markdown(table: pd.DataFrame) -> str:
    """Models down, metrics across, the best model of each metric in bold, half the interval after it."""
    cells: dict[str, dict[str, str]] = {name: {} for name in [*NAMES, "people"]}
    for metric in COLUMNS:
        own = table[table["metric"] == metric].set_index("model")
        models = own.loc[[name for name in NAMES if name in own.index], "value"]
        best = models.idxmin() if metric in LOWER else models.idxmax()
        for name, row in own.iterrows():
            text = f"{row['value']:.3f} ± {(row['high'] - row['low']) / 2:.3f}"
            cells[str(name)][metric] = f"**{text}**" if name == best else text
    arrows = [f"{title} {'↓' if metric in LOWER else '↑'}" for metric, title in COLUMNS.items()]
    lines = ["| | " + " | ".join(arrows) + " |", "| --- |" + " ---: |" * len(arrows)]
    lines += [
        f"| {name} | " + " | ".join(row.get(metric, "") for metric in COLUMNS) + " |" for name, row in cells.items()
    ]
    return "\n".join(lines) + "\n"


def draw_table(table: pd.DataFrame, file: Path) -> None:
    """A panel a metric: every model with its interval, people as a band."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(3, 4, figsize=(15, 9), layout="constrained")
    for axes, (metric, title) in zip(panels.flat, COLUMNS.items(), strict=False):
        own = table[table["metric"] == metric].set_index("model")
        names = [name for name in NAMES if name in own.index]
        for place, name in enumerate(names):
            value, low, high = own.loc[name, ["value", "low", "high"]]
            colour = "#d62728" if name == "OAT" else "0.35"
            axes.plot([low, high], [place, place], "-", color=colour, linewidth=2)
            axes.plot([value], [place], "o", color=colour)
        if "people" in own.index:
            axes.axvline(own.loc["people", "value"], color="#1f77b4", linestyle="--", linewidth=1.5)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{title} ({'lower' if metric in LOWER else 'higher'} is better)", fontsize=10)
        axes.grid(axis="x", color="0.9")
    panels.flat[-1].axis("off")
    note = (
        "red: OAT\ngrey: baselines, with human\nlengths and endings\nbars: 95 % intervals over collages\n"
        "blue, dashed: between people\n(delta and steps: one person\nagainst the others)"
    )
    panels.flat[-1].text(0, 0.5, note, fontsize=10, va="center")
    _save(figure, file)


def draw_paths(data: ScanpathData, results: list[dict[str, Any]], file: Path) -> None:
    """Four collages: people, OAT, and two baselines, six paths each, drawn by lot."""
    from matplotlib import pyplot as plt

    shown = [next(iter(fold["models"]["OAT"]["paths"])) for fold in results][:4]
    rows = ["people", "OAT", "Markov (steps)", "random"]
    figure, panels = plt.subplots(
        len(rows), len(shown), figsize=(4.2 * len(shown), 11), layout="constrained", squeeze=False
    )
    for column, scene in enumerate(shown):
        fold = next(fold for fold in results if scene in fold["models"]["OAT"]["paths"])
        for row, name in enumerate(rows):
            human = [path.objects for path in data.on_scene(scene) if path.objects is not None]
            drawn = [np.array(path) for path in fold["models"].get(name, {"paths": {scene: []}})["paths"][scene]]
            chosen = np.random.default_rng(column).permutation(len(drawn))[:6]
            paths = human[:6] if name == "people" else [drawn[number] for number in chosen]
            title = f"{name}: collage {scene}, {np.mean([len(p) for p in paths]):.1f} fixations"
            plot_paths(
                panels[row][column], layout_of(data, scene), paths, target=data.scenes[scene].target, title=title
            )
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    part = file.with_name(file.name + ".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(file)


def verdicts(table: pd.DataFrame) -> dict[str, dict[str, float | str | bool]]:
    """For each metric that OAT must win: its figure, the best baseline's, and whether it is better."""
    found: dict[str, dict[str, float | str | bool]] = {}
    for metric in ("nll", "delta", "step length", "step direction"):
        own = table[(table["metric"] == metric) & (table["model"] != "people")].set_index("model")["value"]
        rival = own.drop("OAT").idxmin()
        found[metric] = {
            "OAT": float(own["OAT"]), "best baseline": str(rival), "its value": float(own[rival]),
            "OAT is better": bool(own["OAT"] < own[rival]),
        }  # fmt: skip
    return found


def main(
    data: Annotated[Path, typer.Option(help="Amazon.json of the book-cover scanpaths.")] = DATA,
    out: Annotated[Path, typer.Option(help="Gets amazon_covers.json, .md and two PNGs.")] = Path(__file__).parent
    / "results",
    work: Annotated[Path, typer.Option(help="Where folds are kept, to go on from.")] = Path("runs/amazon-covers"),
    seed: Annotated[int, typer.Option(help="Of folds, weights, draws and intervals.")] = 1234,
    quick: Annotated[bool, typer.Option(help="Two of five folds, two epochs, few samples: does it run?")] = False,
) -> None:
    """Cross-validates OAT and the baselines on human scanpaths and writes table and figures."""
    torch.set_num_threads(1)
    human = read_amazon_covers(data).without_outliers()
    work = work / f"{'quick' if quick else 'folds'}_{seed}"
    count, samples, epochs, resamples = (2, 4, 2, 50) if quick else (5, 50, TRAINING.epochs, 1000)
    results = all_folds(human, work, folds=5, count=count, seed=seed, samples=samples, epochs=epochs)
    tested = [scene for fold in results for scene in fold["models"]["OAT"]["paths"]]
    human = human.choose(scenes=tested)
    table = score(human, results, seed=seed, resamples=resamples)
    report = {
        "command": "python packages/gaze-oat/proofs/amazon_covers.py", "seed": seed, "quick": quick,
        "collages": len(tested), "human paths": len(human), "samples a collage": samples,
        "model": asdict(MODEL), "parameters": sum(p.numel() for p in OATModel(MODEL).parameters()),
        "training": asdict(TRAINING), "epochs": [fold["epochs"] for fold in results],
        "verdicts": verdicts(table), "scores": table.to_dict("records"),
        "torch": torch.__version__, "gaze-oat": version("gaze-oat"),
    }  # fmt: skip
    write_text(out / "amazon_covers.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "amazon_covers.md", as_markdown(table))
    draw_table(table, out / "amazon_covers_metrics.png")
    draw_paths(human, results, out / "amazon_covers_paths.png")
    stderr.print(report["verdicts"])


if __name__ == "__main__":
    typer.run(main)
