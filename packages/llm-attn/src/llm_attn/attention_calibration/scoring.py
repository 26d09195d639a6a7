"""Multiple choice by the likelihood of each option, the prompt computed once for all of its options.

The prompt is one call, in the form that the method has for prompts, and an option is what is generated after it. No
option is thus seen by the rows of its prompt, also where rows of a prompt depend on later ones.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from llm_attn.transformers.door import base_model

Metric = Literal["choice_accuracy", "label_accuracy"]


@dataclass(frozen=True)
class Choice:
    """A question with one right option.

    prompt: what stands before the option. options: its continuations, with the space they begin with, if they do.
    answer: number of the right one.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if not self.prompt or len(self.options) < 2 or not all(self.options):
            raise ValueError(f"a choice needs a prompt and two or more options with text, got {self!r}")
        if not 0 <= self.answer < len(self.options):
            raise ValueError(f"answer must be the number of an option, 0 to {len(self.options) - 1}, got {self.answer}")


@dataclass(frozen=True)
class Batch:
    """Some choices as tokens: prompts padded on the left, options (those of a prompt in a row) on the right."""

    index: list[int]
    """Which of the examples these are."""
    prompts: Int[Tensor, "n P"]
    prompt_mask: Bool[Tensor, "n P"]
    options: Int[Tensor, "n*m T"]
    option_mask: Bool[Tensor, "n*m T"]


def check_metric(metric: str) -> None:
    """ValueError on a metric that does not exist."""
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")


def choice_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Choice],
    *,
    metric: Metric = "choice_accuracy",
    batch_size: int = 16,
    on_batch: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "n options"]:
    """Score of each option of each example; -inf beyond the options that an example has. The highest is the answer.

    "choice_accuracy" scores by the mean log-likelihood of an option's tokens. "label_accuracy" looks at the first token
    after the prompt, and there at the last token of each option (the official code's rule for classification).
    `on_batch` is told how many examples are done, of how many.
    """
    check_metric(metric)
    batches = encode(tokenizer, examples, batch_size=batch_size)
    scores = torch.full((len(examples), max(len(example.options) for example in examples)), -torch.inf)
    done = 0
    for batch in batches:
        of_batch = score_batch(model, batch, metric)
        scores[batch.index, : of_batch.shape[1]] = of_batch.cpu()
        done += len(batch.index)
        if on_batch is not None:
            on_batch(done, len(examples))
    return scores


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Choice], *, batch_size: int) -> list[Batch]:
    """The examples as batches, prompts of like length together."""
    if not examples:
        raise ValueError("examples must hold at least one Choice, got none")
    prompts = [tokenizer(example.prompt)["input_ids"] for example in examples]
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    batches = []
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        options = list(_options(tokenizer, [examples[i] for i in index]))
        batches.append(Batch(index, *_padded([prompts[i] for i in index], left=True), *_padded(options, left=False)))
    return batches


def _options(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Choice]) -> Iterator[list[int]]:
    most = max(len(example.options) for example in examples)
    for example in examples:
        yield from (tokenizer(option, add_special_tokens=False)["input_ids"] for option in example.options)
        yield from [[]] * (most - len(example.options))


def _padded(rows: Sequence[list[int]], *, left: bool) -> tuple[Int[Tensor, "n T"], Bool[Tensor, "n T"]]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.int64), True
    return ids, mask


@torch.inference_mode()
def score_batch(model: PreTrainedModel, batch: Batch, metric: Metric) -> Float[Tensor, "n m"]:
    """Scores of the options of a batch; -inf where an example has fewer."""
    host = base_model(model)
    n, m = len(batch.index), len(batch.options) // len(batch.index)
    prompts, mask, options, option_mask = (
        tensor.to(host.device) for tensor in (batch.prompts, batch.prompt_mask, batch.options, batch.option_mask)
    )
    cache = DynamicCache(config=host.config.get_text_config())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    last = _log_likelihoods(model, prompts, mask, positions, cache, logits_to_keep=1)[:, -1]
    counts = option_mask.sum(-1)
    if metric == "label_accuracy":
        labels = options.gather(1, (counts - 1).clamp(min=0)[:, None]).view(n, m)
        return last.gather(1, labels).masked_fill(counts.view(n, m) == 0, -torch.inf)
    total = last.repeat_interleave(m, 0).gather(1, options[:, :1])[:, 0]
    if options.shape[1] > 1:
        cache.batch_repeat_interleave(m)
        mask, positions = mask.repeat_interleave(m, 0), positions[:, -1:].repeat_interleave(m, 0)
        positions = positions + torch.arange(1, options.shape[1], device=host.device)
        mask = torch.cat([mask, option_mask[:, :-1]], 1)
        rest = _log_likelihoods(model, options[:, :-1], mask, positions, cache)
        rest = rest.gather(2, options[:, 1:, None])[..., 0]
        total = total + rest.masked_fill(~option_mask[:, 1:], 0).sum(-1)
    return (total / counts.clamp(min=1)).masked_fill(counts == 0, -torch.inf).view(n, m)


def _log_likelihoods(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, **more: Any
) -> Float[Tensor, "n T V"]:
    # older transformers call it past_key_values
    name = "cache" if "cache" in inspect.signature(base_model(model).forward).parameters else "past_key_values"
    given = {"attention_mask": mask.long(), "position_ids": positions, name: cache, "use_cache": True}
    return model(input_ids=ids, **given, **more).logits.float().log_softmax(-1)
