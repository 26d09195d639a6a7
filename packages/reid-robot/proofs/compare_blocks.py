"""Attention blocks side by side on generated people: accuracy, latency in PyTorch and ONNX Runtime, multiply-adds.

    uv run --package reid-robot python packages/reid-robot/proofs/compare_blocks.py

The claim of Eisenbach et al. (arXiv:2302.14574): a cheap block keeps up with heavy ones and with deeper networks while
it hardly slows inference. All blocks sit after the four stages of the same ResNet-18 of width 16 (where relation-aware
attention was published), are trained by the same recipe on the same people and batches, seed by seed, and are tested on
other people: every picture is searched for among those by the other five cameras. `resnet34` is the plain network with
twice the blocks.

Each (block, seed) is a file below `<out>/compare_blocks/`, written when it is done; a second start goes on. Seeds come
first, so that a run that is cut off has compared all blocks on fewer seeds. Intervals, 95 %, are of the mean over seeds
of mAP minus the plain network's, from resampling test people. Latencies are measured last, all networks taking turns in
one process. About 25 minutes on one core.
"""

import json
import platform
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from reid_robot.costs import compare_latency, count_macs, count_parameters, take_turns
from reid_robot.network import ReidConfig, ReidNet
from reid_robot.onnx_export import OnnxEmbedder, export_onnx
from reid_robot.ranking import Labels, evaluate_features
from reid_robot.training import TrainingConfig, extract, train
from reid_robot.walkers import CropSet, WalkerConfig, draw_walkers

BLOCKS = (
    "plain", "light", "rga-sc", "nonlocal", "se", "cbam", "eca", "light-c", "light-s", "rga-s", "rga-c", "resnet34",
)  # fmt: skip
WHERE = "s1.last,s2.last,s3.last,s4.last"
stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all runs share."""

    people: int = 300
    test_people: int = 100
    cameras: int = 6
    cast: float = 0.15
    size: tuple[int, int] = (64, 32)
    steps: int = 300
    batch_people: int = 16
    rate: float = 2e-3
    latency_runs: int = 200


QUICK = Plan(people=8, test_people=5, cameras=2, steps=2, batch_people=4, latency_runs=3)


def network(name: str, plan: Plan, num_ids: int = 0) -> ReidNet:
    """The network called `name` in the tables."""
    backbone = "resnet34_reid_w16" if name == "resnet34" else "resnet18_reid_w16"
    attention = None if name in ("plain", "resnet34") else name
    return ReidNet(
        ReidConfig(backbone=backbone, attention=attention, where=WHERE, input_size=plan.size, num_ids=num_ids)
    )


def people(plan: Plan) -> tuple[CropSet, CropSet]:
    """To train and to test on: other people, the same cameras."""
    config = WalkerConfig(size=plan.size, cameras=plan.cameras, images_per_camera=1, cast=plan.cast)
    return draw_walkers(plan.people, config, seed=0), draw_walkers(plan.test_people, config, seed=1_000_000)


def run(name: str, seed: int, plan: Plan, data: tuple[CropSet, CropSet], out: Path) -> dict[str, Any]:
    """One training and its test; read from its file if that is there."""
    file = out / "compare_blocks" / f"{name}-{seed}.json"
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["plan"] != json.loads(json.dumps(asdict(plan))):
            raise typer.BadParameter(f"{file} was made by another plan: give another --out")
        return kept
    training, test = data
    torch.manual_seed(seed)
    net = network(name, plan, plan.people)
    recipe = TrainingConfig(
        steps=plan.steps, people=plan.batch_people, rate=plan.rate, warm_up=plan.steps // 10, drops=(0.6, 0.85),
        erase=0.3, seed=seed,
    )  # fmt: skip
    with Progress(console=stderr) as progress:
        task = progress.add_task(f"{name}, seed {seed}", total=plan.steps)
        losses = train(net, training, recipe, on_step=lambda step, *_: progress.update(task, completed=step))
    features, labels = extract(net, test).numpy(), Labels(test.ids.numpy(), test.cameras.numpy())
    found = evaluate_features(features, features, labels, labels)
    result = {
        "block": name, "seed": seed, "plan": asdict(plan), "map": found.map, "rank1": found.rank1, "minp": found.minp,
        "ap": found.ap.tolist(), "ids": test.ids.tolist(), "loss": losses[-1], "torch": torch.__version__,
        "timm": version("timm"),
    }  # fmt: skip
    _write(file, json.dumps(result))
    return result


def costs(plan: Plan) -> dict[str, dict[str, float]]:
    """Parameters, multiply-adds and latencies of every network; times are of random weights, which cost the same."""
    torch.manual_seed(0)
    networks = {name: network(name, plan).eval() for name in BLOCKS}
    crops = torch.randint(0, 256, (1, 3, *plan.size), dtype=torch.uint8)
    found: dict[str, dict[str, float]] = {}
    for name, net in networks.items():
        found[name] = {"parameters": count_parameters(net.backbone), "mmacs": count_macs(net, crops) / 1e6}
    for batch in (1, 8):
        report = compare_latency(networks, batch=batch, warm_up=min(20, plan.latency_runs), runs=plan.latency_runs)
        for name, latency in report.results.items():
            found[name] |= {f"torch_{batch}": latency.median, f"torch_{batch}_ratio": latency.ratio}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, net in networks.items():
            export_onnx(net, Path(folder) / f"{name}.onnx")
            sessions[name] = OnnxEmbedder(Path(folder) / f"{name}.onnx", threads=torch.get_num_threads())
        for batch in (1, 8):
            pixels = crops.expand(batch, -1, -1, -1).numpy()
            calls = {name: lambda s=session, p=pixels: s.run(p) for name, session in sessions.items()}
            for name, latency in take_turns(calls, warm_up=min(20, plan.latency_runs), runs=plan.latency_runs).items():
                found[name] |= {f"onnx_{batch}": latency.median, f"onnx_{batch}_ratio": latency.ratio}
    return found


def difference(
    runs: list[dict[str, Any]], plain: list[dict[str, Any]], *, resamples: int = 4000
) -> tuple[float, float]:
    """95 % interval of the mean difference of AP, over seeds that both have, resampling people."""
    ids = np.array(runs[0]["ids"])
    theirs = {r["seed"]: np.array(r["ap"], dtype=float) for r in plain}
    both = [np.array(r["ap"], dtype=float) - theirs[r["seed"]] for r in runs if r["seed"] in theirs]
    each = np.mean(both, axis=0)
    per_person = np.array([np.nanmean(each[ids == person]) for person in np.unique(ids)])
    rng = np.random.default_rng(0)
    means = per_person[rng.integers(0, len(per_person), (resamples, len(per_person)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def summary(results: list[dict[str, Any]], costs: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each network that has been trained."""
    rows = []
    plain = [r for r in results if r["block"] == "plain"]
    for name in BLOCKS:
        own = [r for r in results if r["block"] == name]
        if not own:
            continue
        scores = {key: float(np.mean([r[key] for r in own])) for key in ("map", "rank1", "minp")}
        low, high = difference(own, plain) if name != "plain" else (0.0, 0.0)
        spread = float(np.std([r["map"] for r in own], ddof=1)) if len(own) > 1 else 0.0
        rows.append({"block": name, "seeds": len(own), **scores, "sd": spread, "low": low, "high": high, **costs[name]})
    return rows


