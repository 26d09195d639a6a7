"""AttentionInfluence: choose pretraining documents by how much a model misses its retrieval heads on them.

Nothing is trained: find the heads that copy from the context (`retrieval_scores`), mask them (`apply_head_masking`),
score every document by the rise of its loss (`InfluenceScorer`), and keep the best fifth of each domain
(`select_documents`). `score_corpus` and `select_corpus` do the last two for files of any size.

Hua et al., "AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining Data Selection",
arXiv:2505.07293. What the paper leaves open is decided at the head of each file.
"""

from llm_attn.attention_influence.choosing import Selection, select_corpus
from llm_attn.attention_influence.corpus import Columns
from llm_attn.attention_influence.detecting import detect_heads
from llm_attn.attention_influence.detection import HeadScores, copy_hits, most_attended, retrieval_scores
from llm_attn.attention_influence.errors import CorpusProblem
from llm_attn.attention_influence.job import ScoringJob, score_corpus
from llm_attn.attention_influence.masking import HeadMaskingConfig, apply_head_masking, visible_value_mean
from llm_attn.attention_influence.pictures import draw_heads
from llm_attn.attention_influence.retrieval import (
    RetrievalConfig,
    RetrievalSample,
    generated_sentences,
    retrieval_samples,
)
from llm_attn.attention_influence.scoring import (
    InfluenceScorer,
    InfluenceScores,
    ScoringConfig,
    influence_score,
    pair_losses,
    summed_losses,
)
from llm_attn.attention_influence.selection import ScoreHistogram, select_documents

__all__ = [
    "Columns",
    "CorpusProblem",
    "HeadMaskingConfig",
    "HeadScores",
    "InfluenceScorer",
    "InfluenceScores",
    "RetrievalConfig",
    "RetrievalSample",
    "ScoreHistogram",
    "ScoringConfig",
    "ScoringJob",
    "Selection",
    "apply_head_masking",
    "copy_hits",
    "detect_heads",
    "draw_heads",
    "generated_sentences",
    "influence_score",
    "most_attended",
    "pair_losses",
    "retrieval_samples",
    "retrieval_scores",
    "score_corpus",
    "select_corpus",
    "select_documents",
    "summed_losses",
    "visible_value_mean",
]
