"""VTrans: shrink a transformer to a given size by gates that an information bottleneck trains.

`apply_vtrans` puts a Gaussian gate on every channel of the residual stream, attention head, feed-forward unit and
layer; `VTransTrainer` trains them under a size constraint, with the weights ("full", "fast") or alone ("faster");
`shrink` writes what stays into an ordinary transformers model; `finetune` trains it. `compress` does all of it, to a
folder.

Dutta et al., "VTrans: Accelerating Transformer Compression with Variational Information Bottleneck based Pruning",
arXiv:2406.05276. Its code is not published; gates and size constraint follow the same authors' code for language
models ("Efficient LLM Pruning with Global Token-Dependency Awareness and Hardware-Adapted Inference", ES-FoMo
workshop 2024). What both leave open is decided at the head of each file.
"""

from llm_attn.vtrans.baselines import layer_drop_structure, magnitude_scores, magnitude_structure
from llm_attn.vtrans.choosing import Scores, choose_structure, pick
from llm_attn.vtrans.compressing import (
    CompressionConfig,
    CompressionProblem,
    compress,
    load_for_compression,
    read_texts,
)
from llm_attn.vtrans.door import VTransConfig, VTransHandle, apply_vtrans
from llm_attn.vtrans.gates import VIBGate, log_alpha, masked_layer_norm, masked_rms_norm, vib_gate, vib_kl
from llm_attn.vtrans.measuring import embedding_agreement, embeddings, latency, perplexity, weight_bytes
from llm_attn.vtrans.objectives import (
    EmbeddingObjective,
    LanguageObjective,
    Objective,
    ObjectiveConfig,
    objective_for,
)
from llm_attn.vtrans.pictures import draw_structure, draw_training
from llm_attn.vtrans.probing import draw_attention, probe_attention
from llm_attn.vtrans.shrinking import load_shrunk, shrink
from llm_attn.vtrans.structure import Counts, SizeModel, Structure, fits_stock
from llm_attn.vtrans.training import FinetuneConfig, PruningConfig, SizeConstraint, VTransTrainer, evaluate, finetune

__all__ = [
    "CompressionConfig",
    "CompressionProblem",
    "Counts",
    "EmbeddingObjective",
    "FinetuneConfig",
    "LanguageObjective",
    "Objective",
    "ObjectiveConfig",
    "PruningConfig",
    "Scores",
    "SizeConstraint",
    "SizeModel",
    "Structure",
    "VIBGate",
    "VTransConfig",
    "VTransHandle",
    "VTransTrainer",
    "apply_vtrans",
    "choose_structure",
    "compress",
    "draw_attention",
    "draw_structure",
    "draw_training",
    "embedding_agreement",
    "embeddings",
    "evaluate",
    "finetune",
    "fits_stock",
    "latency",
    "layer_drop_structure",
    "load_for_compression",
    "load_shrunk",
    "log_alpha",
    "magnitude_scores",
    "magnitude_structure",
    "masked_layer_norm",
    "masked_rms_norm",
    "objective_for",
    "perplexity",
    "pick",
    "probe_attention",
    "read_texts",
    "shrink",
    "vib_gate",
    "vib_kl",
    "weight_bytes",
]
