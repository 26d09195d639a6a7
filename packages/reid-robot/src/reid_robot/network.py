"""A network that turns crops of people into embeddings: a timm backbone, attention, a BatchNorm neck, a classifier.

crop -> backbone -> map (B, D, h, w) -> mean over places f_t -> BatchNorm without shift f_i -> classifier without bias.
Triplet loss acts on f_t, identity loss on f_i (Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person
Re-Identification", CVPRW 2019), which is the baseline that Eisenbach et al. (arXiv:2302.14574) stand on.

Decided here: embeddings for matching come after the neck and have unit norm, since distances are cosine;
`embedding="before"` is for Euclidean ones. Crops of dtype uint8 are normalised inside, float ones are taken as
normalised already, so that an exported network cannot be fed with pictures normalised twice.

Shapes: B crops, 3 x H x W, RGB; D width of the embedding.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reid_robot.timm_door import AttentionConfig, apply_attention, keep_last_resolution


@dataclass(frozen=True, kw_only=True)
class ReidConfig:
    """What a network is built of."""

    backbone: str = "resnet50"
    """Name of a timm model."""
    attention: str | None = "light"
    """Block, see BLOCKS in timm_door.py; None for the plain network."""
    where: str = "s2.last,s3.last,s4.last"
    """Placement of the blocks."""
    input_size: tuple[int, int] = (256, 128)
    """Height and width of crops."""
    num_ids: int = 0
    """Identities of the classifier; 0 for no classifier."""
    last_stride: Literal[1, 2] = 1
    """1 keeps the resolution of the last stage."""
    embedding: Literal["after", "before"] = "after"
    """The neck: "after" for cosine distances, "before" for Euclidean ones."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", tuple(self.input_size))
        AttentionConfig(block=self.attention or "light", where=self.where, input_size=self.input_size)
        if self.num_ids < 0:
            raise ValueError(f"num_ids must not be negative, got {self.num_ids}")
        if self.last_stride not in (1, 2):
            raise ValueError(f"last_stride must be 1 or 2, got {self.last_stride}")
        if self.embedding not in ("after", "before"):
            raise ValueError(f"embedding must be 'after' or 'before' (the neck), got {self.embedding!r}")


class ReidNet(nn.Module):
    """Built from a ReidConfig; called, it embeds crops.

    Raises ValueError if timm has no such backbone or the placement does not fit it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ReidConfig = ReidConfig()) -> None:
        super().__init__()
        self.config = config
        try:
            self.backbone: Any = timm.create_model(config.backbone, pretrained=False, num_classes=0, global_pool="")
        except RuntimeError as problem:
            raise ValueError(f"timm has no model '{config.backbone}': {problem}") from problem
        if config.last_stride == 1:
            keep_last_resolution(self.backbone)
        if config.attention is not None:
            apply_attention(
                self.backbone,
                AttentionConfig(block=config.attention, where=config.where, input_size=config.input_size),
            )
        self.neck = nn.BatchNorm1d(self.backbone.num_features)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(self.neck.num_features, config.num_ids, bias=False) if config.num_ids else None
        if self.classifier is not None:
            nn.init.normal_(self.classifier.weight, std=0.001)
        given = self.backbone.pretrained_cfg
        for name, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            values = torch.tensor(given.get(name, default)).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def pooled(self, crops: Tensor) -> Float[Tensor, "B D"]:
        """f_t. crops: (B, 3, H, W), uint8 or normalised floats."""
        if crops.ndim != 4 or crops.shape[1] != 3:
            raise ValueError(f"crops must be (B, 3, H, W), got {tuple(crops.shape)}")
        if crops.dtype == torch.uint8:
            crops = (crops.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.backbone.forward_features(crops).mean((2, 3))

    def training_outputs(self, crops: Tensor) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B ids"]]:
        """f_t for the triplet loss, logits for the identity loss. ValueError without a classifier."""
        if self.classifier is None:
            raise ValueError("a network without classifier cannot be trained: build it with num_ids")
        pooled = self.pooled(crops)
        return pooled, self.classifier(self.neck(pooled))

    def forward(self, crops: Tensor) -> Float[Tensor, "B D"]:
        """Embeddings of unit norm. crops: (B, 3, H, W), uint8 or normalised floats."""
        pooled = self.pooled(crops)
        return F.normalize(self.neck(pooled) if self.config.embedding == "after" else pooled)

    def save(self, path: Path, *, half: bool = False) -> None:
        """Weights and config, without the classifier, to a safetensors file."""
        dtype = torch.float16 if half else torch.float32
        state = {k: v.detach() for k, v in self.state_dict().items() if not k.startswith("classifier.")}
        state = {k: (v.to(dtype) if v.is_floating_point() else v).contiguous().clone() for k, v in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        save_file(state, temporary, metadata={"config": json.dumps(asdict(replace(self.config, num_ids=0)))})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "ReidNet":
        """What `save` wrote, in float32 and eval mode. FileNotFoundError; ValueError for other files."""
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at '{path}'")
        try:
            with safe_open(path, "pt") as file:
                config = ReidConfig(**json.loads(file.metadata()["config"]))
            state = load_file(path)
        except Exception as problem:
            raise ValueError(f"'{path}' is no checkpoint of ReidNet: {problem}") from problem
        net = cls(config)
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return net.eval()


def build_reid(
    backbone: str = "resnet50",
    *,
    attention: str | None = "light",
    where: str = "s2.last,s3.last,s4.last",
    input_size: tuple[int, int] = (256, 128),
    num_ids: int = 0,
) -> ReidNet:
    """A ReidNet with random weights and the other settings of ReidConfig at their defaults."""
    return ReidNet(
        ReidConfig(backbone=backbone, attention=attention, where=where, input_size=input_size, num_ids=num_ids)
    )


def load_backbone_weights(net: ReidNet, weights: Path | Mapping[str, Tensor]) -> int:
    """Fills the network from a state dict of timm, torchvision or fast-reid; how many tensors of the backbone it
    filled.

    Prefixes "module.", "model." and "backbone." are taken off; a fast-reid neck comes along. Attention blocks keep
    their own weights. Raises ValueError if a tensor of the backbone is missing or has another shape.
    """
    state = _read_weights(weights) if isinstance(weights, Path) else dict(weights)
    bare = {_without_prefix(name): value for name, value in state.items()}
    own = net.backbone.state_dict()
    blocks = ("reid_attention", ".se.", ".drop_path.0.")
    missing = [k for k in own if k not in bare and not any(b in k for b in blocks) and "num_batches" not in k]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(own)} tensors of {net.config.backbone} are missing, {missing[0]} first"
        )
    wrong = [k for k in own if k in bare and own[k].shape != bare[k].shape]
    if wrong:
        raise ValueError(f"{wrong[0]} must be {tuple(own[wrong[0]].shape)}, is {tuple(bare[wrong[0]].shape)}")
    filled = {k: bare[k].float() for k in own if k in bare}
    net.backbone.load_state_dict(filled, strict=False)
    neck = {k: bare.get(f"heads.bottleneck.0.{k}", bare.get(f"neck.{k}")) for k in net.neck.state_dict()}
    net.neck.load_state_dict({k: v for k, v in neck.items() if v is not None}, strict=False)
    return len(filled)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"no weights at '{path}'")
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        state = state.get(key, state)
    return state


def _without_prefix(name: str) -> str:
    for prefix in ("module.", "model.", "backbone."):
        name = name.removeprefix(prefix)
    return name
