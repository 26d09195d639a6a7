"""Trains the vision-language model that the methods of this package are judged on.

    uv run --package vlm-prune python packages/vlm-prune/proofs/train_vlm.py

From scratch, on the scenes of `vlm_prune.scenes`, in the stages of `STAGES`:

1. the tower alone learns what each patch shows (features of the layer before the last, as LLaVA reads them) and, by its
   class token, what the picture shows; on crowded scenes first, since nine digits a picture teach more than five;
2. alignment, LLaVA's first stage: the projector learns to say of each visual token the words of its colour, shape,
   number and place;
3. the language model learns to answer, the tower at rest and its features kept for a pool of 800 scenes. At first it
   sees few visual tokens, those of things among them, then more and more, at last all: it learns to look things up
   among 32 tokens much sooner than among 256. A side effect is welcome: as large models do, it can do without some.

Decided here: matrices inside the layers are trained by Muon, all else by AdamW; the loss is on answers only, many
questions to a picture (`shapes_vlm.packed_logits`); tower and language model run in bfloat16, their weights and their
attention in float32. Every step's data follow from seed and step alone, and the state is saved every `--save-every`
steps: a second start goes on from it, bit for bit.
"""

import json
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from shapes_vlm import (
    CHECKPOINT,
    IGNORED,
    PATCH,
    SIZE,
    TOKENS,
    Example,
    answer,
    answer_packed,
    build_model,
    guess_from_words,
    load_trained,
    packed_logits,
    pixels,
    prepare_packed,
    segments,
    summary,
    visible_tokens,
)
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_prune.scenes import (
    ANSWERS,
    COLORS,
    KINDS,
    PLACES,
    SHAPES,
    Scene,
    SceneConfig,
    Thing,
    ask,
    build_processor,
    make_examples,
    make_scenes,
    patches_of,
)

PER_KIND = 3
POOL = 10**8  # number of the first scene of the pool; the other stages stay below
LANGUAGE = ("multi_modal_projector", "language_model", "lm_head")
stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some steps of one kind of training."""

    name: str
    """What the log calls it."""
    steps: int
    """Optimiser steps."""
    batch: int
    """Pictures a step."""
    lr: float
    """Highest learning rate; rises for `warmup` steps and falls as a cosine."""
    task: str
    """"tower" (patch and picture labels), "alignment" (words for visual tokens), or "answers"."""
    trains: tuple[str, ...]
    """The parts that change, as they occur in parameter names."""
    crowded: bool = False
    """Nine things a picture (tower only)."""
    visible: tuple[int, int] = (TOKENS, TOKENS)
    """Visual tokens that the language model sees, in the first step and from half of the stage on."""
    pool: int = 0
    """Scenes whose features are kept while the tower is at rest; 0: new scenes in every step."""
    warmup: int = 50
    """Steps until the learning rate is reached."""
    horizon: int = 0
    """Step at which the cosine would end; 0: with the stage."""


TOWER = ("vision_tower",)
STAGES = (
    Stage(name="tower, crowded", steps=500, horizon=1500, batch=8, lr=1.5e-3, task="tower", trains=TOWER, crowded=True),
    Stage(name="tower, scenes", steps=200, batch=8, lr=1.1e-3, task="tower", trains=TOWER, warmup=10),
    Stage(
        name="alignment", steps=200, batch=16, lr=3e-3, task="alignment",
        trains=("multi_modal_projector",), pool=800,
    ),
    Stage(
        name="answers, few tokens", steps=300, batch=8, lr=1.5e-3, task="answers", trains=LANGUAGE, visible=(32, 64),
        pool=800, horizon=600,
    ),
    Stage(
        name="answers", steps=200, batch=8, lr=1.2e-3, task="answers", trains=LANGUAGE, visible=(64, 256), pool=800,
        warmup=10,
    ),
)  # fmt: skip


class TowerHeads(nn.Module):
    """Linear read-outs of the tower, for its training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = {"color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "digit": 10, "heart": 2}
        self.patch = nn.Linear(width, sum(self.sizes.values()))
        self.picture = nn.Linear(width, len(COLORS) * len(SHAPES) + 10)


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """For each patch: colour and shape (0: background), digit and place (IGNORED where there is none), heart (1: one
    patch of the middle, so that things can be counted)."""
    side, labels = SIZE // PATCH, {}
    for name, empty in (("color", 0), ("shape", 0), ("digit", IGNORED), ("place", IGNORED), ("heart", 0)):
        labels[name] = np.full(side * side, empty, np.int64)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        x, y, inner = (left + right) / 2, (top + bottom) / 2, SceneConfig().digit / 2
        body = patches_of([thing.box], size=SIZE, patch=PATCH)
        labels["color"][body] = 1 + tuple(COLORS).index(thing.color)
        labels["shape"][body] = 1 + SHAPES.index(thing.shape)
        labels["place"][body] = PLACES.index(thing.place)
        labels["digit"][patches_of([(x - inner, y - inner, x + inner, y + inner)], size=SIZE, patch=PATCH)] = (
            thing.digit
        )
        labels["heart"][round(y / PATCH) * side + round(x / PATCH)] = 1
    return labels


def picture_labels(scene: Scene) -> np.ndarray:
    """Which pairs of colour and shape, and which digits, the picture shows."""
    labels = np.zeros(len(COLORS) * len(SHAPES) + 10, np.float32)
    for thing in scene.things:
        labels[tuple(COLORS).index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)] = 1
        labels[len(COLORS) * len(SHAPES) + thing.digit] = 1
    return labels


