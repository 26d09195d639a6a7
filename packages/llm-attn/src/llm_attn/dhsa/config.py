"""Settings of DHSA and of its boundary predictor. Defaults are those of the authors' released code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

BoundarySource = Literal["predictor", "keyshift", "punctuation", "uniform"]
Pooling = Literal["avgpool_norm", "avgpool", "maxpool"]
QueryChunks = Literal["block", "boundary"]
Encoder = Literal["attention", "conv", "stack"]
WindowPooling = Literal["mean", "gated"]


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """Build of a boundary predictor."""

    channels: int
    """C, key heads times head width: a predictor fits one build of model."""
    window: int = 4
    """w, tokens looked at on either side of a possible boundary."""
    hidden: int = 256
    """Width of the hidden layer."""
    num_heads: int = 4
    """Attention heads of the encoder; must divide `channels`. Kept with the weights, as nothing else tells it."""
    encoder: Encoder = "attention"
    """"attention" (the paper's), "conv" (depthwise convolution) or "stack" (four pre-norm blocks with dropout)."""
    pooling: WindowPooling = "mean"
    """How the w encoded tokens of a side become one: mean, or softmax weights of a linear gate."""
    host: str | None = None
    """Model that it was trained on, to refuse another; None fits any of that width."""

    def __post_init__(self) -> None:
        for name in ("channels", "window", "hidden", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.encoder not in get_args(Encoder):
            raise ValueError(f"encoder must be one of {', '.join(get_args(Encoder))}, got {self.encoder!r}")
        if self.pooling not in get_args(WindowPooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(WindowPooling))}, got {self.pooling!r}")
        if self.encoder != "conv" and self.channels % self.num_heads:
            raise ValueError(f"num_heads must divide channels, got {self.num_heads} heads for {self.channels} channels")


@dataclass(frozen=True, kw_only=True)
class DHSAConfig:
    """Settings of DHSA in a model."""

    budget: int = 1024
    """N_b, keys that each block of queries reads; texts up to this length run dense."""
    block_size: int = 128
    """B_q, queries that share a list of keys in prefill (paper: 128 for quality, 256 for speed)."""
    boundary: BoundarySource = "predictor"
    """Where chunks end: by a trained predictor, or without training where the keys turn ("keyshift"), behind sentences
    ("punctuation"), or every `chunk_size` tokens ("uniform")."""
    local_tokens: int = 128
    """Latest keys that are always read; never fewer than the block's own, so that every token sees itself."""
    global_tokens: int = 128
    """First keys that are always read."""
    instruction_tokens: int = 64
    """Last tokens of a prompt, which attend to everything."""
    threshold: float = 1.1
    """theta, logit above which a token may end a chunk (1.1: a probability of 0.75)."""
    min_distance: int = 8
    """Two boundaries are more than so many tokens apart."""
    chunks_per_block: int = 8
    """Predicted boundaries are at most so many for each `block_size` tokens."""
    chunk_size: int = 16
    """Length of uniform chunks."""
    punctuation_ids: tuple[int, ...] = ()
    """Token ids that end a sentence, for "punctuation"; `punctuation_ids(tokenizer)` finds them."""
    pooling: Pooling = "avgpool_norm"
    """How tokens become one vector: mean times the square root of their number, plain mean, or maximum."""
    query_chunks: QueryChunks = "block"
    """Queries that share a list: fixed blocks (the released code), or the chunks of the keys (the paper's text;
    slow)."""
    per_kv_head: bool = False
    """Whether every key head has lists of its own; otherwise all heads share one."""
    share_boundaries: bool = True
    """Whether boundaries found in the first layer hold in all."""
    share_lists: bool = False
    """Whether keys chosen in the first layer are read in all layers of the same window: faster, worse."""
    generated_chunk: int = 512
    """Generated tokens are one chunk, always read, until there are more than so many; then they are cut like a
    prompt."""
    predictor: PredictorConfig | None = None
    """Build of the predictor, filled in by `apply_dhsa`."""

    def __post_init__(self) -> None:
        # from JSON, tuples come back as lists and dataclasses as dicts
        object.__setattr__(self, "punctuation_ids", tuple(self.punctuation_ids))
        if isinstance(self.predictor, Mapping):
            object.__setattr__(self, "predictor", PredictorConfig(**self.predictor))
        least = {"block_size": 1, "local_tokens": 0, "global_tokens": 0, "instruction_tokens": 0, "min_distance": 0}
        for name, low in {**least, "chunks_per_block": 1, "chunk_size": 1, "generated_chunk": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name, kind in (("boundary", BoundarySource), ("pooling", Pooling), ("query_chunks", QueryChunks)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        self._check_budget()

    def _check_budget(self) -> None:
        always = self.always_local + self.global_tokens
        if self.budget < always:
            raise ValueError(
                f"budget must hold what is always read, {self.always_local} latest and {self.global_tokens} first "
                f"keys, got {self.budget}; raise it, or lower block_size, local_tokens or global_tokens"
            )
        if self.boundary == "punctuation" and not self.punctuation_ids:
            raise ValueError("boundary='punctuation' needs punctuation_ids; punctuation_ids(tokenizer) finds them")

    @property
    def always_local(self) -> int:
        """Latest keys that a block of queries always reads."""
        return max(self.local_tokens, self.block_size)

    def max_chunks(self, length: int) -> int:
        """Boundaries that a text of some length gets at most, its ends not counted."""
        return max(1, length // self.block_size * self.chunks_per_block)
