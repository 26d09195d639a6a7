"""What each token method leaves of a trained ViT, and what it gains: accuracy against work and against images a second.

    uv run --package vit-efficient python packages/vit-efficient/proofs/compare.py --digits samples/data/digits.png

The ViT is that of `train_base.py`. Every method starts from it, is set to the same shares of its multiply-adds, and is
fine-tuned on the same canvases in the same order with the same optimiser; methods that work without training are shown
as they come out of the box too. A seed decides the canvases of a fine-tune; all are tested on the same 1,000 canvases
of held-out digits. Work is what torch counts on these canvases, padding included; images a second are measured at the
end in one process, taking turns, one thread.

Decided here: loss is cross-entropy + 0.5 x KL to the base model (AS-ViT and DynamicViT add their own terms, Sparsifiner
its distance to the features); drop path is off, as AS-ViT's authors have it. Sparsifiner saves attention only, so its
settings are shares of keys, not of work; its predictors are trained first, once a seed, as the paper's first phase.
Every finished unit is a file in WORK, so that a second start goes on where the first stopped.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from train_base import load_base

import vit_efficient as ve
from vit_efficient.baselines.dynamicvit import DynamicViTLoss, dynamicvit_forward
from vit_efficient.digits import Canvases, Digits, draw_canvases, load_digits
from vit_efficient.sparsifiner import reconstruction_loss, set_phase, sparse_layers

RESULTS = Path(__file__).parent / "results"
WORK_SHARES = (0.5, 0.4, 0.65)
KEY_SHARES = (0.25, 0.1)
BLOCKS = (3, 6, 9)
"""Where AS-ViT drops tokens: where EViT and DynamicViT do. The paper's rule (4, 7, 10) leaves little room below 0.5."""
MIN_KEEP = {0.65: 96, 0.5: 56, 0.4: 24}
"""Patches that AS-ViT leaves at least, by share of work: images with a sharp class attention would keep too few."""
stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One fine-tune, the same for all. predictor_steps: of Sparsifiner's first phase, before it."""

    steps: int = 16
    batch: int = 32
    lr: float = 2e-4
    threshold_lr: float = 3e-5
    weight_decay: float = 0.05
    predictor_steps: int = 48
    predictor_batch: int = 8
    predictor_lr: float = 5e-3
    calibration: int = 40


