"""TransNormerLLM: a language model whose layers mix tokens by Lightning Attention alone.

A layer is x + GLA(norm(x)), then x + GLU(norm(x)). GLA: queries and keys through silu, Lightning Attention with the
decay of the layer, a norm over all heads together, times a gate without activation, projected. GLU: (x W1 * x W2) W3.
Norms have no weights. The first layer also turns queries and keys by learned angles (LRPE).

Qin et al., "TransNormerLLM", arXiv:2307.14995, and arXiv:2405.17381; parameters have the names and layouts of the
released checkpoints, which load as they are.

Decided here:
- The state and the slopes are float32 and the angles computed in float32 whatever the model's dtype; the released code
  counts positions in the model's dtype, which is exact up to 256 in bfloat16, and advances them by 1 however many
  tokens are read.
- `inputs_embeds` stand for rows of the embedding, so they are scaled like them.
- Packed sequences are recognised by `cu_seq_lens_q`, or by position_ids that do not rise by one, where neither an
  attention_mask nor a cache is given, as transformers does for softmax models; they begin no cache. Otherwise positions
  are counted, not read, since only their differences matter.
- Padding left or right is exact. Padding between tokens (a right-padded prompt that is continued) lets the state decay
  as tokens would.

Shapes: B batch, N tokens, H heads, D width of a head, W width of the residual stream, V vocabulary.
"""

import math
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from llm_attn.lightning_attention import DecaySlopes, continue_lightning_attention, lightning_attention
from llm_attn.transnormer.cache import CACHE_NAME, StateCache, StateLayer
from llm_attn.transnormer.configuration import TransNormerConfig

logger = logging.get_logger(__name__)


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), without weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "*any W"]) -> Float[Tensor, "*any W"]:
        """Computed in float32 at least."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


class LRPE(nn.Module):
    """Linearised relative positional encoding: [x cos(theta t) | x sin(theta t)], so that the product of a query at s
    and a key at t is sum_j q_j k_j cos(theta_j (s - t)). The angles are learned; arXiv:2307.09270."""

    no_weight_decay = ("theta",)  # an angle of 0 means something else than a weight of 0

    def __init__(self, num_heads: int, head_dim: int, base: float) -> None:
        super().__init__()
        self.base = base
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """One geometric series over the channels of all heads."""
        channels = torch.arange(self.theta.numel(), device=self.theta.device, dtype=torch.float32)
        init.copy_(self.theta, (self.base ** (-2 * channels / channels.numel())).view_as(self.theta))

    def forward(self, x: Float[Tensor, "B H N D"], start: int) -> Float[Tensor, "B H N 2*D"]:
        """The first token is at position `start`."""
        acc = torch.promote_types(x.dtype, torch.float32)
        position = torch.arange(start, start + x.shape[2], device=x.device, dtype=acc)
        angle = self.theta.to(acc) * position[:, None]
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], dim=-1)


class GatedLinearAttention(nn.Module):
    """The token mixer."""

    def __init__(self, config: TransNormerConfig, layer: int) -> None:
        super().__init__()
        width = config.attention_dim
        self.num_heads = config.num_attention_heads
        self.qkvu_proj = nn.Linear(config.hidden_size, 4 * width, bias=config.bias)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=config.bias)
        self.act, self.value_act = ACT2FN[config.hidden_act], ACT2FN[config.value_act]
        self.norm = SimpleRMSNorm(config.norm_eps)
        has_lrpe = config.lrpe_layers[layer]
        self.lrpe = LRPE(self.num_heads, width // self.num_heads, config.lrpe_base) if has_lrpe else None
        self.decay = DecaySlopes(self.num_heads, layer=layer, num_layers=config.num_hidden_layers, decay=config.decay)

    def forward(
        self,
        x: Float[Tensor, "B N W"],
        padding: Bool[Tensor, "B N"] | None,
        memory: StateLayer | None,
        cu_seqlens: Int32[Tensor, "S+1"] | None,
    ) -> Float[Tensor, "B N W"]:
        """`padding` is True at tokens that are none; `memory` holds the tokens before and takes these in."""
        query, key, value, gate = self.qkvu_proj(x).chunk(4, dim=-1)
        mixed = (self.act(query), self.act(key), self.value_act(value))
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in mixed)
        if padding is not None:
            key, value = (t.masked_fill(padding[:, None, :, None], 0) for t in (key, value))
        if self.lrpe is not None:
            start = memory.seen if memory is not None else 0
            query, key = self.lrpe(query, start), self.lrpe(key, start)
        out = self._attend(query, key, value, memory, cu_seqlens)
        return self.out_proj(gate * self.norm(out.transpose(1, 2).flatten(2)))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, memory: StateLayer | None, cu_seqlens: Tensor | None
    ) -> Float[Tensor, "B H N D"]:
        if memory is not None:
            before = None if memory.state is None else memory.state.to(query.device)
            out, state = continue_lightning_attention(query, key, value, self.decay(), before)
            memory.advance(state, query.shape[2])
            return out
        if cu_seqlens is None:
            return cast(Tensor, lightning_attention(query, key, value, self.decay()))
        rows = query.shape[0]
        query, key, value = (t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value))  # rows end to end
        packed = cast(Tensor, lightning_attention(query, key, value, self.decay(), cu_seqlens=cu_seqlens))
        return packed[0].unflatten(1, (rows, -1)).transpose(0, 1)


class GatedLinearUnit(nn.Module):
    """The channel mixer, without activation: the product is what is not linear."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__()
        self.l1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.l2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.l3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Float[Tensor, "B N W"]) -> Float[Tensor, "B N W"]:
        """(x W1 * x W2) W3"""
        return self.l3(self.l1(x) * self.l2(x))


