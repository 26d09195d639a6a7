"""Fewer visual tokens in any vision-language model of transformers, by any of the published criteria."""

from vlm_prune.criteria import (
    DivPruneConfig,
    FasterVLMConfig,
    FastVConfig,
    HiMAPConfig,
    PyramidDropConfig,
    RandomConfig,
    SparseVLMConfig,
    UniformConfig,
    VisionZipConfig,
    VisPrunerConfig,
    apply_divprune,
    apply_fastervlm,
    apply_fastv,
    apply_himap,
    apply_pyramiddrop,
    apply_random,
    apply_sparsevlm,
    apply_uniform,
    apply_visionzip,
    apply_vispruner,
)
from vlm_prune.criterion import Context, Criterion, Selection
from vlm_prune.door import Method, PruneHandle, StagesConfig, apply_stages
from vlm_prune.families import Family, register_family
from vlm_prune.methods import METHODS, prune
from vlm_prune.report import Report
from vlm_prune.stages import BEFORE, Stage

__all__ = [
    "BEFORE",
    "METHODS",
    "Context",
    "Criterion",
    "DivPruneConfig",
    "Family",
    "FastVConfig",
    "FasterVLMConfig",
    "HiMAPConfig",
    "Method",
    "PruneHandle",
    "PyramidDropConfig",
    "RandomConfig",
    "Report",
    "Selection",
    "SparseVLMConfig",
    "Stage",
    "StagesConfig",
    "UniformConfig",
    "VisPrunerConfig",
    "VisionZipConfig",
    "apply_divprune",
    "apply_fastervlm",
    "apply_fastv",
    "apply_himap",
    "apply_pyramiddrop",
    "apply_random",
    "apply_sparsevlm",
    "apply_stages",
    "apply_uniform",
    "apply_visionzip",
    "apply_vispruner",
    "prune",
    "register_family",
]