@dataclass(frozen=True)
class Lesson:
    """Canvases of one step, and what the base model makes of them."""

    images: Tensor
    labels: Tensor
    logits: Tensor
    features: Tensor


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method in this comparison.

    open: (model, share, calibration images) -> handle. loss: (model, share, lesson) -> what a step minimises.
    free: whether it is also shown without training. shares: of work, or of keys.
    """

    open: Callable[[Any, float, Tensor], ve.Handle]
    loss: Callable[[Any, float, Lesson], Tensor]
    color: str
    free: bool = True
    shares: tuple[float, ...] = WORK_SHARES


# ---- the methods


def imitation(logits: Tensor, lesson: Lesson) -> Tensor:
    """Cross-entropy + 0.5 x KL to the base model."""
    kl = F.kl_div(logits.log_softmax(-1), lesson.logits.log_softmax(-1), log_target=True, reduction="batchmean")
    return F.cross_entropy(logits, lesson.labels) + 0.5 * kl


def plain_loss(model: Any, _share: float, lesson: Lesson) -> Tensor:
    return imitation(model(lesson.images), lesson)


def asvit_loss(model: Any, share: float, lesson: Lesson) -> Tensor:
    masked = ve.masked_forward(model, lesson.images)
    return ve.AdaptiveSparsityLoss(model, share)(masked, lesson.labels, lesson.logits).total


def dynamicvit_loss(model: Any, _share: float, lesson: Lesson) -> Tensor:
    output = dynamicvit_forward(model, lesson.images)
    return DynamicViTLoss(model)(output, lesson.labels, lesson.logits, lesson.features)


def sparsifiner_loss(model: Any, _share: float, lesson: Lesson) -> Tensor:
    features = model.forward_features(lesson.images)
    distance = F.mse_loss(features[:, model.num_prefix_tokens :], lesson.features[:, model.num_prefix_tokens :])
    return imitation(model.forward_head(features), lesson) + 0.5 * distance


def open_asvit(model: Any, share: float, images: Tensor) -> ve.Handle:
    handle = ve.apply_adaptive_sparsity(model, ve.AdaptiveSparsityConfig(locations=BLOCKS, min_keep=MIN_KEEP[share]))
    ve.fit_thresholds(model, images, share, tolerance=0.01)
    return handle


def open_by_ratio(apply: Callable[[Any, float], ve.Handle], model: Any, share: float, images: Tensor) -> ve.Handle:
    """The method at the keep ratio at which it does `share` of the work."""
    dense, low, high = work(model, images[:2]), 0.02, 1.0
    for _ in range(9):
        ratio = (low + high) / 2
        with apply(model, ratio):
            low, high = (ratio, high) if work(model, images[:2]) < share * dense else (low, ratio)
    return apply(model, (low + high) / 2)


def open_tome(model: Any, share: float, images: Tensor) -> ve.Handle:
    """ToMe with the number of merges a block that comes closest to `share` of the work."""
    wanted, found = share * work(model, images[:2]), {}
    few, many = 0, model.patch_embed.num_patches // 2
    while many - few > 1:
        r = (few + many) // 2
        with ve.apply_tome(model, ve.ToMeConfig(r=r)):
            found[r] = work(model, images[:2]) - wanted
        few, many = (r, many) if found[r] > 0 else (few, r)
    return ve.apply_tome(model, ve.ToMeConfig(r=min(found, key=lambda r: abs(found[r]))))


def open_sparsifiner(granularity: Any, model: Any, share: float, _images: Tensor) -> ve.Handle:
    config = ve.SparsifinerConfig(keep_rate=share, granularity=granularity, block=16)
    return ve.apply_sparsifiner(model, config)


def evit(model: Any, ratio: float) -> ve.Handle:
    return ve.apply_evit(model, ve.EViTConfig(keep_ratio=ratio))


def dynamicvit(model: Any, ratio: float) -> ve.Handle:
    return ve.apply_dynamicvit(model, ve.DynamicViTConfig(keep_ratio=ratio))


def fixed(choice: Any, model: Any, ratio: float) -> ve.Handle:
    return ve.apply_fixed_tokens(model, ve.FixedTokensConfig(keep_ratio=ratio, choice=choice))


WAYS = {
    "AS-ViT": Way(open=open_asvit, loss=asvit_loss, color="C3"),
    "EViT": Way(open=partial(open_by_ratio, evit), loss=plain_loss, color="C0"),
    "ToMe": Way(open=open_tome, loss=plain_loss, color="C2"),
    "DynamicViT": Way(open=partial(open_by_ratio, dynamicvit), loss=dynamicvit_loss, color="C1", free=False),
    "uniform": Way(open=partial(open_by_ratio, partial(fixed, "uniform")), loss=plain_loss, color="C7"),
    "random": Way(open=partial(open_by_ratio, partial(fixed, "random")), loss=plain_loss, color="C8"),
    "Sparsifiner": Way(
        open=partial(open_sparsifiner, "token"), loss=sparsifiner_loss, color="C4", free=False, shares=KEY_SHARES
    ),
    "Sparsifiner, blocks": Way(
        open=partial(open_sparsifiner, "block"), loss=sparsifiner_loss, color="C5", free=False, shares=KEY_SHARES
    ),
}


# ---- one unit: a method at a share, untrained or fine-tuned with a seed


@dataclass(frozen=True, kw_only=True)
class Unit:
    """seed: None for the method without training."""

    way: str
    share: float
    seed: int | None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.way.lower().replace(', ', '-')}_{self.share}_{'free' if self.seed is None else self.seed}"


def units(seeds: int, shares: Callable[[Way], Sequence[float]]) -> list[Unit]:
    """What there is to do, the most telling first."""
    free = [Unit(way=n, share=s, seed=None) for n, way in WAYS.items() if way.free for s in shares(way)]
    tuned = [Unit(way=n, share=s, seed=i) for i in range(seeds) for n, way in WAYS.items() for s in shares(way)]
    return free + tuned


@torch.no_grad()
def lessons(digits: Digits, recipe: Recipe, seed: int) -> list[Lesson]:
    """The canvases of a seed's fine-tunes."""
    base, generator, found = load_base(), torch.Generator().manual_seed(1000 + seed), []
    for _ in range(recipe.steps):
        index = torch.randint(len(digits.labels), (recipe.batch,), generator=generator)
        canvases = draw_canvases(digits, index, generator)
        features = base.forward_features(canvases.images)
        found.append(Lesson(canvases.images, canvases.labels, base.forward_head(features), features))
    return found