def _features(model: nn.Module, scenes: Sequence[Scene]) -> Tensor:
    return model.model.vision_tower(pixels(scenes), output_hidden_states=True).hidden_states[-2][:, 1:]


def tower_loss(model: nn.Module, heads: TowerHeads, scenes: Sequence[Scene]) -> tuple[Tensor, dict[str, float]]:
    """Sum of the losses of all labels, and the accuracy of each on the patches that show something."""
    out = model.model.vision_tower(pixels(scenes), output_hidden_states=True)
    named = [patch_labels(scene) for scene in scenes]
    logits = heads.patch(out.hidden_states[-2][:, 1:]).float().split(list(heads.sizes.values()), -1)
    loss, right = torch.zeros(()), {}
    for (name, size), part in zip(heads.sizes.items(), logits, strict=True):
        label = torch.from_numpy(np.stack([labels[name] for labels in named]))
        shown = (label > 0) if name != "digit" else (label != IGNORED)
        each = F.cross_entropy(part.reshape(-1, size), label.reshape(-1), reduction="none", ignore_index=IGNORED)
        each = each.view_as(label)
        loss = loss + each[shown].mean() + (0.0 if name == "digit" else each[~shown].mean())
        right[name] = (part.argmax(-1) == label)[shown].float().mean().item()
    target = torch.from_numpy(np.stack([picture_labels(scene) for scene in scenes]))
    return loss + 2 * F.binary_cross_entropy_with_logits(heads.picture(out.pooler_output).float(), target), right


