"""Loss-based reweighting against uniform weights: a toy regression, and a small language model on real text.

    uv run --package llm-attn python packages/llm-attn/proofs/loss_reweighting.py

- Toy: linear regression by SGD in which nine samples of ten lie in a small subspace; error on isotropic data.
- Language model: a Llama of two layers on bytes, trained from scratch on texts that installed packages carry, as
  they are; with 70 % of rows replaced by five sentences that repeat; and with a quarter of rows whose bytes are
  shuffled. Held out are whole documents, never altered. Strategies share seed, initial weights, batches and learning
  rate; the difference to uniform of the same seed is given with a 95 % interval (t, over seeds).

Each finished training is a file below `<out>/loss_reweighting/`: a second start goes on where the first stopped.
`loss_reweighting.json`, `.md` and `.png` are made from these. A few minutes on one core; `--width 256 --steps 2000` is
a more serious training of some hours.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attention_influence import gather
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llm_attn import LossReweighter, loss_weights, per_sample_losses

BASELINE = "uniform"
TOY_STRATEGIES = (BASELINE, "linupper", "quadratic", "extremes")
STRATEGIES = (BASELINE, "linupper", "quadratic")
COLOURS = {BASELINE: "#555555", "linupper": "#c2410c", "quadratic": "#1d4ed8", "extremes": "#15803d"}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantile 0.975 of Student's t, by number of seeds."""
RESULTS = Path(__file__).parent / "results"
stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all trainings share. documents: per class of text. plain_steps: before weights set in."""

    steps: int = 120
    plain_steps: int = 20
    rise: int = 10
    """Steps over which the learning rate rises, before it falls to a tenth by a cosine."""
    batch: int = 32
    length: int = 48
    width: int = 64
    rate: float = 2e-3
    r: float = 0.4
    duplicated: float = 0.7
    corrupted: float = 0.25
    repeated_sentences: int = 5
    documents: int = 330
    held_out: int = 200
    look_every: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)
    toy_seeds: int = 10


QUICK = Recipe(steps=4, plain_steps=1, rise=1, batch=4, width=32, documents=3, held_out=6, look_every=2, toy_seeds=2)


# ---- the toy: SGD on samples most of which say the same


def toy_errors(
    strategy: str, seed: int, *, steps: Sequence[int] = (50, 100, 200, 400), r: float = 0.4, noise: float = 0.0
) -> list[float]:
    """Squared error on isotropic data after so many steps of SGD (batch 64, rate 0.02), noiseless targets.

    512 samples of 20 dimensions, 460 of them in a random subspace of three dimensions and scaled by 0.6.
    """
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(20, 3, generator=draw)).Q
    inside = 0.6 * torch.randn(460, 3, generator=draw) @ basis.T
    x = torch.cat([inside, torch.randn(52, 20, generator=draw)])
    truth = torch.randn(20, generator=draw)
    y = x @ truth + noise * torch.randn(512, generator=draw)
    w, errors = torch.zeros(20), []
    for step in range(1, max(steps) + 1):
        chosen = torch.randperm(512, generator=draw)[:64]
        off = x[chosen] @ w - y[chosen]
        weights = loss_weights(off.square(), strategy=strategy, r=r)  # type: ignore[arg-type]
        w -= 0.02 * 2 * (weights * off) @ x[chosen]
        if step in steps:
            errors.append(float((w - truth).square().sum()))
    return errors


def toy(seeds: int) -> dict[str, Any]:
    """Mean error of each strategy on a grid of steps, without and with noise in the targets."""
    steps = list(range(10, 401, 10))
    found: dict[str, Any] = {"steps": steps, "seeds": seeds}
    for name, noise in (("noiseless", 0.0), ("noise 0.5", 0.5)):
        runs = {s: [toy_errors(s, seed, steps=steps, noise=noise) for seed in range(seeds)] for s in TOY_STRATEGIES}
        found[name] = {s: [statistics.mean(each) for each in zip(*of, strict=True)] for s, of in runs.items()}
    return found


# ---- text: rows of bytes


@dataclass(frozen=True)
class Text:
    """Bytes of the documents to train on and of those held out, and a name for both."""

    train: Tensor
    held_out: Tensor
    name: str


def read_text(recipe: Recipe, pool: Path) -> Text:
    """Documents of seven kinds, one in ten of them held out, the same for all seeds; kept in the file `pool`.

    Kept, since what is installed may change before a second start.
    """
    if not pool.exists():
        pool.parent.mkdir(parents=True, exist_ok=True)
        _write(pool, "".join(json.dumps(each) + "\n" for each in gather(recipe.documents, 0)))
    documents = [json.loads(line)["text"].encode() for line in pool.read_text().splitlines()]
    held, train = b"\n".join(documents[::10]), b"\n".join(d for n, d in enumerate(documents) if n % 10)
    return Text(_bytes(train), _bytes(held), hashlib.sha256(train + held).hexdigest()[:16])


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def windows(text: Tensor, count: int, length: int, draw: torch.Generator) -> Tensor:
    """Rows (count, length) that begin anywhere."""
    starts = torch.randint(len(text) - length, (count, 1), generator=draw)
    return text[starts + torch.arange(length)]


def clean(text: Tensor, recipe: Recipe, draw: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (B, N) of rows as they are, and which of them are altered."""
    while True:
        yield windows(text, recipe.batch, recipe.length, draw), torch.zeros(recipe.batch, dtype=torch.bool)


