"""Small models trained from scratch, one attention each, and run at up to 16 times the length they were trained at.

    uv run --package llm-attn python packages/llm-attn/proofs/toy_training.py softplus

Two tasks that an induction head solves: a random permutation repeated over and over (period 6 to 14), and a random
string that is copied once. Train length 32; a token counts if the tokens before it determine it. Every variant has the
same Llama around its attention (2 layers, 64 wide, 4 heads, rotary positions; TransNormerLLM is a model of its own, of
the same size), the same data, optimiser and steps; nothing was tuned for any. While training: largest score, entropy of
the attention relative to that of uniform weights, norm of the gradient before it is clipped. Three seeds; tables give
the mean and, in brackets, lowest and highest.

A method's figure compares the variants in `METHODS`. To add a variant: a function of the seed in `VARIANTS`, its name
in `METHODS`, and a function in `ATTENTION` that says what its scores and weights are if those are not softmax's.
Each finished run is in `<out>/toy_training/<variant>.json`, so that a second start goes on where the first stopped;
`toy_<method>.png` and `toy_<method>.md` are drawn from these files.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llm_attn.affine_attention import AffineConfig, apply_affine
from llm_attn.affine_attention.mass import attention_maps
from llm_attn.attention_residuals import AttentionResidualsConfig, apply_attention_residuals
from llm_attn.lightning_attention import LightningConfig, apply_lightning, decay_slopes
from llm_attn.softplus_attention import Mode, SoftplusConfig, apply_softplus, cosines, log_scale, softplus_weights
from llm_attn.transformers.door import layer_config
from llm_attn.transnormer import TransNormerConfig, TransNormerForCausalLM

PERMUTED = 40
"""Symbols that permutations are made of."""
COPIED = 256
"""Symbols of strings to copy, none of which comes twice in a string: two layers find a token by the one before it."""
SEPARATOR, END = COPIED, COPIED + 1
VOCABULARY = COPIED + 2
RESULTS = Path(__file__).parent / "results"
stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all variants share."""

    steps: int = 1500
    warm_up: int = 100
    """Steps over which the learning rate rises, before it falls to a tenth by a cosine."""
    batch: int = 64
    train_length: int = 32
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512)
    learning_rate: float = 3e-3
    clip: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    look_every: int = 50
    """Steps between two looks at scores and entropy."""
    test_rows: int = 128
    looked_at: int = 8
    """Rows whose attention maps are looked at."""


QUICK = Recipe(steps=6, warm_up=2, batch=8, lengths=(32, 64), seeds=(0,), look_every=3, test_rows=8, looked_at=2)


# ---- tasks: (rows, length, generator) -> tokens, and which of them the tokens before determine


