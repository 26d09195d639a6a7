"""Training a boundary predictor for a model, from the model's own attention: no labels are needed, the model is frozen.

A chunk ends where later tokens treat the two sides differently: for place i, the attention that all tokens from i + w
on pay to the w tokens before and to the w tokens after is summed, and where one sum is at least twice the other there
is a boundary. The predictor learns to say so from the keys alone.

arXiv:2510.24606, section 3.1 and the authors' released code. Decided here: attention is summed row block by row block,
so that no map of tokens x tokens exists for all heads; sums are float64. One step of Adam per document, over the
gradients of all layers. A training that was stopped goes on behind the last document that its folder knows of.

Shapes: B batch, H query heads, Hkv key heads, L tokens, D head width.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from llm_attn.dhsa.config import PredictorConfig
from llm_attn.dhsa.door import describe_host, key_channels
from llm_attn.dhsa.predictor import BoundaryPredictor
from llm_attn.transformers.door import base_model, layer_config, open_door, register_attention
from llm_attn.transformers.visibility import Visibility, dense_attention

NAME = "dhsa_labels"
ROWS = 256
"""Rows of attention that exist at a time."""
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class BoundaryTraining:
    """Settings of a training."""

    learning_rate: float = 1e-4
    epochs: int = 2
    """How often each document is seen."""
    max_tokens: int = 8192
    """Longer documents lose their beginning."""
    min_tokens: int = 512
    """Shorter documents are left out."""
    window_rows: int = 4096
    """Rows that count for a place in sliding-window layers."""
    gamma: float = 2.0
    """Focus of the loss on places that are judged wrongly; 0 is plain cross-entropy."""
    pos_weight: float = 1.3
    """Weight of boundaries."""
    alpha: float = 2.0
    beta: float = 2.0
    """A ratio of attention of `beta` is a boundary as likely as not; `alpha` is how fast it becomes one from there."""
    soft: bool = False
    """Whether targets are probabilities; otherwise 0 and 1."""
    checkpoint_every: int = 200
    """Documents between two checkpoints."""
    seed: int = 0
    """Of the first weights and the order of the documents."""

    def __post_init__(self) -> None:
        counts = ("epochs", "max_tokens", "min_tokens", "window_rows", "checkpoint_every")
        for name in (*counts, "learning_rate", "alpha", "beta", "pos_weight"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma}")


def mass_ratio(
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B Hkv L D"],
    *,
    window: int = 4,
    scale: float | None = None,
    sliding: int | None = None,
    max_rows: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B L"]:
    """How unlike the attention is that the two sides of each place get: (larger + 1e-6) / (smaller + 1e-6), float64.

    Place i: the mean over heads of causal attention, summed over rows i + w to L - 1 (at most `max_rows`), on columns
    i - w + 1..i and on columns i + 1..i + w. `sliding` is the window of the layer. 0 within 2w of either end.
    """
    (B, H, L, D), (Hkv, w) = query.shape, (key.shape[1], window)
    scale = D**-0.5 if scale is None else scale
    past, future = key.new_zeros(2, B, L, dtype=torch.float64)
    place = torch.arange(L, device=key.device)
    for low in range(0, L, ROWS):
        rows = place[low : low + ROWS]
        q = query[:, :, rows].unflatten(1, (Hkv, H // Hkv)).to(torch.promote_types(query.dtype, torch.float32))
        scores = q @ key.to(q.dtype)[:, :, None].mT * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        seen = Visibility(sliding).dense(L, L, key.device)[0, 0, rows]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean((1, 2)).double()  # (B, rows, L)
        upto = F.pad(weights.cumsum(-1), (w, w + 1))  # upto[j + w] is the sum of columns up to j
        upto[..., w + L :] = upto[..., w + L - 1 : w + L]
        left = upto[..., w : w + L] - upto[..., :L]
        right = upto[..., 2 * w : 2 * w + L] - upto[..., w : w + L]
        counted = rows[:, None] >= place + w
        if max_rows is not None:
            counted &= rows[:, None] < place + w + max_rows
        past += (left * counted).sum(1)
        future += (right * counted).sum(1)
    ratio = (torch.maximum(past, future) + EPSILON) / (torch.minimum(past, future) + EPSILON)
    return ratio.masked_fill(~valid_places(L, w, key.device), 0.0)


def valid_places(length: int, window: int, device: torch.device) -> Bool[Tensor, "L"]:
    """Places that are 2w from either end."""
    place = torch.arange(length, device=device)
    return (place >= 2 * window - 1) & (place < length - 2 * window)


def boundary_targets(
    ratio: Float[Tensor, "B L"], *, alpha: float = 2.0, beta: float = 2.0, soft: bool = False
) -> Float[Tensor, "B L"]:
    """sigmoid(alpha (log ratio - log beta)), ratio at least 1; 1 where that is at least 1/2, else 0, unless `soft`."""
    odds = alpha * ((ratio.clamp(min=1.0) + EPSILON).log() - torch.tensor(beta, dtype=ratio.dtype).log())
    return torch.sigmoid(odds) if soft else (odds >= 0).to(ratio.dtype)


def focal_loss(
    logits: Float[Tensor, "B L"],
    targets: Float[Tensor, "B L"],
    valid: Bool[Tensor, "#B L"],
    *,
    gamma: float = 2.0,
    pos_weight: float = 1.3,
) -> Float[Tensor, ""]:
    """Mean over valid places of (1 - p_t)^gamma times binary cross-entropy, p_t the probability of the target."""
    weight = torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    probability = logits.sigmoid()
    agreed = probability * targets + (1 - probability) * (1 - targets)
    valid = valid.expand_as(loss)
    return ((1 - agreed).pow(gamma) * loss).masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


@dataclass(frozen=True)
class _Recorder:
    """Takes the place of a config while attention is recorded: called by each layer with what it is given."""

    on_layer: Callable[..., None]


def _record(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    *,
    scale: float | None,
    dropout: float,  # noqa: ARG001 - labels are those of the model at work
    softcap: float | None = None,
) -> Tensor:
    recorder = layer_config(layer, NAME, None)
    if recorder is None:
        raise ValueError(f"{NAME} is how labels are made, not an attention to choose; see train_boundary_predictor")
    recorder.on_layer(query, key, visible.window, scale, softcap)
    return dense_attention(query, key, value, visible, scale=scale, softcap=softcap)


register_attention(NAME, _record, softcap=True)


def layer_keys_and_ratios(
    model: nn.Module, ids: Tensor, *, window: int = 4, window_rows: int = 4096
) -> list[tuple[Float[Tensor, "1 Hkv L D"], Float[Tensor, "1 L"]]]:
    """For each layer of the model, the keys of a document (L,) and how unlike the sides of each place are."""
    found = []

    def on_layer(query: Tensor, key: Tensor, sliding: int | None, scale: float | None, softcap: float | None) -> None:
        rows = None if sliding is None else window_rows
        options: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap}
        found.append((key.float(), mass_ratio(query, key, sliding=sliding, max_rows=rows, **options)))

    host = base_model(model)
    training = host.training
    host.eval()
    try:
        with open_door(host, NAME, _Recorder(on_layer)), torch.no_grad():
            host.get_decoder()(input_ids=ids[None].to(host.device), use_cache=False)
    finally:
        host.train(training)
    return found


def train_boundary_predictor(
    model: nn.Module,
    documents: Iterable[Tensor | Sequence[int]],
    *,
    build: PredictorConfig | None = None,
    training: BoundaryTraining | None = None,
    folder: Path | str | None = None,
    on_document: Callable[[int, float], None] | None = None,
) -> BoundaryPredictor:
    """A boundary predictor for the model, trained on documents (token ids), in eval mode.

    folder: gets checkpoints and in the end the predictor; a second call with it goes on where the first stopped.
    on_document: called with the number of documents done and the loss of the last.
    Raises ValueError where no document has `training.min_tokens`, or the folder holds another training.
    """
    training = BoundaryTraining() if training is None else training
    texts = [torch.as_tensor(d, dtype=torch.long)[-training.max_tokens :] for d in documents]
    texts = [text for text in texts if len(text) >= training.min_tokens]
    if not texts:
        raise ValueError(f"no document has the {training.min_tokens} tokens that training takes (min_tokens)")
    run = _Run(model, _build_for(model, build), training, None if folder is None else Path(folder))
    for number, index in enumerate(_order(len(texts), training)):
        if number < run.done:
            continue
        loss = run.step(texts[index])
        if on_document is not None:
            on_document(run.done, loss)
    run.finish()
    return run.predictor.eval()


def _build_for(model: nn.Module, build: PredictorConfig | None) -> PredictorConfig:
    channels = key_channels(model)
    if build is None:
        return PredictorConfig(channels=channels, host=describe_host(model))
    if build.channels != channels:
        raise ValueError(f"build.channels must be {channels}, the width of this model's keys, got {build.channels}")
    return build


def _order(count: int, training: BoundaryTraining) -> Iterator[int]:
    generator = torch.Generator().manual_seed(training.seed)
    for _ in range(training.epochs):
        yield from torch.randperm(count, generator=generator).tolist()


class _Run:
    """A training under way: the predictor, its optimiser, and how many documents they have seen."""

    def __init__(
        self, model: nn.Module, build: PredictorConfig, training: BoundaryTraining, folder: Path | None
    ) -> None:
        self.model, self.training, self.folder, self.done = model, training, folder, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.predictor = BoundaryPredictor(build).train()
        self.predictor.to(base_model(model).device)
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), lr=training.learning_rate)
        self.settings = {"build": asdict(build), "training": asdict(training)}
        if folder is not None and (folder / "training.json").exists():
            self._resume(folder)

    def step(self, ids: Tensor) -> float:
        t, window = self.training, self.predictor.config.window
        layers = layer_keys_and_ratios(self.model, ids, window=window, window_rows=t.window_rows)
        self.optimizer.zero_grad()
        losses = []
        for key, ratio in layers:
            targets = boundary_targets(ratio, alpha=t.alpha, beta=t.beta, soft=t.soft).float()
            valid = valid_places(len(ids), window, key.device)[None]
            loss = focal_loss(self.predictor(key), targets, valid, gamma=t.gamma, pos_weight=t.pos_weight)
            loss.backward()
            losses.append(loss.item())
        self.optimizer.step()
        self.done += 1
        if self.folder is not None and self.done % t.checkpoint_every == 0:
            self._checkpoint(self.folder)
        return sum(losses) / len(losses)

    def finish(self) -> None:
        if self.folder is not None:
            self._checkpoint(self.folder)
            self.predictor.save_pretrained(self.folder)

    def _checkpoint(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"predictor.{name}": tensor.contiguous() for name, tensor in self.predictor.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            state |= {
                f"optimizer.{index}.{name}": torch.as_tensor(value).contiguous() for name, value in values.items()
            }
        # weights of a checkpoint carry its number, so that the JSON, replaced last, never points to others
        file = folder / f"training-{self.done}.safetensors"
        save_file(state, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        record = folder / "training.json"
        record.with_suffix(".part").write_text(json.dumps({**self.settings, "done": self.done}, indent=2))
        record.with_suffix(".part").replace(record)
        for old in folder.glob("training-*.safetensors"):
            if old != file:
                old.unlink()

    def _resume(self, folder: Path) -> None:
        record = json.loads((folder / "training.json").read_text())
        done = record.pop("done")
        if record != self.settings:
            raise ValueError(f"{folder} holds a training with other settings; give another folder, or its settings")
        state = load_file(folder / f"training-{done}.safetensors")
        weights = {k.removeprefix("predictor."): v for k, v in state.items() if k.startswith("predictor.")}
        self.predictor.load_state_dict(weights)
        adam = self.optimizer.state_dict()
        adam["state"] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, entry = name.split(".")
                adam["state"].setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict(adam)
        self.done = done


def evaluate_boundary_predictor(
    model: nn.Module,
    predictor: BoundaryPredictor,
    documents: Iterable[Tensor | Sequence[int]],
    *,
    training: BoundaryTraining | None = None,
    topk: int = 500,
) -> dict[str, float]:
    """Precision, recall and F1 of boundaries at probability 1/2, and the share that the `topk` places with the highest
    ratios and with the highest logits have in common; over all layers and documents."""
    t = BoundaryTraining() if training is None else training
    window = predictor.config.window
    hits = claimed = true = common = compared = 0.0
    for document in documents:
        ids = torch.as_tensor(document, dtype=torch.long)[-t.max_tokens :]
        for key, ratio in layer_keys_and_ratios(model, ids, window=window, window_rows=t.window_rows):
            with torch.no_grad():
                logits = predictor(key)
            valid = valid_places(len(ids), window, key.device)
            logits, ratio = logits[0, valid], ratio[0, valid]
            target, said = boundary_targets(ratio, alpha=t.alpha, beta=t.beta).bool(), logits >= 0
            hits += (target & said).sum().item()
            claimed, true = claimed + said.sum().item(), true + target.sum().item()
            k = min(topk, len(logits))
            best = [torch.zeros_like(said).scatter_(0, x.topk(k).indices, True) for x in (ratio, logits)]
            common, compared = common + (best[0] & best[1]).sum().item(), compared + k
    precision, recall = hits / max(claimed, 1), hits / max(true, 1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "overlap": common / max(compared, 1),
    }
