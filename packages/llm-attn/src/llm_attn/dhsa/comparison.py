"""A question about a long document, answered with dense attention and with DHSA: time, memory, answers, a picture."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_attn.dhsa.config import DHSAConfig
from llm_attn.dhsa.door import Selection, apply_dhsa
from llm_attn.dhsa.predictor import BoundaryPredictor
from llm_attn.transformers.door import attention_layers

Way = Literal["dense", "dhsa"]
COLUMNS = 1200
"""Columns of the picture at most; longer texts are averaged down to it."""


class InputProblem(ValueError):
    """What was given cannot be used; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one way of reading gave, and what it cost."""

    way: Way
    text: str
    prompt_tokens: int
    first_token: float
    """Seconds from the prompt to the first token of the answer."""
    per_token: float
    """Seconds for each further token."""
    peak: float | None
    """MiB beyond what the loaded model needs; None where the system does not tell."""
    keys_read: float
    """Keys that a token of the prompt attends to, mean over tokens and layers."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both answers, and what DHSA chose while it read the prompt, a layer each."""

    dense: Answer
    dhsa: Answer
    selections: tuple[Selection, ...]


def build_prompt(tokenizer: PreTrainedTokenizerBase, document: str, question: str) -> Int[Tensor, "1 L"]:
    """Document and question as the model's chat template has them, or one after the other if it has none."""
    text = f"{document.strip()}\n\n{question.strip()}"
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return tokenizer(text, return_tensors="pt").input_ids


def compare_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    question: str,
    config: DHSAConfig,
    *,
    predictor: BoundaryPredictor | None = None,
    max_new_tokens: int = 64,
    on_step: Callable[[str], None] | None = None,
) -> Comparison:
    """Answers the question about the document twice, greedily. `on_step` is told what is being done.

    Raises InputProblem where there is nothing to read, or more than the model has positions for.
    """
    ids = _check_prompt(model, build_prompt(tokenizer, document, question), document)
    say = on_step or (lambda _: None)
    chosen: list[Selection] = []
    try:
        door = apply_dhsa(model, config, predictor=predictor, on_selection=chosen.append)
    except ValueError as problem:  # the predictor is another model's, or the family is not supported
        raise InputProblem(str(problem)) from None
    with door:
        say(f"reading {ids.shape[1]:,} tokens with DHSA, {config.budget:,} keys each")
        sparse = _answer(model, tokenizer, ids, "dhsa", max_new_tokens, chosen)
    say("reading them with dense attention")
    dense = _answer(model, tokenizer, ids, "dense", max_new_tokens, [])
    prompt = tuple(s for s in chosen if s.num_queries > 1)
    return Comparison(dense=dense, dhsa=sparse, selections=prompt)


def _check_prompt(model: PreTrainedModel, ids: Tensor, document: str) -> Tensor:
    if not document.strip():
        raise InputProblem("the document has no text")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and ids.shape[1] > most:
        raise InputProblem(
            f"document and question have {ids.shape[1]:,} tokens, the model reads {most:,}: give a shorter document"
        )
    return ids.to(model.device)


@torch.no_grad()
def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "1 L"],
    way: Way,
    max_new_tokens: int,
    chosen: list[Selection],
) -> Answer:
    meter = _PeakMemory(ids.device)
    began = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    tokens = [int(out.logits[0, -1].argmax())]
    first = time.perf_counter() - began
    ends = _ends(model, tokenizer)
    while len(tokens) < max_new_tokens and tokens[-1] not in ends:
        step = torch.tensor([[tokens[-1]]], device=ids.device)
        out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    rest = time.perf_counter() - began - first
    return Answer(
        way=way,
        text=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        prompt_tokens=ids.shape[1],
        first_token=first,
        per_token=rest / max(1, len(tokens) - 1),
        peak=meter.read(),
        keys_read=mean_keys_read(chosen, ids.shape[1], len(attention_layers(model))),
    )


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}


