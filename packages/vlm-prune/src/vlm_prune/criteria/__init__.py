"""Published criteria that need a page at most, one file each; methods with a module of their own stand beside this."""

from vlm_prune.criteria.divprune import DivPruneConfig, apply_divprune
from vlm_prune.criteria.fastervlm import FasterVLMConfig, apply_fastervlm
from vlm_prune.criteria.fastv import FastVConfig, apply_fastv
from vlm_prune.criteria.himap import HiMAPConfig, apply_himap
from vlm_prune.criteria.pyramiddrop import PyramidDropConfig, apply_pyramiddrop
from vlm_prune.criteria.random_tokens import RandomConfig, apply_random
from vlm_prune.criteria.sparsevlm import SparseVLMConfig, apply_sparsevlm
from vlm_prune.criteria.uniform import UniformConfig, apply_uniform
from vlm_prune.criteria.visionzip import VisionZipConfig, apply_visionzip
from vlm_prune.criteria.vispruner import VisPrunerConfig, apply_vispruner

__all__ = [
    "DivPruneConfig",
    "FastVConfig",
    "FasterVLMConfig",
    "HiMAPConfig",
    "PyramidDropConfig",
    "RandomConfig",
    "SparseVLMConfig",
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
    "apply_uniform",
    "apply_visionzip",
    "apply_vispruner",
]