def duplicated(text: Tensor, recipe: Recipe, draw: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """As `clean`, but 70 % of rows are one of five."""
    repeated = windows(text, recipe.repeated_sentences, recipe.length, draw)
    for rows, _ in clean(text, recipe, draw):
        altered = torch.rand(recipe.batch, generator=draw) < recipe.duplicated
        which = torch.randint(recipe.repeated_sentences, (recipe.batch,), generator=draw)
        yield torch.where(altered[:, None], repeated[which], rows), altered


def corrupted(text: Tensor, recipe: Recipe, draw: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """As `clean`, but a quarter of rows have their bytes in random order."""
    for rows, _ in clean(text, recipe, draw):
        altered = torch.rand(recipe.batch, generator=draw) < recipe.corrupted
        order = torch.rand(rows.shape, generator=draw).argsort(1)
        yield torch.where(altered[:, None], rows.gather(1, order), rows), altered


POOLS: dict[str, Callable[..., Iterator[tuple[Tensor, Tensor]]]] = {
    "70 % repeated": duplicated,
    "25 % shuffled": corrupted,
    "as they are": clean,
}
ARMS = dict.fromkeys(POOLS, STRATEGIES) | {"as they are": STRATEGIES[:2]}
"""Which strategies train on which rows."""


# ---- the language model


def language_model(recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """Two layers on bytes."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=recipe.width, intermediate_size=recipe.width * 8 // 3 // 32 * 32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _rate(step: int, recipe: Recipe) -> float:
    if step < recipe.rise:
        return (step + 1) / recipe.rise
    done = (step - recipe.rise) / max(1, recipe.steps - recipe.rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean over tokens, nats per byte."""
    parts = [per_sample_losses(model.model(r).last_hidden_state, model.lm_head.weight, r) for r in rows.split(100)]
    return float(torch.cat([part.losses for part in parts]).mean())


def train(strategy: str, pool: str, seed: int, text: Text, recipe: Recipe) -> dict[str, Any]:
    """One training; held-out losses, and the weight that altered rows got for every one that is their due."""
    model = language_model(recipe, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.01)
    reweight = LossReweighter(strategy, r=recipe.r, warmup_steps=recipe.plain_steps)  # type: ignore[arg-type]
    batches = POOLS[pool](text.train, recipe, torch.Generator().manual_seed(seed))
    held_out = windows(text.held_out, recipe.held_out, recipe.length, torch.Generator().manual_seed(99))
    looks, weights = [], []
    for step in range(recipe.steps):
        rows, altered = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _rate(step, recipe)
        samples = per_sample_losses(model.model(rows).last_hidden_state, model.lm_head.weight, rows)
        loss = reweight(samples.losses, step=step, num_tokens=samples.num_tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        weights.append(float(reweight.last_weights[altered].sum()) - float(altered.float().mean()))  # type: ignore[index]
        if (step + 1) % recipe.look_every == 0:
            looks.append(held_out_loss(model, held_out))
    return {"held out": looks, "excess weight of altered rows": _by_look(weights, recipe.look_every)}


def _by_look(values: Sequence[float], size: int) -> list[float]:
    return [statistics.mean(values[start : start + size]) for start in range(0, len(values) - size + 1, size)]


# ---- all of it


def prove(recipe: Recipe, text: Text, out: Path) -> dict[str, Any]:
    """Runs what is not there yet; writes JSON, table and picture each time one kind of rows is done."""
    folder = _folder(recipe, out)
    folder.mkdir(parents=True, exist_ok=True)
    found_toy = toy(recipe.toy_seeds)
    arms: dict[str, dict[str, Any]] = {}
    with Progress(console=stderr) as progress:
        task = progress.add_task("train", total=recipe.steps * len(recipe.seeds) * sum(map(len, ARMS.values())))
        for pool, strategies in ARMS.items():
            runs: dict[str, list[dict[str, Any]]] = {strategy: [] for strategy in strategies}
            for seed in recipe.seeds:
                for strategy in strategies:
                    file = folder / f"{pool.replace(' % ', '-').replace(' ', '-')}_{strategy}_{seed}.json"
                    if not file.exists():
                        run = train(strategy, pool, seed, text, recipe)
                        _write(file, json.dumps({"recipe": asdict(recipe), "text": text.name} | run) + "\n")
                    runs[strategy].append(_load(file, recipe, text))
                    progress.advance(task, recipe.steps)
            arms[pool] = {strategy: about(of, runs[BASELINE]) for strategy, of in runs.items()}
            result = _report(recipe, text, found_toy, arms, out)
    return result


def _folder(recipe: Recipe, out: Path) -> Path:
    return out / ("loss_reweighting_quick" if recipe == QUICK else "loss_reweighting")


def _report(recipe: Recipe, text: Text, found_toy: Any, arms: Mapping[str, Any], out: Path) -> dict[str, Any]:
    result = {
        "recipe": asdict(recipe),
        "text": {"name": text.name, "bytes": len(text.train), "held-out bytes": len(text.held_out)},
        "versions": {name: version(name) for name in ("llm-attn", "torch", "transformers")},
        "toy": found_toy,
        "language model": dict(arms),
        "still to be trained on": [pool for pool in ARMS if pool not in arms],
    }
    _write(out / "loss_reweighting.json", json.dumps(result, indent=1) + "\n")
    _write(out / "loss_reweighting.md", table(result))
    draw(result, out / "loss_reweighting.png")
    return result


def _load(file: Path, recipe: Recipe, text: Text) -> dict[str, Any]:
    """A run of the same recipe, whatever other seeds that had."""
    run: dict[str, Any] = json.loads(file.read_text())
    wanted = json.loads(json.dumps(asdict(recipe)))
    if run["recipe"] | {"seeds": wanted["seeds"]} != wanted or run["text"] != text.name:
        raise typer.BadParameter(
            f"{file} was made by another recipe or from other texts: delete it, or choose another --out"
        )
    return run


def about(runs: Sequence[Mapping[str, Any]], uniform: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one strategy: held-out loss at every look, and its difference to uniform with an interval."""
    losses = [run["held out"] for run in runs]
    apart = [
        [a - b for a, b in zip(run["held out"], host["held out"], strict=True)]
        for run, host in zip(runs, uniform, strict=True)
    ]
    weights = [run["excess weight of altered rows"] for run in runs]
    return {
        "held out": [statistics.mean(each) for each in zip(*losses, strict=True)],
        "last, of each seed": [run[-1] for run in losses],
        "to uniform": [interval(each) for each in zip(*apart, strict=True)],
        "excess weight of altered rows": [statistics.mean(each) for each in zip(*weights, strict=True)],
    }


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval, from Student's t; without width for one value."""
    mean = statistics.mean(values)
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


def table(result: Mapping[str, Any]) -> str:
    """The tables of the README."""
    toy, recipe = result["toy"], result["recipe"]
    lines = [f"Toy regression, squared error on isotropic data, mean of {toy['seeds']} seeds:", ""]
    lines += [
        "| targets | step | " + " | ".join(TOY_STRATEGIES) + " |",
        "| --- |" + " ---: |" * (len(TOY_STRATEGIES) + 1),
    ]
    for kind in ("noiseless", "noise 0.5"):
        for step in (50, 100, 200, 400):
            at = toy["steps"].index(step)
            lines.append(f"| {kind} | {step} | " + " | ".join(f"{toy[kind][s][at]:.3g}" for s in TOY_STRATEGIES) + " |")
    lines += [
        "",
        f"Language model on bytes, {recipe['steps']} steps of {recipe['batch']} rows of {recipe['length']} bytes, r = "
        f"{recipe['r']}, weights from step {recipe['plain_steps']} on; loss on held-out documents, nats per byte, mean "
        f"of {len(recipe['seeds'])} seeds; difference to uniform of the same seed with its 95 % interval (below 0 is "
        "better):",
        "",
        "| rows | weights | held-out loss | to uniform | in % | weight of altered rows beyond their share |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for pool, arms in result["language model"].items():
        for strategy, arm in arms.items():
            mean, low, high = arm["to uniform"][-1]
            excess = statistics.mean(arm["excess weight of altered rows"][1:])
            apart = ["", ""] if strategy == BASELINE else [f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"]
            if len(apart) == 1:
                apart.append(f"{100 * mean / arms[BASELINE]['held out'][-1]:+.2f}")
            altered = "" if pool == "as they are" else f"{100 * excess:+.1f} points"
            lines.append(f"| {pool} | {strategy} | {arm['held out'][-1]:.4f} | {apart[0]} | {apart[1]} | {altered} |")
    if result["still to be trained on"]:
        lines += [
            "",
            "Still to be trained on, by the same command: rows " + ", ".join(result["still to be trained on"]),
        ]
    return "\n".join(lines) + "\n"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Above: difference to uniform while training. Below: the toy, and which rows the weights go to."""
    recipe, pools = result["recipe"], result["language model"]
    figure = Figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subplots(2, 3)
    steps = list(range(recipe["look_every"], recipe["steps"] + 1, recipe["look_every"]))
    for axes in (*above[len(pools) :], *below[1 + len(pools) :]):
        axes.set_axis_off()
    for axes, (pool, arms) in zip(above, pools.items(), strict=False):
        for strategy in ARMS[pool][1:]:
            mean, low, high = zip(*arms[strategy]["to uniform"], strict=True)
            axes.plot(steps, mean, color=COLOURS[strategy], marker="o", markersize=3, label=strategy)
            axes.fill_between(steps, low, high, color=COLOURS[strategy], alpha=0.15, linewidth=0)
        axes.axhline(0, color=COLOURS[BASELINE], linewidth=1, label=BASELINE)
        axes.axvline(recipe["plain_steps"], color="black", linewidth=0.6, linestyle=":")
        axes.set(title=f"rows: {pool}", xlabel="step", ylabel="held-out loss - uniform's (nats per byte)")
    above[0].legend(fontsize=8)
    for strategy in TOY_STRATEGIES:
        below[0].plot(
            result["toy"]["steps"], result["toy"]["noiseless"][strategy], color=COLOURS[strategy], label=strategy
        )
    below[0].set(yscale="log", title="toy regression", xlabel="step", ylabel="error on isotropic data")
    below[0].legend(fontsize=8)
    for axes, pool in zip(below[1:], pools, strict=False):
        for strategy in STRATEGIES:
            excess = pools[pool][strategy]["excess weight of altered rows"]
            axes.plot(
                steps, [100 * e for e in excess], color=COLOURS[strategy], marker="o", markersize=3, label=strategy
            )
        axes.set(title=f"weight of altered rows: {pool}", xlabel="step", ylabel="points beyond their share of rows")
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=130)
    part.replace(path)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for JSON, table and picture.")] = RESULTS,
    seed: Annotated[int, typer.Option(help="The first of three seeds.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, to see that everything runs.")] = False,
    width: Annotated[int, typer.Option(help="Of the language model.")] = Recipe.width,
    steps: Annotated[int, typer.Option(help="Of each training.")] = Recipe.steps,
) -> None:
    """Trains what is missing, then writes `loss_reweighting.json`, `.md` and `.png`."""
    recipe = QUICK if quick else Recipe(seeds=(seed, seed + 1, seed + 2), width=width, steps=steps)
    prove(recipe, read_text(recipe, _folder(recipe, out) / "pool.jsonl"), out)
    typer.echo(out / "loss_reweighting.md")


if __name__ == "__main__":
    typer.run(main)
