"""Which heads to calibrate: each on its own, on examples with known answers, kept if accuracy rises (section 4.2).

Three things make that affordable. A head that has no sink on any example cannot change anything and is not tried. A
trial in layer l starts from the stored input of layer l. And every trial is on disk before the next one begins, so that
a search goes on where it was cut off.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from llm_attn.attention_calibration.config import ACTConfig
from llm_attn.attention_calibration.door import apply_act
from llm_attn.attention_calibration.scoring import Batch, Choice, Metric, check_metric, encode, score_batch
from llm_attn.transformers.door import attention_layers, base_model, decoder_layers

_DEFAULT = ACTConfig()


@dataclass(frozen=True)
class HeadTrial:
    """What calibrating one head alone does. likelihood: mean log-probability of the right option among the options."""

    layer: int
    head: int
    accuracy: float
    likelihood: float


@dataclass
class HeadTable:
    """The outcome of a search: accuracy without calibration, and with each head that has sinks calibrated alone."""

    settings: dict[str, Any]
    """What was searched: metric, calibration, layers, and a fingerprint of the examples."""
    accuracy: float
    likelihood: float
    trials: list[HeadTrial] = field(default_factory=list)

    def select(self, *, min_gain: float = 0.0, top: int | None = None) -> dict[int, tuple[int, ...]]:
        """Heads that gained more than `min_gain` accuracy, or the `top` best of these, by layer, as `ACTConfig.heads`.

        Ranked by gain, then by likelihood; a head that gains nothing is never kept. Empty if there are none.
        """
        better = [trial for trial in self.ranked() if trial.accuracy - self.accuracy > max(0.0, min_gain)][:top]
        return {
            layer: tuple(sorted(trial.head for trial in better if trial.layer == layer))
            for layer in sorted({trial.layer for trial in better})
        }

    def ranked(self) -> list[HeadTrial]:
        """Trials, best first."""
        return sorted(self.trials, key=lambda trial: (-trial.accuracy, -trial.likelihood, trial.layer, trial.head))

    def save(self, path: Path | str) -> None:
        """Writes JSON, whole at any time."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(path)

    @classmethod
    def load(cls, path: Path | str) -> "HeadTable":
        """Reads what `save` wrote."""
        content = json.loads(Path(path).read_text())
        return cls(**{**content, "trials": [HeadTrial(**trial) for trial in content["trials"]]})


def calibrate_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Choice],
    *,
    config: ACTConfig = _DEFAULT,
    metric: Metric = "choice_accuracy",
    layers: str | Sequence[int] = "2:-1",
    batch_size: int = 16,
    resume_from: Path | str | None = None,
    on_head: Callable[[int, int, HeadTrial], None] | None = None,
) -> HeadTable:
    """Tries each head of `layers` (numbers, or a slice such as "2:-1") alone, on examples that are not for testing.

    config: how a head is calibrated; if it names heads, only those are tried.
    resume_from: file that every trial is written to; if it exists, its trials are not run again.
    on_head: told, after each trial, how many are done, of how many, and the trial.

    Raises ValueError on layers that do not exist, and on a file of another search, model or examples.
    """
    check_metric(metric)
    host = base_model(model)
    chosen = _chosen_layers(layers, len(attention_layers(host)))
    searched = replace(config, heads=_searched(config, host, chosen))
    right = torch.tensor([example.answer for example in examples])
    batches = encode(tokenizer, examples, batch_size=batch_size)
    scores, candidates = _without_calibration(host, batches, searched, metric)
    table = HeadTable(_settings(searched, metric, chosen, examples), *_outcome(scores, right))
    table = _resumed(table, resume_from)
    done = {(trial.layer, trial.head) for trial in table.trials}
    inputs: list[list[Tensor]] | None = None
    before = 0
    for layer in chosen:
        heads = [head for head in candidates.get(layer, ()) if (layer, head) not in done]
        if not heads:
            continue
        inputs, before = _inputs_of(host, batches, metric, layer, inputs, before), layer
        for head in heads:
            trial = _try(host, batches, replace(config, heads={layer: (head,)}), metric, inputs, right)
            table.trials.append(trial)
            if resume_from is not None:
                table.save(resume_from)
            if on_head is not None:
                on_head(len(table.trials), sum(map(len, candidates.values())), trial)
    return table


def _chosen_layers(layers: str | Sequence[int], count: int) -> tuple[int, ...]:
    if not isinstance(layers, str):
        chosen = tuple(sorted(set(layers)))
    else:
        try:
            chosen = tuple(range(count))[slice(*(int(part) if part.strip() else None for part in layers.split(":")))]
        except (ValueError, TypeError):
            raise ValueError(f'layers must be numbers, or a slice such as "2:-1", got {layers!r}') from None
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < count:
        raise ValueError(f"layers must name some of the {count} layers, got {layers!r}, that is {list(chosen)}")
    return chosen