def _bag_flops(weight: Sequence[int], indices: Sequence[int], *_rest: Any, **_more: Any) -> int:
    return 2 * math.prod(indices) * weight[1]


def counter() -> FlopCounterMode:
    """Torch's counter, which leaves out the sums of rows that Sparsifiner's scores are."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False, custom_mapping={aten._embedding_bag: _bag_flops, aten._embedding_bag_forward_only: _bag_flops}
    )


def work(model: nn.Module, images: Tensor) -> float:
    """Multiply-adds of an image, in units of 1e9."""
    with torch.inference_mode(), counter() as counted:
        model(images)
    return counted.get_total_flops() / 2e9 / len(images)


def judge(model: nn.Module, test: Canvases) -> dict[str, float]:
    """Accuracy and work on the test canvases."""
    right = 0
    with torch.inference_mode(), counter() as counted:
        for images, labels in zip(test.images.split(100), test.labels.split(100), strict=True):
            right += int((model(images).argmax(-1) == labels).sum())
    spent = counted.get_total_flops() / 2e9 / len(test.labels)
    return {"accuracy": right / len(test.labels), "gmacs": spent}


def descend(model: Any, recipe: Recipe, steps: int, lr: float, loss_at: Callable[[int], Tensor]) -> float:
    """AdamW with a cosine over whatever of the model learns; the mean loss of the last quarter."""
    thresholds = [p for n, p in model.named_parameters() if n.endswith("thresholds")]
    weights = [p for p in model.parameters() if p.requires_grad and all(p is not t for t in thresholds)]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": recipe.weight_decay, "top": lr},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0, "top": lr},
        {"params": thresholds, "weight_decay": 0.0, "top": recipe.threshold_lr},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.99))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 3)
            group["lr"] = group["top"] * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-max(steps // 4, 1) :])


def train_predictors(model: Any, digits: Digits, recipe: Recipe, seed: int, saved: Path) -> None:
    """Sparsifiner's first phase; its predictors do not depend on the share of keys, so a seed trains them once."""
    layers = sparse_layers(model)
    if saved.exists():
        state = torch.load(saved, weights_only=True)
    else:
        generator = torch.Generator().manual_seed(2000 + seed)

        def loss_at(_step: int) -> Tensor:
            index = torch.randint(len(digits.labels), (recipe.predictor_batch,), generator=generator)
            return 0.01 * reconstruction_loss(model, draw_canvases(digits, index, generator).images)

        set_phase(model, "reconstruct")
        descend(model, recipe, recipe.predictor_steps, recipe.predictor_lr, loss_at)
        state = [layer.predictor.state_dict() for layer in layers]
        torch.save(state, saved.with_suffix(".part"))
        saved.with_suffix(".part").replace(saved)
    for layer, weights in zip(layers, state, strict=True):
        layer.predictor.load_state_dict(weights)
    set_phase(model, "finetune")


def run_unit(unit: Unit, training: Digits, test: Canvases, recipe: Recipe, folder: Path) -> None:
    """Opens, fine-tunes and judges; writes the unit's weights and its figures."""
    way, generator = WAYS[unit.way], torch.Generator().manual_seed(77)
    calibration = draw_canvases(
        training, torch.randint(len(training.labels), (recipe.calibration,), generator=generator), generator
    ).images
    torch.manual_seed(unit.seed or 0)
    model: Any = load_base()
    untrained = folder / replace(unit, seed=None).name
    if unit.seed is not None and untrained.exists():
        handle = ve.load_method(model, untrained)
    else:
        handle = way.open(model, unit.share, calibration)
    loss = None
    if unit.seed is not None:
        if unit.way.startswith("Sparsifiner"):
            saved = folder / f"predictors_{unit.seed}.pt"
            train_predictors(model, training, recipe, unit.seed, saved)
        course = cached_lessons(training, recipe, unit.seed)
        loss = descend(model, recipe, recipe.steps, recipe.lr, lambda i: way.loss(model, unit.share, course[i]))
        if unit.way == "AS-ViT":  # its budget is met on average over the training; meet it at the end
            ve.scale_thresholds(model, calibration, unit.share, tolerance=0.01)
    ve.save_method(handle, folder / unit.name)
    write(folder / f"{unit.name}.json", asdict(unit) | judge(model, test) | {"loss": loss})


