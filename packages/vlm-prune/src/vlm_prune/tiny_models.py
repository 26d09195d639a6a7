"""Tiny random models of every supported family, with prompts for them: what the tests of methods run on.

Five language layers, hidden size 64, images of 32 by 32 pixels, weights large enough that outputs depend on inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, START, END = 99, 98, 97, 96
VOCABULARY = 128
"""Text tokens of the prompts are 3 to 89."""

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
_PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def tiny_model(family: str, *, seed: int = 0, text: Mapping[str, Any] | None = None) -> Any:
    """A random model of the family in float32 and eval mode; `text` are other fields of its text config."""
    config = _CONFIGS[family]({**_TEXT, **(text or {})})
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def sized_llava(*, num_layers: int, hidden_size: int = 1024, image_size: int = 336) -> Any:
    """A random LLaVA for benchmarks, in eval mode: a small tower with a class token, 576 visual tokens at 336 pixels.

    With 24 layers of the default width about half a thousand million parameters, 25 million of them in the tower.
    """
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, image_size=image_size,
            patch_size=14, projection_dim=512,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=32_000, hidden_size=hidden_size, intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers, num_attention_heads=hidden_size // 64,
            num_key_value_heads=hidden_size // 128, max_position_embeddings=2048, tie_word_embeddings=True,
        ),
        image_token_index=31_999, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config).float().eval()


def sized_prompt(*, text: int = 24, image_size: int = 336) -> dict[str, Tensor]:
    """One image in the middle of some text, for `sized_llava`."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 31_000, (text,), generator=generator)
    patches = torch.full(((image_size // 14) ** 2,), 31_999)
    ids = torch.cat([words[:4], patches, words[4:]])[None]
    pixels = torch.randn(1, 3, image_size, image_size, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _llava(text: dict[str, Any]) -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{**_TOWER, "patch_size": 8, "projection_dim": 32}),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_next(text: dict[str, Any]) -> Any:
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**{**_TOWER, "patch_size": 8, "projection_dim": 32}),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=_PINPOINTS,
    )


def _llava_onevision(text: dict[str, Any]) -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**{**_TOWER, "patch_size": 8, "vision_use_head": False}),
        text_config=transformers.Qwen2Config(**text),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=_PINPOINTS,
    )


def _qwen(kind: str) -> Callable[[dict[str, Any]], Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "in_channels": 3}
    vision["spatial_merge_size"] = 2
    if kind == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    if kind == "Qwen2_5_VL":
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 16}
        vision["fullatt_block_indexes"] = [2]
    if kind == "Qwen3VL":
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}

    def config(text: dict[str, Any]) -> Any:
        head = {"head_dim": 16} if kind == "Qwen3VL" else {}
        return getattr(transformers, f"{kind}Config")(
            vision_config=vision,
            text_config={**text, **head, "rope_parameters": rope},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )

    return config


def _internvl(text: dict[str, Any]) -> Any:
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**{**_TOWER, "image_size": [32, 32], "patch_size": [4, 4]}),
        text_config=transformers.Qwen2Config(**text),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
        image_seq_length=16,
    )


def _idefics(kind: str) -> Callable[[dict[str, Any]], Any]:
    def config(text: dict[str, Any]) -> Any:
        return getattr(transformers, f"{kind}Config")(
            vision_config=_TOWER,
            text_config=transformers.LlamaConfig(**text).to_dict(),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
            tie_word_embeddings=False,
        )

    return config


def _paligemma(text: dict[str, Any]) -> Any:
    tower = {**_TOWER, "patch_size": 8, "vision_use_head": False, "projection_dim": 64}
    return transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **tower},
        text_config={"model_type": "gemma", **text, "head_dim": 16},
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )


def _gemma3(text: dict[str, Any]) -> Any:
    return transformers.Gemma3Config(
        vision_config={**_TOWER, "vision_use_head": False},
        text_config={**text, "head_dim": 16, "sliding_window": 12, "layer_types": _GEMMA_LAYERS},
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=START,
        eoi_token_index=END,
    )


_GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen("Qwen2VL"),
    "qwen2_5_vl": _qwen("Qwen2_5_VL"),
    "qwen3_vl": _qwen("Qwen3VL"),
    "internvl": _internvl,
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM"),
    "paligemma": _paligemma,
    "gemma3": _gemma3,
}
FAMILIES = tuple(_CONFIGS)
"""Every supported family."""
RAGGED = ("llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose images give different numbers of tokens."""


@dataclass(frozen=True)
class Asked:
    """A sample: text before its images, the size of each image in pixels (height, width), text behind, text between."""

    before: int = 3
    images: tuple[tuple[int, int], ...] = ((64, 64),)
    behind: int = 7
    between: int = 0
    seed: int = 1


LONG, SHORT = Asked(), Asked(before=2, images=((32, 64),), behind=5, seed=2)


def prompt(family: str, *samples: Asked) -> dict[str, Tensor]:
    """Inputs of a batch, padded on the left, as the family's processor would make them."""
    samples = samples or (LONG,)
    rows, pixels, sizes = [], [], []
    for sample in samples:
        generator = torch.Generator().manual_seed(sample.seed)
        ids = _text(sample.before, generator)
        for number, size in enumerate(sample.images):
            if number:
                ids += _text(sample.between, generator)
            ids += _wrapped(family, tokens_of(family, size))
            sizes.append(size)
            pixels.append(_pixels(family, size, generator))
        rows.append(ids + _text(sample.behind, generator))
    width = max(map(len, rows))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": padded, "attention_mask": mask}
    if pixels:
        inputs |= _vision_inputs(family, pixels, sizes, [len(s.images) for s in samples])
    return inputs | _extra(family, padded)


def _text(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 90, (length,), generator=generator).tolist()


def tokens_of(family: str, size: tuple[int, int]) -> int:
    """Placeholders of an image of that size."""
    if family in ("llava_next", "llava_onevision"):
        rows, columns = size[0] // 8, size[1] // 8
        return 16 + rows * (columns + 1)
    if family.startswith("qwen"):
        return (size[0] // 16) * (size[1] // 8)
    return 16


def _wrapped(family: str, count: int) -> list[int]:
    return [START, *[IMAGE] * count, END] if family.startswith(("qwen", "gemma")) else [IMAGE] * count


def _pixels(family: str, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    if family in ("llava_next", "llava_onevision"):
        return torch.randn(5, 3, 32, 32, generator=generator)
    if family.startswith("qwen"):
        return torch.randn(size[0] // 8 * (size[1] // 4), 3 * 2 * 4 * 4, generator=generator)
    return torch.randn(3, 32, 32, generator=generator)


def _vision_inputs(
    family: str, pixels: list[Tensor], sizes: list[tuple[int, int]], counts: list[int]
) -> dict[str, Tensor]:
    if family in ("llava_next", "llava_onevision"):
        return {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}
    if family.startswith("qwen"):
        grid = torch.tensor([[1, height // 8, width // 4] for height, width in sizes])
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": grid}
    if family in ("idefics3", "smolvlm"):
        stacked = torch.zeros(len(counts), max(counts), 3, 32, 32)  # zeros are padding images
        remaining = iter(pixels)
        for row, count in enumerate(counts):
            for column in range(count):
                stacked[row, column] = next(remaining)
        return {"pixel_values": stacked}
    return {"pixel_values": torch.stack(pixels)}


def _extra(family: str, ids: Tensor) -> dict[str, Tensor]:
    if family.startswith("qwen"):
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    if family == "paligemma":
        return {"token_type_ids": torch.zeros_like(ids)}
    if family == "gemma3":
        return {"token_type_ids": (ids == IMAGE).long()}
    return {}
