"""What VTrans knows of a model family: the axes of each weight, where its gates sit, and what its stock class can hold.

The axes say everything that counting, masking and shrinking need. Of each parameter they name, axis by axis, what its
entries belong to:

    hidden   the residual stream            query   heads' channels of queries and of the context
    inter    the feed-forward layer         key     heads' channels of keys and values
    qkv      query, key and value in one    all     nothing that can be pruned (vocabulary, classes, positions)

`*` marks the axis into which a gate's mean is folded when the model is shrunk, `/` the one that takes a fold back where
output and input embedding are one matrix.

Decided here: a head of grouped-query attention is a key-value head with all its query heads. One gate per layer takes
both its sublayers, since what a stock configuration can lack is whole layers. The pooled output and the transform of
masked-language heads keep the channels of the residual stream.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Axes = tuple[str, ...]

_LLAMA = {
    r"layers\.\d+\.self_attn\.q_proj\.weight": ("query", "hidden"),
    r"layers\.\d+\.self_attn\.q_proj\.bias": ("query",),
    r"layers\.\d+\.self_attn\.[kv]_proj\.weight": ("key", "hidden"),
    r"layers\.\d+\.self_attn\.[kv]_proj\.bias": ("key",),
    r"layers\.\d+\.self_attn\.o_proj\.weight": ("hidden*", "query*"),
    r"layers\.\d+\.self_attn\.o_proj\.bias": ("hidden*",),
    r"layers\.\d+\.self_attn\.[qk]_norm\.weight": ("all",),
    r"layers\.\d+\.mlp\.(gate|up)_proj\.weight": ("inter", "hidden"),
    r"layers\.\d+\.mlp\.(gate|up)_proj\.bias": ("inter",),
    r"layers\.\d+\.mlp\.down_proj\.weight": ("hidden*", "inter*"),
    r"layers\.\d+\.mlp\.down_proj\.bias": ("hidden*",),
    r"layers\.\d+\.(input|post_attention)_layernorm\.weight": ("hidden",),
    r"embed_tokens\.weight": ("all", "hidden*"),
    r"norm\.weight": ("hidden/",),
    r"(lm_head|score)\.weight": ("all", "hidden"),
}
_GPT2 = {
    r"h\.\d+\.attn\.c_attn\.weight": ("hidden", "qkv"),
    r"h\.\d+\.attn\.c_attn\.bias": ("qkv",),
    r"h\.\d+\.attn\.c_proj\.weight": ("query*", "hidden*"),
    r"h\.\d+\.(attn|mlp)\.c_proj\.bias": ("hidden*",),
    r"h\.\d+\.mlp\.c_fc\.weight": ("hidden", "inter"),
    r"h\.\d+\.mlp\.c_fc\.bias": ("inter",),
    r"h\.\d+\.mlp\.c_proj\.weight": ("inter*", "hidden*"),
    r"h\.\d+\.ln_[12]\.(weight|bias)": ("hidden",),
    r"w[tp]e\.weight": ("all", "hidden*"),
    r"ln_f\.(weight|bias)": ("hidden/",),
    r"(lm_head|score)\.weight": ("all", "hidden"),
}
_LAYER = r"encoder\.layer\.\d+\."
_BERT = {
    _LAYER + r"attention\.self\.(query|key|value)\.weight": ("query", "hidden"),
    _LAYER + r"attention\.self\.(query|key|value)\.bias": ("query",),
    _LAYER + r"attention\.output\.dense\.weight": ("hidden*", "query*"),
    _LAYER + r"(attention\.)?output\.dense\.bias": ("hidden*",),
    _LAYER + r"(attention\.)?output\.LayerNorm\.(weight|bias)": ("hidden",),
    _LAYER + r"intermediate\.dense\.weight": ("inter", "hidden"),
    _LAYER + r"intermediate\.dense\.bias": ("inter",),
    _LAYER + r"output\.dense\.weight": ("hidden*", "inter*"),
    r"embeddings\.(word|position|token_type)_embeddings\.weight": ("all", "hidden"),
    r"embeddings\.LayerNorm\.(weight|bias)": ("hidden*",),
    r"(pooler|cls\.predictions\.transform|lm_head|classifier)\.dense\.weight": ("hidden", "hidden"),
    r"(pooler|cls\.predictions\.transform|lm_head|classifier)\.dense\.bias": ("hidden",),
    r"(cls\.predictions\.transform\.LayerNorm|lm_head\.layer_norm)\.(weight|bias)": ("hidden",),
    r"(cls\.predictions\.decoder|cls\.seq_relationship|lm_head\.decoder|classifier(\.out_proj)?|qa_outputs)\.weight": (
        "all",
        "hidden",
    ),
    r"(cls\.predictions(\.decoder)?|cls\.seq_relationship|lm_head(\.decoder)?|classifier(\.out_proj)?|qa_outputs)"
    r"\.bias": ("all",),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models. Paths of modules start at the base model, or at a layer where they are a layer's."""

    axes: Mapping[str, Axes]
    """Regular expression on a parameter's name, from the base model on, and its axes; the first that fits holds."""
    layers: str
    attention_out: str
    """Projection of the context back to the residual stream, in a layer."""
    ffn_out: str
    norms: tuple[str, ...]
    """Of a layer, each the last module of a sublayer where `post_norm`."""
    final_norm: str | None
    embedded: str
    """Module at which embeddings are complete and enter the residual stream."""
    embedded_input: bool
    """Whether that is what enters the module, or what leaves it."""
    necks: tuple[str, ...] = ()
    """Modules, from the whole model on, whose output has the channels of the residual stream."""
    neck_norms: tuple[str, ...] = ()
    post_norm: bool = False
    """Whether sublayers end with the norm; a removed layer is passed by, norms included."""
    square_attention: bool = False
    """Whether the stock class has no head width of its own: heads times head width is the hidden width."""
    layer_gates: bool = True
    """Whether layers have gates by default."""
    count_embeddings: bool = True
    """Whether the size of the model counts embeddings and output head by default."""
    inter_name: str = "intermediate_size"
    """What the configuration calls the feed-forward width."""


