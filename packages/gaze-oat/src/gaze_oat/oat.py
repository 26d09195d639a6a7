"""OAT: an attention transformer over objects that says where the eyes go next while somebody searches for a target.

Encoder tokens are the objects of a scene and, last, the target once more; decoder tokens are the objects looked at so
far. The output points at one of the encoder's tokens, and pointing at the target token means "found, stop". So a model
works for any number of objects, any layout and unseen targets.

    token    = concat(v, concat(E[row], E[col], E[flag])[:width / 2])        v: object encoder, E: position code
    H_e      = encoder(objects, target);   H_d = causal decoder(BOS, o_1, ..., o_n; H_e)
    A_e^k    = H_e W_e^k + b,  A_d^k = H_d W_d^k + b,  O^k = concat(A_d^k A_e^kT, 0) / sqrt(width), k = 1..heads
    p(next)  = softmax(readout(O^1, O^2, ...))      over P objects, TARGET (= stop), PAD

Fang, Yu, Zhang, van der Lans, Shi, "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", ECCV 2024,
arXiv:2407.13335, sections 3.1 to 3.5.

Decided here: the target's copy among the objects keeps flag 0 in the encoder, and flag 1 in the decoder, as published;
the blank crop of BOS is ones (features: zeros); the position code is the closed form of the published solver's problem;
PAD's column is kept in training (`pad_logit`) and never chosen; batches may mix scenes with different numbers of
objects (masked). `anisotropic` and `offset_bias` are ours. The first measures row distances in cell widths and gives
the flag codes of its own; the second adds a learnt score for the step (rows, columns) from the last object to each
candidate, as cosines alone cannot tell left from right.

Shapes: B scenes, P objects, n fixations, L = n + 1 decoder tokens, D width.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gaze_oat.errors import ScanpathProblem
from gaze_oat.generation import GeneratedPaths, roll_out
from gaze_oat.layouts import Layout
from gaze_oat.object_encoder import CropEncoder, TimmEncoder
from gaze_oat.pointer import PointerHead
from gaze_oat.position_code import Kind, position_table
from gaze_oat.scanpaths import read_json_file, write_text


@dataclass(frozen=True, kw_only=True)
class OATConfig:
    """Architecture; defaults are the paper's."""

    width: int = 512
    """D; half of it is appearance, half position."""
    num_heads: int = 4
    """Of encoder and decoder."""
    encoder_layers: int = 4
    """Layers over the objects."""
    decoder_layers: int = 4
    """Layers over the path."""
    feedforward: int = 512
    """Hidden width of the layers' MLPs."""
    dropout: float = 0.1
    """In layers and on decoder tokens."""
    pointer_heads: int = 2
    """N_c; 1 means no readout layer."""
    grid_size: int = 14
    """Most rows or columns of a layout."""
    sigma: float = 2.0
    """Width of the position code's Gaussian, cells."""
    position_code: Kind = "closed"
    """closed, solved (the paper's optimiser), or an ablation: sinusoid, linear, exp1, exp2, original_update."""
    anisotropic: bool = False
    """Row distances count `cell_aspect` each, and the flag does not share the table. False: as published."""
    cell_aspect: float = 1.0
    """Height over width of a cell; used if anisotropic."""
    offset_bias: bool = False
    """Add a learnt score for each step (rows, columns). False: as published."""
    crop_encoder: str = "cnn"
    """cnn (the paper's), features (objects come as vectors), or the name of a timm model."""
    crop_size: tuple[int, int] = (150, 93)
    """Height and width of crops, pixels."""
    pyramid_levels: int | None = None
    """2, 3 or 4: spatial pyramid in place of the CNN's last pooling, for crops of any size."""
    feature_size: int = 0
    """Length of an object's vector for crop_encoder='features'."""
    pad_logit: bool = True
    """Keep the constant column for PAD in the training softmax."""
    max_length: int = 92
    """Most fixations that are generated; the paper takes the longest training path."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_size", tuple(self.crop_size))
        sizes = ("width", "num_heads", "encoder_layers", "decoder_layers", "feedforward", "pointer_heads", "grid_size")
        for name in (*sizes, "max_length"):
            if getattr(self, name) < 1:
                raise ScanpathProblem(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % 2 or self.width % self.num_heads:
            raise ScanpathProblem(f"width must be even and divisible by {self.num_heads} heads, got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ScanpathProblem(f"dropout must lie in [0, 1), got {self.dropout}")
        if not (self.sigma > 0 and self.cell_aspect > 0):
            raise ScanpathProblem(f"sigma and cell_aspect must be positive, got {self.sigma} and {self.cell_aspect}")
        if self.pyramid_levels not in (None, 2, 3, 4):
            raise ScanpathProblem(f"pyramid_levels must be None, 2, 3 or 4, got {self.pyramid_levels}")
        if self.crop_encoder == "features" and self.feature_size < 1:
            raise ScanpathProblem("crop_encoder='features' needs feature_size, the length of an object's vector")


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneBatch:
    """Scenes side by side, objects padded to the most of them."""

    objects: Float[Tensor, "B P ..."]
    """Crops (B, P, 3, h, w) or vectors (B, P, F)."""
    cells: Int[Tensor, "B P 2"]
    """Row and column."""
    grid: Int[Tensor, "B 2"]
    """Rows and columns of the layout."""
    target: Int[Tensor, "B"]
    """Object searched for."""
    present: Bool[Tensor, "B P"]
    """False where the scene has no such object."""

    @classmethod
    def of(cls, objects: Sequence[Tensor], layouts: Sequence[Layout], targets: Sequence[int]) -> "SceneBatch":
        """From one tensor (P, ...), one layout and one target a scene; ScanpathProblem where they disagree."""
        for own, layout, target in zip(objects, layouts, targets, strict=True):
            if len(own) != len(layout):
                raise ScanpathProblem(f"a scene has {len(layout)} boxes but {len(own)} objects: they must be as many")
            if not 0 <= target < len(layout):
                raise ScanpathProblem(f"target {target} is no object of a scene with objects 0 to {len(layout) - 1}")
        most = max(len(layout) for layout in layouts)
        padded = torch.stack([_padded(own, most) for own in objects])
        cells = torch.stack([_padded(torch.as_tensor(layout.cells).long(), most) for layout in layouts])
        sizes = torch.tensor([len(layout) for layout in layouts])
        return cls(
            objects=padded,
            cells=cells,
            grid=torch.tensor([[layout.rows, layout.cols] for layout in layouts]),
            target=torch.tensor(list(targets), dtype=torch.long),
            present=torch.arange(most)[None] < sizes[:, None],
        )

    def to(self, device: torch.device) -> "SceneBatch":
        """The same on another device."""
        return SceneBatch(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values.new_zeros(size - len(values), *values.shape[1:])])


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """What all decoder steps of a batch of scenes share."""

    memory: Float[Tensor, "B P+1 D"]
    """Encoder output; the target token is last."""
    tokens: Float[Tensor, "B P+1 D"]
    """Decoder tokens of each object (flag 1 for the target), and of BOS, last."""
    offset: Float[Tensor, "B P P"] | None
    """Learnt score of the step from each object to each other."""
    allowed: Bool[Tensor, "B P+1"]
    """False for padding objects."""


class OATModel(nn.Module):
    """Object-level Attention Transformer: `model(scenes, paths)` gives logits, `model.generate(...)` paths."""

    row_table: Tensor
    col_table: Tensor
    flag_table: Tensor

    def __init__(self, config: OATConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or OATConfig()
        half = c.width // 2
        self.object_encoder = _object_encoder(c, half)
        columns = -(-half // 3)
        for name, table in _tables(c, columns).items():
            self.register_buffer(name, table)
        common: dict[str, Any] = {
            "d_model": c.width, "nhead": c.num_heads, "dim_feedforward": c.feedforward, "dropout": c.dropout,
            "batch_first": True,
        }  # fmt: skip
        encoder_layer, decoder_layer = nn.TransformerEncoderLayer(**common), nn.TransformerDecoderLayer(**common)
        self.encoder = nn.TransformerEncoder(encoder_layer, c.encoder_layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder_layer, c.decoder_layers)
        self.pointer = PointerHead(c.width, c.pointer_heads)
        self.dropout = nn.Dropout(c.dropout)
        span = 2 * c.grid_size - 1
        self.offset_scores = nn.Parameter(torch.zeros(span, span)) if c.offset_bias else None
        for parameter in [*self.encoder.parameters(), *self.decoder.parameters(), *self.pointer.parameters()]:
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, scenes: SceneBatch, paths: Int[Tensor, "B n"]) -> Float[Tensor, "B n+1 P+2"]:
        """Logits of each next decision under teacher forcing: P objects, stopping, PAD; -inf for absent objects.

        Args:
            scenes: B scenes.
            paths: objects looked at, padded at the end with -1 (or anything: later tokens never reach earlier logits).
        """
        encoded = self.encode(scenes)
        tokens = self.decoder_tokens(encoded, paths)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device, dtype=tokens.dtype)
        hidden = self.decoder(
            tokens, encoded.memory, tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=~encoded.allowed
        )
        logits = self.pointer(hidden, encoded.memory)
        if encoded.offset is not None:
            logits[:, 1:, : encoded.offset.shape[1]] += _rows(encoded.offset, paths.clamp(min=0))
        absent = nn.functional.pad(~encoded.allowed, (0, 1))[:, None]
        return logits.masked_fill(absent, -torch.inf)

    def encode(self, scenes: SceneBatch) -> Encoded:
        """Object encoder and transformer encoder: all that a scene needs once."""
        self._check(scenes)
        at = torch.arange(len(scenes.target), device=scenes.target.device)
        visual = self.object_encoder(scenes.objects.flatten(0, 1)).unflatten(0, scenes.objects.shape[:2])
        plain, marked = (
            self.position(scenes.cells, torch.full_like(scenes.present, on).long()) for on in (False, True)
        )
        objects = torch.cat([visual, plain], -1)
        target = torch.cat([visual[at, scenes.target], marked[at, scenes.target]], -1)[:, None]
        allowed = nn.functional.pad(scenes.present, (0, 1), value=True)
        memory = self.encoder(torch.cat([objects, target], 1), src_key_padding_mask=~allowed)
        is_target = torch.zeros_like(scenes.present)
        is_target[at, scenes.target] = True
        seen = torch.where(is_target[..., None], torch.cat([visual, marked], -1), objects)
        tokens = torch.cat([seen, self._bos(scenes)[:, None]], 1)
        return Encoded(memory=memory, tokens=tokens, offset=self._offset(scenes.cells), allowed=allowed)

    def decoder_tokens(self, encoded: Encoded, paths: Int[Tensor, "B n"]) -> Float[Tensor, "B n+1 D"]:
        """BOS and the objects of each path, with the sinusoidal code of their time and dropout."""
        ids = nn.functional.pad(paths.clamp(min=0), (1, 0), value=encoded.tokens.shape[1] - 1)
        tokens = _rows(encoded.tokens, ids)
        return self.dropout(tokens + self.time_code(torch.arange(ids.shape[1], device=ids.device)))

    def time_code(self, steps: Int[Tensor, "L"]) -> Float[Tensor, "L D"]:
        """The transformer's sinusoidal code of decoder positions."""
        even = torch.arange(0, self.config.width, 2, device=steps.device)
        angle = steps[:, None] * 10_000.0 ** (-even / self.config.width)
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(self.row_table.dtype)

    def position(self, cells: Int[Tensor, "... 2"], flag: Int[Tensor, "..."]) -> Float[Tensor, "... D/2"]:
        """concat(E[row], E[col], E[flag]), cut to half the width."""
        code = torch.cat([self.row_table[cells[..., 0]], self.col_table[cells[..., 1]], self.flag_table[flag]], -1)
        return code[..., : self.config.width // 2]

    def generate(
        self,
        objects: Float[Tensor, "P ..."],
        layout: Layout,
        target: int,
        *,
        num_samples: int = 100,
        temperature: float = 1.0,
        greedy: bool = False,
        generator: torch.Generator | None = None,
        max_length: int | None = None,
    ) -> GeneratedPaths:
        """Scanpaths of one scene, all samples in step with cached keys and values; the encoder runs once.

        Args:
            objects: crops (`crop_objects`) or vectors, one an object.
            layout: `Layout.grid(...)` or `Layout.from_boxes(...)`.
            target: object searched for.
            num_samples: paths to draw; 1 if greedy.
            temperature: divides the logits; below 1 more typical paths, above 1 more varied ones.
            greedy: the most probable object at each step instead of a draw.
            generator: source of randomness; torch's global one if None.
            max_length: most fixations; the config's if None.
        """
        if num_samples < 1 or not temperature > 0:
            raise ScanpathProblem(f"num_samples and temperature must be positive, got {num_samples} and {temperature}")
        longest = self.config.max_length if max_length is None else max_length
        if longest < 1:
            raise ScanpathProblem(f"max_length must be at least 1, got {longest}")
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                scenes = SceneBatch.of([objects], [layout], [target]).to(self.row_table.device)
                encoded = self.encode(scenes)
                return roll_out(
                    self, encoded, count=1 if greedy else num_samples, temperature=None if greedy else temperature,
                    generator=generator, longest=longest,
                )  # fmt: skip
        finally:
            self.train(training)

    @torch.no_grad()
    def probabilities(
        self, objects: Float[Tensor, "P ..."], layout: Layout, target: int, paths: Sequence[Sequence[int] | np.ndarray]
    ) -> list[Float[np.ndarray, "n+1 P+1"]]:
        """p(next object or stop) before each decision of given paths, as in inference: no PAD, no stop at once."""
        lengths = [len(path) for path in paths]
        ids = torch.full((len(paths), max(lengths)), -1)
        for row, path in zip(ids, paths, strict=True):
            row[: len(path)] = torch.as_tensor(np.asarray(path))
        training = self.training
        self.eval()
        scenes = SceneBatch.of([objects] * len(paths), [layout] * len(paths), [target] * len(paths))
        logits = self(scenes.to(self.row_table.device), ids.to(self.row_table.device))[..., :-1]
        self.train(training)
        logits[:, 0, -1] = -torch.inf
        chances = logits.double().softmax(-1).cpu().numpy()
        return [own[: length + 1] for own, length in zip(chances, lengths, strict=True)]

    def start_from_steps(self, steps: Float[np.ndarray, "2R-1 2C-1"]) -> None:
        """Sets the step scores of `offset_bias` to log frequencies: training starts from a Markov model of steps.

        Args:
            steps: relative frequency of steps (rows, columns), the middle is staying; `MarkovKernel.fit(...).steps`.
        """
        if self.offset_scores is None:
            raise ScanpathProblem("start_from_steps needs a model with offset_bias=True")
        span, shape = self.offset_scores.shape[0], np.asarray(steps).shape
        if len(shape) != 2 or not all(side % 2 and side <= span for side in shape) or not (np.asarray(steps) > 0).all():
            raise ScanpathProblem(f"steps must be positive and (2R-1, 2C-1), at most {span} a side, got {shape}")
        scores = torch.from_numpy(np.log(steps)).to(self.offset_scores)
        top, left = ((span - side) // 2 for side in shape)
        with torch.no_grad():
            self.offset_scores.fill_(scores.min() - scores.mean())
            self.offset_scores[top : top + shape[0], left : left + shape[1]] = scores - scores.mean()

    def save(self, folder: Path) -> None:
        """model.safetensors and config.json, each written whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "model.safetensors.part"
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, part)
        part.replace(folder / "model.safetensors")
        write_text(folder / "config.json", json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "OATModel":
        """What `save` wrote, in eval mode. ScanpathProblem where a file is missing or does not fit."""
        settings = read_json_file(folder / "config.json")
        unknown = set(settings) - set(OATConfig.__dataclass_fields__)
        if unknown:
            raise ScanpathProblem(
                f"'{folder}/config.json' has unknown settings {sorted(unknown)}: another version wrote it"
            )
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise ScanpathProblem(f"no file at '{weights}': give a folder that OATModel.save wrote")
        model = cls(OATConfig(**settings))
        state = load_file(weights)
        own = model.state_dict()
        wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if wrong or set(state) - set(own):
            raise ScanpathProblem(
                f"'{weights}' does not fit its config.json: {(wrong or sorted(set(state) - set(own)))[0]}"
            )
        dtype = {value.dtype for value in state.values() if value.is_floating_point()}
        model.to(dtype.pop() if len(dtype) == 1 else torch.float32)
        model.load_state_dict(state)
        return model.eval()

    def _bos(self, scenes: SceneBatch) -> Float[Tensor, "B D"]:
        blank = torch.zeros_like if self.config.crop_encoder == "features" else torch.ones_like
        visual = self.object_encoder(blank(scenes.objects[:1, 0])).expand(len(scenes.target), -1)
        centre = scenes.grid // 2
        return torch.cat([visual, self.position(centre, torch.zeros_like(scenes.target))], -1)

    def _offset(self, cells: Int[Tensor, "B P 2"]) -> Float[Tensor, "B P P"] | None:
        if self.offset_scores is None:
            return None
        step = cells[:, None] - cells[:, :, None] + self.config.grid_size - 1  # [b, from, to]
        return self.offset_scores[step[..., 0], step[..., 1]]

    def _check(self, scenes: SceneBatch) -> None:
        if int(scenes.grid.max()) > self.config.grid_size:
            raise ScanpathProblem(
                f"a layout has {scenes.grid.max()} rows or columns, the model knows {self.config.grid_size}: "
                "quantise more coarsely, or build it with a larger grid_size"
            )
        wanted = 3 if self.config.crop_encoder == "features" else 5
        if scenes.objects.ndim != wanted:
            kind = "vectors (B, P, F)" if wanted == 3 else "crops (B, P, 3, h, w)"
            raise ScanpathProblem(f"objects must be {kind}, got {tuple(scenes.objects.shape)}")
        if not torch.isfinite(scenes.objects).all():
            raise ScanpathProblem("objects hold values that are not finite: check the crops or vectors")


def _rows(values: Float[Tensor, "B P D"], ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
    return values.gather(1, ids[..., None].expand(-1, -1, values.shape[-1]))


def _object_encoder(config: OATConfig, width: int) -> nn.Module:
    if config.crop_encoder == "features":
        return nn.Linear(config.feature_size, width)
    if config.crop_encoder == "cnn":
        return CropEncoder(width, crop_size=config.crop_size, pyramid_levels=config.pyramid_levels)
    return TimmEncoder(config.crop_encoder, width)


def _tables(config: OATConfig, columns: int) -> dict[str, Tensor]:
    shared = position_table(config.position_code, config.grid_size, columns, sigma=config.sigma)
    if not config.anisotropic:
        flags = shared[:2] if len(shared) > 1 else torch.cat([shared, -shared])
        return {"row_table": shared, "col_table": shared.clone(), "flag_table": flags.clone()}
    rows = position_table(config.position_code, config.grid_size, columns, sigma=config.sigma / config.cell_aspect)
    flags = torch.zeros(2, columns)
    flags[0, 0] = flags[1, 1] = columns**0.5
    return {"row_table": rows, "col_table": shared, "flag_table": flags}
