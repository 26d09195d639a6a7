"""What a single attention layer can learn: random-feature attention as an object of learning theory.

NOT linear-time random feature attention. Performer (Choromanski et al.) and Random Feature Attention (Peng et al., both
ICLR 2021) use random features to approximate softmax in linear time; nothing here does, and nothing here is faster than
attention. Here many heads have random, frozen query-key matrices, only their values are trained, and the question is
which functions of a query and a set of keys such a layer learns from how many samples:

    f(x_0, x_1..x_N) = sum_m 1/N sum_i relu(x~_0^T W_m x~_i) <v_m, x~_i>,   W_m frozen, v_m trained

Three models as feature maps (RFA, biased BRFA, and the random-feature MLP that they are compared with), their kernels
at infinite width, exact ridge regression on them, targets with their complexity, the theorems' bounds as formulas, and
the simulations: `python -m llm_attn.random_feature_theory --help`.

Fu, Guo, Bai, Mei, "What can a Single Attention Layer Learn? A Study Through the Random Features Lens", NeurIPS 2023,
arXiv:2307.11353. No code was published with it. What the paper leaves open is decided at the head of each file.
"""

from llm_attn.random_feature_theory.bounds import (
    approximation_bound,
    biased_gain,
    excess_risk_bound,
    kernel_norm_bound,
    mlp_norm_bound,
    samples_needed,
    value_bounds,
    value_norms,
)
from llm_attn.random_feature_theory.features import HeadFeatures, NeuronFeatures, head_features
from llm_attn.random_feature_theory.gram import gram, growing_gram
from llm_attn.random_feature_theory.inputs import Sets, as_sets, sphere_samples
from llm_attn.random_feature_theory.kernels import arc_cosine, head_kernel, neuron_kernel, rectified_product
from llm_attn.random_feature_theory.layer import RandomHeadAttention, ReluAttention
from llm_attn.random_feature_theory.qk_diagonal import diagonal_ratio, num_attention_layers, qk_mean
from llm_attn.random_feature_theory.regressor import RandomHeadRegressor, RandomNeuronRegressor
from llm_attn.random_feature_theory.ridge import STRENGTHS, RidgePath, choose_strength
from llm_attn.random_feature_theory.targets import Average, Correlation, Mixture, degree_constant, random_direction

__all__ = [
    "STRENGTHS",
    "Average",
    "Correlation",
    "HeadFeatures",
    "Mixture",
    "NeuronFeatures",
    "RandomHeadAttention",
    "RandomHeadRegressor",
    "RandomNeuronRegressor",
    "ReluAttention",
    "RidgePath",
    "Sets",
    "approximation_bound",
    "arc_cosine",
    "as_sets",
    "biased_gain",
    "choose_strength",
    "degree_constant",
    "diagonal_ratio",
    "excess_risk_bound",
    "gram",
    "growing_gram",
    "head_features",
    "head_kernel",
    "kernel_norm_bound",
    "mlp_norm_bound",
    "neuron_kernel",
    "num_attention_layers",
    "qk_mean",
    "random_direction",
    "rectified_product",
    "samples_needed",
    "sphere_samples",
    "value_bounds",
    "value_norms",
]