_BERT_FAMILY = Family(
    axes=_BERT,
    layers="encoder.layer",
    attention_out="attention.output.dense",
    ffn_out="output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    final_norm=None,
    embedded="embeddings.LayerNorm",
    embedded_input=False,
    necks=(
        *("pooler.dense", "bert.pooler.dense", "roberta.pooler.dense"),
        *("cls.predictions.transform.dense", "lm_head.dense", "classifier.dense"),
    ),
    neck_norms=("cls.predictions.transform.LayerNorm", "lm_head.layer_norm"),
    post_norm=True,
    square_attention=True,
)
_LLAMA_FAMILY = Family(
    axes=_LLAMA,
    layers="layers",
    attention_out="self_attn.o_proj",
    ffn_out="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    final_norm="norm",
    embedded="embed_tokens",
    embedded_input=False,
    layer_gates=False,
    count_embeddings=False,
)
_GPT2_FAMILY = Family(
    axes=_GPT2,
    layers="h",
    attention_out="attn.c_proj",
    ffn_out="mlp.c_proj",
    norms=("ln_1", "ln_2"),
    final_norm="ln_f",
    embedded="drop",
    embedded_input=True,
    square_attention=True,
    inter_name="n_inner",
)
FAMILIES: Mapping[str, Family] = {
    "bert": _BERT_FAMILY,
    "roberta": _BERT_FAMILY,
    "gpt2": _GPT2_FAMILY,
    "llama": _LLAMA_FAMILY,
    "mistral": _LLAMA_FAMILY,
    "qwen2": _LLAMA_FAMILY,
    "qwen3": _LLAMA_FAMILY,
}
"""By `config.model_type`."""


