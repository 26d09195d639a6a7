"""The engine: hooks that drop visual tokens while a host reads a prompt, and keep decoding right afterwards.

Nothing of the host is copied. Forward pre-hooks on its base model, its text stack and its decoder layers gather what
they are given: before the first layer embeddings, positions, masks; behind a layer hidden states, and for every later
layer its mask and rotary tables. Tokens keep the positions that they had, so decoding positions, M-RoPE and
`rope_deltas` need nothing. Prompts are never rewritten: hosts count placeholders.

Decided here: a prompt is read at once, when its cache is empty; what comes later, a second turn with another image
too, goes through unpruned against the pruned cache. Positions are preserved for every method: some published code
renumbers the kept tokens (AdaptInfer, PyramidDrop and SparseVLM on LLaVA), which breaks M-RoPE and generate().
"""

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from shared_kernels import select_tokens
from vlm_prune import masks
from vlm_prune.criterion import Context
from vlm_prune.families import Family, bound_arguments
from vlm_prune.layer_attention import Caught, LayerAttention, attach_probe, look_ahead
from vlm_prune.logical_length import count_dropped
from vlm_prune.prefill import Prefill, adopt_vision, new_prefill
from vlm_prune.report import Report, make_report
from vlm_prune.stages import BEFORE, Stage
from vlm_prune.vision import Modality, VisionCall, recording

_LOG = logging.getLogger(__name__)
_VISION = {"tower_attention", "projector_input"}


