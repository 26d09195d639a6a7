"""Training of VTrans: masks under a size constraint, then the small model's weights.

    L = L_task + L_KL + lambda_1 (s - t) + lambda_2 (s - t)^2            s expected sparsity, t its target at this step

Weights and gates descend, both lambdas ascend from 0; t rises linearly from 0 over the first steps. Three modes:
"full" trains weights and gates, "fast" does so on 3 % of the data, "faster" leaves the weights alone and trains only
gates. Then the masks are set and the model is shrunk; `finetune` trains what is left.

Dutta et al., arXiv:2406.05276; the constraint as in Wang et al., "Structured Pruning of Large Language Models", EMNLP
2020, arXiv:1910.04732; rates and the rule for the best state as in the same authors' later code for language models.
Decided here: fine-tuning runs on the shrunk model, which computes what the masked one does and is faster; dropout is
off, since everything is distilled from a teacher without it. Every `check_every` steps at which s is near t, the
model is shrunk to the target in thought (masks fixed, no noise) and judged on the held-out texts; the best state is
kept.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_attn.transformers.door import base_model
from llm_attn.vtrans.choosing import Scores, check_target, choose_structure
from llm_attn.vtrans.door import VTransConfig, VTransHandle, apply_vtrans
from llm_attn.vtrans.objectives import Batch, Objective, objective_for
from llm_attn.vtrans.resuming import Checkpoint
from llm_attn.vtrans.shrinking import shrink
from llm_attn.vtrans.structure import Structure

Mode = Literal["full", "fast", "faster"]
FAST_SHARE = 0.03
"""Share of the data that "fast" trains on."""
OnStep = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Settings of the training of masks."""

    target_sparsity: float = 0.5
    """Share of counted parameters that goes."""
    mode: Mode = "full"
    steps: int = 1000
    batch_size: int = 16
    warm_up: float = 0.2
    """Share of the steps over which the target rises (published: 0.1 of an epoch, 0.2 for high sparsity)."""
    gate_lr: float | None = None
    """None: 0.05, and 0.1 for targets above 0.5, as published; falls linearly to 0."""
    lambda_lr: float = 1.0
    """Published: 0.1, for thousands of steps; the multipliers must outgrow the task's gradients before the end."""
    weight_lr: float = 2e-5
    kl_factor: float = 1e-6
    """Of L_KL. The pull by which gates drift towards noise; the size constraint sees them only once they are near."""
    head_multiplier: float = 256.0
    """Of heads (and layers) in L_KL."""
    inter_multiplier: float = 1.0
    hidden_kl_weight: float = 25.0
    """How often the hidden gate counts in L_KL beyond once per sublayer."""
    multiple_of: int = 1
    """To which hidden and feed-forward widths are rounded (published: 128 on GPUs)."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    check_every: int = 50
    """Steps between checkpoints, and looks at the held-out texts."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.target_sparsity < 1:
            raise ValueError(f"target_sparsity must lie in (0, 1), got {self.target_sparsity}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        _check_positive(self, "steps", "batch_size", "multiple_of", "check_every", "clip", "lambda_lr", "weight_lr")
        if not 0 <= self.warm_up <= 1:
            raise ValueError(f"warm_up is a share of the steps and must lie in [0, 1], got {self.warm_up}")

    @property
    def rate(self) -> float:
        """Learning rate of gates."""
        return (0.1 if self.target_sparsity > 0.5 else 0.05) if self.gate_lr is None else self.gate_lr


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of the training of the small model's weights."""

    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 2e-4
    """Rises over the first twentieth and falls linearly to 0."""
    weight_decay: float = 0.01
    clip: float = 1.0
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive(self, "steps", "batch_size", "learning_rate", "clip", "checkpoint_every")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


class SizeConstraint(nn.Module):
    """lambda_1 (s - t) + lambda_2 (s - t)^2 with both lambdas from 0; an optimiser must maximise over them."""

    def __init__(self, target: float, *, warm_up_steps: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.target, self.warm_up_steps = target, warm_up_steps
        self.first = nn.Parameter(torch.zeros((), device=device))
        self.second = nn.Parameter(torch.zeros((), device=device))

    def target_at(self, step: int) -> float:
        """t at a step, counted from 0: linear from 0 to the target over the warm-up."""
        return self.target * (min(1.0, step / self.warm_up_steps) if self.warm_up_steps else 1.0)

    def forward(self, sparsity: Tensor, step: int) -> Tensor:
        """L_size."""
        excess = sparsity - self.target_at(step)
        return self.first * excess + self.second * excess.square()


class VTransTrainer:
    """Trains the gates of a model until it has the target sparsity, and shrinks it.

        trainer = VTransTrainer(model, data, config=PruningConfig(target_sparsity=0.5, mode="faster"))
        structure = trainer.train()
        small = trainer.shrink()

    data: token ids of each text, 1-D. held_out: of texts the best state is chosen by (None: the last is taken).
    teacher: None takes a copy of the model as it is now. objective: None takes `objective_for(model)`. folder: a
    second trainer with it goes on where the first stopped. on_step: called with the number of steps done and a
    dictionary of figures.

    In the modes "full" and "fast" the model's own weights change; "faster" freezes them (`requires_grad`). Texts are
    padded with the model's `pad_token_id`, or with 0 where it has none; padding is masked. ValueError on a target that
    cannot be met.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Tensor],
        *,
        config: PruningConfig | None = None,
        gates: VTransConfig | None = None,
        held_out: Sequence[Tensor] | None = None,
        teacher: nn.Module | None = None,
        objective: Objective | None = None,
        folder: Path | str | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.config = c = PruningConfig() if config is None else config
        self.model = host = base_model(model)
        self.teacher = (deepcopy(host) if teacher is None else teacher).eval().requires_grad_(False)
        self.objective = (objective_for(host) if objective is None else objective).to(host.device)
        self.handle: VTransHandle = apply_vtrans(host, gates)
        check_target(self.handle.size, c.target_sparsity, multiple_of=c.multiple_of)
        self.data = _share(data, c)
        self.held_out, self.on_step = held_out, on_step
        self.constraint = SizeConstraint(
            c.target_sparsity, warm_up_steps=round(c.warm_up * c.steps), device=host.device
        )
        host.requires_grad_(c.mode != "faster")
        self._optimizers = self._build_optimizers()
        self._best = nn.ModuleDict()
        self._checkpoint = self._open(folder)

    def train(self) -> Structure:
        """Runs the steps that are left; the masks are then set in the model, and their structure is returned."""
        progress = self._checkpoint.resume()
        progress.setdefault("best", None)
        c = self.config
        for step, batch in enumerate(batches(self.data, c.batch_size, c.steps, c.seed, self._pad)):
            if step < progress["done"]:
                continue
            figures = self._step(step, batch)
            progress["done"] = step + 1
            if (step + 1) % c.check_every == 0 or step + 1 == c.steps:
                self._look(progress, figures["sparsity"])
                self._checkpoint.save(progress)
            if self.on_step is not None:
                self.on_step(step + 1, figures)
        if progress["best"] is not None:
            self._restore()
        return self.set_masks()

    def set_masks(self, target_sparsity: float | None = None) -> Structure:
        """Sets masks of the config's sparsity, or of another one, by what the gates have learned."""
        c, handle = self.config, self.handle
        target = c.target_sparsity if target_sparsity is None else target_sparsity
        structure = choose_structure(Scores.of(handle.gates), handle.size, target, multiple_of=c.multiple_of)
        handle.fix(structure)
        handle.gates.eval()
        self.structure = structure
        return structure

    def shrink(self) -> PreTrainedModel:
        """The small model of the masks that were set last. ValueError before there are any."""
        if not hasattr(self, "structure"):
            raise ValueError("there are no masks yet: call train() first")
        return shrink(self.model, self.structure, gates=self.handle.gates)

    def _build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        c = self.config
        gates = torch.optim.AdamW(self.handle.gates.parameters(), lr=c.rate, weight_decay=0.0)
        lambdas = torch.optim.AdamW(self.constraint.parameters(), lr=c.lambda_lr, weight_decay=0.0, maximize=True)
        found: dict[str, torch.optim.Optimizer] = {"gates": gates, "lambdas": lambdas}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        found["weights"] = torch.optim.AdamW([*trained, *self.objective.parameters()], lr=c.weight_lr, weight_decay=0.0)
        return found

    @property
    def _modules(self) -> dict[str, nn.Module]:
        modules = {"gates": self.handle.gates, "constraint": self.constraint, "objective": self.objective}
        return modules if self.config.mode == "faster" else modules | {"model": _Untied(self.model)}

    @property
    def _pad(self) -> int:
        return getattr(self.model.config, "pad_token_id", None) or 0

    def _open(self, folder: Path | str | None) -> Checkpoint:
        settings = {"pruning": asdict(self.config), "gates": asdict(self.handle.config), "texts": len(self.data)}
        best = {f"best_{name}": _copy(module) for name, module in self._modules.items() if name != "constraint"}
        self._best = nn.ModuleDict(best)
        return Checkpoint(
            folder,
            settings,
            modules=self._modules | best,
            optimizers=self._optimizers,
            generators={"noise": self.handle.gates.generator},
        )

    def _step(self, step: int, batch: Batch) -> dict[str, float]:
        c, gates = self.config, self.handle.gates
        gates.train()
        self.model.eval()
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()
        self._optimizers["gates"].param_groups[0]["lr"] = c.rate * (1 - step / c.steps)
        task = self.objective(self.model, self.teacher, to_device(batch, self.model))
        kl = gates.kl(
            head_multiplier=c.head_multiplier,
            inter_multiplier=c.inter_multiplier,
            hidden_weight=c.hidden_kl_weight,
        )
        sparsity = self.handle.sparsity()
        loss = task + c.kl_factor * kl + self.constraint(sparsity, step)
        loss.backward()
        for parameters in (gates.parameters(), self._optimizers["weights"].param_groups[0]["params"]):
            nn.utils.clip_grad_norm_(parameters, c.clip)
        for optimizer in self._optimizers.values():
            optimizer.step()
        return {
            "loss": task.item(),
            "kl": kl.item(),
            "sparsity": sparsity.item(),
            "target": self.constraint.target_at(step),
        }

    def _look(self, progress: dict[str, Any], sparsity: float) -> None:
        target = self.config.target_sparsity
        near = target - 0.008 <= sparsity <= target + (0.006 if target > 0.7 else 0.001)
        if not self.held_out or not near:
            return
        self.set_masks()
        judged = evaluate(self.model, self.teacher, self.objective, self.held_out, batch_size=self.config.batch_size)
        self.handle.fix(None)
        if progress["best"] is None or judged < progress["best"]:
            progress["best"] = judged
            for name, module in self._modules.items():
                if name != "constraint":
                    self._best[f"best_{name}"].load_state_dict(module.state_dict())

    def _restore(self) -> None:
        for name, module in self._modules.items():
            if name != "constraint":
                module.load_state_dict(self._best[f"best_{name}"].state_dict())


class _Untied(nn.Module):
    """A model whose state has every parameter once, as safetensors demand."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters_of = nn.ParameterList(list(model.parameters()))


def _copy(module: nn.Module) -> nn.Module:
    """A module with copies of another's parameters, frozen; generators of gates are not copied."""
    copied = nn.Module()
    for name, parameter in module.named_parameters():
        _place(copied, name.split("."), nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return copied


def _place(module: nn.Module, path: list[str], parameter: nn.Parameter) -> None:
    for part in path[:-1]:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    module.register_parameter(path[-1], parameter)


def finetune(
    small: nn.Module,
    teacher: nn.Module,
    data: Sequence[Tensor],
    *,
    objective: Objective,
    config: FinetuneConfig | None = None,
    folder: Path | str | None = None,
    on_step: OnStep | None = None,
) -> nn.Module:
    """Trains a small model in place to agree with its teacher, and returns it in eval mode.

    objective: `Objective.narrowed` of the structure's hidden channels. folder, on_step: as for `VTransTrainer`.
    """
    c = FinetuneConfig() if config is None else config
    small.requires_grad_(True).eval()
    teacher.requires_grad_(False).eval()
    trained = [*small.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=c.learning_rate, weight_decay=c.weight_decay)
    checkpoint = Checkpoint(
        folder,
        {"finetune": asdict(c), "texts": len(data), "parameters": sum(p.numel() for p in small.parameters())},
        modules={"model": _Untied(small), "objective": objective},
        optimizers={"weights": optimizer},
    )
    progress = checkpoint.resume()
    pad = getattr(small.config, "pad_token_id", None) or 0
    for step, batch in enumerate(batches(data, c.batch_size, c.steps, c.seed, pad)):
        if step < progress["done"]:
            continue
        optimizer.param_groups[0]["lr"] = c.learning_rate * _warmed(step, c.steps)
        optimizer.zero_grad()
        loss = objective(small, teacher, to_device(batch, small))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, c.clip)
        optimizer.step()
        progress["done"] = step + 1
        if (step + 1) % c.checkpoint_every == 0 or step + 1 == c.steps:
            checkpoint.save(progress)
        if on_step is not None:
            on_step(step + 1, {"loss": loss.item()})
    return small


def _warmed(step: int, steps: int) -> float:
    return min((step + 1) / max(1, steps // 20), 1 - step / steps)


@torch.no_grad()
def evaluate(
    student: nn.Module, teacher: nn.Module, objective: Objective, data: Sequence[Tensor], *, batch_size: int = 16
) -> float:
    """The mean of the objective over batches of the texts, in their order."""
    pad = getattr(student.config, "pad_token_id", None) or 0
    parts = [data[first : first + batch_size] for first in range(0, len(data), batch_size)]
    losses = [objective(student, teacher, to_device(collate(part, pad), student)).item() for part in parts]
    return sum(losses) / len(losses)


def collate(texts: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    """A batch: ids padded on the right, and the mask that says where they are."""
    ids = nn.utils.rnn.pad_sequence([text.long() for text in texts], batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def batches(data: Sequence[Tensor], size: int, steps: int, seed: int, pad: int) -> Iterator[dict[str, Tensor]]:
    """So many batches, the texts in an order drawn anew for each round. ValueError without texts."""
    if not len(data):
        raise ValueError("there are no texts to train on")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(data), generator=generator).tolist()
        chosen, order = order[:size], order[size:]
        yield collate([data[index] for index in chosen], pad)


def to_device(batch: Batch, model: Any) -> dict[str, Tensor]:
    """The batch on the model's device."""
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _share(data: Sequence[Tensor], config: PruningConfig) -> Sequence[Tensor]:
    if config.mode != "fast":
        return data
    count = max(min(config.batch_size, len(data)), round(FAST_SHARE * len(data)))
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))[:count]
    return [data[int(index)] for index in chosen]