def alignment_loss(
    model: nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, features: Tensor, scenes: Sequence[Scene]
) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of the words of a visual token's thing against their like, and their accuracy.

    The logits are inner products of projected token and table of words; on the background they are to vanish.
    """
    tokens, table = model.model.multi_modal_projector(features).float(), model.get_input_embeddings().weight
    logits, loss, right = 50 * tokens @ table.T.float(), torch.zeros(()), {}
    named = [patch_labels(scene) for scene in scenes]
    for name, shift in (("color", 1), ("shape", 1), ("digit", 0), ("place", 0)):
        label = torch.from_numpy(np.stack([labels[name] for labels in named])) - shift
        label = label.where(label >= 0, IGNORED)
        words = tokenizer.convert_tokens_to_ids(list(ANSWERS["number" if name == "digit" else name]))
        part = logits[..., words]
        loss = loss + F.cross_entropy(part.flatten(0, 1), label.flatten(), ignore_index=IGNORED)
        right[name] = (part.argmax(-1) == label)[label != IGNORED].float().mean().item()
    ground = torch.from_numpy(np.stack([labels["color"] == 0 for labels in named]))
    return loss + 0.05 * logits[ground].square().mean(), right


def answer_loss(
    model: nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, features: Tensor, examples: Sequence[Example],
    visible: Tensor,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Mean cross entropy of the answers and their ends, and the accuracy of each kind of question.

    The answer is to be said from the word on that settles it ("star" in "what color is the star ?"), so that looking up
    is learned at the word itself; the accuracy is that of the place where the answer is due.
    """
    questions = [asked for _, asked in examples]
    ids, truth, at, settled = segments(questions, tokenizer)
    logits = packed_logits(model, model.model.multi_modal_projector(features), ids, visible).float()
    place = torch.arange(ids.shape[-1])
    label = truth[..., None].expand_as(ids).where((place >= settled[..., None]) & (place <= at[..., None]), IGNORED)
    label = label.where(place != at[..., None] + 1, tokenizer.eos_token_id)
    loss = F.cross_entropy(logits.flatten(0, 2), label.flatten(), ignore_index=IGNORED)
    answers = logits.gather(2, at[..., None, None].expand(-1, -1, 1, logits.shape[-1])).flatten(0, 2)
    hits, right = (answers.argmax(-1) == truth.flatten()).view_as(truth), {}
    for kind in KINDS:
        which = torch.tensor([[question.kind == kind for question in row] for row in questions])
        right[kind] = hits[which].float().mean().item()
    return loss, right


