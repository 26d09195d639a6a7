"""Affine-Scaled Attention: softmax weights times a factor of each token, plus a bias on every key that it sees.

Softmax makes the weights of a row sum to one, so a head that has nothing to say must put its mass somewhere, and puts
it on the first token. Here a factor alpha in [0, 1], one for each token and head, read off the hidden state by one
small linear map, scales the row, and a bias beta on all keys of the row holds the mean mass at the running mean of
alpha:

    o_i = sum_j [alpha_i softmax_ij + beta_i] v_j,    beta_i = (alpha_ma - alpha_i) / N

beta is the same for all keys of a row, so o_i = alpha_i softmax_i V + beta_i (sum of the values that row i sees): SDPA
as it stands, a running sum of values, and one multiply-add. The maps never exist. Weights may be negative.

Bae et al., "Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention", arXiv:2602.23057.
Left open there, decided here:
- N is 2,048, the length of the paper's training (`n_mode="fixed"`), at any length: the same token gets the same bias
  in a prefill and in decoding. "row" counts the keys that the row sees: the mass of every row is alpha_ma exactly. "kv"
  is the literal reading, the keys of this call, equal to "fixed" while training at 2,048; it contradicts itself in
  decoding, and refuses a cache there.
- The bias lies on keys that the row may see and on no other: causal, windowed, padded, packed.
- The running mean starts at 0 as printed, is of each head (`ema_scope="layer"`: of all heads), takes part after it was
  moved, without gradient, and leaves padding out. It moves once for each forward pass in training: once for each
  micro-batch of accumulated gradients, not again when activation checkpointing runs a layer a second time, and not at
  all by a batch whose alpha is not finite. Ranks of data parallel training move their own (which DDP, unless told
  otherwise, replaces by rank 0's before each step); see `average_affine_means`.
- The input of alpha is what q, k and v are made from. Dropout acts on the softmax alone.
- alpha does not touch the logits: it is no temperature, though the paper calls it one in one place.
`init="identity"` is an extension: a pretrained model starts as what it is, see `AffineConfig`.
The paper's rivals are options: attention sinks (one logit of each head, by the log-sum-exp) and Gated Attention (Qiu et
al., arXiv:2505.06708; combined, the affine scaling comes first).
"""

from llm_attn.affine_attention.door import AverageAffineMeans, apply_affine, average_affine_means
from llm_attn.affine_attention.formula import (
    affine_attention,
    affine_weights,
    linear_clip,
    prefix_value_sum,
    sink_attention,
    sink_weights,
)
from llm_attn.affine_attention.mass import AttentionMass, attention_mass, draw_attention_mass
from llm_attn.affine_attention.scale import AffineConfig, AffineScale, AffineScaledAttention

__all__ = [
    "AffineConfig",
    "AffineScale",
    "AffineScaledAttention",
    "AttentionMass",
    "AverageAffineMeans",
    "affine_attention",
    "affine_weights",
    "apply_affine",
    "attention_mass",
    "average_affine_means",
    "draw_attention_mass",
    "linear_clip",
    "prefix_value_sum",
    "sink_attention",
    "sink_weights",
]
