"""The whole job: a model and texts in, a small checkpoint with its figures out. A run that is stopped goes on.

    OUT/pruning, OUT/finetuning   state of the two trainings, until the model is written
    OUT/model                     the checkpoint, with its tokenizer, and vtrans_pruning.json: which units stay
    OUT/report.json, *.png        sizes, latency and quality of both models; what stays; how training went

Decided here: texts are paragraphs of a text file or a field of JSON lines; broken lines are counted and left out. An
encoder sees each text by itself, cut to `tokens`; a language model sees all of them in a row, in pieces of `tokens`.
One text in twenty is held out, for choosing the best state and for the figures of the report.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm_attn.transformers.loading import load_model
from llm_attn.vtrans.door import VTransConfig
from llm_attn.vtrans.families import FAMILIES
from llm_attn.vtrans.measuring import NEIGHBOURS, embedding_agreement, embeddings, latency, perplexity, weight_bytes
from llm_attn.vtrans.objectives import ObjectiveConfig, objective_for
from llm_attn.vtrans.pictures import draw_structure, draw_training
from llm_attn.vtrans.resuming import write_json
from llm_attn.vtrans.shrinking import load_shrunk
from llm_attn.vtrans.structure import SizeModel, Structure
from llm_attn.vtrans.training import FinetuneConfig, PruningConfig, VTransTrainer, finetune

logger = logging.getLogger(__name__)
OnProgress = Callable[[str, int, int], None]
_HELD_OUT = 20
_MOST_HELD_OUT = 200
_SIDE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


class CompressionProblem(ValueError):
    """What is wrong with the model, the texts or the folder, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Settings of a job."""

    pruning: PruningConfig = field(default_factory=PruningConfig)
    finetuning: FinetuneConfig = field(default_factory=FinetuneConfig)
    gates: VTransConfig = field(default_factory=VTransConfig)
    objective: ObjectiveConfig | None = None
    """None: what `objective_for` takes."""
    tokens: int = 128
    """Longest text, or length of a piece."""


def load_for_compression(path: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model (folder or .gguf file) or an encoder without its head (folder), and its tokenizer.

    CompressionProblem where there is none, or it is of a family that VTrans does not know.
    """
    path = Path(path)
    if not path.exists():
        raise CompressionProblem(f"no model at '{path}': give a transformers folder or a .gguf file")
    try:
        if path.suffix == ".gguf":
            return load_model(path)
        config: Any = AutoConfig.from_pretrained(path)
        if config.model_type not in FAMILIES:
            raise CompressionProblem(f"VTrans shrinks {', '.join(FAMILIES)}; '{config.model_type}' is not among them")
        if (config.architectures or [""])[0].endswith(("ForCausalLM", "LMHeadModel")):
            return load_model(path)
        return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    except (OSError, ImportError, KeyError) as problem:
        raise CompressionProblem(f"'{path}' cannot be read as a model: {problem}") from problem


def read_texts(files: Sequence[Path], *, text_field: str = "text") -> list[str]:
    """Texts of files: a line's field in .jsonl, else paragraphs that blank lines set apart. Empty ones are left out.

    Broken lines are left out, and logged with their numbers. CompressionProblem where a file is missing, or no text is
    left.
    """
    texts: list[str] = []
    for file in files:
        if not file.is_file():
            raise CompressionProblem(f"no text file at '{file}'")
        texts += _json_texts(file, text_field) if file.suffix == ".jsonl" else file.read_text().split("\n\n")
    found = [text.strip() for text in texts if text.strip()]
    if not found:
        raise CompressionProblem(f"there is no text in {', '.join(map(str, files))}")
    return found


def _json_texts(file: Path, name: str) -> Iterator[str]:
    broken = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            text = json.loads(line)[name] if line.strip() else ""
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if isinstance(text, str):
            yield text
        else:
            broken.append(number)
    if broken:
        shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        logger.warning("%d lines of %s have no text field '%s' and were left out: %s", len(broken), file, name, shown)


def encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int
) -> list[Tensor]:
    """Token ids of each text for an encoder, of pieces of all texts in a row for a language model."""
    limit = getattr(model.config, "max_position_embeddings", tokens)
    if not 2 <= tokens <= limit:
        raise CompressionProblem(f"tokens must lie in [2, {limit}] for this model, got {tokens}")
    if not _writes(model):
        return [torch.tensor(ids) for ids in tokenizer(list(texts), truncation=True, max_length=tokens)["input_ids"]]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    row = [i for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for i in [*ids, *end]]
    return list(torch.tensor(row[: len(row) // tokens * tokens]).view(-1, tokens))


def _writes(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    out: Path | str,
    config: CompressionConfig | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Trains masks, shrinks, fine-tunes, measures; returns what OUT/report.json says. `model` may be changed by it.

    on_progress: called with the stage ("train gates", "fine-tune"), steps done and steps in all. CompressionProblem
    where texts are too few, the target cannot be met, or `out` holds another job.
    """
    config = CompressionConfig() if config is None else config
    out = Path(out)
    data = encode(model, tokenizer, texts, config.tokens)
    held = min(_MOST_HELD_OUT, max(NEIGHBOURS + 2, len(data) // _HELD_OUT))
    if len(data) < 2 * held:
        raise CompressionProblem(f"the texts give {len(data)} pieces; at least {2 * held} are needed: give more text")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.pruning.seed)).tolist()
    data = [data[index] for index in order]
    job = _Job(model, tokenizer, data[held:], data[:held], out, config, on_progress or (lambda *_: None))
    try:
        return job.run()
    except CompressionProblem:
        raise
    except ValueError as problem:
        raise CompressionProblem(str(problem)) from problem


class _Job:
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: list[Tensor],
        held_out: list[Tensor],
        out: Path,
        config: CompressionConfig,
        on_progress: OnProgress,
    ) -> None:
        self.model, self.tokenizer, self.out, self.config = model, tokenizer, out, config
        self.data, self.held_out, self.on_progress = data, held_out, on_progress
        self.objective = objective_for(model, config.objective)
        self._their: Tensor | None = None

    def run(self) -> dict[str, Any]:
        self._own_folder()
        report = self.out / "report.json"
        if not report.exists():
            original = self._figures(self.model)  # before "full" changes its weights
            whole = Structure.whole(self.model)
            size = SizeModel(self.model, count_embeddings=self.config.gates.count_embeddings)
            self._teacher = _copy_of(self.model)
            small, structure = self._shrunk()
            self._finetune(small, structure)
            self._write_model(small, structure)
            self._pictures(structure, whole)
            write_json(report, self._report(original, small, structure, size))
            for done in ("pruning", "finetuning"):
                shutil.rmtree(self.out / done, ignore_errors=True)
        found: dict[str, Any] = json.loads(report.read_text())
        return found

    def _own_folder(self) -> None:
        settings = json.loads(json.dumps(asdict(self.config) | {"pieces": len(self.data)}))
        self.out.mkdir(parents=True, exist_ok=True)
        record = self.out / "job.json"
        if record.exists() and json.loads(record.read_text()) != settings:
            raise CompressionProblem(f"'{self.out}' holds a job with other settings or texts; give another folder")
        if not record.exists():
            write_json(record, settings)

    def _shrunk(self) -> tuple[PreTrainedModel, Structure]:
        """The shrunk model before fine-tuning, trained or read back."""
        folder, record = self.out / "pruning" / "shrunk", self.out / "pruning" / "vtrans_pruning.json"
        if record.exists():
            self.objective.load_state_dict(load_file(folder / "objective.state"))
            return load_shrunk(folder), Structure.from_json(json.loads(record.read_text()))
        history: list[dict[str, float]] = []
        c = self.config.pruning

        def on_step(done: int, figures: dict[str, float]) -> None:
            history.append({"step": done, **figures})
            self.on_progress("train gates", done, c.steps)

        trainer = VTransTrainer(
            self.model,
            self.data,
            config=c,
            gates=self.config.gates,
            held_out=self.held_out,
            teacher=self._teacher,
            objective=self.objective,
            folder=self.out / "pruning",
            on_step=on_step,
        )
        structure = trainer.train()
        small = trainer.shrink()
        trainer.handle.remove()
        small.save_pretrained(folder)
        save_file(self.objective.state_dict(), folder / "objective.state")
        if history:
            draw_training(history, self.out / "training.png")
        write_json(record, structure.to_json())
        return small, structure

    def _finetune(self, small: PreTrainedModel, structure: Structure) -> None:
        c = self.config.finetuning
        finetune(
            small,
            self._teacher,
            self.data,
            objective=self.objective.narrowed(structure.hidden),
            config=c,
            folder=self.out / "finetuning",
            on_step=lambda done, _: self.on_progress("fine-tune", done, c.steps),
        )

    def _write_model(self, small: PreTrainedModel, structure: Structure) -> None:
        part, folder = self.out / "model.part", self.out / "model"
        shutil.rmtree(part, ignore_errors=True)
        small.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        write_json(part / "vtrans_pruning.json", structure.to_json())
        _sentence_files(Path(str(self.tokenizer.name_or_path)), part, len(structure.hidden))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    def _pictures(self, structure: Structure, whole: Structure) -> None:
        draw_structure(structure, whole, self.out / "structure.png")

    def _figures(self, model: PreTrainedModel) -> dict[str, Any]:
        found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
        if _writes(model):
            return found | {"perplexity": perplexity(model, self.held_out)}
        own = embeddings(model, self.held_out)
        if self._their is None:  # the first model is the original
            self._their = own
        return found | embedding_agreement(own, self._their)

    def _report(
        self, original: dict[str, Any], small: PreTrainedModel, structure: Structure, size: SizeModel
    ) -> dict[str, Any]:
        seconds = latency([self._teacher, small], tokens=self.config.tokens)
        counts = structure.counts
        return {
            "original": original | {"latency ms": 1000 * seconds[0], "weights MB": _megabytes(self._teacher)},
            "compressed": self._figures(small)
            | {"latency ms": 1000 * seconds[1], "weights MB": weight_bytes(self.out / "model") / 1e6},
            "kept of counted parameters": float(1 - size.sparsity(counts)),
            "sizes": {
                "hidden": counts.hidden,
                "layers": list(structure.layers),
                "heads": list(counts.heads),
                "inter": list(counts.inter),
            },
            "tokens": self.config.tokens,
            "threads": torch.get_num_threads(),
        }


def _copy_of(model: PreTrainedModel) -> PreTrainedModel:
    return deepcopy(model).eval().requires_grad_(False)


def _megabytes(model: PreTrainedModel) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def _sentence_files(source: Path, folder: Path, width: int) -> None:
    """What sentence-transformers reads beside a model, with the new width."""
    for name in _SIDE_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    pooling = source / "1_Pooling" / "config.json"
    if pooling.exists():
        record = json.loads(pooling.read_text()) | {"word_embedding_dimension": width}
        (folder / "1_Pooling").mkdir(exist_ok=True)
        write_json(folder / "1_Pooling" / "config.json", record)