class Trainer:
    """One run: model, read-outs, optimisers and the step it is at; saved to and resumed from `folder`."""

    def __init__(self, stages: Sequence[Stage], folder: Path, *, seed: int, save_every: int = 100) -> None:
        self.stages, self.folder, self.seed, self.save_every = tuple(stages), folder, seed, save_every
        self.model = prepare_packed(build_model(seed))
        torch.manual_seed(seed + 1)
        self.heads = TowerHeads(self.model.config.vision_config.hidden_size)
        self.tokenizer = build_processor(size=SIZE, patch=PATCH).tokenizer
        self.optimizers: list[torch.optim.Optimizer] = []
        self.stage, self.step, self.log = 0, 0, []
        self._pool: tuple[list[Scene], Tensor] | None = None
        self._resume()

    @property
    def steps_done(self) -> int:
        """Of all stages together."""
        return sum(stage.steps for stage in self.stages[: self.stage]) + self.step

    def save(self) -> None:
        """Writes everything that going on needs, under a temporary name first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(), "stage": self.stage, "step": self.step,
            "log": self.log, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }  # fmt: skip
        path = self.folder / "state.pt"
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def one_step(self) -> tuple[float, dict[str, float]]:
        """Takes a step; its loss and accuracies."""
        stage = self.stages[self.stage]
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = self._tower_step(stage) if stage.task == "tower" else self._answer_step(stage)
        loss.backward()
        for optimizer in self.optimizers:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            for group in optimizer.param_groups:
                group["lr"] = self._rate(stage)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item(), right

    def run(self, on_log: Callable[[dict], None], on_step: Callable[[int], None]) -> None:
        """All stages from where the run is; `on_step` hears the number of steps done."""
        while self.stage < len(self.stages):
            stage, recent, began = self.stages[self.stage], [], time.monotonic()
            while self.step < stage.steps:
                recent.append(self.one_step())
                on_step(self.steps_done)
                if self.step % 25 == 0 or self.step == stage.steps:
                    seconds, began = (time.monotonic() - began) / len(recent), time.monotonic()
                    self.log.append(_entry(stage, self.step, recent, seconds))
                    on_log(self.log[-1])
                    recent = []
                if self.step % self.save_every == 0 and self.step < stage.steps:
                    self.save()
            self.stage, self.step = self.stage + 1, 0
            self._prepare()
            self.save()

    def _resume(self) -> None:
        if not (self.folder / "state.pt").exists():
            self._prepare()
            return
        state = torch.load(self.folder / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage, self.step, self.log = state["stage"], state["step"], state["log"]
        self._prepare()
        if self.step:  # at the start of a stage its optimisers are new
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def _prepare(self) -> None:
        """New optimisers for the parts that the stage trains."""
        self.optimizers = []
        if self.stage >= len(self.stages):
            return
        stage, matrices, others = self.stages[self.stage], [], []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(part in name for part in stage.trains))
            if parameter.requires_grad:
                inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
                (matrices if inner else others).append(parameter)
        if stage.task == "tower":
            others += list(self.heads.parameters())
        self.optimizers = [
            torch.optim.AdamW(others, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.02),
            torch.optim.Muon(matrices, lr=stage.lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        ]

    def _rate(self, stage: Stage) -> float:
        done = self.step / (stage.horizon or stage.steps)
        return stage.lr * min(1.0, (self.step + 1) / stage.warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)

    def _tower_step(self, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        config = SceneConfig(size=SIZE, num_things=(9, 9)) if stage.crowded else SceneConfig(size=SIZE)
        start = 10**6 * self.stage + self.step * stage.batch
        return tower_loss(self.model, self.heads, make_scenes(stage.batch, seed=self.seed, start=start, config=config))

    def _answer_step(self, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([self.seed, self.stage, self.step])
        if stage.pool:
            scenes, features = self._pooled(stage.pool)
            chosen = rng.choice(stage.pool, stage.batch, replace=False)
            scenes, features = [scenes[i] for i in chosen], features[torch.from_numpy(chosen)]
        else:
            start = 10**6 * self.stage + self.step * stage.batch
            scenes = make_scenes(stage.batch, seed=self.seed, start=start, config=SceneConfig(size=SIZE))
            features = _features(self.model, scenes)
        if stage.task == "alignment":
            return alignment_loss(self.model, self.tokenizer, features, scenes)
        examples = [(scene, ask(scene, rng, per_kind=PER_KIND)) for scene in scenes]
        share = min(1.0, 2 * self.step / stage.steps)
        tokens = round(stage.visible[0] + share * (stage.visible[1] - stage.visible[0]))
        return answer_loss(self.model, self.tokenizer, features, examples, visible_tokens(scenes, tokens, rng))

    @torch.no_grad()
    def _pooled(self, number: int) -> tuple[list[Scene], Tensor]:
        """Scenes without their pictures, and the features that the resting tower has of them; kept on disk too."""
        if self._pool is None or len(self._pool[0]) != number:
            weights = torch.cat([p.flatten() for p in self.model.model.vision_tower.parameters()])
            path = self.folder / f"pool-{number}-{zlib.crc32(weights.numpy().tobytes()):08x}.pt"
            if not path.exists():
                scenes, features = make_scenes(number, seed=self.seed, start=POOL, config=SceneConfig(size=SIZE)), []
                for start in range(0, number, 32):
                    features.append(_features(self.model, scenes[start : start + 32]).bfloat16())
                things = [[asdict(thing) for thing in scene.things] for scene in scenes]
                self.folder.mkdir(parents=True, exist_ok=True)
                torch.save({"things": things, "features": torch.cat(features)}, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
            saved = torch.load(path, weights_only=True)
            blank = np.zeros((SIZE, SIZE, 3), np.uint8)
            scenes = [Scene(image=blank, things=tuple(Thing(**t) for t in row)) for row in saved["things"]]
            self._pool = scenes, saved["features"]
        return self._pool


def _entry(stage: Stage, step: int, recent: Sequence[tuple[float, dict[str, float]]], seconds: float) -> dict:
    entry: dict[str, float | str] = {"stage": stage.name, "step": step}
    entry["loss"] = round(sum(loss for loss, _ in recent) / len(recent), 4)
    for name in recent[0][1]:
        entry[name] = round(sum(right[name] for _, right in recent) / len(recent), 3)
    return entry | {"seconds a step": round(seconds, 3)}


def export(trainer: Trainer, out: Path) -> None:
    """Config, tokenizer, processor and weights in half precision, as `from_pretrained` reads them."""
    model = build_model(trainer.seed)
    model.load_state_dict(trainer.model.state_dict())
    model.half().save_pretrained(out)
    build_processor(size=SIZE, patch=PATCH).save_pretrained(out)


def report(out: Path, *, pictures: int, seed: int, on_look: Callable[[str], None]) -> dict[str, dict]:
    """Accuracy of the saved model and of three blind ones on `pictures` held-out scenes, two questions of each kind.

    Blind: without a picture, with another scene's picture, and guessing from the words of the question.
    """
    model, processor = load_trained(out)
    asked = make_examples(pictures, seed=10**6 + seed, split="test", per_kind=2, config=SceneConfig(size=SIZE))
    seen = make_examples(10 * pictures, seed=seed, split="train", per_kind=4, config=SceneConfig(size=SIZE))
    blind = [pair for batch in answer(model, processor, asked, look="none") for pair in batch.pairs]
    table = {"no picture": summary(blind)}
    on_look("no picture")
    prepare_packed(model)
    for look, name in (("own", "own picture"), ("other", "another scene's picture")):
        batches = answer_packed(model, processor.tokenizer, asked, look=look)
        table[name] = summary([pair for questions, hits in batches for pair in zip(questions, hits, strict=True)])
        on_look(name)
    return table | {"best guess from the words": summary(guess_from_words(seen, asked))}


def draw(out: Path, path: Path, *, seed: int) -> None:
    """Held-out scenes with one question of each kind and the model's answers, wrong ones in red."""
    model, processor = load_trained(out)
    examples = make_examples(6, seed=2 * 10**6 + seed, split="test", config=SceneConfig(size=SIZE))
    answers = [said for batch in answer(model, processor, examples) for said in batch.said]
    figure = Figure(figsize=(13, 10.5))
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=0.86, hspace=0.42, wspace=0.1)
    for axes, start, (scene, questions) in zip(
        figure.subplots(2, 3).flat, range(0, len(answers), len(KINDS)), examples, strict=True
    ):
        axes.imshow(scene.image)
        axes.set_axis_off()
        for line, (question, said) in enumerate(zip(questions, answers[start:], strict=False)):
            hit = said == question.answer
            text = f"{question.text}  {said}" + ("" if hit else f"  (right: {question.answer})")
            axes.text(
                0, 1.02 + 0.055 * (len(questions) - 1 - line), text, transform=axes.transAxes, fontsize=11,
                color="black" if hit else "tab:red",
            )  # fmt: skip
    figure.savefig(path, dpi=70)


