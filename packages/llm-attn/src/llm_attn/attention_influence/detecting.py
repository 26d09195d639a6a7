"""Detection as a job that can be cut off: the sums of all samples so far are on disk after each of them."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_attn.attention_influence.detection import HeadScores, sample_hits
from llm_attn.attention_influence.errors import CorpusProblem
from llm_attn.attention_influence.retrieval import RetrievalConfig, retrieval_samples


def detect_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path | str,
    config: RetrievalConfig | None = None,
    *,
    sentences: Sequence[str] | None = None,
    generate: bool = False,
    on_sample: Callable[[int], None] | None = None,
) -> HeadScores:
    """Retrieval scores on `config.num_samples` generated samples, written to `path` (JSON), which is read if it exists.

    A run that was cut off goes on from `path` + ".progress", and ends with the same numbers. on_sample: told how many
    samples are done. CorpusProblem if either file is of another detection.
    """
    config = RetrievalConfig() if config is None else config
    path = Path(path)
    settings = _settings(model, config, sentences, generate)
    if path.exists():
        found = HeadScores.load(path)
        _check(found.settings, settings, path)
        return found
    progress = path.with_name(path.name + ".progress")
    done, total = _resumed(progress, settings)
    samples = islice(retrieval_samples(tokenizer, config, sentences=sentences), done, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    for hits in sample_hits(model, samples, generate=generate):
        total = hits if total is None else total + hits
        done += 1
        _write(progress, {"settings": settings, "done": done, "total": total.tolist()})
        if on_sample is not None:
            on_sample(done)
    if total is None:
        raise CorpusProblem("there are no samples: give at least one")
    found = HeadScores(tuple(tuple(row) for row in (total / done).tolist()), settings)
    found.save(path)
    progress.unlink(missing_ok=True)
    return found


def _settings(
    model: PreTrainedModel, config: RetrievalConfig, sentences: Sequence[str] | None, generate: bool
) -> dict[str, Any]:
    text = hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16] if sentences is not None else "generated"
    shape = model.config.get_text_config(decoder=True)
    of_model = {name: getattr(shape, name) for name in ("model_type", "num_hidden_layers", "num_attention_heads")}
    first = next(model.parameters()).detach().float()
    of_model["weights"] = f"{first.abs().sum().item():.6g}"
    return {**asdict(config), "generate": generate, "sentences": text, "model": of_model}


def _check(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    differ = [name for name in wanted if found.get(name) != wanted[name]]
    if differ:
        raise CorpusProblem(f"'{path}' is of another detection ({', '.join(differ)} differ): give another file")


def _resumed(progress: Path, settings: dict[str, Any]) -> tuple[int, Tensor | None]:
    if not progress.exists():
        return 0, None
    content = json.loads(progress.read_text())
    _check(content["settings"], settings, progress)
    return content["done"], torch.tensor(content["total"], dtype=torch.float64)


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content))
    part.replace(path)