def mean_keys_read(selections: Iterable[Selection], length: int, num_layers: int) -> float:
    """Keys that a token of a prompt attends to; layers that chose nothing read all."""
    every, total, sparse_layers = length * (length + 1) / 2, 0.0, 0
    for s in selections:
        if s.num_queries != length:
            continue
        counts = s.lists.counts[0].double().mean(0)  # over heads with lists of their own
        rows = torch.full_like(counts, s.block_size)
        rows[-1] = s.sparse_queries - (len(counts) - 1) * s.block_size
        # of a block's own keys, which all its queries list, a query sees those up to itself
        total += (counts * rows - rows * (rows - 1) / 2).sum().item()
        total += every - s.sparse_queries * (s.sparse_queries + 1) / 2  # the last tokens read everything
        sparse_layers += 1
    return (total + (num_layers - sparse_layers) * every) / (num_layers * length)


class _PeakMemory:
    """How much more memory the process holds at most, from now on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: float | None = torch.cuda.memory_allocated(device)
        else:
            self._before = self._status("VmRSS")
            if self._before is not None:
                Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def read(self) -> float | None:
        if self._device.type == "cuda" and self._before is not None:
            return (torch.cuda.max_memory_allocated(self._device) - self._before) / 2**20
        peak = self._status("VmHWM")
        return None if peak is None or self._before is None else (peak - self._before) / 2**20

    def _status(self, name: str) -> float | None:
        status = Path("/proc/self/status")
        if not status.exists():
            return None
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))


def reading_map(selections: Iterable[Selection]) -> Float[Tensor, "blocks tokens"]:
    """Share of the layers in which each block of queries reads each token."""
    found: list[Tensor] = []
    for s in selections:
        indices = s.lists.indices[0].long()
        read = torch.zeros(*indices.shape[:2], s.num_keys + 1, device=indices.device)
        read.scatter_(2, indices.masked_fill(indices < 0, s.num_keys), 1.0)
        found.append(read[..., :-1].amax(0))
    if not found:
        raise InputProblem("nothing was chosen: the budget holds the whole prompt, which was read densely")
    return torch.stack(found).mean(0).cpu()


def draw_selections(selections: Iterable[Selection], path: Path) -> Path:
    """A picture of which block of queries read which tokens, with the boundaries of the chunks above; PNG."""
    selections = list(selections)
    read = reading_map(selections)
    tokens = read.shape[1]
    shown = torch.nn.functional.adaptive_avg_pool1d(read[None], min(tokens, COLUMNS))[0]
    figure = Figure(figsize=(10, 5), layout="constrained")
    ticks, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 14))
    cuts = selections[0].boundaries[0].cpu()
    ticks.eventplot([cuts.tolist()], colors="black", linewidths=0.4, lineoffsets=0.5, linelengths=1.0)
    ticks.set(yticks=[], ylim=(0, 1), title=f"{len(cuts) - 1} chunks, and what each block of queries read")
    image = axes.imshow(shown.numpy(), aspect="auto", cmap="magma_r", vmin=0, vmax=1, extent=(0, tokens, len(shown), 0))
    axes.set(xlabel="token of the prompt", ylabel="block of queries")
    figure.colorbar(image, ax=[ticks, axes], label="share of layers that read the token", shrink=0.8)
    temporary = path.with_suffix(".part.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    return path


def write_comparison(result: Comparison, config: DHSAConfig, folder: Path) -> list[Path]:
    """Both answers with their figures as JSON, and the picture; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "config": asdict(config),
        "versions": {name: version(name) for name in ("llm-attn", "torch", "transformers")},
        "threads": torch.get_num_threads(),
        "answers": [asdict(result.dense), asdict(result.dhsa)],
    }
    file = folder / "comparison.json"
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(file)
    return [file, draw_selections(result.selections, folder / "chunks.png")] if result.selections else [file]
