"""Configuration of TransNormerLLM for transformers; reads the config.json of the released models as it is."""

from dataclasses import field
from typing import Any, get_args

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from llm_attn.lightning_attention import Decay

_SIZES = "vocab_size", "hidden_size", "intermediate_size", "attention_dim", "num_hidden_layers", "num_attention_heads"


class TransNormerConfig(PreTrainedConfig):
    """Sizes and choices of a TransNormerLLM. The defaults are the 385M model."""

    model_type = "transnormer"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012  names in the released config files
        "decoder_embed_dim": "hidden_size",
        "decoder_layers": "num_hidden_layers",
        "decoder_attention_heads": "num_attention_heads",
        "glu_dim": "intermediate_size",
        "hidden_dim": "attention_dim",
        "linear_act_fun": "hidden_act",
        "linear_use_lrpe_list": "lrpe_layers",
        "init_std": "initializer_range",
    }
    base_model_tp_plan = {  # noqa: RUF012  one all-reduce for each GLU, as in the paper
        "layers.*.channel_mixer.l1": "colwise",
        "layers.*.channel_mixer.l2": "colwise",
        "layers.*.channel_mixer.l3": "rowwise",
    }

    vocab_size: int = 64000
    hidden_size: int = 1024
    """Width of the residual stream."""
    intermediate_size: int = 2816
    """Width inside the gated linear unit; -1: that of the residual stream."""
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    attention_dim: int = -1
    """Width of all heads together; -1: that of the residual stream."""
    hidden_act: str = "silu"
    """Activation of queries and keys."""
    value_act: str = "linear"
    """Activation of values: none in TransNormerLLM, silu in some relatives."""
    decay: Decay = "alibi"
    """Rule of the decay slopes: "alibi" as in the released weights, or "paper"; see `decay_slopes`."""
    lrpe_layers: list[bool] = field(default_factory=list)
    """Which layers encode positions in queries and keys; empty: the first alone. It doubles the size of the state."""
    lrpe_base: float = 10000.0
    """Base of the geometric series that the angles start from."""
    scale_embedding: bool = True
    """Multiply embeddings by the root of their width."""
    bias: bool = False
    """Biases in the projections of a layer."""
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for released, ours in self.attribute_map.items():
            if released in kwargs:
                setattr(self, ours, kwargs.pop(released))
        if "no_scale_embedding" in kwargs:
            self.scale_embedding = not kwargs.pop("no_scale_embedding")
        if (norm := kwargs.pop("norm_type", "simplermsnorm")) != "simplermsnorm":
            raise ValueError(f"TransNormerLLM here has SimpleRMSNorm; norm_type={norm!r} is not supported")
        for name in ("intermediate_size", "attention_dim"):
            if getattr(self, name) == -1:
                setattr(self, name, self.hidden_size)
        if not self.lrpe_layers:
            self.lrpe_layers = [layer == 0 for layer in range(self.num_hidden_layers)]
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.attention_dim % self.num_attention_heads:
            raise ValueError(
                f"attention_dim must be a multiple of num_attention_heads, got {self.attention_dim} and "
                f"{self.num_attention_heads}"
            )
        if len(self.lrpe_layers) != self.num_hidden_layers:
            raise ValueError(
                f"lrpe_layers must say for each of the {self.num_hidden_layers} layers whether it has LRPE, "
                f"got {len(self.lrpe_layers)} values"
            )
        for name in ("hidden_act", "value_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"{name} must be one of {', '.join(ACT2FN)}, got {getattr(self, name)!r}")
        if self.decay not in get_args(Decay):
            raise ValueError(f"decay must be one of {', '.join(get_args(Decay))}, got {self.decay!r}")
