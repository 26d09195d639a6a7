"""Attention Residuals: the input of each layer is a softmax mix over depth, in place of the sum, of earlier outputs.

Every attention and every MLP has one learned vector, its pseudo-query, which attends to the token's embedding and to
what the layers before put out; Block Attention Residuals attends to sums over blocks of layers instead, so that memory
does not grow with depth. Everything is per token: no cache, mask or position is touched.

Kimi Team, "Attention Residuals", arXiv:2603.15031: equations 1-4 (full), 5-6 (block), algorithm 1 (two phases), and
the caching of blocks across the virtual stages of a pipeline.

Left open there, decided here:
- Queries at zero give the mean of the sources, and their sum is the ordinary residual stream: so a trained pre-norm
  model is converted without loss. `sum_scale` multiplies the mean back to the sum, which also takes out the effect of
  the norms' eps. The report does not mention conversion.
- Blocks end where the index of the layer is a multiple of S; the report's listing, with its own indexing, may shift
  them. A block may end between the attention and the MLP of a decoder layer; if S does not divide L, the last is short.
- Each key norm has a weight, and the model's eps. Logits, softmax and mix are float32 at least.
- Full Attention Residuals in two phases: runs of about sqrt(L) queries, a matter of schedule alone.
- A layer whose attention and MLP share a norm and are added together (Phi) is one sub-layer.
- Outputs count as they are added to the stream: after a post-norm (Gemma), a residual multiplier or dropout.
"""

from llm_attn.attention_residuals.blocks import BlockDelta, BlockState
from llm_attn.attention_residuals.config import AttentionResidualsConfig
from llm_attn.attention_residuals.depth_weights import depth_weights, plot_depth_weights
from llm_attn.attention_residuals.door import apply_attention_residuals
from llm_attn.attention_residuals.module import AttentionResiduals, attention_residuals
from llm_attn.attention_residuals.pipeline import BlockCache, blocks_sent, known_blocks
from llm_attn.attention_residuals.stream import ResidualStream

__all__ = [
    "AttentionResiduals",
    "AttentionResidualsConfig",
    "BlockCache",
    "BlockDelta",
    "BlockState",
    "ResidualStream",
    "apply_attention_residuals",
    "attention_residuals",
    "blocks_sent",
    "depth_weights",
    "known_blocks",
    "plot_depth_weights",
]
