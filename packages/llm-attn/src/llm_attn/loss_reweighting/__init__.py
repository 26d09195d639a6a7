"""Loss-based reweighting: every sample of a batch is weighted by its own current loss, while a model is pretrained.

No second model, no further pass, no state: the losses of the global batch become weights that sum to 1, samples that
are easy already count less, and the same backward pass goes on. `loss_weights` is the formula, `LossReweighter` the
loss for a loop of one's own, `ReweightedTrainer` and `LossReweightingMixin` the door into transformers.

Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", ICLR 2025,
arXiv:2502.06733. What the paper leaves open is decided at the head of each file.
"""

from llm_attn.loss_reweighting.config import LossReweightingConfig, temperature_at
from llm_attn.loss_reweighting.head import losses_for_logits
from llm_attn.loss_reweighting.reweighter import LossReweighter
from llm_attn.loss_reweighting.samples import (
    SampleLosses,
    documents_of,
    next_targets,
    per_sample_losses,
    sample_means,
)
from llm_attn.loss_reweighting.trainer import LossReweightingCallback, LossReweightingMixin, ReweightedTrainer
from llm_attn.loss_reweighting.weights import loss_extremes, loss_weights, normalized_losses, weight_bound

__all__ = [
    "LossReweighter",
    "LossReweightingCallback",
    "LossReweightingConfig",
    "LossReweightingMixin",
    "ReweightedTrainer",
    "SampleLosses",
    "documents_of",
    "loss_extremes",
    "loss_weights",
    "losses_for_logits",
    "next_targets",
    "normalized_losses",
    "per_sample_losses",
    "sample_means",
    "temperature_at",
    "weight_bound",
]
