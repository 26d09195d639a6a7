"""Models whose layers differ in heads and feed-forward width, as pruning leaves them.

This file is copied into a checkpoint beside its weights, so that transformers loads it wherever it goes:
`AutoModel.from_pretrained(folder, trust_remote_code=True)`. It needs torch and transformers, nothing else. The classes
are the stock ones with other widths; `config.ragged` says which: `heads` and `inter` of each layer, `head_dim`, `group`
(query heads for each key-value head).
"""

from typing import Any

from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)
from transformers.pytorch_utils import Conv1D


def resize(model: Any) -> None:
    """Gives each layer of a model the widths that `model.config.ragged` names."""
    sizes = model.config.ragged
    host = model.base_model
    layers = host.encoder.layer if hasattr(host, "encoder") else getattr(host, "h", None) or host.layers
    for layer, heads, inter in zip(layers, sizes["heads"], sizes["inter"], strict=True):
        context, keys = heads * sizes["group"] * sizes["head_dim"], heads * sizes["head_dim"]
        if hasattr(layer, "self_attn"):
            _resize_llama(layer, context, keys, inter, sizes)
        elif hasattr(layer, "attn"):
            _resize_gpt2(layer, context, heads, inter, sizes["head_dim"], model.config)
        else:
            _resize_bert(layer, context, heads, inter, sizes["head_dim"])


def _linear(old: Any, inputs: int | None = None, outputs: int | None = None) -> nn.Linear:
    return nn.Linear(inputs or old.in_features, outputs or old.out_features, bias=old.bias is not None)


def _resize_llama(layer: Any, context: int, keys: int, inter: int, sizes: dict[str, Any]) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    attention.q_proj = _linear(attention.q_proj, outputs=context)
    attention.k_proj = _linear(attention.k_proj, outputs=keys)
    attention.v_proj = _linear(attention.v_proj, outputs=keys)
    attention.o_proj = _linear(attention.o_proj, inputs=context)
    attention.num_key_value_groups = sizes["group"]
    mlp.gate_proj, mlp.up_proj = (_linear(old, outputs=inter) for old in (mlp.gate_proj, mlp.up_proj))
    mlp.down_proj = _linear(mlp.down_proj, inputs=inter)


def _resize_gpt2(layer: Any, context: int, heads: int, inter: int, head_dim: int, config: Any) -> None:
    attention, mlp = layer.attn, layer.mlp
    hidden = config.hidden_size
    attention.c_attn, attention.c_proj = Conv1D(3 * context, hidden), Conv1D(hidden, context)
    attention.num_heads, attention.head_dim = heads, head_dim
    attention.split_size = attention.embed_dim = context
    attention.scaling = head_dim**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        attention.scaling /= attention.layer_idx + 1
    mlp.c_fc, mlp.c_proj = Conv1D(inter, hidden), Conv1D(hidden, inter)


def _resize_bert(layer: Any, context: int, heads: int, inter: int, head_dim: int) -> None:
    attention = layer.attention.self
    for name in ("query", "key", "value"):
        setattr(attention, name, _linear(getattr(attention, name), outputs=context))
    attention.num_attention_heads, attention.attention_head_size = heads, head_dim
    attention.all_head_size, attention.scaling = context, head_dim**-0.5
    out = layer.attention.output
    out.dense = _linear(out.dense, inputs=context)
    layer.intermediate.dense = _linear(layer.intermediate.dense, outputs=inter)
    layer.output.dense = _linear(layer.output.dense, inputs=inter)


class _Ragged:
    """Builds the stock model, then gives its layers their widths."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        resize(self)


class RaggedBertModel(_Ragged, BertModel):
    """BertModel with layers of different sizes."""

    _auto_class = "AutoModel"


class RaggedBertForMaskedLM(_Ragged, BertForMaskedLM):
    """BertForMaskedLM with layers of different sizes."""

    _auto_class = "AutoModelForMaskedLM"


class RaggedBertForSequenceClassification(_Ragged, BertForSequenceClassification):
    """BertForSequenceClassification with layers of different sizes."""

    _auto_class = "AutoModelForSequenceClassification"


class RaggedBertForTokenClassification(_Ragged, BertForTokenClassification):
    """BertForTokenClassification with layers of different sizes."""

    _auto_class = "AutoModelForTokenClassification"


class RaggedBertForQuestionAnswering(_Ragged, BertForQuestionAnswering):
    """BertForQuestionAnswering with layers of different sizes."""

    _auto_class = "AutoModelForQuestionAnswering"


class RaggedRobertaModel(_Ragged, RobertaModel):
    """RobertaModel with layers of different sizes."""

    _auto_class = "AutoModel"


class RaggedRobertaForMaskedLM(_Ragged, RobertaForMaskedLM):
    """RobertaForMaskedLM with layers of different sizes."""

    _auto_class = "AutoModelForMaskedLM"


class RaggedRobertaForSequenceClassification(_Ragged, RobertaForSequenceClassification):
    """RobertaForSequenceClassification with layers of different sizes."""

    _auto_class = "AutoModelForSequenceClassification"


class RaggedGPT2Model(_Ragged, GPT2Model):
    """GPT2Model with layers of different sizes."""

    _auto_class = "AutoModel"


class RaggedGPT2LMHeadModel(_Ragged, GPT2LMHeadModel):
    """GPT2LMHeadModel with layers of different sizes."""

    _auto_class = "AutoModelForCausalLM"


class RaggedGPT2ForSequenceClassification(_Ragged, GPT2ForSequenceClassification):
    """GPT2ForSequenceClassification with layers of different sizes."""

    _auto_class = "AutoModelForSequenceClassification"


class RaggedLlamaModel(_Ragged, LlamaModel):
    """LlamaModel with layers of different sizes."""

    _auto_class = "AutoModel"


class RaggedLlamaForCausalLM(_Ragged, LlamaForCausalLM):
    """LlamaForCausalLM with layers of different sizes."""

    _auto_class = "AutoModelForCausalLM"


class RaggedLlamaForSequenceClassification(_Ragged, LlamaForSequenceClassification):
    """LlamaForSequenceClassification with layers of different sizes."""

    _auto_class = "AutoModelForSequenceClassification"


class RaggedMistralModel(_Ragged, MistralModel):
    """MistralModel with layers of different sizes."""

    _auto_class = "AutoModel"


class RaggedMistralForCausalLM(_Ragged, MistralForCausalLM):
    """MistralForCausalLM with layers of different sizes."""

    _auto_class = "AutoModelForCausalLM"


class RaggedQwen2Model(_Ragged, Qwen2Model):
    """Qwen2Model with layers of different sizes."""

    _auto_class = "AutoModel"


class RaggedQwen2ForCausalLM(_Ragged, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with layers of different sizes."""

    _auto_class = "AutoModelForCausalLM"


class RaggedQwen3Model(_Ragged, Qwen3Model):
    """Qwen3Model with layers of different sizes."""

    _auto_class = "AutoModel"


class RaggedQwen3ForCausalLM(_Ragged, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with layers of different sizes."""

    _auto_class = "AutoModelForCausalLM"


def ragged_class(name: str) -> Any:
    """The ragged form of a stock class, by its name. ValueError where there is none."""
    found = globals().get(name if name.startswith("Ragged") else f"Ragged{name}")
    if found is None:
        known = ", ".join(each.removeprefix("Ragged") for each in globals() if each.startswith("Ragged"))
        raise ValueError(f"layers of different sizes are supported for {known}, not for {name}; use layout='stock'")
    return found