class TransNormerLayer(GradientCheckpointingLayer):
    """Token mixer and channel mixer, each behind a norm and around a residual."""

    def __init__(self, config: TransNormerConfig, layer: int) -> None:
        super().__init__()
        self.token_norm = SimpleRMSNorm(config.norm_eps)
        self.token_mixer = GatedLinearAttention(config, layer)
        self.channel_norm = SimpleRMSNorm(config.norm_eps)
        self.channel_mixer = GatedLinearUnit(config)

    def forward(
        self,
        x: Float[Tensor, "B N W"],
        padding: Bool[Tensor, "B N"] | None = None,
        memory: StateLayer | None = None,
        cu_seqlens: Int32[Tensor, "S+1"] | None = None,
    ) -> Float[Tensor, "B N W"]:
        """Arguments as in `GatedLinearAttention`."""
        x = x + self.token_mixer(self.token_norm(x), padding, memory, cu_seqlens)
        return x + self.channel_mixer(self.channel_norm(x))


class TransNormerPreTrainedModel(PreTrainedModel):
    """What both models share with transformers."""

    config_class = TransNormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransNormerLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LRPE):
            module.reset_parameters()
        elif isinstance(module, DecaySlopes):  # models are loaded on the meta device, which leaves no value in it
            init.copy_(module.slopes, module.computed(module.slopes.device))


class TransNormerModel(TransNormerPreTrainedModel):
    """The layers, from token ids to the last hidden states."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(TransNormerLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = SimpleRMSNorm(config.norm_eps)
        self.embed_scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B N"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#B N"] | None = None,
        cache: StateCache | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Float[Tensor, "B N W"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Int32[Tensor, "S+1"] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`cache` and `past_key_values` are two names of one argument; attention_mask is 1 at tokens, 0 at padding."""
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("TransNormerLLM has no attention maps: leave output_attentions out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_scale * (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        padding = _padding(attention_mask, x.shape[1])
        memory, packed = _given(cache, past_key_values), None
        if memory is None and attention_mask is None:
            packed = _boundaries(position_ids, x.shape[0]) if cu_seq_lens_q is None else cu_seq_lens_q
        if memory is None and packed is None and self._remembers(use_cache):
            memory = StateCache(self.config)
        if memory is not None and self._recomputes():
            raise ValueError("gradient checkpointing computes each layer twice, which a cache cannot stand: give none")
        wanted = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        x, hidden = self._layers(x, padding, memory, packed, wanted)
        named: dict[str, Any] = {CACHE_NAME: memory}
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **named)

    def _layers(
        self, x: Tensor, padding: Tensor | None, memory: StateCache | None, packed: Tensor | None, wanted: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The last hidden states, and if wanted the embeddings and what each layer makes of them."""
        states = memory.layers if memory is not None else [None] * len(self.layers)
        hidden: tuple[Tensor, ...] = ()
        for layer, state in zip(self.layers, states, strict=True):
            hidden = (*hidden, x) if wanted else ()
            x = layer(x, padding, state, packed)
        x = self.final_norm(x)
        return x, (*hidden, x) if wanted else None

    def _recomputes(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _remembers(self, use_cache: bool | None) -> bool:
        """Whether to begin a cache. Training begins none by itself."""
        if use_cache is None:
            return self.config.use_cache and not self.training
        if use_cache and self._recomputes():
            logger.warning_once("use_cache=True is ignored: gradient checkpointing computes each layer twice")
            return False
        return use_cache


def _given(cache: Any, past_key_values: Any) -> StateCache | None:
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one")
    given = cache if cache is not None else past_key_values
    if given is not None and not isinstance(given, StateCache):
        raise TypeError(f"TransNormerLLM needs a StateCache(config), got a {type(given).__name__}")
    return given


def _padding(attention_mask: Tensor | None, tokens: int) -> Bool[Tensor, "B N"] | None:
    """Where this call's tokens are padding; masks may also cover the tokens before."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask must be (batch, tokens) over at least the {tokens} tokens given, "
            f"got {tuple(attention_mask.shape)}: TransNormerLLM is causal, only padding can be masked"
        )
    return attention_mask[:, attention_mask.shape[1] - tokens :] == 0


def _boundaries(position_ids: Int[Tensor, "#B N"] | None, batch: int) -> Int32[Tensor, "S+1"] | None:
    """Where sequences begin in all rows laid end to end, if some row holds several."""
    if position_ids is None or position_ids.shape[-1] == 0:
        return None
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    if torch.compiler.is_compiling() or int(starts.sum()) == starts.shape[0]:
        return None
    first = starts.expand(batch, -1).flatten().nonzero().flatten()
    return F.pad(first, (0, 1), value=batch * position_ids.shape[1]).int()


class TransNormerForCausalLM(TransNormerPreTrainedModel, GenerationMixin):
    """The language model. `generate` keeps a state of constant size; load, save and train it like any other."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B N"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#B N"] | None = None,
        cache: StateCache | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Float[Tensor, "B N W"] | None = None,
        labels: Int[Tensor, "B N"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Int32[Tensor, "S+1"] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, of the last `logits_to_keep` positions (0: all), and the loss against `labels`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seq_lens_q=cu_seq_lens_q,
            output_attentions=kwargs.pop("output_attentions", None),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        named: dict[str, Any] = {CACHE_NAME: outputs.get(CACHE_NAME)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **named)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"TransNormerLLM keeps a state of constant size; leave cache_implementation out, got {kind!r}"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = StateCache(self.config)
        host = cast(Any, super())
        return host._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