class Anatomy:
    """A model seen through its family: sizes, modules and axes of parameters.

    d hidden width, H heads that can go (key-value heads where queries are grouped), g query heads of each, D head
    width, m feed-forward width, L layers. TypeError on what is no transformers model, ValueError on other families.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
        config: Any = model.config
        if config.model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ValueError(f"VTrans shrinks {known}; '{config.model_type}' is not among them")
        if getattr(config, "add_cross_attention", False):
            raise ValueError("VTrans does not shrink cross-attention; give a model without add_cross_attention")
        self.model, self.family, self.config = model, FAMILIES[config.model_type], config
        self.hidden: int = config.hidden_size
        self.layers: list[nn.Module] = list(self._base(self.family.layers))
        self.query_heads: int = config.num_attention_heads
        self.heads: int = getattr(config, "num_key_value_heads", None) or self.query_heads
        self.group = self.query_heads // self.heads
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden // self.query_heads
        self.inter: int = self.ffn_out(0).weight.numel() // self.hidden
        self.tied = _tied(model)

    @property
    def base(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    def _base(self, path: str) -> Any:
        return self.base.get_submodule(path)

    def attention_out(self, layer: int) -> Any:
        """Projection of a layer's context."""
        return self.layers[layer].get_submodule(self.family.attention_out)

    def ffn_out(self, layer: int) -> Any:
        """Last projection of a layer's feed-forward part."""
        return self.layers[layer].get_submodule(self.family.ffn_out)

    def embedded(self) -> nn.Module:
        """Where embeddings are complete."""
        module: nn.Module = self._base(self.family.embedded)
        return module

    def norms(self, layer: int) -> list[nn.Module]:
        """Norms of a layer."""
        return [self.layers[layer].get_submodule(path) for path in self.family.norms]

    def outer_norms(self) -> list[nn.Module]:
        """Norms of the residual stream outside layers."""
        paths = [self.family.final_norm] if self.family.final_norm else [self.family.embedded]
        return [self._base(path) for path in paths] + self._present(self.family.neck_norms)

    def necks(self) -> list[nn.Module]:
        """Modules outside layers that give the channels of the residual stream."""
        return self._present(self.family.necks)

    def _present(self, paths: tuple[str, ...]) -> list[nn.Module]:
        modules = dict(self.model.named_modules())
        return [modules[path] for path in paths if path in modules]

    def axes(self, name: str) -> Axes:
        """Axes of the parameter of that name. ValueError where the family does not know it."""
        short = self.inside(name)
        for pattern, axes in self.family.axes.items():
            if re.fullmatch(pattern, short):
                return axes
        raise ValueError(
            f"VTrans does not know what the parameter '{name}' of {type(self.model).__name__} belongs to; shrink the "
            "base model, or a model with one of transformers' usual heads"
        )

    def inside(self, name: str) -> str:
        """A parameter's name from the base model on."""
        return name.removeprefix(f"{self.model.base_model_prefix}.")

    def layer_of(self, name: str) -> int | None:
        """The layer a parameter is in, None outside."""
        found = re.match(re.escape(self.family.layers) + r"\.(\d+)\.", self.inside(name))
        return int(found[1]) if found else None

    def is_embedding(self, name: str) -> bool:
        """Whether a parameter belongs to embeddings or output head, what `count_embeddings` is about."""
        return self.layer_of(name) is None and self.axes(name) != ("hidden/",)


def _tied(model: PreTrainedModel) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights: list[Tensor | None] = [getattr(module, "weight", None) for module in (embedding, head)]
    return weights[0] is not None and weights[0] is weights[1]


def kept_channels(kept: Tensor, width: int) -> Tensor:
    """Indices of the channels of kept units that are `width` channels wide, in the units' order."""
    return (kept[:, None] * width + torch.arange(width, device=kept.device)).flatten()