def _quick(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    return tuple(
        replace(stage, steps=2, batch=2, pool=min(stage.pool, 4), visible=(min(stage.visible), 48)) for stage in stages
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    work: Annotated[Path, typer.Option(help="Where the state is saved, to go on from.")] = Path("runs/shapes-vlm"),
    seed: Annotated[int, typer.Option(help="Of weights and scenes.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between two saved states.")] = 40,
    pictures: Annotated[int, typer.Option(help="Held-out pictures, of 12 questions each, for the accuracy.")] = 150,
    export_now: Annotated[
        bool, typer.Option(help="No training: write the checkpoint of the state saved last.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="Two small steps a stage: does it run?")] = False,
) -> None:
    """Trains the model and writes it in half precision, with its accuracy and a picture of its answers beside it."""
    stages, pictures = (_quick(STAGES), 2) if quick else (STAGES, pictures)
    trainer = Trainer(stages, work, seed=seed, save_every=save_every)
    if not export_now:
        _train(trainer)
    export(trainer, out)
    with Progress(console=stderr) as progress:
        task = progress.add_task("questions", total=3)
        scores = report(out, pictures=pictures, seed=seed, on_look=lambda _: progress.advance(task))
    draw(out, out.parent / f"{out.name}.png", seed=seed)
    record = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()), "seed": seed,
        "steps done": trainer.steps_done, "steps planned": sum(stage.steps for stage in stages), "accuracy": scores,
        "stages": [asdict(stage) for stage in stages], "log": trainer.log,
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    path = out.parent / f"{out.name}.json"
    path.with_suffix(".part").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".part").replace(path)
    stderr.print({look: {kind: row["accuracy"] for kind, row in table.items()} for look, table in scores.items()})


def _train(trainer: Trainer) -> None:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=stderr) as progress:
        total = sum(stage.steps for stage in trainer.stages)
        task = progress.add_task("training", total=total, completed=trainer.steps_done)
        trainer.run(
            lambda entry: progress.console.print(json.dumps(entry), soft_wrap=True),
            lambda done: progress.update(task, completed=done),
        )


if __name__ == "__main__":
    typer.run(main)
