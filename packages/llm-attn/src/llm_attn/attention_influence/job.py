"""Scoring and selecting a corpus: files in, scores and the chosen documents out, in as many sittings as it takes.

`score_corpus` writes one small Parquet file for each unit of the input into `out/parts`, numbers only, and `run.json`,
which says what the numbers come from; a second call does what is missing. `select_corpus` reads the parts and writes
what people want: `scores.parquet`, the chosen records as they were in `selected/`, `broken.jsonl`, `selection.json` and
`histogram.png`. Neither holds more than a unit's text in memory.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from llm_attn.attention_influence.corpus import (
    Columns,
    Unit,
    corpus_files,
    corpus_units,
    fingerprint,
    pyarrow,
    read_unit,
)
from llm_attn.attention_influence.engine import run_units
from llm_attn.attention_influence.errors import CorpusProblem
from llm_attn.attention_influence.masking import Heads, sorted_heads
from llm_attn.attention_influence.scoring import InfluenceScorer, ScoringConfig
from llm_attn.transformers.loading import load_model

UNIT_BYTES = 256 << 10
DType = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """What the scores of a corpus depend on, beside its text."""

    model: str
    """Transformers folder or .gguf file."""
    heads: Heads
    """Heads to mask."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How documents are scored."""
    columns: Columns = field(default_factory=Columns)
    """Fields of the records."""
    dtype: DType = "float32"
    """Of weights and activations."""
    unit_bytes: int = UNIT_BYTES
    """Input bytes that are scored, and written down, at a time."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", sorted_heads(self.heads))
        if self.dtype not in _DTYPES:
            raise CorpusProblem(f"dtype must be one of {', '.join(_DTYPES)}, got '{self.dtype}'")


def score_corpus(
    inputs: Sequence[Path | str],
    out: Path | str,
    job: ScoringJob,
    *,
    engine: str = "local",
    workers: int = 1,
    on_unit: Callable[[int, int, int], None] | None = None,
) -> int:
    """Scores all documents of the inputs (files, or folders of files) into `out`; returns how many units were left.

    engine, workers: see `run_units`. on_unit: told, after each unit, how many are done, of how many, and documents of
    this one. Raises CorpusProblem on wrong files and options, and where `out` holds another run.
    """
    pyarrow()
    files = corpus_files(inputs)
    units = corpus_units(files, job.unit_bytes)
    out = Path(out)
    parts = out / "parts"
    _settle(out, job, files)
    parts.mkdir(exist_ok=True)
    left = [unit for unit in units if not part_path(parts, unit).exists()]
    done = len(units) - len(left)
    if on_unit is not None and done:
        on_unit(done, len(units), 0)
    for documents in run_units(partial(UnitScorer, job, str(parts)), left, engine=engine, workers=workers):
        done += 1
        if on_unit is not None:
            on_unit(done, len(units), documents)
    return len(left)


def part_path(parts: Path, unit: Unit) -> Path:
    """Where the scores of a unit are."""
    return parts / f"{unit.index:08d}.parquet"


def _settle(out: Path, job: ScoringJob, files: Sequence[Path]) -> None:
    """Writes `run.json`, or sees that the one there says the same."""
    if not Path(job.model).exists():
        raise CorpusProblem(f"no model at '{job.model}': give a transformers folder or a .gguf file")
    # JSON has layers as strings
    settings = json.loads(json.dumps(asdict(job))) | {"model": fingerprint(Path(job.model))}
    run = {"job": settings, "inputs": [{"name": file.name, "fingerprint": fingerprint(file)} for file in files]}
    path = out / "run.json"
    if path.exists():
        before = read_run(out)
        differ = [f"job.{name}" for name in settings if before["job"].get(name) != settings[name]]
        differ += ["inputs"] if before["inputs"] != run["inputs"] else []
        if differ:
            raise CorpusProblem(f"'{out}' holds another run ({', '.join(differ)} differ): give another --out")
    elif out.exists() and any(not each.name.startswith("heads.") for each in out.iterdir()):
        raise CorpusProblem(f"'{out}' holds something else: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    places = {"model": str(Path(job.model).resolve()), "inputs": [str(file.resolve()) for file in files]}
    versions = {name: version(name) for name in ("llm-attn", "torch", "transformers")}
    with written(path) as part:
        part.write_text(json.dumps(run | {"places": places, "versions": versions}, indent=1) + "\n")


def read_run(out: Path) -> dict[str, Any]:
    """What `score_corpus` wrote down about the run in `out`. CorpusProblem where there is none."""
    try:
        run: dict[str, Any] = json.loads((out / "run.json").read_text())
        return {name: run[name] for name in ("job", "inputs", "places", "versions")}
    except FileNotFoundError:
        raise CorpusProblem(f"'{out}' holds no scored corpus: score one first") from None
    except (ValueError, KeyError, TypeError):
        raise CorpusProblem(f"'{out}/run.json' is damaged: remove '{out}' and score again") from None


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary name to write to; what was written takes the place of `path` when the block ends well."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class UnitScorer:
    """Loads the job's model once, then scores unit after unit into `parts`; a unit that is there is passed over."""

    def __init__(self, job: ScoringJob, parts: str) -> None:
        self.job, self.parts = job, Path(parts)
        try:
            model, tokenizer = load_model(job.model, dtype=_DTYPES[job.dtype])
            if torch.cuda.is_available():
                model = model.to("cuda")
            self.scorer = InfluenceScorer(model, tokenizer, job.heads, job.scoring)
        except (OSError, ValueError, ImportError) as problem:
            raise CorpusProblem(f"the model '{job.model}' cannot be used: {problem}") from problem

    def __call__(self, unit: Unit) -> int:
        """Returns how many documents the unit has; 0 if somebody did it before."""
        path = part_path(self.parts, unit)
        if path.exists():
            return 0
        arrow = pyarrow()
        content = read_unit(unit, self.job.columns)
        scores = self.scorer.score([document.text for document in content.documents])
        columns = {
            "line": arrow.array([document.line for document in content.documents], arrow.int64()),
            "id": arrow.array([document.id for document in content.documents], arrow.string()),
            "domain": arrow.array([document.domain for document in content.documents], arrow.string()),
            "tokens": scores.tokens,
            "loss": scores.base,
            "masked_loss": scores.masked,
            "score": scores.score,
        }
        about = {"lines": str(content.lines), "broken": json.dumps(content.broken)}
        table = arrow.table(columns).replace_schema_metadata(about)
        with written(path) as part:
            arrow.parquet.write_table(table, part)
        return len(content.documents)
