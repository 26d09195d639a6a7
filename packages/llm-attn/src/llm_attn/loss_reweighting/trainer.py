"""Loss-based reweighting in transformers' Trainer: a mixin for any Trainer, and `ReweightedTrainer`.

Evaluation and the plain steps of the warm-up are the host's own loss, bit for bit. Reweighted steps are right under
gradient accumulation and data parallelism (DDP, FSDP): gradients of a step are those of  sum_i w_i l_i  over the
samples that share the weight 1, divided by the number of micro-batches where each has its own.

Decided here: the first pass of `scope="window"` runs in eval mode, so dropout draws nothing and what a model averages
in training is averaged once. The averages of `scope="ema"` are in `loss_reweighting.json` of each checkpoint and come
back with `resume_from_checkpoint`. Refused with a sentence: a loss of the user's own, label smoothing, several GPUs in
one process, and ranks that are not all data parallel.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from llm_attn.loss_reweighting.config import LossReweightingConfig
from llm_attn.loss_reweighting.head import losses_for_logits, plain_head
from llm_attn.loss_reweighting.reweighter import LossReweighter
from llm_attn.loss_reweighting.samples import SampleLosses, documents_of, next_targets, sample_means

STATE_FILE = "loss_reweighting.json"
logger = logging.getLogger(__name__)


class LossReweightingCallback(TrainerCallback):
    """Keeps a LossReweighter's state beside each checkpoint of a Trainer; the mixin adds it by itself."""

    def __init__(self, reweighter: LossReweighter) -> None:
        self.reweighter = reweighter

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - what the Trainer calls with
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Called by the Trainer when a checkpoint is complete."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not state.is_world_process_zero:
            return
        if not folder.is_dir():
            logger.warning("no checkpoint at %s to keep the averages of loss reweighting in", folder)
            return
        part = folder / (STATE_FILE + ".part")
        part.write_text(json.dumps(self.reweighter.state_dict()))
        part.replace(folder / STATE_FILE)

    def restore(self, checkpoint: str | Path) -> None:
        """Sets the reweighter to the state of a checkpoint folder, if that has one."""
        file = Path(checkpoint) / STATE_FILE
        if file.exists():
            self.reweighter.load_state_dict(json.loads(file.read_text()))
        else:
            logger.warning("%s has no %s: the averages of loss reweighting begin anew", checkpoint, STATE_FILE)


