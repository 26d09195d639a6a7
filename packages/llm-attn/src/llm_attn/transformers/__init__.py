"""Doors into Hugging Face transformers."""

from llm_attn.transformers.door import (
    TESTED_FAMILIES,
    Handle,
    attention_layers,
    base_model,
    decoder_layers,
    layer_config,
    open_door,
    register_attention,
)
from llm_attn.transformers.loading import load_model, smollm2_gguf
from llm_attn.transformers.saving import register_door
from llm_attn.transformers.visibility import Visibility, dense_attention

__all__ = [
    "TESTED_FAMILIES",
    "Handle",
    "Visibility",
    "attention_layers",
    "base_model",
    "decoder_layers",
    "dense_attention",
    "layer_config",
    "load_model",
    "open_door",
    "register_attention",
    "register_door",
    "smollm2_gguf",
]
