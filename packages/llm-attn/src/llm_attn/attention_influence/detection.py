"""Retrieval heads: which heads look at the token that the model is about to copy (eqs. 1-4).

The definition is that of Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality",
arXiv:2404.15574. A head scores a hit where its most attended position lies in the span of the answer in the context and
holds the very token that comes next; its score is the share of the answer that it hits, averaged over samples.

Decided here: the answer is given, not generated, so that one pass serves a sample; `generate=True` has the model speak
instead, and then, as eq. 4 is about sets, a token that is copied twice counts once. The most attended position needs
no softmax and only the rows of the answer, so detection costs hardly more than the pass, without an attention map.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_attn.attention_influence.retrieval import RetrievalSample
from llm_attn.transformers.door import base_model, layer_config, open_door, register_attention
from llm_attn.transformers.visibility import Visibility, dense_attention
from shared_kernels import attention_argmax

NAME = "retrieval_watch"


@dataclass(frozen=True)
class HeadScores:
    """Retrieval score of every head, 0 to 1."""

    scores: tuple[tuple[float, ...], ...]
    """By layer, then by head."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the scores come from."""

    def ranked(self) -> list[tuple[int, int, float]]:
        """Layer, head and score, best first; of equal ones the earlier layer and head."""
        heads = [(la, h, score) for la, of_layer in enumerate(self.scores) for h, score in enumerate(of_layer)]
        return sorted(heads, key=lambda each: (-each[2], each[0], each[1]))

    def top(self, share: float = 0.05) -> dict[int, tuple[int, ...]]:
        """The best heads by layer: that share of all, rounded, at least one (the paper: 5 %)."""
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        ranked = self.ranked()
        return by_layer((layer, head) for layer, head, _ in ranked[: max(1, round(share * len(ranked)))])

    def random_others(self, share: float = 0.05, *, seed: int) -> dict[int, tuple[int, ...]]:
        """As many heads as `top`, drawn from all that it leaves: the control of every claim about the best."""
        count = sum(map(len, self.top(share).values()))
        rest = [(layer, head) for layer, head, _ in self.ranked()[count:]]
        if len(rest) < count:
            raise ValueError(f"the best {count} heads leave only {len(rest)} others: take a smaller share")
        return by_layer(random.Random(seed).sample(rest, count))

    def save(self, path: Path | str) -> None:
        """Writes JSON, whole at any time."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: Path | str) -> "HeadScores":
        """Reads what `save` wrote. ValueError on anything else."""
        try:
            content = json.loads(Path(path).read_text())
            return cls(tuple(tuple(float(s) for s in of_layer) for of_layer in content["scores"]), content["settings"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} holds no head scores: give a file that HeadScores.save wrote") from None


def by_layer(heads: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """Heads, given as (layer, head), as `HeadMaskingConfig.heads` has them."""
    chosen: dict[int, list[int]] = {}
    for layer, head in heads:
        chosen.setdefault(layer, []).append(head)
    return {layer: tuple(sorted(chosen[layer])) for layer in sorted(chosen)}


@dataclass
class _Watch:
    """Rows of the next call to look at, (R,) or one list per text (B, R), and what each layer's heads look at most."""

    rows: Int[Tensor, "*B R"]
    length: int
    """Tokens so far; a sliding window's cache holds only the last of them."""
    found: dict[int, Int[Tensor, "B H R"]] = field(default_factory=dict)

    def positions(self) -> Int[Tensor, "B layers H R"]:
        return torch.stack([self.found[layer] for layer in sorted(self.found)], 1)


def _attention(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    *,
    scale: float | None,
    dropout: float,
    softcap: float | None = None,
) -> Tensor:
    watch: _Watch = layer_config(layer, NAME, None)
    index: int = layer.layer_idx  # type: ignore[assignment]
    # neither a positive scale nor a cap of the scores moves the largest one
    rows = watch.rows.to(query.device)
    seen = attention_argmax(query, key, rows=rows, causal=True, window=visible.window, key_mask=visible.key_mask)
    watch.found[index] = seen + (watch.length - key.shape[2])
    return dense_attention(query, key, value, visible, scale=scale, dropout=dropout, softcap=softcap)


register_attention(NAME, _attention, softcap=True)


def most_attended(
    model: PreTrainedModel, input_ids: Int[Tensor, "B N"], rows: Int[Tensor, "*B R"]
) -> Int[Tensor, "B layers H R"]:
    """The position that each head attends to most from the given rows of unpadded (or right-padded) texts."""
    with torch.inference_mode(), _watching(model, _Watch(rows, input_ids.shape[1])) as watch:
        _decoder(model)(input_ids.to(model.device), use_cache=False)
        return watch.positions().cpu()


@contextmanager
def _watching(model: PreTrainedModel, watch: _Watch) -> Iterator[_Watch]:
    with open_door(model, NAME, watch):
        yield watch


def _decoder(model: PreTrainedModel) -> Any:
    host: Any = base_model(model)
    return host.get_decoder()