class LossReweightingMixin:
    """Stands before a Trainer class: `class MyTrainer(LossReweightingMixin, SFTTrainer)`.

    reweighting: keyword of the constructor, a LossReweightingConfig; None: the paper's defaults.
    reweighter: the LossReweighter at work. Logs get the shares that the weights of the last batch amount to:
    `reweighting/effective_samples`, 1 / (n * sum w^2), and `reweighting/largest_weight`, n * w_max.

    Raises ValueError where the loss could not be what is asked for, see the head of this file.
    """

    def __init__(self, *args: Any, reweighting: LossReweightingConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        host: Any = self
        self.reweighter = LossReweighter(reweighting)
        self._window: list[Any] = []
        self._window_factors: Iterator[Tensor] | None = None
        self._kept = LossReweightingCallback(self.reweighter)
        _refuse(host)
        if self.reweighter.config.head == "fused":
            plain_head(host.model)
        host.add_callback(self._kept)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the host's; a checkpoint brings the averages of `scope="ema"` back."""
        host: Any = self
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(host.args.output_dir)
        if found:
            self._kept.restore(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's, which collects the micro-batches of one optimiser step."""
        collected = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._window, self._window_factors = list(collected[0]), None
        return collected

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Called by the Trainer. With a fused head, `outputs.logits` of a reweighted step are token losses."""
        host: Any = self
        step = host.state.global_step
        if not model.training or self.reweighter.temperature(step) is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        window = self.reweighter.config.scope == "window"
        if window and self._window_factors is None:
            self._window_factors = iter(self._look_ahead(model, step))
        samples, outputs = self._samples(model, inputs)
        if window:
            factors = next(self._window_factors)  # type: ignore[arg-type]
            loss = self.reweighter.weighted_sum(samples.losses, factors)
        else:
            loss = self.reweighter(samples.losses, step=step, num_tokens=samples.num_tokens)
        loss = loss * self._share(window, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the host's, with what the weights amount to while training."""
        weights = self.reweighter.last_weights
        if weights is not None and "loss" in logs:
            n = max(1, int((weights > 0).sum()))
            logs["reweighting/effective_samples"] = float(1 / (n * weights.square().sum()).clamp(min=1e-30))
            logs["reweighting/largest_weight"] = float(n * weights.max())
            logs["reweighting/nonfinite_losses"] = self.reweighter.nonfinite_losses
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def _look_ahead(self, model: nn.Module, step: int) -> tuple[Tensor, ...]:
        """The factors of every micro-batch of the optimiser step, from one pass over all of them."""
        host: Any = self
        model.eval()
        try:
            seen = [self._samples(model, host._prepare_inputs(dict(batch)))[0] for batch in self._window]
        finally:
            model.train()
        losses, numbers = (torch.cat(each) for each in zip(*seen, strict=True))
        factors = self.reweighter.factors(losses, step=step, num_tokens=numbers)
        return factors.split([len(samples.losses) for samples in seen])

    def _samples(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[SampleLosses, Any]:
        config, host = self.reweighter.config, self
        given = dict(inputs)
        documents = _documents(given) if config.unit == "document" else None
        targets = _targets(given, documents)
        if config.head == "fused":
            with losses_for_logits(host.model, targets):  # type: ignore[attr-defined]
                outputs = model(**given)
        else:
            outputs = model(**given)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if config.head == "logits":
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            losses = losses.view(targets.shape)
        elif logits.shape == (*targets.shape, 1):
            losses = logits.squeeze(-1)
        else:
            raise ValueError(
                f"{type(host.model).__name__} did not call its output layer: "  # type: ignore[attr-defined]
                "get losses from the logits with LossReweightingConfig(head='logits')"
            )
        return sample_means(losses, targets, documents), outputs

    def _share(self, window: bool, num_items_in_batch: Any) -> float:
        """What a loss is multiplied with so that, after what the Trainer does, micro-batches add up to the step's."""
        host: Any = self
        scaled = getattr(host, "loss_is_scaled_for_ga", None)  # transformers 5.17 has it not; then, and for None:
        if scaled is None:
            scaled = host.model_accepts_loss_kwargs and num_items_in_batch is not None
        steps: int = host.current_gradient_accumulation_steps
        return (1.0 if window else 1.0 / steps) * (1 if scaled else steps)


class ReweightedTrainer(LossReweightingMixin, Trainer):
    """transformers' Trainer with loss-based reweighting: `ReweightedTrainer(model, args, reweighting=...)`."""


def _refuse(trainer: Any) -> None:
    if trainer.compute_loss_func is not None or trainer.args.label_smoothing_factor:
        raise ValueError(
            "reweighting computes the loss itself: leave out compute_loss_func and label_smoothing_factor, or call a "
            "LossReweighter in a loss of your own"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError("several GPUs in one process (DataParallel) have no common batch: start with torchrun")
    plan = getattr(trainer.accelerator, "parallelism_config", None)
    split = [kind for kind in ("tp", "cp", "sp") if (getattr(plan, f"{kind}_size", 1) or 1) > 1]
    if split:
        raise ValueError(
            f"reweighting in a Trainer is for data parallelism, got {split[0]}_size > 1: call a LossReweighter with "
            "the data-parallel group in a loop of your own"
        )


def _targets(inputs: dict[str, Any], documents: Tensor | None) -> Tensor:
    """Takes the labels out of the inputs, or the model would compute its own loss as well."""
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if shifted is not None:
        return shifted
    if labels is None:
        raise ValueError(
            "a batch has no labels to compute losses from: use a collator that makes them, such as "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    return next_targets(labels, documents)


def _documents(inputs: dict[str, Any]) -> Tensor:
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        raise ValueError(
            "unit='document' needs position_ids that restart with each document: use DataCollatorWithFlattening, or "
            "unit='row'"
        )
    return documents_of(position_ids)