def table(rows: list[dict[str, Any]], plan: Plan) -> str:
    """Markdown."""
    lines = [
        "| block | mAP | against plain, 95 % | rank 1 | MMACs | parameters | torch, 1 crop | ONNX, 1 crop "
        "| ONNX, 8 crops |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        against = "" if r["block"] == "plain" else f"{100 * r['low']:+.1f} to {100 * r['high']:+.1f}"
        cells = [r["block"], f"{100 * r['map']:.1f}", against, f"{100 * r['rank1']:.1f}", f"{r['mmacs']:.2f}"]
        cells += [f"{r['parameters'] / 1e3:,.0f} k"]
        cells += [
            f"{1e3 * r[key]:.2f} ms" if r["block"] == "plain" else f"{100 * (r[key + '_ratio'] - 1):+.0f} %"
            for key in ("torch_1", "onnx_1", "onnx_8")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = sorted({r["seeds"] for r in rows})
    lines.append("")
    lines.append(
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}; crops {plan.size[0]} x "
        f"{plan.size[1]}, ResNet-18 of width 16, blocks after all four stages; {plan.steps} steps on {plan.people} "
        f"generated people, tested on {plan.test_people} others; seeds: {' to '.join(map(str, seeds))}; latency: "
        f"difference to plain, median of {plan.latency_runs} alternating runs, batch norms folded; "
        "`uv run --package reid-robot python packages/reid-robot/proofs/compare_blocks.py`"
    )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Accuracy against latency, in both engines."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2, sharey=True), ("torch_1", "onnx_1"), ("PyTorch", "ONNX Runtime"), strict=True
    ):
        for r in rows:
            colour = (
                "tab:red"
                if r["block"].startswith("light")
                else "black"
                if r["block"] in ("plain", "resnet34")
                else "tab:blue"
            )
            axes.errorbar(
                1e3 * r[key], 100 * r["map"], yerr=100 * r["sd"], fmt="o", color=colour, capsize=3, markersize=6
            )
            axes.annotate(
                r["block"],
                (1e3 * r[key], 100 * r["map"]),
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=9,
                color=colour,
            )
        axes.set_xlabel("milliseconds per crop (batch 1)")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.margins(x=0.16, y=0.12)
    figure.axes[0].set_ylabel("mAP, % (bars: standard deviation over seeds)")
    figure.suptitle("Attention blocks on one small network: up is better, left is faster")
    figure.savefig(out, dpi=130)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").replace(path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path(__file__).parent / "results",
    seed: Annotated[int, typer.Option(help="The first of the seeds.")] = 0,
    seeds: Annotated[int, typer.Option(help="How many.")] = 3,
    quick: Annotated[bool, typer.Option(help="Two steps each: does it run?")] = False,
    report: Annotated[bool, typer.Option(help="Only measure latency and report what has been trained so far.")] = False,
) -> None:
    """Trains every block with every seed, measures, and writes compare_blocks.json, .md and .png."""
    plan = QUICK if quick else Plan()
    data = None if report else people(plan)
    results = []
    for number in range(seed, seed + seeds):
        for name in BLOCKS:
            if data is not None or (out / "compare_blocks" / f"{name}-{number}.json").exists():
                results.append(run(name, number, plan, data or people(QUICK), out))
                stderr.print(f"{name}, seed {number}: mAP {results[-1]['map']:.3f}")
    rows = summary(results, costs(plan))
    _write(out / "compare_blocks.json", json.dumps({"plan": asdict(plan), "rows": rows}, indent=1) + "\n")
    _write(out / "compare_blocks.md", table(rows, plan))
    draw(rows, out / "compare_blocks.png")
    stderr.print(table(rows, plan))


if __name__ == "__main__":
    typer.run(main)