class Pruner:
    """Stages at work in one host. `attach` registers all hooks, `undo` holds the way back, newest last."""

    def __init__(self, host: Any, base: Any, family: Family, name: str, stages: tuple[Stage, ...]) -> None:
        self.host, self.base, self.family, self.name = host, base, family, name
        self.stages = {stage.after_layer: stage for stage in stages}
        self.needs = frozenset().union(*(stage.criterion.needs for stage in stages))
        self.decoder = base.get_decoder()
        self.config = self.decoder.config
        self.placeholders = family.placeholders(host.config)
        self.known: WeakKeyDictionary[Any, Prefill] = WeakKeyDictionary()
        self.current: Prefill | None = None
        self.num_tokens: Tensor | None = None
        self.encoded: dict[Modality, VisionCall] = {}
        self.encoding = False
        self.padding_of: Callable[[VisionCall], Tensor] | None = None
        self.report: Report | None = None
        self.undo: list[Callable[[], None]] = []

    # ---- attaching

    def attach(self) -> None:
        """Registers every hook. On an error the caller runs `undo`."""
        self._hook(self.base, self._on_base)
        self._hook(self.decoder, self._on_text)
        self.undo.append(self.decoder.register_forward_hook(self._after_text).remove)
        if self.host is not self.base:
            self._hook(self.host, _refuse_labels)
        for index, layer in enumerate(self.decoder.layers):
            self._hook(layer, lambda module, args, kwargs, i=index: self._on_layer(i, module, args, kwargs))
        for stage in self.stages.values():
            if "attention" in stage.criterion.needs:
                self._probe(stage.after_layer)
        for modality in self.placeholders:
            if hasattr(self.base, f"get_{modality}_features"):
                self._watch_encoding(modality)
        if hasattr(self.decoder, "_deepstack_process"):
            self._replace_deepstack()

    def _hook(self, module: Any, function: Any) -> None:
        self.undo.append(module.register_forward_pre_hook(function, with_kwargs=True).remove)

    def _probe(self, layer: int) -> None:
        def observe(caught: Caught, _: dict[str, Any]) -> None:
            if self.current is not None and not self.current.done:
                self.current.caught[layer] = caught

        self.undo.append(attach_probe(self.decoder.layers[layer].self_attn, observe))

    def _watch_encoding(self, modality: Modality) -> None:
        name = f"get_{modality}_features"
        encode = getattr(self.base, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.encoding:  # Qwen3-VL encodes videos by way of its images
                return encode(*args, **kwargs)
            call = VisionCall(self.base, self.family, modality, bound_arguments(encode, args, kwargs))
            self.encoding = True
            try:
                with recording(call, attention="tower_attention" in self.needs):
                    out = encode(*args, **kwargs)
            finally:
                self.encoding = False
            features = out.pooler_output if hasattr(out, "pooler_output") else out
            call.counts = [len(image) if image.ndim == 2 else image[..., 0].numel() for image in features]
            self.encoded[modality] = call
            return out

        watched.__wrapped__ = encode  # type: ignore[attr-defined] # generate() reads the signature
        setattr(self.base, name, watched)
        self.undo.append(lambda: delattr(self.base, name))

    def _replace_deepstack(self) -> None:
        host = self.decoder._deepstack_process

        def process(hidden: Tensor, places: Tensor, embeds: Tensor) -> Tensor:
            prefill = self.current
            if prefill is None or prefill.done or prefill.local_index is None or hidden.shape[1] == places.shape[1]:
                return host(hidden, places, embeds)
            left, gathered = _gather_deepstack(places, [embeds], prefill.local_index, prefill.valid)
            return host(hidden, left, gathered[0])

        self.decoder._deepstack_process = process
        self.undo.append(lambda: delattr(self.decoder, "_deepstack_process"))

    # ---- the base model is called

    def _on_base(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        cache, mask = _cache(kwargs), kwargs.get("attention_mask")
        if cache is not None and _physical(cache) > 0:
            self._warn_of_late_images()
            self.current = self.known.get(cache)
            if self.current is not None:
                kwargs = {**kwargs, "attention_mask": self._later_mask(self.current, mask)}
            return args, kwargs
        self.current = None
        if ids is None:
            raise ValueError(
                "input_ids are needed to know which tokens are visual, got inputs_embeds; call the model with "
                "input_ids and pixel_values"
            )
        if ids.shape[1] > 1:
            valid = masks.real_tokens(mask, ids)
            self.current = new_prefill(ids, valid, self.placeholders)
            self.num_tokens = valid.sum(1)
        if self.current is None:
            self.report = None
        return args, kwargs

    def _warn_of_late_images(self) -> None:
        if self.encoded:
            self.encoded = {}
            _LOG.warning(
                "%s: these images come with a cache that holds something already (a later turn, or a prompt read in "
                "chunks), and their tokens are not pruned",
                self.name,
            )

    def _later_mask(self, prefill: Prefill, mask: Any) -> Any:
        """The 2D mask of a later call, with the columns of the prompt's kept tokens in place of the prompt's."""
        prefill.tail = None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < prefill.length:
            return mask
        prefill.tail = mask[:, prefill.length :].bool()
        first = prefill.group(0)
        return mask if first is None else torch.cat([first.valid.to(mask.dtype), mask[:, prefill.length :]], 1)

    # ---- the text stack is called

    def _on_text(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefill = self.current
        if prefill is None or prefill.done or kwargs.get("inputs_embeds") is None:
            return args, kwargs
        embeds = kwargs["inputs_embeds"]
        calls, self.encoded = self.encoded, {}
        adopt_vision(prefill, self.family, self.base, calls, embeds)
        if self.padding_of is not None and prefill.calls:
            vision = prefill.context(BEFORE, embeds, prefill.num_visual).vision
            prefill.padding = vision.gather(self.padding_of) > 0.5 if vision is not None else None
        stage = self.stages.get(BEFORE)
        index = None if stage is None else self._run_stage(stage, prefill, embeds)
        if index is None:
            return args, kwargs
        return args, self._gather_inputs(prefill, kwargs, *index)

    def _gather_inputs(self, prefill: Prefill, kwargs: dict[str, Any], index: Tensor, embeds: Tensor) -> dict[str, Any]:
        valid, cache = prefill.valid, _cache(kwargs)
        new = {**kwargs, "inputs_embeds": embeds, "position_ids": _gather_positions(kwargs, index, prefill.length)}
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):
            new["attention_mask"] = {k: m if m is None else masks.gather_mask(m, index, valid) for k, m in mask.items()}
        elif mask is not None:
            new["attention_mask"] = masks.gather_mask(mask, index, valid)
        elif cache is None or not bool(valid.all()):
            # without a mask and a cache, positions with gaps would be read as packed sequences
            new["attention_mask"] = valid.long()
        if isinstance(new.get("attention_mask"), dict):
            new["attention_mask"] = {
                k: self._ragged_mask(prefill, embeds, cache, 0) if m is None else m
                for k, m in new["attention_mask"].items()
            }
        if kwargs.get("deepstack_visual_embeds") is not None:
            new["visual_pos_masks"], new["deepstack_visual_embeds"] = _gather_deepstack(
                kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"], index, valid
            )
        return new

    def _after_text(self, *_: Any) -> None:
        prefill = self.current
        if prefill is None or prefill.done:
            return
        prefill.done = True
        prefill.caught.clear()
        prefill.calls = {}  # contexts that somebody kept hold on to theirs
        prefill.prompt = None
        if self.num_tokens is not None:
            self.report = make_report(self.name, prefill, self.config, self.host.dtype, self.num_tokens)

    # ---- a decoder layer is called

    def _on_layer(self, i: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefill = self.current
        if prefill is None:
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        if prefill.done:
            return args, self._decoding_kwargs(prefill, i, hidden, kwargs)
        cache = _cache(kwargs)
        if i == 0 and cache is not None:
            self._remember(prefill, cache)
        stage = self.stages.get(i - 1) if i > 0 else None
        if stage is not None:
            before = self._prefill_kwargs(prefill, i, hidden, kwargs)
            found = self._run_stage(stage, prefill, hidden, layer=layer, kwargs=before)
            hidden = hidden if found is None else found[1]
        kwargs = self._prefill_kwargs(prefill, i, hidden, kwargs)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _remember(self, prefill: Prefill, cache: Any) -> None:
        self.known[cache] = prefill
        first = prefill.group(0)
        if not self.family.static_cache and type(cache).__name__ == "StaticCache":
            raise ValueError(
                f"{type(self.host).__name__} with a static cache is not supported while tokens are dropped; leave "
                "cache_implementation out"
            )
        if first is not None:
            count_dropped(cache, prefill.length - first.valid.shape[1])

    def _prefill_kwargs(self, prefill: Prefill, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if prefill.group(i) is None and prefill.local_index is None:
            return kwargs
        new = {**kwargs, "position_ids": None}  # rotary tables say it all; flash attention would look for packing
        index = prefill.local_index
        if index is None:
            return new
        index = index.to(hidden.device)
        cos, sin = kwargs["position_embeddings"]
        new["position_embeddings"] = select_tokens(index, *_same_batch(index, cos, sin))
        mask = kwargs.get("attention_mask")
        if mask is not None:
            new["attention_mask"] = masks.gather_mask(mask, index, prefill.valid.to(hidden.device))
        elif not bool(prefill.valid.all()):
            new["attention_mask"] = self._ragged_mask(prefill, hidden, _cache(kwargs), i)
        return new

    def _ragged_mask(self, prefill: Prefill, hidden: Tensor, cache: Any, i: int) -> Tensor:
        valid = prefill.valid.to(hidden.device)
        if masks.is_flash(self.config):
            return valid.long()
        keys = valid.shape[1]
        if cache is not None and i < len(cache.layers):
            keys = max(keys, int(cache.get_mask_sizes(keys, i)[0]))
        return masks.for_host(masks.causal_mask(valid, keys), self.config, hidden.dtype)

    def _decoding_kwargs(self, prefill: Prefill, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        group, cache = prefill.group(i), _cache(kwargs)
        if group is None or cache is None:
            return kwargs
        num_queries, device = hidden.shape[1], hidden.device
        held = group.valid.shape[1]
        later = int(cache.layers[i].get_seq_length()) + num_queries - held
        tail = prefill.tail
        all_valid = not group.ragged and (tail is None or bool(tail.all()))
        keys = int(cache.get_mask_sizes(num_queries, i)[0])
        window = self._window(i)
        new = {**kwargs, "position_ids": None, "attention_mask": None}
        if all_valid and num_queries == 1 and keys == held + later and window is None:
            return new
        valid = group.valid.to(device)
        if tail is None or tail.shape[1] != later:
            tail = valid.new_ones(len(valid), later)
        valid = torch.cat([valid, tail.to(device)], 1)
        if masks.is_flash(self.config):
            new["attention_mask"] = valid.long()
            return new
        position = prefill.length + torch.arange(later, device=device).expand(len(valid), -1)
        position = torch.cat([group.prompt_index.to(device), position], 1)
        visible = masks.decode_mask(position, valid, num_queries=num_queries, num_keys=keys, window=window)
        new["attention_mask"] = masks.for_host(visible, self.config, hidden.dtype)
        return new

    def _window(self, i: int) -> int | None:
        types = getattr(self.config, "layer_types", None)
        sliding = types is not None and types[i] == "sliding_attention"
        return self.config.sliding_window if sliding else None

    # ---- a stage

    def _run_stage(
        self, stage: Stage, prefill: Prefill, hidden: Tensor, *, layer: Any = None, kwargs: Any = None
    ) -> tuple[Tensor, Tensor] | None:
        """Drops tokens; returns indices into the tokens so far and the hidden states that go on, None if all stay."""
        left = prefill.visual.sum(1)
        num_kept = stage.count(prefill.num_visual, left)
        if bool((num_kept >= left).all()):
            return None
        if stage.criterion.needs & _VISION and set(prefill.calls) != set(prefill.places):
            raise RuntimeError(
                f"{self.name} reads the vision tower, which did not run inside the block: call generate() with "
                "pixel_values, not with features made before"
            )
        with torch.no_grad():
            attention = self._attention(stage, prefill, hidden, layer, kwargs)
            context = prefill.context(stage.after_layer, hidden.detach(), num_kept, attention=attention)
            selection = stage.criterion(context)
        _note(prefill, stage, context)
        inside = stage.after_layer != BEFORE
        index, _ = prefill.drop(selection, inside=inside, first_layer=stage.after_layer + 1)
        source = hidden if selection.hidden is None else selection.hidden.to(hidden)
        return index, select_tokens(index, source)[0]

    def _attention(
        self, stage: Stage, prefill: Prefill, hidden: Tensor, layer: Any, kwargs: Any
    ) -> LayerAttention | None:
        needs = stage.criterion.needs
        if "next_attention" in needs:
            caught = look_ahead(layer, hidden, kwargs["position_embeddings"], kwargs.get("attention_mask"))
        elif "attention" in needs:
            found = prefill.caught.pop(stage.after_layer, None)
            if found is None:
                raise RuntimeError(f"layer {stage.after_layer} did not call its attention function")
            caught = found
        else:
            return None
        plain = self.family.plain_causal and self._window(stage.after_layer) is None
        return LayerAttention(caught, prefill.valid, plain)


def _note(prefill: Prefill, stage: Stage, context: Context) -> None:
    if context.notes:
        prefill.notes[stage.after_layer] = dict(context.notes)


def _cache(kwargs: dict[str, Any]) -> Any:
    """The cache under whichever name this version of transformers has for it."""
    found = kwargs.get("cache")
    return kwargs.get("past_key_values") if found is None else found


def _physical(cache: Any) -> int:
    return int(cache.layers[0].get_seq_length()) if len(cache.layers) else 0


def _same_batch(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.shape[0] in (1, len(index)) else t.expand(len(index), *t.shape[1:]) for t in tensors)


def _gather_positions(kwargs: dict[str, Any], index: Tensor, length: int) -> Tensor:
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=index.device)[None]
    positions = positions.expand(*positions.shape[:-2], len(index), -1)
    return positions.gather(-1, index.expand(*positions.shape[:-2], *index.shape))


def _gather_deepstack(
    places: Tensor, embeds: list[Tensor], index: Tensor, valid: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Places and features of the visual tokens that are left, in the host's form: all rows of the batch in a list."""
    places = places.to(index.device)
    left = places.gather(1, index) & valid
    number = torch.zeros_like(places, dtype=torch.long)
    number[places] = torch.arange(int(places.sum()), device=index.device)
    rows = number.gather(1, index)[left]
    return left, [e[rows.to(e.device)] for e in embeds]


def _refuse_labels(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("labels") is not None:
        raise ValueError(
            "labels do not fit the logits of fewer tokens; call the model without labels, or outside the block"
        )
    return args, kwargs
