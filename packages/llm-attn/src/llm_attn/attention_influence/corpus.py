"""Files of documents, JSON lines or Parquet, in units of work that can be read on their own, by anyone, twice.

A unit of JSON lines is a range of bytes: the lines that begin in it. So nothing needs to be read to know the units, a
file of a terabyte is no different from a small one, and line numbers are local until all units before are counted.
A unit of Parquet is a range of row groups; a compressed file of JSON lines cannot be entered in the middle and is one
unit.

Decided here: a line that is no document (no JSON, no object, no text) is left out and told with its number and the
reason; blank lines are nothing at all. A document of no text is a document.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from llm_attn.attention_influence.errors import CorpusProblem

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonl.gz": "gzip", ".parquet": "parquet"}
_SAMPLED = 1 << 16  # bytes at each end that a file is known by


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the fields of a record."""

    text: str = "text"
    """The document."""
    id: str | None = None
    """What identifies it; None: its file and line do."""
    domain: str | None = None
    """What it is compared with, such as "code"; None: all documents are one domain."""


@dataclass(frozen=True)
class Unit:
    """Bytes, or row groups, `start` to `stop` of a file; numbered through the corpus."""

    index: int
    path: str
    kind: str
    start: int
    stop: int


class Document(NamedTuple):
    """A document and its line (or row) in its unit, counted from 1."""

    line: int
    id: str | None
    domain: str
    text: str


class Broken(NamedTuple):
    """A line that is no document, and why."""

    line: int
    reason: str


class Content(NamedTuple):
    """What a unit holds, and how many lines it has."""

    documents: list[Document]
    broken: list[Broken]
    lines: int


def pyarrow() -> Any:
    """pyarrow with its Parquet part, or a CorpusProblem that says how to get it."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError:
        raise CorpusProblem("Parquet, in which scores are kept, needs pyarrow: uv add pyarrow") from None
    return arrow


def kind_of(path: Path) -> str:
    """ "jsonl", "gzip" or "parquet". CorpusProblem on other names."""
    for ending, kind in _KINDS.items():
        if path.name.endswith(ending):
            return kind
    raise CorpusProblem(f"'{path}' is none of {', '.join('*' + ending for ending in _KINDS)}")


def corpus_files(inputs: Sequence[Path | str]) -> list[Path]:
    """The files given, and those in the folders given, in order. CorpusProblem on what is missing or unknown."""
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if any(p.name.endswith(ending) for ending in _KINDS))
            if not inside:
                raise CorpusProblem(f"'{path}' holds none of {', '.join('*' + ending for ending in _KINDS)}")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise CorpusProblem(f"no file at '{path}'")
    if len({"parquet" if kind_of(file) == "parquet" else "lines" for file in files}) > 1:
        raise CorpusProblem("give either Parquet files or files of JSON lines, not both: what is kept is written alike")
    if len(set(files)) < len(files):
        raise CorpusProblem(f"'{next(file for file in files if files.count(file) > 1)}' is given twice")
    return files


def corpus_units(files: Sequence[Path], unit_bytes: int) -> list[Unit]:
    """Units of about that many bytes, in order; for Parquet, bytes of uncompressed row groups."""
    if unit_bytes < 1:
        raise CorpusProblem(f"unit_bytes must be at least 1, got {unit_bytes}")
    ranges = [(file, kind_of(file), *span) for file in files for span in _spans(file, unit_bytes)]
    return [Unit(index, str(file), kind, start, stop) for index, (file, kind, start, stop) in enumerate(ranges)]


def _spans(file: Path, unit_bytes: int) -> Iterator[tuple[int, int]]:
    kind = kind_of(file)
    if kind == "parquet":
        yield from _row_groups(file, unit_bytes)
        return
    size = file.stat().st_size
    step = size if kind == "gzip" else unit_bytes
    for start in range(0, size, max(step, 1)):
        yield start, min(start + step, size)


def _row_groups(file: Path, unit_bytes: int) -> Iterator[tuple[int, int]]:
    metadata = _open_parquet(file).metadata
    start, held = 0, 0
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        if held >= unit_bytes or group == metadata.num_row_groups - 1:
            yield start, group + 1
            start, held = group + 1, 0


def _open_parquet(file: Path | str) -> Any:
    arrow = pyarrow()
    try:
        return arrow.parquet.ParquetFile(file)
    except (arrow.ArrowInvalid, OSError) as problem:
        raise CorpusProblem(f"'{file}' cannot be read as Parquet: {str(problem).splitlines()[0]}") from None


def fingerprint(path: Path) -> str:
    """A hash of a file's size and of its beginning and end; of a folder, those of all its files by name."""
    found = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.relative_to(path) if path.is_dir() else file.name} {size}".encode())
        with file.open("rb") as stream:
            found.update(stream.read(_SAMPLED))
            stream.seek(max(0, size - _SAMPLED))
            found.update(stream.read())
    return found.hexdigest()[:16]


