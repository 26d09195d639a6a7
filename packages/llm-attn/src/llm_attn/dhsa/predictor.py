"""The boundary predictor: from the keys around a place, does a chunk end there?

Place i has the window of tokens i-w+1..i on its left and i+1..i+w on its right. The 2w keys are encoded together, each
side is pooled, and a small network judges both sides, their distance, their product and their cosine. Every window is
encoded by itself, so the answer does not depend on where in the text it lies.

arXiv:2510.24606, section 3.1 and the authors' released code; parameters have the names of their checkpoints, which can
be loaded. Decided here: queries, keys and values of the encoder are projected once per token and not once per window,
which is the same since windows have no positions; without gradients, places are encoded a few thousand at a time.

Shapes: B batch, L tokens, Hkv key heads, D head width, C = Hkv * D channels, w window.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from llm_attn.dhsa.config import PredictorConfig

PLACES = 2048
"""Places that are encoded at a time where no gradient is wanted."""
BLOCKS = 4
"""Blocks of the "stack" encoder."""
FILES = ("boundary_predictor.json", "boundary_predictor.safetensors")


class WindowAttention(nn.Module):
    """Self-attention among the tokens of each window, then LayerNorm; no residual, no positions."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)

    def forward(self, windows: Float[Tensor, "N W C"]) -> Float[Tensor, "N W C"]:
        """Windows that differ in all their tokens."""
        return self._attend(F.linear(windows, self.mha.in_proj_weight, self.mha.in_proj_bias))

    def slide(self, tokens: Float[Tensor, "B P C"], width: int) -> Float[Tensor, "B L W C"]:
        """All windows of `width` tokens of a sequence, L = P - width + 1."""
        B = tokens.shape[0]
        projected = F.linear(tokens, self.mha.in_proj_weight, self.mha.in_proj_bias)
        windows = projected.unfold(1, width, 1).transpose(2, 3)  # (B, L, W, 3C)
        return self._attend(windows.reshape(-1, *windows.shape[2:])).unflatten(0, (B, -1))

    def _attend(self, projected: Tensor) -> Tensor:
        heads = projected.unflatten(2, (3, self.mha.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.flatten(1, 2)
        weights = (query @ key.mT * query.shape[2] ** -0.5).softmax(-1)
        mixed = (weights @ value).unflatten(0, (-1, self.mha.num_heads)).transpose(1, 2).flatten(2)
        return self.norm(self.mha.out_proj(mixed))


class WindowGate(nn.Module):
    """Softmax-weighted mean of the tokens of one side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, 1, bias=False)

    def forward(self, tokens: Float[Tensor, "B L W C"]) -> Float[Tensor, "B L C"]:
        """Weights come from the tokens themselves."""
        return (self.gate(tokens).softmax(2) * tokens).sum(2)


class BoundaryPredictor(nn.Module):
    """Logits that a chunk ends behind each token; see the module's text."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        C, width = config.channels, config.channels
        self.pool = WindowGate(C) if config.pooling == "gated" and config.encoder != "conv" else None
        if config.encoder == "attention":
            self.enc = WindowAttention(C, config.num_heads)
        elif config.encoder == "stack":
            self.enc_ls = nn.ModuleList([WindowAttention(C, config.num_heads) for _ in range(BLOCKS)])
            self.dropout = nn.Dropout(0.1)
            self.norm = nn.LayerNorm(C)
        else:
            width = config.hidden
            self.enc = nn.Sequential(  # type: ignore[assignment]
                nn.Conv1d(C, C, config.window, groups=C), nn.ReLU(), nn.Conv1d(C, width, 1), nn.ReLU()
            )
        self.mlp = nn.Sequential(nn.Linear(4 * width + 1, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1))

    def forward(self, key: Float[Tensor, "B Hkv L D"]) -> Float[Tensor, "B L"]:
        """Logit of place i: a chunk ends behind token i. Keys carry their rotary positions, heads are not repeated."""
        Hkv, L, D = key.shape[1:]
        if Hkv * D != self.config.channels:
            raise ValueError(f"this predictor reads {self.config.channels} channels, the keys have {Hkv} x {D}")
        w = self.config.window
        tokens = key.transpose(1, 2).flatten(2).to(next(self.mlp.parameters()).dtype)
        tokens = F.pad(tokens, (0, 0, w - 1, w))
        if torch.is_grad_enabled() or L <= PLACES:
            return self._judge(*self._sides(tokens))
        parts = [tokens[:, i : i + PLACES + 2 * w - 1] for i in range(0, L, PLACES)]
        return torch.cat([self._judge(*self._sides(part)) for part in parts], 1)

    def _sides(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        w = self.config.window
        if self.config.encoder == "conv":
            encoded = self.enc(tokens.mT).mT  # one window of w tokens after another
            return encoded[:, :-w], encoded[:, w:]
        if self.config.encoder == "attention":
            encoded = self.enc.slide(tokens, 2 * w)
        else:
            windows = tokens.unfold(1, 2 * w, 1).transpose(2, 3)
            encoded = windows.reshape(-1, *windows.shape[2:])
            for block in self.enc_ls:
                encoded = encoded + self.dropout(block(self.norm(encoded)))
            encoded = encoded.unflatten(0, windows.shape[:2])
        pool = self.pool or (lambda side: side.mean(2))
        return pool(encoded[:, :, :w]), pool(encoded[:, :, w:])

    def _judge(self, left: Tensor, right: Tensor) -> Tensor:
        cosine = F.cosine_similarity(left, right, dim=-1, eps=1e-6)
        both = torch.cat([left, right, (left - right).abs(), left * right, cosine[..., None]], -1)
        return self.mlp(both).squeeze(-1)

    def save_pretrained(self, folder: Path | str) -> Path:
        """Writes settings (JSON) and weights (safetensors) into a folder; both are whole at any time."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings, weights = (folder / name for name in FILES)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, weights.with_suffix(".part"))
        settings.with_suffix(".part.json").write_text(json.dumps(asdict(self.config), indent=2))
        weights.with_suffix(".part").replace(weights)
        settings.with_suffix(".part.json").replace(settings)
        return folder

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "BoundaryPredictor":
        """A predictor that `save_pretrained` wrote, in eval mode. FileNotFoundError where a file is missing."""
        settings, weights = (Path(folder) / name for name in FILES)
        for file in (settings, weights):
            if not file.exists():
                raise FileNotFoundError(f"no boundary predictor in {folder}: {file.name} is missing")
        predictor = cls(PredictorConfig(**json.loads(settings.read_text())))
        predictor.load_state_dict(load_file(weights))
        return predictor.eval()
