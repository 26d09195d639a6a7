"""Knowledge distillation: a student language model learns the next-token distributions of a teacher.

Affine-Scaled Attention (Bae et al., arXiv:2602.23057, section 4.1) and many others train small models this way.
Left open there, decided here: the loss is KL(teacher || student) of every predicted token at temperature 1 and nothing
else; a share of cross-entropy with the text is an option. Loss and its gradient are made for some rows of the
vocabulary at a time, in float32.

Shapes: B batch, N tokens, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 22
"""Logits that exist in float32 at a time, rows times vocabulary."""
_TEACHER_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Settings of the loss  KL + ce_weight * cross-entropy."""

    temperature: float = 1.0
    """Softens both distributions; the loss is multiplied by its square, so that gradients keep their size."""
    ce_weight: float = 0.0
    """Weight of the cross-entropy with the labels."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.ce_weight < 0:
            raise ValueError(f"ce_weight must be at least 0, got {self.ce_weight}")


def distillation_loss(
    student_logits: Float[Tensor, "B N V"],
    teacher_logits: Float[Tensor, "B N V"],
    labels: Int[Tensor, "B N"],
    *,
    config: DistillationConfig | None = None,
    num_items: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """The sum of T^2 KL(teacher || student) over predicted tokens, divided by `num_items` (None: their number).

    Place n predicts token n + 1; places whose next label is -100 do not count. The teacher gets no gradient. ValueError
    on shapes that differ.
    """
    config = DistillationConfig() if config is None else config
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher must have logits of one shape, and with that one vocabulary, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if labels.shape != student_logits.shape[:2]:
        raise ValueError(f"labels must be {tuple(student_logits.shape[:2])} like the logits, got {tuple(labels.shape)}")
    next_label = F.pad(labels, (0, 1), value=-100)[:, 1:]
    counted = next_label != -100
    student, teacher, target = (t[counted] for t in (student_logits, teacher_logits.detach(), next_label))
    rows = max(1, CHUNK // max(1, student.shape[-1]))
    parts = zip(student.split(rows), teacher.split(rows), target.split(rows), strict=True)
    losses = [checkpoint(_loss_of_rows, *part, config, use_reentrant=False) for part in parts]
    total = torch.stack(losses).sum()
    return total / (counted.sum().clamp_min(1) if num_items is None else num_items)


def _loss_of_rows(student: Tensor, teacher: Tensor, target: Tensor, config: DistillationConfig) -> Tensor:
    wide = torch.promote_types(student.dtype, torch.float32)
    T = config.temperature
    log_student, log_teacher = ((logits.to(wide) / T).log_softmax(-1) for logits in (student, teacher))
    loss = T**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    if config.ce_weight:
        loss = loss + config.ce_weight * F.cross_entropy(student.to(wide), target, reduction="sum")
    return loss


class Distillation:
    """The loss for `Trainer(compute_loss_func=...)`: it runs the teacher on whatever the student was last called with.

    Give the student that the trainer is given. The teacher is put in eval mode, once; move it to the student's device
    yourself. `remove()`, or leaving a `with` block, takes the hook off the student.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, config: DistillationConfig | None = None) -> None:
        self.teacher = teacher.eval()
        self.config = DistillationConfig() if config is None else config
        self._inputs: dict[str, Any] | None = None
        self._hook = student.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = {**dict(zip(_TEACHER_INPUTS, args, strict=False)), **kwargs}
        self._inputs = {name: given[name] for name in _TEACHER_INPUTS if given.get(name) is not None}

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of the student's last call."""
        if not self._inputs or "input_ids" not in self._inputs:
            raise ValueError("the student must be called with input_ids before its distillation loss is asked for")
        with torch.no_grad():
            teacher = self.teacher(**self._inputs, use_cache=False).logits
        return distillation_loss(outputs.logits, teacher, labels, config=self.config, num_items=num_items_in_batch)

    def remove(self) -> None:
        """Takes the hook off the student."""
        self._hook.remove()
        self._inputs = None

    def __enter__(self) -> "Distillation":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
