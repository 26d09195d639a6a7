"""DHSA in a transformers model: `apply_dhsa`, and the attention implementation "dhsa".

A prompt is cut into chunks once, by the first layer that needs them, for all layers; each layer keeps the vectors of
its chunks, so that a token that is generated scores chunks and not keys. What is kept is checked against the cache
before it is used (the key that ends each chunk must still be there), so that beams may be reordered, caches exchanged
or cut back: what no longer fits is made anew from the keys.

Decided here: more of a prompt (chunked prefill, the next turn of a talk) is cut by itself and put behind what is there.
In training every layer cuts for itself, because checkpointing repeats layers without the first. Without a door, chosen
by `attn_implementation="dhsa"` alone, boundaries are those of "keyshift", for each layer its own. Weights of attention
are not dropped out: with attention_dropout a sentence says so.

Shapes: as in `selection`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_attn.dhsa.attention import covers, dhsa_decode, dhsa_prefill
from llm_attn.dhsa.boundaries import (
    boundaries_from_logits,
    keyshift_logits,
    punctuation_logits,
    uniform_boundaries,
)
from llm_attn.dhsa.config import DHSAConfig
from llm_attn.dhsa.predictor import BoundaryPredictor
from llm_attn.dhsa.selection import KeyLists, chunk_keys
from llm_attn.dhsa.sequences import Part, by_sequence
from llm_attn.transformers.door import Handle, attention_layers, base_model, open_door, register_attention
from llm_attn.transformers.saving import register_door
from llm_attn.transformers.visibility import Visibility, dense_attention

NAME = "dhsa"
_MEMORY = "llm_attn_dhsa_memory"
MOST_IDS = 1 << 20
"""Token ids that are remembered where boundaries need them."""
DEFAULT = DHSAConfig(boundary="keyshift")
"""Settings where DHSA is chosen by its name alone."""


@dataclass(frozen=True)
class Selection:
    """What a layer chose in one forward pass, for `apply_dhsa(..., on_selection=)`."""

    layer: int
    boundaries: Int[Tensor, "B M+1"]
    lists: KeyLists
    num_queries: int
    """Queries of the pass; the last `instruction_tokens` of a prompt read everything and are in no list."""
    num_keys: int
    sparse_queries: int
    """Queries that the lists are for."""
    block_size: int
    """Queries of a list; the last list may have fewer."""


@dataclass(frozen=True)
class _Chunks:
    """How the first `covered` keys are cut, and the keys that end the chunks, by which they are known again."""

    boundaries: Int[Tensor, "B M+1"]
    covered: int
    ends: Float[Tensor, "B M D"]

    def fit(self, key: Tensor) -> bool:
        if self.covered > key.shape[2] or len(self.ends) != len(key) or self.ends.device != key.device:
            return False
        return torch.equal(self.ends, _chunk_ends(key, self.boundaries))


def _chunk_ends(key: Tensor, boundaries: Tensor) -> Tensor:
    last = (boundaries[:, 1:] - 1).clamp(min=0)
    return key[:, 0].gather(1, last[..., None].expand(-1, -1, key.shape[3])).detach()


@dataclass
class Memory:
    """What the layers of a model share during a forward pass, and remember until the next."""

    config: DHSAConfig
    predictor: BoundaryPredictor | None = None
    follows: bool = False
    """Whether hooks tell it when a forward pass begins; only then can layers share."""
    on_selection: Callable[[Selection], None] | None = None
    ids: Tensor | None = None
    """The latest token ids, where boundaries need them."""
    chunks: dict[tuple[int | None, int, bool], _Chunks] = field(default_factory=dict)
    """By layer (None: all), part of the batch, and whether the layer slides, since its cache may hold the latest keys
    alone."""
    vectors: dict[tuple[int, int], tuple[_Chunks, Tensor]] = field(default_factory=dict)
    shared_chunks: dict[tuple[int, int], _Chunks] = field(default_factory=dict)
    """Of this forward pass, by part and number of keys."""
    shared_lists: dict[tuple[int | None, int], KeyLists] = field(default_factory=dict)

    def begin(self) -> None:
        """A forward pass begins."""
        self.shared_chunks, self.shared_lists = {}, {}

    def read_ids(self, ids: Int[Tensor, "B Nq"]) -> None:
        """The tokens of a forward pass, behind those before."""
        before = self.ids if self.ids is not None and self.ids.shape[0] == ids.shape[0] else ids[:, :0]
        self.ids = torch.cat([before, ids], 1)[:, -MOST_IDS:]

    def attend(
        self,
        layer: nn.Module,
        part: Part,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """One text, or a batch of texts of one length, longer than the budget."""
        index, config = _index(layer), self.config
        Nq, Nk = query.shape[2], key.shape[2]
        if covers(config, Nk, window) or 1 < Nq <= config.instruction_tokens:
            return dense_attention(query, key, value, Visibility(window), scale=scale, softcap=softcap)
        chunks = self._chunks(layer, part, key, Nq)
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
        if Nq == 1:
            vectors = self._vectors(index, part, key, chunks)
            options["covered"] = chunks.covered
            lists: KeyLists | None
            out, lists = dhsa_decode(query, key, value, chunks.boundaries, vectors, config, **options)
        else:
            share = self.follows and config.share_lists and not layer.training
            known = self.shared_lists.get((window, part.number)) if share else None
            out, lists = dhsa_prefill(query, key, value, chunks.boundaries, config, lists=known, **options)
            if share and lists is not None:
                self.shared_lists[window, part.number] = lists
        if self.on_selection is not None and lists is not None:
            sparse = 1 if Nq == 1 else Nq - config.instruction_tokens
            self.on_selection(Selection(index, chunks.boundaries, lists, Nq, Nk, sparse, config.block_size))
        return out

    def _chunks(self, layer: nn.Module, part: Part, key: Tensor, num_queries: int) -> _Chunks:
        shared, Nk = self.follows and self.config.share_boundaries and not layer.training, key.shape[2]
        if shared and (part.number, Nk) in self.shared_chunks:
            return self.shared_chunks[part.number, Nk]
        slides = getattr(layer, "sliding_window", None) is not None
        place = (None if shared else _index(layer), part.number, slides)
        start = num_queries == Nk
        if start and part.number == 0:
            self.chunks = {k: v for k, v in self.chunks.items() if (k[0], k[2]) != (place[0], slides)}
        known = self.chunks.get(place)
        if start or known is None or not known.fit(key):
            # a cache that was never seen, or is no longer the same: all that is there was a prompt
            known = self._cut(None, part, key, Nk - (num_queries == 1))
        if (num_queries > 1 and known.covered < Nk) or Nk - known.covered > self.config.generated_chunk:
            known = self._cut(known, part, key, Nk)
        self.chunks[place] = known
        if shared:
            self.shared_chunks[part.number, Nk] = known
        return known

    def _cut(self, known: _Chunks | None, part: Part, key: Tensor, upto: int) -> _Chunks:
        """Keys that are not covered yet, up to some, become chunks behind those that are known."""
        begin = 0 if known is None else known.covered
        with torch.no_grad():
            more = self._boundaries(part, key, begin, upto) + begin
        boundaries = more if known is None else torch.cat([known.boundaries, more[:, 1:]], 1)
        return _Chunks(boundaries, upto, _chunk_ends(key, boundaries))

    def _boundaries(self, part: Part, key: Tensor, begin: int, upto: int) -> Tensor:
        config, new = self.config, key[:, :, begin:upto]
        B, _, L, _ = new.shape
        if config.boundary == "uniform":
            return uniform_boundaries(B, L, config.chunk_size, key.device)
        tail = config.instruction_tokens if begin == 0 else 0
        options: dict[str, Any] = {"distance": config.min_distance, "instruction_tokens": tail}
        if config.boundary == "punctuation":
            logits = punctuation_logits(self._ids_of(part)[:, begin:upto], config.punctuation_ids)
            return boundaries_from_logits(logits, threshold=0.0, window=1, **options)
        options["max_count"] = config.max_chunks(L)
        if config.boundary == "keyshift":
            return boundaries_from_logits(keyshift_logits(new), threshold=None, **options)
        if self.predictor is None:
            raise ValueError("boundary='predictor' needs a predictor: apply_dhsa(model, config, predictor=...)")
        window = self.predictor.config.window
        return boundaries_from_logits(self.predictor(new), threshold=config.threshold, window=window, **options)

    def _ids_of(self, part: Part) -> Tensor:
        if self.ids is None or self.ids.shape[1] < part.num_keys:
            raise ValueError(
                "boundary='punctuation' needs the input_ids of the whole text; the model was not given them"
            )
        return self.ids[part.rows, -part.num_keys :][:, part.keys]

    def _vectors(self, index: int, part: Part, key: Tensor, chunks: _Chunks) -> Tensor:
        known = self.vectors.get((index, part.number))
        if known is None or known[0] is not chunks:
            heads = key.shape[1] if self.config.per_kv_head else 1
            vectors = chunk_keys(key, chunks.boundaries, pooling=self.config.pooling, list_heads=heads)
            known = self.vectors[index, part.number] = (chunks, vectors)
        return known[1]


def _index(layer: nn.Module) -> int:
    index = layer.layer_idx
    if not isinstance(index, int):
        raise TypeError(f"layer_idx of {type(layer).__name__} must be a number, got {index!r}")
    return index


_ALONE: WeakKeyDictionary[nn.Module, Memory] = WeakKeyDictionary()  # of layers without a door


def _memory(layer: nn.Module) -> Memory:
    memory = getattr(layer, _MEMORY, None)
    if memory is None:
        memory = _ALONE.setdefault(layer, Memory(DEFAULT))
    return memory


@torch.compiler.disable  # what is chosen depends on values; the rest of the layer is compiled around it
def _attention(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    *,
    scale: float | None,
    dropout: float,
    softcap: float | None = None,
) -> Tensor:
    memory = _memory(layer)
    if covers(memory.config, key.shape[2], visible.window):
        return dense_attention(query, key, value, visible, scale=scale, dropout=dropout, softcap=softcap)
    if dropout:
        raise ValueError(f"dhsa has no attention dropout, got {dropout}; set attention_dropout=0 in the model's config")
    return _sparse(memory, layer, query, key, value, visible, scale, softcap)


def _sparse(
    memory: Memory,
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    def run(part: Part, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return memory.attend(layer, part, q, k, v, window=window, scale=scale, softcap=softcap)

    return by_sequence(query, key, value, visible, run, scale=scale, softcap=softcap)


def apply_dhsa(
    model: nn.Module,
    config: DHSAConfig | None = None,
    *,
    predictor: BoundaryPredictor | None = None,
    layers: Sequence[int] | None = None,
    on_selection: Callable[[Selection], None] | None = None,
) -> Handle:
    """Runs DHSA in the layers `layers` (None: all) of a transformers model, until `handle.remove()`.

    predictor: from `train_boundary_predictor` or `BoundaryPredictor.from_pretrained`; needed for boundary="predictor".
    It becomes part of the model and is saved with it. on_selection: called with what each layer chose.

    Raises ValueError on a predictor that is missing, not wanted, or another model's, and where the model has no layers
    that fit.
    """
    config = DHSAConfig() if config is None else config
    _check_predictor(model, config, predictor)
    if predictor is not None:
        config = replace(config, predictor=predictor.config)
    return _open(model, config, predictor, layers, on_selection)


def describe_host(model: nn.Module) -> str:
    """What a predictor must fit: family, layers, and width of the keys."""
    config = base_model(model).config.get_text_config()
    layers = attention_layers(model)
    return f"{config.model_type}, {len(layers)} layers, width {config.hidden_size}, {key_channels(model)} key channels"


def key_channels(model: nn.Module) -> int:
    """C, key heads times head width."""
    config = base_model(model).config.get_text_config()
    head_dim = getattr(next(iter(attention_layers(model).values())), "head_dim", None)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads * (head_dim or config.hidden_size // config.num_attention_heads)


def _check_predictor(model: nn.Module, config: DHSAConfig, predictor: BoundaryPredictor | None) -> None:
    if config.boundary != "predictor":
        if predictor is not None:
            raise ValueError(f"a predictor is used with boundary='predictor' only, got boundary={config.boundary!r}")
        return
    if predictor is None:
        raise ValueError(
            "boundary='predictor' needs predictor=, of train_boundary_predictor or BoundaryPredictor.from_pretrained; "
            "without training, choose 'keyshift', 'punctuation' or 'uniform'"
        )
    build, channels = predictor.config, key_channels(model)
    if build.channels != channels:
        raise ValueError(f"the predictor reads keys of {build.channels} channels, this model's have {channels}")
    if build.host not in (None, describe_host(model)):
        raise ValueError(
            f"the predictor was trained on another model: {build.host}; this one is {describe_host(model)}"
        )


def _forget(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        delattr(layer, _MEMORY)


def _reopen(model: nn.Module, config: DHSAConfig, *, layers: Sequence[int] | None = None) -> Handle:
    """The door of a saved model; the predictor's weights are loaded after it."""
    predictor = None if config.predictor is None else BoundaryPredictor(config.predictor)
    return _open(model, config, predictor, layers, None)


def _open(
    model: nn.Module,
    config: DHSAConfig,
    predictor: BoundaryPredictor | None,
    layers: Sequence[int] | None,
    on_selection: Callable[[Selection], None] | None,
) -> Handle:
    handle = open_door(model, NAME, config, layers=layers, shared=predictor)
    if predictor is not None:
        predictor.float().eval().requires_grad_(False)  # trained by itself, in float32
    memory = Memory(config, predictor, follows=True, on_selection=on_selection)
    changed = [attention_layers(model)[index] for index in handle.layers_changed]
    for layer in changed:
        setattr(layer, _MEMORY, memory)
    handle.on_remove(partial(_forget, changed))
    host = base_model(model)
    hooks = [host.get_decoder().register_forward_pre_hook(lambda *_: memory.begin())]
    if config.boundary == "punctuation":
        embedding = host.get_input_embeddings()
        hooks.append(embedding.register_forward_pre_hook(lambda _, inputs: memory.read_ids(inputs[0])))
    for hook in hooks:
        handle.on_remove(hook.remove)
    return handle


register_attention(NAME, _attention, softcap=True)
register_door(NAME, DHSAConfig, _reopen)