_LESSONS: dict[int, list[Lesson]] = {}


def cached_lessons(digits: Digits, recipe: Recipe, seed: int) -> list[Lesson]:
    """`lessons`, of the last seed asked for kept: units come seed by seed."""
    if seed not in _LESSONS:
        _LESSONS.clear()
        _LESSONS[seed] = lessons(digits, recipe, seed)
    return _LESSONS[seed]


def write(path: Path, report: Any) -> None:
    """JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


# ---- speed


def measure_speed(folder: Path, found: list[Unit], test: Canvases, *, batch: int, rounds: int) -> dict[str, float]:
    """Images a second of the base and of one unit per method and share: medians of turns, one thread, one process."""
    torch.set_num_threads(1)
    chosen = {(u.way, u.share): u for u in sorted(found, key=lambda u: u.seed if u.seed is not None else 99)[::-1]}
    models: dict[str, Any] = {"dense": load_base()}
    for unit in chosen.values():
        models[unit.name] = load_base()
        ve.load_method(models[unit.name], folder / unit.name)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            images = test.images[turn :: max(len(test.images) // batch, 1)][:batch]  # they stand by class
            for name, model in models.items():
                began = time.process_time()
                model(images)
                if turn:  # the first warms up
                    seconds[name].append((time.process_time() - began) / len(images))
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


# ---- what is shown


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method at a share: accuracy (mean, lowest, highest), work as a share of the base's, images a second."""

    way: str
    share: float
    trained: bool
    accuracy: float
    lowest: float
    highest: float
    work: float
    speed: float
    seeds: int


def gather(folder: Path, found: list[Unit], speed: dict[str, float], base: dict[str, float]) -> list[Point]:
    """Points of all finished units, in the order of `WAYS`."""
    points = []
    for way, share, trained in dict.fromkeys((u.way, u.share, u.seed is not None) for u in found):
        same = [u for u in found if (u.way, u.share, u.seed is not None) == (way, share, trained)]
        results = [json.loads((folder / f"{u.name}.json").read_text()) for u in same]
        right = [r["accuracy"] for r in results]
        rate = next(speed[u.name] for u in found if (u.way, u.share) == (way, share) and u.name in speed)
        done = statistics.fmean(r["gmacs"] for r in results) / base["gmacs"]
        points.append(Point(
            way=way, share=share, trained=trained, accuracy=statistics.fmean(right), lowest=min(right),
            highest=max(right), work=done, speed=rate / speed["dense"], seeds=len(same),
        ))  # fmt: skip
    return sorted(points, key=lambda p: (not p.trained, list(WAYS).index(p.way), -p.share))


def above_front(points: list[Point], way: str, of: Callable[[Point], float]) -> list[float]:
    """How far each trained point of `way` lies above the straight lines through every other trained method's points.

    of: the axis, work or speed. Accuracy of a rival at a point's place is interpolated, the base being part of its
    line; beyond a rival's last point it does not count.
    """
    rivals = {p.way for p in points if p.trained and p.way != way}
    margins = []
    for point in (p for p in points if p.trained and p.way == way):
        best = [rival_at(points, rival, of, of(point)) for rival in rivals]
        known = [value for value in best if value is not None]
        margins.append(point.accuracy - max(known) if known else math.nan)
    return margins