def copy_hits(
    positions: Int[Tensor, "*heads R"], sample: RetrievalSample, *, strict: bool = False
) -> Float[Tensor, "*heads"]:
    """Share of the answer's R tokens that a head looks at in the context when they come next.

    positions: what it attends to most from the row before each token. strict: the token must be at the same place in
    the span; otherwise any place in the span with that token counts, as in eq. 2.
    """
    ids = torch.tensor(sample.ids)
    answer, start = ids[sample.prompt :], sample.context
    if strict:
        hits = positions == torch.arange(start, start + sample.answer)
    else:
        inside = (positions >= start) & (positions < start + sample.answer)
        hits = inside & (ids[positions.clamp(min=0)] == answer)
    return hits.double().mean(-1)


def retrieval_scores(
    model: PreTrainedModel,
    samples: Iterable[RetrievalSample],
    *,
    strict: bool = False,
    generate: bool = False,
    batch_size: int = 1,
    on_sample: Callable[[int], None] | None = None,
) -> HeadScores:
    """Retrieval score of every head over the samples.

    strict: see `copy_hits`. generate: the model answers by itself, greedily, token by token. batch_size: samples per
    pass, where the answer is given. on_sample: told how many are done.
    Raises ValueError without samples, and for `strict` with `generate`.
    """
    total: Tensor | None = None
    done = 0
    for hits in sample_hits(model, samples, strict=strict, generate=generate, batch_size=batch_size):
        total = hits if total is None else total + hits
        done += 1
        if on_sample is not None:
            on_sample(done)
    if total is None:
        raise ValueError("there are no samples: give at least one")
    settings = {"samples": done, "strict": strict, "generate": generate}
    return HeadScores(tuple(tuple(row) for row in (total / done).tolist()), settings)


def sample_hits(
    model: PreTrainedModel,
    samples: Iterable[RetrievalSample],
    *,
    strict: bool = False,
    generate: bool = False,
    batch_size: int = 1,
) -> Iterator[Float[Tensor, "layers H"]]:
    """The score of every head on each sample, one after another; arguments are those of `retrieval_scores`."""
    if strict and generate:
        raise ValueError("strict compares places in the given answer, and with generate=True none is given")
    for batch in _batches(samples, 1 if generate else batch_size):
        yield from [_generated_hits(model, batch[0])] if generate else _given_hits(model, batch, strict)


def _batches(samples: Iterable[RetrievalSample], size: int) -> Iterator[list[RetrievalSample]]:
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    batch: list[RetrievalSample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _given_hits(model: PreTrainedModel, batch: Sequence[RetrievalSample], strict: bool) -> list[Tensor]:
    longest, most = max(len(sample.ids) for sample in batch), max(sample.answer for sample in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)  # no row sees what stands to the right of it
    rows = torch.zeros(len(batch), most, dtype=torch.int64)
    for number, sample in enumerate(batch):
        ids[number, : len(sample.ids)] = torch.tensor(sample.ids)
        rows[number, : sample.answer] = torch.arange(sample.prompt - 1, len(sample.ids) - 1)
    positions = most_attended(model, ids, rows)
    return [copy_hits(of[..., : s.answer], s, strict=strict) for of, s in zip(positions, batch, strict=True)]


def _generated_hits(model: PreTrainedModel, sample: RetrievalSample) -> Float[Tensor, "layers H"]:
    spoken, positions = speak(model, sample.ids[: sample.prompt], sample.answer)
    return copied_share(spoken, positions, sample)


@torch.inference_mode()
def speak(
    model: PreTrainedModel, prompt: Sequence[int], length: int
) -> tuple[Int[Tensor, "R"], Int[Tensor, "layers H R"]]:
    """What the model says after the prompt, greedily, and what each head attends to most before each token of it."""
    written, cache = torch.tensor([list(prompt)], device=model.device), None
    spoken, positions = [], []
    with _watching(model, _Watch(torch.tensor([len(prompt) - 1]), len(prompt))) as watch:
        for step in range(length):
            watch.rows, watch.length = torch.tensor([written.shape[1] - 1]), len(prompt) + step
            out = model(written, past_key_values=cache, use_cache=True, logits_to_keep=1)
            written, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            spoken.append(int(written))
            positions.append(watch.positions()[0].cpu())
    return torch.tensor(spoken), torch.cat(positions, -1)


def copied_share(
    spoken: Int[Tensor, "R"], positions: Int[Tensor, "*heads R"], sample: RetrievalSample
) -> Float[Tensor, "*heads"]:
    """|g_h and k| / |k| (eq. 4): of the tokens of the answer k, those that a head copied from its span as they came."""
    ids, start = torch.tensor(sample.ids), sample.context
    inside = (positions >= start) & (positions < start + sample.answer)
    copied = inside & (ids[positions.clamp(min=0)] == spoken)
    wanted = ids[sample.prompt :].unique()
    return (copied[..., None] & (spoken[:, None] == wanted)).any(-2).double().mean(-1)