def repeated_permutation(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each row repeats its own 6 to 14 symbols; the first repeated one is a surprise, all after it are not."""
    order = torch.rand(rows, PERMUTED, generator=generator).argsort(1)
    period = torch.randint(6, 15, (rows, 1), generator=generator)
    place = torch.arange(length).expand(rows, -1)
    return order.gather(1, place % period), place > period


def copied_string(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A string of a quarter to half the length without repeats, a separator, the string again, and the end."""
    string = torch.rand(rows, COPIED, generator=generator).argsort(1)
    size = torch.randint(length // 4, (length - 1) // 2 + 1, (rows, 1), generator=generator)
    place = torch.arange(length).expand(rows, -1)
    tokens = string.gather(1, torch.where(place < size, place, place - size - 1).clamp(0, COPIED - 1))
    tokens = torch.where(place == size, SEPARATOR, torch.where(place > 2 * size, END, tokens))
    return tokens, (place > size) & (place <= 2 * size)


TASKS = {"repeated permutation": repeated_permutation, "copy": copied_string}


# ---- variants: seed -> model


def llama(seed: int, **changes: Any) -> LlamaForCausalLM:
    """The model around every attention; softmax attention as it stands."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        use_cache=False,
        **changes,
    )
    return LlamaForCausalLM(config)


def softplus(seed: int, *, power: float | None = None, mode: Mode = "softplus") -> PreTrainedModel:
    model = llama(seed)
    apply_softplus(model, SoftplusConfig(power=power, mode=mode))
    return model


def affine(seed: int, **settings: Any) -> PreTrainedModel:
    """With the training's own length as N, as in the paper."""
    model = llama(seed)
    apply_affine(model, AffineConfig(bias_length=Recipe.train_length, **settings))
    return model


def lightning(seed: int, *, layers: Sequence[int] | None = None) -> PreTrainedModel:
    model = llama(seed)
    apply_lightning(model, LightningConfig(), layers=layers)
    return model


def attention_residuals(seed: int, *, sublayers_per_block: int) -> PreTrainedModel:
    """Softmax attention over tokens; over depth, attention in place of the residual sum."""
    model = llama(seed)
    apply_attention_residuals(model, AttentionResidualsConfig(sublayers_per_block=sublayers_per_block))
    return model


def transnormer(seed: int) -> PreTrainedModel:
    """As many parameters as the Llama: the gate of its attention is taken off its gated linear unit."""
    host = llama(seed).config
    inside = host.intermediate_size - host.hidden_size // 3
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "use_cache")
    torch.manual_seed(seed)
    sizes = {name: getattr(host, name) for name in names}
    return TransNormerForCausalLM(TransNormerConfig(**sizes, intermediate_size=inside, pad_token_id=None))


VARIANTS: dict[str, Callable[[int], PreTrainedModel]] = {
    "softmax": llama,
    "softmax_logn": partial(softplus, mode="softmax_logn"),
    "lssa": softplus,
    "lssar_3": partial(softplus, power=3.0),
    "lssar_15": partial(softplus, power=15.0),
    "sink": partial(affine, scaling="sink"),
    "affine": affine,
    "affine_row": partial(affine, n_mode="row"),
    "gated": partial(affine, scaling="softmax", gate=True),
    "affine_gated": partial(affine, gate=True),
    "lightning": lightning,
    "lightning_softmax": partial(lightning, layers=[0]),
    "transnormer": transnormer,
    "residuals_full": partial(attention_residuals, sublayers_per_block=1),
    "residuals_block": partial(attention_residuals, sublayers_per_block=2),
}

METHODS: dict[str, tuple[str, ...]] = {
    "softplus": ("softmax", "softmax_logn", "lssa", "lssar_3", "lssar_15"),
    "affine": ("softmax", "sink", "affine", "affine_row", "gated", "affine_gated"),
    "lightning": ("softmax", "lightning", "lightning_softmax", "transnormer"),
    "attention_residuals": ("softmax", "residuals_full", "residuals_block"),
}
"""Figure -> the variants it compares, the baseline first."""


# ---- what is looked at: (layer, query, key) -> scores and weights, both (B, H, N, N)


def softmax_attention(layer: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and weights of the host's own attention."""
    scores = query @ key.mT * layer.scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores, scores.masked_fill(hidden, -torch.inf).softmax(-1)


def llama_attention(
    model: PreTrainedModel, tokens: Tensor, *, of: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Scores and weights of each layer of a model that is built of Llama's attention modules."""
    seen = []

    def look(layer: nn.Module, _: Any, given: dict[str, Any]) -> None:
        states = given["hidden_states"]
        shape = (*states.shape[:2], -1, layer.head_dim)
        query, key = (project(states).view(shape).transpose(1, 2) for project in (layer.q_proj, layer.k_proj))
        seen.append(of(layer, *apply_rotary_pos_emb(query, key, *given["position_embeddings"])))

    layers = [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "scaling")]
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def cosine_attention(layer: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Of the softplus variants: scores are cosines on their scale."""
    config = layer_config(layer, "softplus", None)
    seen = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scores = log_scale(seen.sum(-1, keepdim=True), query.shape[-1]).float() * cosines(query, key)
    if config.mode == "softmax_logn":
        return scores, scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return scores, softplus_weights(query, key, seen, power=config.power)


def lightning_attention(layer: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Of the lightning variants: weights are the scores, faded by distance; layers that are left out have softmax."""
    config = layer_config(layer, "lightning", None)
    if config is None:
        return softmax_attention(layer, query, key)
    slopes = decay_slopes(
        query.shape[1], layer=layer.layer_idx, num_layers=layer.config.num_hidden_layers, decay=config.decay
    )
    return faded(F.silu(query) @ F.silu(key).mT * layer.scaling, slopes)


def faded(scores: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The scores, and what Lightning Attention multiplies the values by."""
    place = torch.arange(scores.shape[-1])
    return scores, scores * torch.exp(-slopes[:, None, None] * (place[:, None] - place)).tril()


def transnormer_attention(model: PreTrainedModel, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Scores and weights of each layer of a TransNormerLLM."""
    seen = []
    hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    for layer, states in zip(model.model.layers, hidden[:-1], strict=True):
        mixer = layer.token_mixer
        query, key, _, _ = mixer.qkvu_proj(layer.token_norm(states)).chunk(4, -1)
        query, key = (F.silu(t).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2) for t in (query, key))
        if mixer.lrpe is not None:
            query, key = mixer.lrpe(query, 0), mixer.lrpe(key, 0)
        seen.append(faded(query @ key.mT, mixer.decay()))
    return seen


ATTENTION: dict[str, Callable[[PreTrainedModel, Tensor], list[tuple[Tensor, Tensor]]]] = {
    name: partial(llama_attention, of=cosine_attention) for name in ("softmax_logn", "lssa", "lssar_3", "lssar_15")
} | dict.fromkeys(("sink", "affine", "affine_row", "gated", "affine_gated"), attention_maps)
ATTENTION |= dict.fromkeys(("lightning", "lightning_softmax"), partial(llama_attention, of=lightning_attention))
ATTENTION["transnormer"] = transnormer_attention
"""Variant -> function of model and tokens to (scores, weights) of each layer, where it is not `softmax_attention`."""


def look_at(variant: str, model: PreTrainedModel, tokens: Tensor) -> dict[str, float]:
    """Largest score that a row may use, and mean entropy of rows of four keys and more over that of uniform weights.

    Weights that are not a distribution count by their share of the row's sum of absolute values.
    """
    attention = ATTENTION.get(variant, partial(llama_attention, of=softmax_attention))
    rows = slice(3, None)
    uniform = torch.arange(1, tokens.shape[1] + 1).log()[rows]
    largest, entropies = 0.0, []
    with torch.no_grad():
        for scores, weights in attention(model, tokens):
            largest = max(largest, float(scores.tril().abs().amax()))
            share = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp_min(1e-30)
            entropies.append(float((-torch.xlogy(share, share).sum(-1)[..., rows] / uniform).mean()))
    return {"max_logit": largest, "entropy": statistics.fmean(entropies)}


# ---- training and testing


def token_losses(model: PreTrainedModel, tokens: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and correctness of the tokens that count."""
    logits = model(input_ids=tokens).logits[:, :-1].float()
    counted, target = counted[:, 1:], tokens[:, 1:]
    logits, target = logits[counted], target[counted]
    return F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target


def learning_rate(step: int, *, recipe: Recipe) -> float:
    """Relative to the highest."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def train(variant: str, task: str, seed: int, recipe: Recipe, on_step: Callable[[], None]) -> dict[str, Any]:
    """One run: curves while training, figures at every length afterwards."""
    begin = time.perf_counter()
    model = VARIANTS[variant](seed).train()
    draw, generator = TASKS[task], torch.Generator().manual_seed(seed)
    fixed, _ = draw(recipe.looked_at, recipe.train_length, torch.Generator().manual_seed(999))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate, recipe=recipe))
    curves: dict[str, list[float]] = {"step": [], "loss": [], "max_logit": [], "entropy": []}
    losses, norms = [], []
    for step in range(recipe.steps):
        tokens, counted = draw(recipe.batch, recipe.train_length, generator)
        loss = token_losses(model, tokens, counted)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)))
        losses.append(float(loss.detach()))
        optimizer.step()
        schedule.step()
        if (step + 1) % recipe.look_every == 0:
            seen = look_at(variant, model.eval(), fixed) | {"step": step + 1}
            seen["loss"] = statistics.fmean(losses[-recipe.look_every :])
            for name, values in curves.items():
                values.append(round(seen[name], 5))
            model.train()
        on_step()
    return {
        "variant": variant,
        "task": task,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - begin, 1),
        "curves": curves,
        "gradient_norm": [round(n, 4) for n in norms[:: max(1, recipe.look_every // 10)]],
        "largest_gradient_norm": max(norms),
        "lengths": {str(n): at_length(variant, model.eval(), task, n, recipe) for n in recipe.lengths},
    }


@torch.no_grad()
def at_length(variant: str, model: PreTrainedModel, task: str, length: int, recipe: Recipe) -> dict[str, float]:
    """Accuracy and cross-entropy of the tokens that count, and what the attention looks like."""
    generator = torch.Generator().manual_seed(10_000 + length)
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(0, recipe.test_rows, 16):
        found.append(token_losses(model, *TASKS[task](min(16, recipe.test_rows), length, generator)))
    losses, right = (torch.cat(parts) for parts in zip(*found, strict=True))
    tokens, _ = TASKS[task](recipe.looked_at, length, torch.Generator().manual_seed(999))
    seen = look_at(variant, model, tokens)
    return {"accuracy": float(right.float().mean()), "cross_entropy": float(losses.mean()), **seen}


# ---- results


class RunsProblem(Exception):
    """Kept runs that cannot be gone on with; the message says what to do."""


def kept_runs(variant: str, recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """The finished runs of a variant. Raises RunsProblem if they were made by another recipe."""
    file = out / "toy_training" / f"{variant}.json"
    if not file.exists():
        return []
    document = json.loads(file.read_text(encoding="utf-8"))
    if document["recipe"] != json.loads(json.dumps(asdict(recipe))):
        raise RunsProblem(f"'{file}' holds runs of another recipe. Delete it, or choose another --out.")
    return document["runs"]


def keep_runs(variant: str, runs: Sequence[dict[str, Any]], recipe: Recipe, out: Path) -> None:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    document = {"recipe": asdict(recipe), "versions": versions, "runs": runs}
    write(out / "toy_training" / f"{variant}.json", json.dumps(document) + "\n")


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(content, encoding="utf-8")
    unfinished.replace(path)


def run_all(variants: Sequence[str], recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """Every variant on every task with every seed; those already in `out` are not run again."""
    found = []
    with Progress(console=stderr) as progress:
        for variant in variants:
            runs = kept_runs(variant, recipe, out)
            done = {(run["task"], run["seed"]) for run in runs}
            for task, seed in ((t, s) for t in TASKS for s in recipe.seeds if (t, s) not in done):
                bar = progress.add_task(f"{variant}, {task}, seed {seed}", total=recipe.steps)
                runs.append(train(variant, task, seed, recipe, partial(progress.advance, bar)))
                keep_runs(variant, runs, recipe, out)
            found += runs
    return found


def chosen(runs: Sequence[dict[str, Any]], variant: str, task: str) -> list[dict[str, Any]]:
    return [run for run in runs if (run["variant"], run["task"]) == (variant, task)]


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def markdown(runs: Sequence[dict[str, Any]], variants: Sequence[str], recipe: Recipe) -> str:
    """One table for each task, one line for each variant."""
    lines = []
    for task in TASKS:
        accuracy = " | ".join(f"accuracy at {n}" for n in recipe.lengths)
        lines += [f"**{task}**, trained at {recipe.train_length}, seeds {', '.join(map(str, recipe.seeds))}", ""]
        longest = f"entropy at {recipe.lengths[-1]}"
        lines += [f"| attention | parameters | {accuracy} | largest score | entropy | {longest} | gradient | largest |"]
        lines += ["|---" * (len(recipe.lengths) + 7) + "|"]
        for variant in variants:
            mine = chosen(runs, variant, task)
            cells = [variant, f"{mine[0]['parameters']:,}"]
            cells += [spread([r["lengths"][str(n)]["accuracy"] for r in mine], 3) for n in recipe.lengths]
            cells += [spread([max(r["curves"]["max_logit"]) for r in mine], 1)]
            cells += [spread([r["curves"]["entropy"][-1] for r in mine], 2)]
            cells += [spread([r["lengths"][str(recipe.lengths[-1])]["entropy"] for r in mine], 2)]
            cells += [spread([statistics.median(r["gradient_norm"]) for r in mine], 2)]
            cells += [spread([r["largest_gradient_norm"] for r in mine], 2)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


# ---- the figure


def draw(runs: Sequence[dict[str, Any]], variants: Sequence[str], recipe: Recipe, title: str, path: Path) -> None:
    """One row of panels for each task: accuracy and entropy over length; loss, score and gradient over steps."""
    figure = Figure(figsize=(20, 8), layout="constrained")
    panels = figure.subplots(len(TASKS), 5, squeeze=False)
    colours = ("#444444", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e")
    for row, task in zip(panels, TASKS, strict=True):
        for variant, colour in zip(variants, colours, strict=False):
            mine = chosen(runs, variant, task)
            for panel, figure_of in zip(row, ("accuracy", "entropy"), strict=False):
                by_length = [[run["lengths"][str(n)][figure_of] for n in recipe.lengths] for run in mine]
                band(panel, recipe.lengths, by_length, colour, variant)
            steps = mine[0]["curves"]["step"]
            every = max(1, recipe.look_every // 10)
            norm_steps = [1 + every * i for i in range(len(mine[0]["gradient_norm"]))]
            band(row[2], steps, [r["curves"]["loss"] for r in mine], colour, variant)
            band(row[3], steps, [r["curves"]["max_logit"] for r in mine], colour, variant)
            band(row[4], norm_steps, [r["gradient_norm"] for r in mine], colour, variant)
        dress(row, task, recipe)
    panels[0, 0].legend(frameon=False, loc="lower left")
    figure.suptitle(title, weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial.png")
    figure.savefig(unfinished, dpi=100)
    unfinished.replace(path)


def band(panel: Any, x: Sequence[float], curves: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """The mean over seeds as a line, lowest to highest as a shade."""
    columns = list(zip(*curves, strict=True))
    panel.plot(x, [statistics.fmean(c) for c in columns], color=colour, label=label, linewidth=1.5)
    panel.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, linewidth=0)


def dress(row: Sequence[Any], task: str, recipe: Recipe) -> None:
    for panel in row[:2]:
        panel.set_xscale("log", base=2)
        panel.set_xticks(recipe.lengths, [str(n) for n in recipe.lengths])
        panel.axvline(recipe.train_length, color="#bbbbbb", linewidth=0.8, linestyle="--")
        panel.set(xlabel="length (dashed: trained at)", ylim=(0, 1.03))
    row[0].set(title=f"{task}: accuracy")
    row[1].set(title="attention entropy, uniform = 1")
    row[2].set(title="training loss", xlabel="step", yscale="log")
    row[3].set(title="largest score", xlabel="step")
    row[4].set(title="gradient norm before clipping", xlabel="step", yscale="log")
    for panel in row:
        panel.spines[["top", "right"]].set_visible(False)


def main(
    method: Annotated[str, typer.Argument(help=f"Whose variants to train: {', '.join(METHODS)}.")],
    out: Annotated[Path, typer.Option(help="Gets the runs, the figure and the table.")] = RESULTS,
    seed: Annotated[int, typer.Option(help="The first of the seeds.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, to see that everything runs.")] = False,
) -> None:
    """Train a method's variants from scratch and draw them beside softmax attention. About 20 minutes on one core."""
    if method not in METHODS:
        stderr.print(f"no method is called '{method}'. There are: {', '.join(METHODS)}.", style="red")
        raise typer.Exit(code=2)
    recipe = QUICK if quick else Recipe()
    recipe = replace(recipe, seeds=tuple(seed + s for s in recipe.seeds))
    torch.set_num_threads(1)  # small batches: a second thread costs more than it brings
    try:
        runs = run_all(METHODS[method], recipe, out)
    except RunsProblem as problem:
        stderr.print(str(problem), style="red")
        raise typer.Exit(code=2) from None
    table = markdown(runs, METHODS[method], recipe)
    write(out / f"toy_{method}.md", table)
    title = f"Trained from scratch at length {recipe.train_length}, seeds {', '.join(map(str, recipe.seeds))}"
    draw(runs, METHODS[method], recipe, title, out / f"toy_{method}.png")
    typer.echo(table)


if __name__ == "__main__":
    typer.run(main)
