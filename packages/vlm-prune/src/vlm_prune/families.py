"""How each family of models is built: its visual tokens, its tower, its projector, and the way from patch to token.

One class says what differs; most families differ in the last point only. A model that is not listed joins by
`register_family(model_type, Family())`, or with a subclass where patches reach the language model in another way.

Decided here: newline tokens (LLaVA-NeXT, LLaVA-OneVision) carry layout, not content. No method may drop them and they
count in no budget, as in ZOO-Prune's published code; a report counts them.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_prune.layer_attention import attention_modules
from vlm_prune.vision import Modality, VisionCall


class Family:
    """A family whose tower gives one visual token for each patch: LLaVA, PaliGemma. Others override what differs."""

    tower_name = "vision_tower"
    projector_name = "multi_modal_projector"
    one_sequence = False
    """Whether the tower sees the patches of all images as one sequence."""
    plain_causal = True
    """Whether language attention at prefill is causal and nothing more."""
    static_cache = True
    """Whether decoding with a static cache is supported."""

    def placeholders(self, config: Any) -> dict[Modality, int]:
        """Ids of the tokens that images and videos take the place of."""
        found: dict[Modality, int] = {}
        modalities: tuple[Modality, ...] = ("image", "video")
        for modality in modalities:
            number = getattr(config, f"{modality}_token_id", None)
            if number is not None:
                found[modality] = int(number)
        return found

    def newline(self, base: Any) -> Tensor | None:
        """The embedding that ends a row of visual tokens, None where there is none."""
        return getattr(base, "image_newline", None)

    def tower(self, base: Any) -> nn.Module:
        """The vision tower."""
        return getattr(base, self.tower_name)

    def projector(self, base: Any) -> nn.Module:
        """The module between tower and language model."""
        return getattr(base, self.projector_name)

    def tower_layers(self, base: Any) -> nn.ModuleList:
        """The tower's layers: the longest list of modules in it."""
        lists = [m for m in self.tower(base).modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=len)

    def tower_attention(self, base: Any) -> Any:
        """The attention module of the layer whose output the features are (FasterVLM, VisPruner: index -2 of LLaVA)."""
        layers = self.tower_layers(base)
        chosen = getattr(base.config, "vision_feature_layer", -1)
        index = chosen[-1] if isinstance(chosen, list | tuple) else chosen
        index = -1 if index is None else index
        return attention_modules(layers)[index if index < 0 else index - 1]

    def prefix(self, base: Any) -> int:
        """1 where the tower has a class token that the features leave out, else 0."""
        has_class = any(
            name.rsplit(".", 1)[-1] in ("class_embedding", "cls_token")
            for name, _ in self.tower(base).named_parameters()
        )
        return int(has_class and getattr(base.config, "vision_feature_select_strategy", "default") == "default")

    def to_tokens(self, call: VisionCall, values: Float[Tensor, "V P c"]) -> Float[Tensor, "N c"]:  # noqa: ARG002
        """Values of patches in the tower's order, as values of the visual tokens; NaN at newlines."""
        return values.flatten(0, 1)

    def projected_to_tokens(self, call: VisionCall, values: Float[Tensor, "V T c"]) -> Float[Tensor, "N c"]:
        """Values of the projector's output, as values of the visual tokens; NaN at newlines."""
        return self.to_tokens(call, values)

    def views(self, call: VisionCall) -> Float[Tensor, "V P"]:
        """Number of the view of each patch."""
        reference = self.patches(call)
        numbers = torch.arange(reference.shape[0], device=reference.device, dtype=torch.float32)
        return numbers[:, None].expand(reference.shape[:2])

    def patches(self, call: VisionCall) -> Float[Tensor, "V P d"]:
        """Something of the shape of the patches that the tower gives."""
        if call.projector_input is None:
            raise RuntimeError("the projector was not called")
        found = call.projector_input
        return found if found.ndim == 3 else found[None]