def rival_at(points: list[Point], way: str, of: Callable[[Point], float], place: float) -> float | None:
    """Accuracy of a method at a place on an axis, None beyond its points."""
    line = sorted((of(p), p.accuracy) for p in points if p.way == way and p.trained)
    for (left, low), (right, high) in pairwise(line):
        if left <= place <= right and right > left:
            return low + (high - low) * (place - left) / (right - left)
    return None


def table(points: list[Point], base: dict[str, float], speed: dict[str, float], note: str) -> str:
    lines = [
        "| method | set to | accuracy (lowest to highest) | work | images/s | without training |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| the ViT | | {base['accuracy']:.1%} | 1 ({base['gmacs']:.2f} GMACs) | 1 ({speed['dense']:.1f} images/s) | |",
    ]
    free = {(p.way, p.share): p for p in points if not p.trained}
    for p in (p for p in points if p.trained):
        alone = free.get((p.way, p.share))
        untrained = f"{alone.accuracy:.1%} at {alone.work:.2f}" if alone else ""
        spread = f" ({p.lowest:.1%} to {p.highest:.1%})" if p.seeds > 1 else ""
        kind = "of keys" if p.way.startswith("Sparsifiner") else "of work"
        lines.append(
            f"| {p.way} | {p.share} {kind} | {p.accuracy:.1%}{spread} | {p.work:.2f} | {p.speed:.2f}x | {untrained} |"
        )
    return "\n".join([*lines, "", note, ""])


def draw(points: list[Point], base: dict[str, float], path: Path) -> None:
    """Accuracy against images a second, whole and its upper part, and against work."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    whole, upper, by_work = figure.subplots(1, 3)
    good = [p.accuracy for p in points if p.way in ("AS-ViT", "EViT", "ToMe")] + [base["accuracy"]]
    for axis, of, label in (
        (whole, lambda p: p.speed, "images a second, dense = 1"),
        (upper, lambda p: p.speed, "images a second, dense = 1 (upper part)"),
        (by_work, lambda p: p.work, "multiply-adds, dense = 1 (upper part)"),
    ):
        for way in WAYS:
            for trained in (False, True):
                _line(axis, [p for p in points if p.way == way and p.trained is trained], of)
        axis.plot([1], [100 * base["accuracy"]], "k*", ms=12, label="dense", zorder=5)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        if axis is not whole:
            axis.set_ylim(100 * min(good) - 1.5, 100 * max(good) + 1.5)
    by_work.invert_xaxis()
    whole.set_ylabel("digits read right, %")
    whole.plot([], [], "k:x", ms=5, label="without training")
    whole.legend(fontsize=8, loc="lower left")
    figure.savefig(path.with_name(path.name + ".part"), format="png", dpi=150)
    path.with_name(path.name + ".part").replace(path)


def _line(axis: Any, points: list[Point], of: Callable[[Point], float]) -> None:
    """One method's points; whiskers from the lowest to the highest of the seeds."""
    points = sorted(points, key=of)
    if not points:
        return
    way, trained = points[0].way, points[0].trained
    x, y = [of(p) for p in points], [100 * p.accuracy for p in points]
    style = "o-" if trained else "x:"
    width = 2.4 if way == "AS-ViT" and trained else 1.2
    axis.plot(x, y, style, ms=5, color=WAYS[way].color, lw=width, label=way if trained else None)
    if trained:
        low, high = ([100 * abs(p.accuracy - edge) for p, edge in zip(points, edges, strict=True)] for edges in (
            [p.lowest for p in points], [p.highest for p in points]))  # fmt: skip
        axis.errorbar(x, y, [low, high], color=WAYS[way].color, fmt="none", capsize=2, lw=1)


