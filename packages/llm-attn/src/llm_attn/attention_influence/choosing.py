"""The second half of a corpus job: from the scores of all units to the documents that are kept.

Decided here: a record is kept as it stands in its file, byte for byte or row for row, in a file of the same name.
Domains are sorted exactly by default, for which the scores (not the texts) must fit in memory, 24 bytes a document;
with `method="histogram"` memory does not depend on the corpus, and the share is met to a millionth of the range.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from llm_attn.attention_influence.corpus import Unit, corpus_units, fingerprint, pyarrow, unit_lines
from llm_attn.attention_influence.errors import CorpusProblem
from llm_attn.attention_influence.job import part_path, read_run, written
from llm_attn.attention_influence.pictures import DomainScores, draw_scores
from llm_attn.attention_influence.selection import ScoreHistogram, num_kept, select_documents

Method = Literal["exact", "histogram"]


@dataclass
class DomainCount:
    """Documents and tokens of a domain, and how many of them are kept; the lowest score that is."""

    domain: str
    documents: int = 0
    scored: int = 0
    kept: int = 0
    tokens: int = 0
    kept_tokens: int = 0
    lowest_kept: float | None = None

    def add(self, tokens: Int[np.ndarray, "n"], score: Float[np.ndarray, "n"], kept: Bool[np.ndarray, "n"]) -> None:
        """Counts documents of a part."""
        self.documents += len(score)
        self.scored += int((~np.isnan(score)).sum())
        self.kept += int(kept.sum())
        self.tokens += int(tokens.sum())
        self.kept_tokens += int(tokens[kept].sum())
        if kept.any():
            lowest = float(score[kept].min())
            self.lowest_kept = lowest if self.lowest_kept is None else min(lowest, self.lowest_kept)


@dataclass(frozen=True)
class Selection:
    """What `select_corpus` kept, and where it is."""

    domains: list[DomainCount]
    broken: int
    files: list[Path]
    scores: Path
    histogram: Path


@dataclass(frozen=True)
class _Part:
    unit: Unit
    lines: int
    broken: list[tuple[int, str]]
    table: Any

    def column(self, name: str) -> np.ndarray:
        return np.asarray(self.table[name].to_numpy())


def select_corpus(
    out: Path | str,
    *,
    share: float = 0.2,
    method: Method = "exact",
    on_unit: Callable[[int, int], None] | None = None,
) -> Selection:
    """Keeps the best `share` of each domain of a corpus that `score_corpus` has scored into `out`.

    on_unit: told how many units are read, of how many. CorpusProblem if scores are missing, or the input has changed.
    """
    if not 0 < share <= 1:
        raise CorpusProblem(f"the share to keep must lie in (0, 1], got {share}")
    if method not in get_args(Method):
        raise CorpusProblem(f"method must be one of {', '.join(get_args(Method))}, got '{method}'")
    out = Path(out)
    units = _scored_units(out)
    chooser = (_Exact if method == "exact" else _Binned)(share)
    for part in _parts(out, units):
        chooser.see(part)
    counts, broken = _write(out, units, chooser, on_unit)
    files = sorted((out / "selected").iterdir())
    picture = draw_scores(chooser.pictured(), out / "histogram.png")
    domains = sorted(counts.values(), key=lambda count: count.domain)
    summary = {"share": share, "method": method, "broken": broken, "domains": [asdict(domain) for domain in domains]}
    with written(out / "selection.json") as part_file:
        part_file.write_text(json.dumps(summary, indent=1) + "\n")
    return Selection(domains, broken, files, out / "scores.parquet", picture)


def _scored_units(out: Path) -> list[Unit]:
    run = read_run(out)
    files = [Path(place) for place in run["places"]["inputs"]]
    for file, known in zip(files, run["inputs"], strict=True):
        if not file.exists() or fingerprint(file) != known["fingerprint"]:
            raise CorpusProblem(f"'{file}' is no longer what was scored: put it back, or score it into another folder")
    units = corpus_units(files, run["job"]["unit_bytes"])
    missing = sum(not part_path(out / "parts", unit).exists() for unit in units)
    if missing:
        raise CorpusProblem(f"{missing} of {len(units)} units are not scored yet: run 'score' to its end first")
    return units


def _parts(out: Path, units: Sequence[Unit]) -> Iterator[_Part]:
    read = pyarrow().parquet.read_table
    for unit in units:
        table = read(part_path(out / "parts", unit))
        about = table.schema.metadata
        yield _Part(unit, int(about[b"lines"]), json.loads(about[b"broken"]), table)


class _Exact:
    """All scores in memory, sorted."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.names: dict[str, int] = {}
        self.marked: np.ndarray | None = None
        self.at = 0

    def see(self, part: _Part) -> None:
        domains = [self.names.setdefault(name, len(self.names)) for name in part.column("domain")]
        self.seen.append((part.column("score"), part.column("tokens"), np.array(domains, dtype=np.int64)))

    def _all(self) -> list[np.ndarray]:
        if len(self.seen) != 1:
            empty = (np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
            columns = zip(*(self.seen or [empty]), strict=True)
            score, tokens, domain = (np.concatenate(column) for column in columns)
            self.seen = [(score, tokens, domain)]
        return list(self.seen[0])

    def keeps(self, part: _Part) -> np.ndarray:
        """Marks the documents of the next part; parts come in the order in which they were seen."""
        if self.marked is None:
            self.marked = select_documents(*self._all(), share=self.share)
        mark = self.marked[self.at : self.at + len(part.table)]
        self.at += len(part.table)
        return mark

    def pictured(self) -> list[DomainScores]:
        score, _, domain = self._all()
        found = []
        for name, number in self.names.items():
            own = score[(domain == number) & ~np.isnan(score)]
            kept = num_kept(len(own), self.share)
            edge = float(np.sort(own)[len(own) - kept]) if kept else math.inf
            found.append(DomainScores.of(name, own, edge))
        return found


class _Binned:
    """A histogram of each domain."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.bins: dict[str, ScoreHistogram] = {}

    def see(self, part: _Part) -> None:
        score, domain = part.column("score"), part.column("domain")
        for name in dict.fromkeys(domain):
            self.bins.setdefault(name, ScoreHistogram()).add(score[domain == name])

    def keeps(self, part: _Part) -> np.ndarray:
        """Marks the documents of any part."""
        score, domain = part.column("score"), part.column("domain")
        kept = np.zeros(len(score), dtype=bool)
        for name in dict.fromkeys(domain):
            own = domain == name
            kept[own] = self.bins[name].keeps(score[own], self.share)
        return kept

    def pictured(self) -> list[DomainScores]:
        return [DomainScores(name, *bins.coarse(), bins.threshold(self.share)) for name, bins in self.bins.items()]


def _write(
    out: Path, units: Sequence[Unit], chooser: _Exact | _Binned, on_unit: Callable[[int, int], None] | None
) -> tuple[dict[str, DomainCount], int]:
    """All tables and the records that are kept, in one pass over the parts."""
    counts: dict[str, DomainCount] = {}
    before: dict[str, int] = {}  # lines of a file in the units so far
    broken = 0
    (out / "selected").mkdir(exist_ok=True)
    for old in (out / "selected").iterdir():
        old.unlink()
    with ExitStack() as stack:
        told = stack.enter_context(stack.enter_context(written(out / "broken.jsonl")).open("w"))
        scores = _Scores(stack, out / "scores.parquet")
        records = _Records(stack, out / "selected", units)
        for done, part in enumerate(_parts(out, units), 1):
            kept, first = chooser.keeps(part), before.get(part.unit.path, 0)
            for line, reason in part.broken:
                told.write(json.dumps({"file": part.unit.path, "line": first + line, "reason": reason}) + "\n")
            broken += len(part.broken)
            scores.write(part, first, kept)
            records.write(part, kept)
            _count(counts, part, kept)
            before[part.unit.path] = first + part.lines
            if on_unit is not None:
                on_unit(done, len(units))
    return counts, broken


def _count(counts: dict[str, DomainCount], part: _Part, kept: np.ndarray) -> None:
    domain, tokens, score = (part.column(name) for name in ("domain", "tokens", "score"))
    for name in dict.fromkeys(domain):
        own = domain == name
        counts.setdefault(name, DomainCount(name)).add(tokens[own], score[own], kept[own])


class _Scores:
    """`scores.parquet`: of each document its file, line, numbers, and whether it is kept."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        arrow = self.arrow = pyarrow()
        texts, numbers = ("id", "domain"), ("loss", "masked_loss", "score")
        self.schema = arrow.schema(
            [("file", arrow.string()), ("line", arrow.int64())]
            + [(name, arrow.string()) for name in texts]
            + [("tokens", arrow.int64())]
            + [(name, arrow.float64()) for name in numbers]
            + [("selected", arrow.bool_())]
        )
        part = stack.enter_context(written(path))
        self.writer = stack.enter_context(arrow.parquet.ParquetWriter(part, self.schema))

    def write(self, part: _Part, first: int, kept: np.ndarray) -> None:
        columns = {name: part.table[name] for name in part.table.column_names}
        columns |= {"file": [part.unit.path] * len(kept), "line": part.column("line") + first, "selected": kept}
        self.writer.write_table(self.arrow.table(columns).select(self.schema.names).cast(self.schema))


class _Records:
    """The records that are kept, one file for each of the input."""

    def __init__(self, stack: ExitStack, folder: Path, units: Sequence[Unit]) -> None:
        self.stack, self.folder = stack, folder
        self.files = list(dict.fromkeys(unit.path for unit in units))
        self.path = ""
        self.sink: Any = None
        self.own = ExitStack()
        stack.push(self.own)

    def write(self, part: _Part, kept: np.ndarray) -> None:
        if part.unit.path != self.path:
            self.own.close()
            self.path, self.sink = part.unit.path, self._open(part.unit)
        marked = np.zeros(part.lines + 1, dtype=bool)
        marked[part.column("line")[kept]] = True
        if part.unit.kind == "parquet":
            self._rows(part.unit, marked[1:])
        else:
            for number, line in unit_lines(part.unit):
                if marked[number]:
                    self.sink.write(line if line.endswith(b"\n") else line + b"\n")

    def _open(self, unit: Unit) -> Any:
        name = Path(unit.path).name.removesuffix(".gz")
        if sum(Path(file).name.removesuffix(".gz") == name for file in self.files) > 1:
            name = f"{self.files.index(unit.path):05d}-{name}"
        part = self.own.enter_context(written(self.folder / name))
        if unit.kind != "parquet":
            return self.own.enter_context(part.open("wb"))
        arrow = pyarrow()
        self.source = arrow.parquet.ParquetFile(unit.path)
        return self.own.enter_context(arrow.parquet.ParquetWriter(part, self.source.schema_arrow))

    def _rows(self, unit: Unit, marked: np.ndarray) -> None:
        arrow = pyarrow()
        at = 0
        for batch in self.source.iter_batches(batch_size=1024, row_groups=list(range(unit.start, unit.stop))):
            chosen = arrow.Table.from_batches([batch]).filter(arrow.array(marked[at : at + len(batch)]))
            at += len(batch)
            if len(chosen):
                self.sink.write_table(chosen)