def read_unit(unit: Unit, columns: Columns) -> Content:
    """The documents of a unit, and the lines that are none."""
    documents: list[Document] = []
    broken: list[Broken] = []
    number = 0
    rows = _parquet_rows(unit, columns) if unit.kind == "parquet" else _json_rows(unit)
    for number, row in rows:
        if row is None:
            continue
        found = row if isinstance(row, str) else _document(number, row, columns)
        if isinstance(found, str):
            broken.append(Broken(number, found))
        else:
            documents.append(found)
    return Content(documents, broken, number)


def _document(number: int, row: dict[str, Any], columns: Columns) -> Document | str:
    """The document, or the reason why there is none."""
    missing = [name for name in (columns.text, columns.id, columns.domain) if name is not None and name not in row]
    if missing:
        return f"no field '{missing[0]}'"
    text = row[columns.text]
    if not isinstance(text, str):
        return f"'{columns.text}' is {type(text).__name__}, not text"
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        return f"'{columns.text}' holds half a surrogate pair"
    ident = None if columns.id is None or row[columns.id] is None else str(row[columns.id])
    return Document(number, ident, "all" if columns.domain is None else str(row[columns.domain]), text)


def _json_rows(unit: Unit) -> Iterator[tuple[int, dict[str, Any] | str | None]]:
    for number, line in unit_lines(unit):
        line = line.rstrip(b"\r\n")
        if not line.strip():
            yield number, None
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 and unit.start == 0 else "utf-8"))
        except UnicodeDecodeError:
            yield number, "not UTF-8"
        except json.JSONDecodeError as problem:
            yield number, f"no JSON: {problem.msg}"
        except (ValueError, RecursionError) as problem:  # a number of thousands of digits, lists a thousand deep
            yield number, f"no JSON: {problem}"
        else:
            yield number, row if isinstance(row, dict) else f"{type(row).__name__}, not an object"


def unit_lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in the unit, as they stand in the file, with their numbers in the unit, from 1."""
    if unit.kind == "gzip":
        with gzip.open(unit.path) as stream:
            try:
                yield from enumerate(stream, 1)
            except (EOFError, OSError) as problem:
                raise CorpusProblem(f"'{unit.path}' cannot be decompressed: {problem}") from None
        return
    with open(unit.path, "rb") as stream:
        yield from enumerate(_lines_from(stream, unit.start, unit.stop), 1)


def _lines_from(stream: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    if start:
        stream.seek(start - 1)
        stream.readline()  # the rest of a line that began before; nothing where one begins at `start`
    while stream.tell() < stop:
        yield stream.readline()


def _parquet_rows(unit: Unit, columns: Columns) -> Iterator[tuple[int, dict[str, Any] | str | None]]:
    file = _open_parquet(unit.path)
    names = [name for name in (columns.text, columns.id, columns.domain) if name is not None]
    missing = [name for name in names if name not in file.schema_arrow.names]
    if missing:
        known = ", ".join(file.schema_arrow.names)
        raise CorpusProblem(f"'{unit.path}' has no column '{missing[0]}'; its columns are {known}")
    groups = range(unit.start, unit.stop)
    number = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=list(groups), columns=list(dict.fromkeys(names))):
        for row in batch.to_pylist():
            number += 1
            yield number, row