def report(
    folder: Path, out: Path, found: list[Unit], test: Canvases, recipe: Recipe, *, anew: bool, rounds: int
) -> None:
    """Measures what was not measured yet; writes compare.json, compare.md, compare.png and token_maps.png."""
    if not (folder / "base.json").exists():
        write(folder / "base.json", judge(load_base(), test))
    base = json.loads((folder / "base.json").read_text())
    saved = folder / "speed.json"
    speed = json.loads(saved.read_text()) if saved.exists() and not anew else {}
    if not {(u.way, u.share) for u in found} <= {(u.way, u.share) for u in found if u.name in speed}:
        speed = measure_speed(folder, found, test, batch=32, rounds=rounds)
        write(saved, speed)
    points = gather(folder, found, speed, base)
    margins = {axis: above_front(points, "AS-ViT", of) for axis, of in (
        ("work", lambda p: p.work), ("speed", lambda p: p.speed))}  # fmt: skip
    write(out / "compare.json", {
        "base": base, "images_per_second": speed, "points": [asdict(p) for p in points], "recipe": asdict(recipe),
        "AS-ViT above the best rival": margins, "torch": torch.__version__, "timm": timm.__version__,
    })  # fmt: skip
    seeds = max(p.seeds for p in points)
    note = (
        f"{recipe.steps} steps of {recipe.batch} canvases each, {seeds} seed{'s' if seeds > 1 else ''}, 1,000 test "
        "canvases; AS-ViT above the best other method at the same work, in points: "
        + ", ".join(f"{100 * m:+.1f}" for m in margins["work"])
    )
    (out / "compare.md").write_text(table(points, base, speed, note))
    draw(points, base, out / "compare.png")
    shown = min((u for u in found if u.way == "AS-ViT"), key=lambda u: (u.seed is None, u.share), default=None)
    if shown is not None:
        model = load_base()
        ve.load_method(model, folder / shown.name)
        ve.draw_token_maps(model, test.images[:: max(len(test.images) // 5, 1)], out / "token_maps.png", limit=5)


def finished(folder: Path, wanted: list[Unit]) -> Iterator[Unit]:
    """Units whose figures are there."""
    return (unit for unit in wanted if (folder / f"{unit.name}.json").exists())


def main(
    digits: Annotated[Path | None, typer.Option(help="OpenCV's digits.png; without it scikit-learn's digits.")] = None,
    out: Annotated[Path, typer.Option(help="Gets compare.json, compare.md, compare.png.")] = RESULTS,
    work_folder: Annotated[Path, typer.Option("--work", help="Finished units, to go on from.")] = Path("runs/compare"),
    seeds: Annotated[int, typer.Option(help="Fine-tunes of each method and share.")] = 3,
    only: Annotated[
        list[str] | None, typer.Option(help="Methods to run, by their names in WAYS; all without it.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure images a second anew.")] = False,
    rounds: Annotated[int, typer.Option(help="Turns of every model when images a second are measured.")] = 7,
    report_only: Annotated[bool, typer.Option(help="Train nothing, show what is there.")] = False,
    quick: Annotated[bool, typer.Option(help="Few canvases, one step, one share: does it run?")] = False,
) -> None:
    """Compares all token methods on the trained ViT."""
    recipe = Recipe(steps=1, batch=2, predictor_steps=1, predictor_batch=1, calibration=4) if quick else Recipe()
    data = load_digits(digits)
    training, held_out = data.split()
    if quick:
        held_out = Digits(held_out.images[::50], held_out.labels[::50])
    test = draw_canvases(held_out, torch.arange(len(held_out.labels)), torch.Generator().manual_seed(10**6))
    wanted = units(1 if quick else seeds, lambda way: way.shares[:1] if quick else way.shares)
    work_folder.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    if only is not None and not set(only) <= set(WAYS):
        raise typer.BadParameter(f"--only takes {', '.join(WAYS)}, got {', '.join(only)}")
    wanted = [u for u in wanted if only is None or u.way in only]
    todo = [] if report_only else [u for u in wanted if u not in set(finished(work_folder, wanted))]
    with Progress(console=stderr) as progress:
        task = progress.add_task("units", total=len(wanted), completed=len(wanted) - len(todo))
        for unit in todo:
            began = time.process_time()
            run_unit(unit, training, test, recipe, work_folder)
            result = json.loads((work_folder / f"{unit.name}.json").read_text())
            stderr.print(f"{unit.name}: {result}, {time.process_time() - began:.0f} s")
            progress.advance(task)
    done = list(finished(work_folder, wanted))
    if not done:
        raise typer.BadParameter(f"no finished unit in {work_folder}: run without --report-only first")
    report(work_folder, out, done, test, recipe, anew=measure, rounds=1 if quick else rounds)


if __name__ == "__main__":
    typer.run(main)