def _searched(config: ACTConfig, host: PreTrainedModel, layers: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    everything = tuple(range(host.config.get_text_config().num_attention_heads))
    if config.heads is None:
        return dict.fromkeys(layers, everything)
    return {layer: tuple(config.heads[layer]) for layer in layers if layer in config.heads}


def _without_calibration(
    host: PreTrainedModel, batches: Sequence[Batch], searched: ACTConfig, metric: Metric
) -> tuple[Float[Tensor, "n options"], dict[int, list[int]]]:
    """Scores of the model itself, and the heads that have a sink on any example."""
    with_sinks: dict[int, set[int]] = {}

    def on_sinks(layer: int, heads: tuple[int, ...], _: Tensor, sinks: Tensor) -> None:
        found = sinks.any(-1).any(0).tolist()
        with_sinks.setdefault(layer, set()).update(h for h, any_sink in zip(heads, found, strict=True) if any_sink)

    with apply_act(host, replace(searched, beta=1.0), on_sinks=on_sinks):
        scores = _scores(host, batches, metric, None, 0)
    return scores, {layer: sorted(heads) for layer, heads in with_sinks.items()}


def _settings(config: ACTConfig, metric: str, layers: tuple[int, ...], examples: Sequence[Choice]) -> dict[str, Any]:
    content = json.dumps([asdict(example) for example in examples], sort_keys=True)
    of_config = json.loads(json.dumps(asdict(config)))
    fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    return {"metric": metric, "layers": list(layers), "config": of_config, "examples": fingerprint}


def _resumed(table: HeadTable, path: Path | str | None) -> HeadTable:
    if path is None or not Path(path).exists():
        return table
    saved = HeadTable.load(path)
    same = math.isclose(saved.likelihood, table.likelihood, rel_tol=1e-3) and saved.accuracy == table.accuracy
    if saved.settings != table.settings or not same:
        raise ValueError(f"{path} is of another search (model, examples or settings differ): give another file")
    return saved


def _try(
    host: PreTrainedModel,
    batches: Sequence[Batch],
    config: ACTConfig,
    metric: Metric,
    inputs: Sequence[Sequence[Tensor]],
    right: Int[Tensor, "n"],
) -> HeadTrial:
    ((layer, (head,)),) = (config.heads or {}).items()
    with apply_act(host, config):
        return HeadTrial(layer, head, *_outcome(_scores(host, batches, metric, inputs, layer), right))


def _outcome(scores: Float[Tensor, "n options"], right: Int[Tensor, "n"]) -> tuple[float, float]:
    """Accuracy, and mean log-probability of the right option among the options."""
    accuracy = (scores.argmax(-1) == right).double().mean().item()
    return accuracy, scores.double().log_softmax(-1).gather(1, right[:, None]).mean().item()


def _scores(
    host: PreTrainedModel,
    batches: Sequence[Batch],
    metric: Metric,
    inputs: Sequence[Sequence[Tensor]] | None,
    layer: int,
) -> Float[Tensor, "n options"]:
    """Scores of all examples; with `inputs`, the calls start at that layer."""
    found = []
    for number, batch in enumerate(batches):
        with _starting_at(host, layer, None if inputs is None else inputs[number]):
            found.append(score_batch(host, batch, metric).cpu())
    width = max(scores.shape[1] for scores in found)
    scores = torch.full((sum(map(len, found)), width), -torch.inf)
    for batch, of_batch in zip(batches, found, strict=True):
        scores[batch.index, : of_batch.shape[1]] = of_batch
    return scores


def _inputs_of(
    host: PreTrainedModel,
    batches: Sequence[Batch],
    metric: Metric,
    layer: int,
    inputs: Sequence[Sequence[Tensor]] | None,
    before: int,
) -> list[list[Tensor]]:
    """What the layer is given in each call of each batch, starting from the stored inputs of an earlier layer."""
    found: list[list[Tensor]] = [[] for _ in batches]
    target: list[Tensor] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target.append(args[0] if args else kwargs["hidden_states"])

    for number, batch in enumerate(batches):
        target = found[number]
        with _starting_at(host, before, None if inputs is None else inputs[number]):
            hook = decoder_layers(host)[layer].register_forward_pre_hook(keep, with_kwargs=True)
            try:
                score_batch(host, batch, metric)
            finally:
                hook.remove()
    return found


@contextmanager
def _starting_at(host: PreTrainedModel, layer: int, inputs: Sequence[Tensor] | None) -> Iterator[None]:
    """Has each call of the model in the block begin at `layer` with the next of its stored inputs."""
    if inputs is None:
        yield
        return
    layers, left = decoder_layers(host), iter(inputs)

    def start(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (next(left), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": next(left)}

    hooks = [
        host.register_forward_pre_hook(_lend_length(layer), with_kwargs=True),
        layers[layer].register_forward_pre_hook(start, with_kwargs=True),
    ]
    skipped = [(each, each.__dict__.get("forward")) for each in list(layers)[:layer]]
    try:
        for each, _ in skipped:
            each.forward = _pass_on
        yield
    finally:
        for each, forward in skipped:
            del each.forward
            if forward is not None:
                each.forward = forward
        for hook in hooks:
            hook.remove()


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _lend_length(layer: int) -> Callable[..., None]:
    """Before a later call: layers that were skipped have nothing in the cache, so they lend the length of one that has.

    transformers asks the first layer how long the text is, and one layer of each kind (sliding or not) for its mask.
    """

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next(given for given in (*args, *kwargs.values()) if isinstance(given, Cache))
        filled: list[Any] = cache.layers[layer:]
        if not filled[0].is_initialized:
            return
        sliding = cache.is_sliding
        for index in range(layer):
            alike = (each for each in filled if each.is_sliding == sliding[index])
            cache.layers[index] = next(alike, filled[0])

    return before