class AnyResolution(Family):
    """LLaVA-NeXT, LLaVA-OneVision: tiles are put together, unpadded, and end each row with a newline; videos pooled."""

    def to_tokens(self, call: VisionCall, values: Float[Tensor, "V P c"]) -> Float[Tensor, "N c"]:
        """The host's own packing, of values in place of features."""
        channels = values.shape[-1]
        newline = values.new_full((channels,), torch.nan)
        if call.modality == "video":
            pooled = call.base.apply_pooling(values)
            videos = len(call.counts)
            pooled = pooled.reshape(videos, -1, channels)
            return torch.cat([pooled, newline.expand(videos, 1, -1)], 1).flatten(0, 1)
        if call.packing is None:
            raise RuntimeError("the host did not pack its features")
        pack, arguments = call.packing
        sizes = [len(tiles) for tiles in arguments["image_features"]]
        features = values.split(sizes)
        packed, _ = pack(**{**arguments, "image_features": features, "image_newline": newline})
        return torch.cat(list(packed))


class Shuffled(Family):
    """InternVL, Idefics3, SmolVLM: blocks of patches become one token by pixel shuffle."""

    def to_tokens(self, call: VisionCall, values: Float[Tensor, "V P c"]) -> Float[Tensor, "N c"]:
        """The mean over the patches of each block, in the order in which the host's shuffle puts them."""
        channels = values.shape[-1]
        shuffled = self.shuffle(call.base, values)
        return shuffled.reshape(-1, shuffled.shape[-1] // channels, channels).mean(1)

    def projected_to_tokens(self, call: VisionCall, values: Float[Tensor, "V T c"]) -> Float[Tensor, "N c"]:  # noqa: ARG002
        """One for each token."""
        return values.flatten(0, 1)

    def shuffle(self, base: Any, values: Float[Tensor, "V P c"]) -> Tensor:
        """The host's pixel shuffle."""
        side = int(values.shape[1] ** 0.5)
        return base.pixel_shuffle(values.reshape(-1, side, side, values.shape[2]), base.config.downsample_ratio)

    def patches(self, call: VisionCall) -> Float[Tensor, "V P d"]:
        """Patches before the shuffle: it comes before the projector."""
        tokens = super().patches(call)
        block = round(1 / call.base.config.downsample_ratio) ** 2
        return tokens.new_empty(tokens.shape[0], tokens.shape[1] * block, 1)


class Idefics(Shuffled):
    """Idefics3, SmolVLM: the shuffle is a part of the connector."""

    tower_name = "vision_model"
    projector_name = "connector"

    def shuffle(self, base: Any, values: Float[Tensor, "V P c"]) -> Tensor:
        """The connector's pixel shuffle."""
        return base.connector.pixel_shuffle(values, base.connector.scale_factor)

    def patches(self, call: VisionCall) -> Float[Tensor, "V P d"]:
        """Patches as they go into the connector."""
        return Family.patches(self, call)


class PaliGemma(Family):
    """PaliGemma: image and prompt see each other in both directions."""

    plain_causal = False


class Gemma3(Family):
    """Gemma3: tokens are means over squares of patches; images see themselves in both directions; sliding layers."""

    plain_causal = False
    static_cache = False

    def to_tokens(self, call: VisionCall, values: Float[Tensor, "V P c"]) -> Float[Tensor, "N c"]:
        """The projector's own pooling."""
        projector: Any = self.projector(call.base)
        side = projector.patches_per_image
        maps = values.transpose(1, 2).reshape(len(values), -1, side, side)
        return projector.avg_pool(maps).flatten(2).transpose(1, 2).flatten(0, 1)

    def projected_to_tokens(self, call: VisionCall, values: Float[Tensor, "V T c"]) -> Float[Tensor, "N c"]:  # noqa: ARG002
        """One for each token."""
        return values.flatten(0, 1)


class QwenVL(Family):
    """Qwen2-VL, Qwen3-VL: one sequence of patches, four of which become a token; frames attend to themselves."""

    tower_name = "visual"
    projector_name = "merger"
    one_sequence = True

    def projector(self, base: Any) -> nn.Module:
        """The merger, a part of the tower."""
        return base.visual.merger

    def prefix(self, base: Any) -> int:  # noqa: ARG002
        """No class token."""
        return 0

    def tower_layers(self, base: Any) -> nn.ModuleList:
        """The tower's blocks."""
        return base.visual.blocks

    def to_tokens(self, call: VisionCall, values: Float[Tensor, "V P c"]) -> Float[Tensor, "N c"]:
        """The mean over the patches of each token; values that are of tokens already pass."""
        flat = values.flatten(0, 1)
        return flat.reshape(sum(call.counts), -1, flat.shape[-1]).mean(1)

    def grid(self, call: VisionCall) -> Tensor:
        """Frames, rows and columns of patches of each image or video."""
        return call.arguments[f"{call.modality}_grid_thw"]

    def views(self, call: VisionCall) -> Float[Tensor, "V P"]:
        """Each frame is a view."""
        grid = self.grid(call)
        frames = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
        return torch.repeat_interleave(torch.arange(len(frames), device=grid.device), frames).float()[None]


class Qwen25VL(QwenVL):
    """Qwen2.5-VL: blocks attend within windows, patches stand in the windows' order; the last full block counts."""

    def tower_attention(self, base: Any) -> Any:
        """The last block that attends to whole frames."""
        return attention_modules(base.visual.blocks)[max(base.visual.fullatt_block_indexes)]

    def to_tokens(self, call: VisionCall, values: Float[Tensor, "V P c"]) -> Float[Tensor, "N c"]:
        """The same, and back from the order of windows."""
        tokens = super().to_tokens(call, values)
        return tokens[torch.argsort(self.window_order(call))]

    def window_order(self, call: VisionCall) -> Tensor:
        """Which token stands at each place of the tower's sequence."""
        from transformers.vision_utils import get_vision_window_index

        tower = call.base.visual
        order, _ = get_vision_window_index(
            self.grid(call),
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
            kwargs={},
        )
        return order


FAMILIES: dict[str, Family] = {
    "llava": Family(),
    "llava_next": AnyResolution(),
    "llava_onevision": AnyResolution(),
    "qwen2_vl": QwenVL(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": QwenVL(),
    "internvl": Shuffled(),
    "idefics3": Idefics(),
    "smolvlm": Idefics(),
    "paligemma": PaliGemma(),
    "gemma3": Gemma3(),
}
"""Families by `config.model_type`; each is tested end to end on a tiny model."""


def register_family(model_type: str, family: Family) -> None:
    """Makes models whose config says `model_type` known. ValueError where another family has that name."""
    if model_type in FAMILIES and FAMILIES[model_type] is not family:
        raise ValueError(f"the family {model_type!r} is known already; give another model_type")
    FAMILIES[model_type] = family


def family_of(model: nn.Module) -> tuple[PreTrainedModel, Any, Family]:
    """The transformers model itself, its base model (tower, projector and language model) and its family.

    TypeError on what is no transformers model, ValueError on a family that is not known.
    """
    unwrap = getattr(model, "get_base_model", None)
    host = model if unwrap is None else unwrap()
    if not isinstance(host, PreTrainedModel):
        raise TypeError(f"model must be a vision-language model of transformers, got {type(model).__name__}")
    family = FAMILIES.get(host.config.model_type)
    if family is None:
        raise ValueError(
            f"{type(host).__name__} (model_type {host.config.model_type!r}) is not supported; supported are "
            f"{', '.join(FAMILIES)}. A model of the same build joins by vlm_prune.register_family"
        )
    return host, host.base_model, family


def bound_arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, those of a wrapped function too."""
    try:
        bound = inspect.signature(function).bind_partial(*args, **kwargs)
    except TypeError:
        return dict(kwargs)
    extra = bound.arguments.pop("kwargs", {})
    return {**bound.arguments, **extra}
