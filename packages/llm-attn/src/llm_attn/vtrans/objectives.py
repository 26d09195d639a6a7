"""What the compressed model is trained to: its task, and what the uncompressed one knows.

    language models   cross-entropy + a_logit T^2 KL(teacher || student) + a_layer sum_j MSE(H_t^j, W H_s^m(j))
    encoders          1 - cosine of W e_s and e_t, + MSE of the cosines within the batch, + the same sum over layers

H are hidden states of the teacher's layers j (the ends of its quarters) and of the student's m(j), W a d x K matrix
that starts as the identity, e the mean over tokens of the last hidden state. m(j) is chosen from the last teacher layer
backwards: the layer of the student with the smallest distance among those before the one chosen last.

Dutta et al., arXiv:2406.05276; the distillation of layers as in Xia et al., "Structured Pruning Learns Compact and
Accurate Models", ACL 2022, arXiv:2204.00408. Decided here: a sentence encoder has no labels, so its task is to agree
with its teacher. The cosines within a batch say so whatever the width of the student's vectors.

Shapes: B batch, T tokens, d teacher's width, K student's width, L layers.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_attn.distillation import DistillationConfig, distillation_loss

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the parts."""

    task: float = 1.0
    """Of cross-entropy, or of one minus the cosine of embeddings."""
    logits: float = 0.01
    """a_logit, of language models (0.01: the recipe for Llama)."""
    temperature: float = 2.0
    """T, by which both distributions are softened."""
    layers: float = 0.0
    """a_layer, of hidden states (0.5 to 0.9 for BERT; the recipe for Llama has none)."""
    similarities: float = 1.0
    """Of the cosines within a batch, of encoders."""

    def __post_init__(self) -> None:
        for name in ("task", "logits", "layers", "similarities"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


class Objective(nn.Module):
    """The loss of a student on a batch, beside a teacher of width `hidden`. Holds W, which is trained along."""

    def __init__(self, hidden: int, config: ObjectiveConfig | None = None) -> None:
        super().__init__()
        self.config = ObjectiveConfig() if config is None else config
        self.projection = nn.Parameter(torch.eye(hidden))

    def narrowed(self, hidden: Sequence[int]) -> "Objective":
        """The same for a student that has only these channels of the residual stream."""
        small = deepcopy(self)
        small.projection = nn.Parameter(self.projection.detach()[:, list(hidden)].clone())
        return small

    def forward(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """The loss, a scalar."""
        raise NotImplementedError

    def _layer_loss(self, student: Any, teacher: Any, counted: Tensor) -> Tensor:
        ours = [self._seen(state, counted) @ self.projection.T for state in student.hidden_states[1:]]
        theirs = [
            self._seen(teacher.hidden_states[j + 1], counted) for j in taught_layers(len(teacher.hidden_states) - 1)
        ]
        distances = torch.stack([torch.stack([F.mse_loss(own, their) for own in ours]) for their in theirs])
        chosen = match_layers(distances.detach())
        return distances[range(len(theirs)), chosen].sum()

    @staticmethod
    def _seen(state: Tensor, counted: Tensor) -> Tensor:
        return state[counted].float()

    def _run(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> tuple[Any, Any]:
        options = {"output_hidden_states": self.config.layers > 0}
        if isinstance(self, LanguageObjective):
            options["use_cache"] = False
        with torch.no_grad():
            taught = teacher(**batch, **options)
        return student(**batch, **options), taught


class LanguageObjective(Objective):
    """For causal language models: the batch's own next tokens, and the teacher's idea of them."""

    def forward(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """See the head of the file; padding does not count."""
        c, counted = self.config, batch["attention_mask"].bool()
        labels = batch["input_ids"].masked_fill(~counted, -100)
        ours, theirs = self._run(student, teacher, batch)
        distillation = DistillationConfig(temperature=c.temperature, ce_weight=c.task / c.logits if c.logits else 0.0)
        if c.logits:
            loss = c.logits * distillation_loss(ours.logits, theirs.logits, labels, config=distillation)
        else:
            loss = c.task * F.cross_entropy(ours.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return loss + c.layers * self._layer_loss(ours, theirs, counted) if c.layers else loss


class EmbeddingObjective(Objective):
    """For encoders without a head: the teacher's sentence embeddings and hidden states."""

    def forward(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """See the head of the file; padding does not count."""
        c, counted = self.config, batch["attention_mask"].bool()
        ours, theirs = self._run(student, teacher, batch)
        own, their = (mean_pooled(out.last_hidden_state, counted) for out in (ours, theirs))
        loss = c.task * (1 - F.cosine_similarity(own @ self.projection.T, their, dim=-1)).mean()
        loss = loss + c.similarities * F.mse_loss(cosines(own), cosines(their))
        return loss + c.layers * self._layer_loss(ours, theirs, counted) if c.layers else loss


def objective_for(model: nn.Module, config: ObjectiveConfig | None = None) -> Objective:
    """`LanguageObjective` for a model with a causal head, `EmbeddingObjective` for a base model.

    ValueError for other heads: their task is yours to say, with a subclass of `Objective`.
    """
    name, width = type(model).__name__, int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return LanguageObjective(width, config)
    if name.endswith("Model"):
        return EmbeddingObjective(width, ObjectiveConfig(layers=0.5) if config is None else config)
    raise ValueError(f"{name} has a head whose task is not known here: give objective=, a subclass of Objective")


def mean_pooled(states: Float[Tensor, "B T K"], counted: Bool[Tensor, "B T"]) -> Float[Tensor, "B K"]:
    """The mean over tokens that count, in float32."""
    weight = counted[..., None].float()
    return (states.float() * weight).sum(1) / weight.sum(1).clamp(min=1)


def cosines(vectors: Float[Tensor, "B K"]) -> Float[Tensor, "B B"]:
    """The cosine of every two vectors."""
    unit = F.normalize(vectors, dim=-1)
    return unit @ unit.T


def taught_layers(layers: int) -> list[int]:
    """Layers of a teacher whose hidden states are taught, from 0: the ends of its quarters, 2, 5, 8, 11 of 12."""
    return sorted({max(0, -(-layers * quarter // 4) - 1) for quarter in (1, 2, 3, 4)})


def match_layers(distances: Float[Tensor, "J L"]) -> list[int]:
    """For each taught layer the student's, order kept: from the last back, the nearest before the one chosen last.

    Where the student has too few layers for all of them to differ, the first one serves several.
    """
    chosen: list[int] = []
    end = distances.shape[1]
    for row in distances.flip(0):
        best = int(row[: max(1, end)].argmin())
        chosen.append(best)
        end = best
    return chosen[::-1]
