"""DHSA: long prompts and long caches, each query block reading a fixed number of keys that it chooses by their content.

The sequence is cut into chunks of unequal length where the meaning turns (`boundaries`, `predictor`), chunks are scored
against blocks of queries, and the best-scored fill the budget (`selection`); over these keys attention is exact
(`attention`). `door` turns it on in a transformers model, `training` makes a predictor for one, and `baselines` has the
patterns of fixed blocks that it is measured against.

Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs", arXiv:2510.24606.
"""

from llm_attn.dhsa.attention import dhsa_attention, dhsa_decode, listed_attention
from llm_attn.dhsa.baselines import FixedBlocksConfig, apply_fixed_blocks, fixed_block_lists
from llm_attn.dhsa.boundaries import (
    boundaries_from_logits,
    keyshift_logits,
    punctuation_ids,
    spaced_peaks,
    uniform_boundaries,
)
from llm_attn.dhsa.comparison import Comparison, InputProblem, compare_answers, draw_selections, write_comparison
from llm_attn.dhsa.config import DHSAConfig, PredictorConfig
from llm_attn.dhsa.door import Selection, apply_dhsa
from llm_attn.dhsa.predictor import BoundaryPredictor
from llm_attn.dhsa.selection import KeyLists, chunk_keys, fill_budget, select_keys
from llm_attn.dhsa.training import (
    BoundaryTraining,
    boundary_targets,
    evaluate_boundary_predictor,
    focal_loss,
    mass_ratio,
    train_boundary_predictor,
)

__all__ = [
    "BoundaryPredictor",
    "BoundaryTraining",
    "Comparison",
    "DHSAConfig",
    "FixedBlocksConfig",
    "InputProblem",
    "KeyLists",
    "PredictorConfig",
    "Selection",
    "apply_dhsa",
    "apply_fixed_blocks",
    "boundaries_from_logits",
    "boundary_targets",
    "chunk_keys",
    "compare_answers",
    "dhsa_attention",
    "dhsa_decode",
    "draw_selections",
    "evaluate_boundary_predictor",
    "fill_budget",
    "fixed_block_lists",
    "focal_loss",
    "keyshift_logits",
    "listed_attention",
    "mass_ratio",
    "punctuation_ids",
    "select_keys",
    "spaced_peaks",
    "train_boundary_predictor",
    "uniform_boundaries",
    "write_comparison",
]
