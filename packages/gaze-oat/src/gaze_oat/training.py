"""Training of OAT: teacher forcing, early stop on how greedy paths behave, runs that go on where they were stopped.

Cross-entropy over P objects, stopping and PAD, mean over valid decisions; Adam at 1e-4, batches of 20, gradients
clipped at 1, at most 500 epochs, stop after 30 epochs without a better behaviour delta of greedy paths on validation,
best weights kept. Fang et al., ECCV 2024, arXiv:2407.13335, sections 3.6 and 4.

Decided here: delta on a few validation scenes is noisy, so `monitor="nll"` watches the likelihood of human paths
instead; each epoch seeds its own order and dropout, so a resumed run is the run that was not stopped; `mirror` shows
each scene also mirrored left to right and `weight_decay` is decoupled (both ours, off by default).

Shapes: B trials, n fixations, L = n + 1 decisions, P objects.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gaze_oat.behaviour import behaviour, behaviour_delta, behaviour_means
from gaze_oat.errors import ScanpathProblem
from gaze_oat.layouts import Layout
from gaze_oat.likelihood import done_probabilities, negative_log_likelihood
from gaze_oat.oat import OATModel, SceneBatch
from gaze_oat.scanpaths import write_text

log = logging.getLogger(__name__)
IGNORED = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One person's search of one scene."""

    scene: str
    """Name of the scene: averages are over scenes."""
    objects: Float[Tensor, "P ..."]
    """Crops or vectors; trials of a scene share the tensor."""
    layout: Layout
    """Where the objects are."""
    target: int
    """Object searched for."""
    path: Int[np.ndarray, "n"]
    """Objects looked at."""

    def __post_init__(self) -> None:
        if len(self.path) == 0 or self.path.min() < 0 or self.path.max() >= len(self.layout):
            raise ScanpathProblem(
                f"a path on '{self.scene}' must hold objects 0 to {len(self.layout) - 1} and at least one"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train; defaults are the paper's."""

    epochs: int = 500
    """At most."""
    batch_size: int = 20
    """Trials."""
    lr: float = 1e-4
    """Adam's."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: from lr to 0 over `epochs`; the paper's is constant."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    patience: int = 30
    """Epochs without a better validation figure before it stops."""
    monitor: Literal["delta", "nll"] = "delta"
    """Validation figure: behaviour delta of greedy paths, or NLL of human paths."""
    weight_decay: float = 0.0
    """Decoupled (AdamW); the paper has none."""
    mirror: bool = False
    """Mirror each trial left to right with probability 1/2."""
    seed: int = 1234
    """Of order, dropout and mirroring. Weights come from the model as given."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.patience) < 1 or not (self.lr > 0 and self.clip > 0):
            raise ScanpathProblem("epochs, batch_size, patience, lr and clip must be positive")
        if self.schedule not in ("constant", "cosine"):
            raise ScanpathProblem(f"schedule must be 'constant' or 'cosine', got '{self.schedule}'")
        if self.monitor not in ("delta", "nll"):
            raise ScanpathProblem(f"monitor must be 'delta' or 'nll', got '{self.monitor}'")


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What one epoch gave."""

    epoch: int
    """From 0."""
    loss: float
    """Mean training cross-entropy, nats a decision."""
    score: float
    """The monitored validation figure; lower is better."""
    best: float
    """The lowest so far."""


def next_labels(paths: Int[Tensor, "B n"], objects: int) -> Int[Tensor, "B n+1"]:
    """The path, then stopping (label `objects`), then IGNORED; paths are padded with negative numbers."""
    lengths = (paths >= 0).sum(1)
    labels = torch.nn.functional.pad(paths, (0, 1), value=-1)
    labels[torch.arange(len(paths), device=paths.device), lengths] = objects
    return torch.where(torch.arange(labels.shape[1], device=paths.device) <= lengths[:, None], labels, IGNORED)


def decision_loss(
    logits: Float[Tensor, "B n+1 P+2"], paths: Int[Tensor, "B n"], *, pad_logit: bool = True
) -> Float[Tensor, ""]:
    """Cross-entropy of the next decision, mean over valid ones; what stands in padded places does not matter."""
    labels = next_labels(paths, logits.shape[-1] - 2)
    used = logits if pad_logit else logits[..., :-1]
    return torch.nn.functional.cross_entropy(used.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def collate(trials: Sequence[Trial], mirrored: Sequence[bool] | None = None) -> tuple[SceneBatch, Int[Tensor, "B n"]]:
    """Trials side by side: scenes padded to the most objects, paths with -1."""
    flips = [False] * len(trials) if mirrored is None else mirrored
    layouts = [trial.layout.mirrored() if flip else trial.layout for trial, flip in zip(trials, flips, strict=True)]
    scenes = SceneBatch.of([trial.objects for trial in trials], layouts, [trial.target for trial in trials])
    paths = torch.full((len(trials), max(len(trial.path) for trial in trials)), -1)
    for row, trial in zip(paths, trials, strict=True):
        row[: len(trial.path)] = torch.as_tensor(trial.path)
    return scenes, paths


def validation_score(model: OATModel, trials: Sequence[Trial], monitor: Literal["delta", "nll"]) -> float:
    """Behaviour delta of one greedy path a scene, or NLL of the human paths; lower is better."""
    scenes: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        scenes.setdefault((trial.scene, trial.target), []).append(trial)
    if monitor == "nll":
        done = []
        for own in scenes.values():
            chances = model.probabilities(own[0].objects, own[0].layout, own[0].target, [trial.path for trial in own])
            done += [done_probabilities(p, trial.path.tolist()) for p, trial in zip(chances, own, strict=True)]
        return negative_log_likelihood(done)
    names = list(scenes)
    first = [scenes[name][0] for name in names]
    paths = [model.generate(t.objects, t.layout, t.target, greedy=True).paths[0] for t in first]
    ours = behaviour_means(behaviour(paths, [trial.target for trial in first]), names)
    human = behaviour([trial.path for trial in trials], [trial.target for trial in trials])
    return behaviour_delta(ours, behaviour_means(human, [(trial.scene, trial.target) for trial in trials]))


class OATTrainer:
    """One training run. `run()` goes on where a run in `folder` was stopped; `model` ends with the best weights.

    `folder` gets last.pt (state to go on from), log.json, and the best model as `OATModel.save` writes it.
    """

    def __init__(
        self,
        model: OATModel,
        training: Sequence[Trial],
        validation: Sequence[Trial],
        config: TrainingConfig | None = None,
        *,
        folder: Path | None = None,
        on_epoch: Callable[[EpochReport], None] | None = None,
    ) -> None:
        if not training or not validation:
            raise ScanpathProblem(
                f"training needs trials on both sides, got {len(training)} and {len(validation)} to validate"
            )
        self.model, self.training, self.validation = model, training, validation
        self.config, self.folder, self.on_epoch = config or TrainingConfig(), folder, on_epoch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay)
        self.reports: list[EpochReport] = []
        self.best_state = _copied(model)

    def run(self) -> list[EpochReport]:
        """Trains to the end and returns a report for each epoch."""
        self._resume()
        while len(self.reports) < self.config.epochs and not self._exhausted():
            number = len(self.reports)
            loss = self._epoch(number)
            score = validation_score(self.model, self.validation, self.config.monitor)
            best = min([score, *(report.score for report in self.reports)])
            if score == best:
                self.best_state = _copied(self.model)
            self.reports.append(EpochReport(epoch=number, loss=loss, score=score, best=best))
            self._save()
            if self.on_epoch is not None:
                self.on_epoch(self.reports[-1])
        self.model.load_state_dict(self.best_state)
        self.model.eval()
        if self.folder is not None:
            self.model.save(self.folder)
        return self.reports

    def _exhausted(self) -> bool:
        scores = [report.score for report in self.reports]
        return bool(scores) and len(scores) - 1 - int(np.argmin(scores)) >= self.config.patience

    def _epoch(self, number: int) -> float:
        self.model.train()
        device = self.model.row_table.device
        total, count = 0.0, 0
        if self.config.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * (1 + math.cos(math.pi * number / self.config.epochs)) / 2
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed * 100_003 + number)
            order = torch.randperm(len(self.training)).tolist()
            for start in range(0, len(order), self.config.batch_size):
                trials = [self.training[i] for i in order[start : start + self.config.batch_size]]
                flips = (torch.rand(len(trials)) < 0.5).tolist() if self.config.mirror else None
                scenes, paths = collate(trials, flips)
                paths = paths.to(device)
                loss = decision_loss(self.model(scenes.to(device), paths), paths, pad_logit=self.model.config.pad_logit)
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
                self.optimizer.step()
                total, count = total + loss.item() * len(trials), count + len(trials)
        if not np.isfinite(total):
            raise ScanpathProblem(f"the loss of epoch {number} is not finite: lower lr (now {self.config.lr})")
        return total / count

    def _settings(self) -> dict[str, Any]:
        """What must be the same to go on; a constant run may go on for longer."""
        longer = {"epochs": 1, "patience": 1} if self.config.schedule == "constant" else {}
        plain = {"model": asdict(self.model.config), "training": asdict(self.config) | longer}
        return json.loads(json.dumps(plain))

    def _save(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(), "best": self.best_state, "optimizer": self.optimizer.state_dict(),
            "reports": [asdict(report) for report in self.reports], "settings": json.dumps(self._settings()),
        }  # fmt: skip
        part = self.folder / "last.pt.part"
        torch.save(state, part)
        part.replace(self.folder / "last.pt")
        write_text(self.folder / "log.json", json.dumps(state["reports"], indent=1) + "\n")

    def _resume(self) -> None:
        file = None if self.folder is None else self.folder / "last.pt"
        if file is None or not file.exists():
            return
        state = torch.load(file, weights_only=True)
        if json.loads(state["settings"]) != self._settings():
            raise ScanpathProblem(f"'{file}' is a run with other settings: give another folder, or delete it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_state = state["best"]
        self.reports = [EpochReport(**report) for report in state["reports"]]
        log.info("goes on after epoch %d of '%s'", len(self.reports) - 1, file)


def _copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
