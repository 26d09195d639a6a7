"""Training: identity and triplet loss on P people with K images each, warm-up, two drops of the rate; resumable.

The recipe of "Bag of Tricks" (Luo et al., CVPRW 2019) and of fast-reid, which Eisenbach et al. (arXiv:2302.14574) build
on: Adam, rate 3.5e-4 after a linear warm-up from a tenth, times 0.1 at a third and at three quarters, weight decay
5e-4; random flip, shift and erasing. Decided here: the batch of a step depends on the seed and the step alone, so a run
that was stopped goes on with the same numbers as one that was not.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from reid_robot.losses import batch_hard_triplet, identity_loss
from reid_robot.network import ReidNet

_GREY = (124, 116, 104)  # ImageNet's mean colour, which erased pixels take


class Crops(Protocol):
    """What is trained and tested on: `CropSet` in memory, `CropFiles` on disk."""

    @property
    def ids(self) -> Tensor:
        """(N,)"""

    @property
    def cameras(self) -> Tensor:
        """(N,)"""

    def load(self, index: Tensor) -> Tensor:
        """(B, 3, H, W) uint8"""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The recipe; defaults are for Market-1501 (120 epochs of 200 steps)."""

    steps: int = 24_000
    """Batches in all."""
    people: int = 16
    """P, identities in a batch."""
    images: int = 4
    """K, images of each."""
    rate: float = 3.5e-4
    """Of Adam, after warm-up."""
    weight_decay: float = 5e-4
    """Of Adam (as L2, in the gradient)."""
    warm_up: int = 2_000
    """Steps in which the rate climbs from a tenth."""
    drops: tuple[float, ...] = (1 / 3, 3 / 4)
    """Shares of the steps after which the rate is divided by ten."""
    label_smoothing: float = 0.1
    """Of the identity loss."""
    margin: float = 0.3
    """Of the triplet loss."""
    flip: float = 0.5
    """Probability of mirroring a crop."""
    pad: float = 10 / 256
    """Largest shift, as a share of the crop's height."""
    erase: float = 0.5
    """Probability that a rectangle is erased."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed, by autocast."""
    seed: int = 0
    """Of batches and their changes; weights are the caller's."""

    def __post_init__(self) -> None:
        for name in ("steps", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.people < 2:
            raise ValueError(f"people must be at least 2 for a triplet, got {self.people}")
        for name in ("flip", "pad", "erase", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")


def rate_factor(step: int, config: TrainingConfig) -> float:
    """What the rate is multiplied by at a step, counted from 0."""
    factor = 0.1 ** sum(step >= drop * config.steps for drop in config.drops)
    if step < config.warm_up:
        factor *= 0.1 + 0.9 * step / config.warm_up
    return factor


def sample_batch(ids: Int[Tensor, "N"], people: int, images: int, generator: torch.Generator) -> Int[Tensor, "PK"]:
    """Numbers of K images of each of P identities, one identity after the other.

    Identities are drawn without replacement, images too where there are enough, and with it where there are not: an
    identity with one image gives it K times. Raises ValueError if there are fewer than P identities.
    """
    known = ids.unique()
    if len(known) < people:
        raise ValueError(f"a batch of {people} people needs as many identities, the data has {len(known)}")
    chosen = known[torch.randperm(len(known), generator=generator)[:people]]
    found = []
    for person in chosen:
        own = (ids == person).nonzero()[:, 0]
        order = torch.randperm(len(own), generator=generator)
        if len(own) < images:
            order = torch.cat([order, torch.randint(len(own), (images - len(own),), generator=generator)])
        found.append(own[order[:images]])
    return torch.cat(found)


def change_crops(
    crops: UInt8[Tensor, "B 3 H W"], config: TrainingConfig, generator: torch.Generator
) -> UInt8[Tensor, "B 3 H W"]:
    """Each crop perhaps mirrored, shifted (black comes in), and with a rectangle erased (Zhong et al., AAAI 2020)."""
    B, _, H, W = crops.shape
    crops = crops.clone()
    mirrored = torch.rand(B, generator=generator) < config.flip
    crops[mirrored] = crops[mirrored].flip(-1)
    pad = round(config.pad * H)
    padded = torch.nn.functional.pad(crops, (pad, pad, pad, pad))
    top, left = torch.randint(2 * pad + 1, (2, B), generator=generator)
    grey = torch.tensor(_GREY, dtype=torch.uint8)[:, None, None]
    erased = torch.rand(B, generator=generator) < config.erase
    for i in range(B):
        crops[i] = padded[i, :, top[i] : top[i] + H, left[i] : left[i] + W]
        if erased[i]:
            rows, columns = _rectangle(H, W, generator)
            crops[i, :, rows, columns] = grey
    return crops


def _rectangle(height: int, width: int, generator: torch.Generator) -> tuple[slice, slice]:
    """2 to 40 % of the area, sides 0.3 to 3.3; after ten tries that do not fit, the last, cut."""
    h = w = 1
    for _ in range(10):
        area, ratio = torch.rand(2, generator=generator).tolist()
        area, ratio = (0.02 + 0.38 * area) * height * width, 0.3 * (1 / 0.09) ** ratio
        h, w = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if h < height and w < width:
            break
    h, w = min(h, height), min(w, width)
    top = int(torch.randint(height - h + 1, (), generator=generator))
    left = int(torch.randint(width - w + 1, (), generator=generator))
    return slice(top, top + h), slice(left, left + w)


def train(
    net: ReidNet,
    crops: Crops,
    config: TrainingConfig = TrainingConfig(),
    *,
    folder: Path | None = None,
    save_every: int = 200,
    on_step: Callable[[int, int, float], None] = lambda *_: None,
) -> list[float]:
    """Trains the network in place and returns the loss of every step; it ends in eval mode.

    With a folder, `last.pt` there is written every `save_every` steps and gone on from. Identities may be any numbers.
    on_step: told (step, steps, loss). Raises ValueError if the network has fewer classes than there are identities, a
    loss is not finite, or the folder holds a run of another config.
    """
    known, classes = crops.ids.unique(return_inverse=True)
    if net.config.num_ids < len(known):
        raise ValueError(f"the data has {len(known)} identities, the network's classifier {net.config.num_ids}")
    device = net.mean.device
    optimizer = torch.optim.Adam(net.parameters(), lr=config.rate, weight_decay=config.weight_decay)
    losses = [] if folder is None else _resume(folder / "last.pt", net, optimizer, config)
    net.train()
    for step in range(len(losses), config.steps):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        index = sample_batch(crops.ids, config.people, config.images, generator)
        batch = change_crops(crops.load(index), config, generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = config.rate * rate_factor(step, config)
        losses.append(_step(net, optimizer, batch, classes[index].to(device), config))
        if folder is not None and ((step + 1) % save_every == 0 or step + 1 == config.steps):
            _save(folder / "last.pt", net, optimizer, config, losses)
        on_step(step + 1, config.steps, losses[-1])
    net.eval()
    return losses


def _step(net: ReidNet, optimizer: torch.optim.Optimizer, batch: Tensor, ids: Tensor, config: TrainingConfig) -> float:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        features, logits = net.training_outputs(batch)
    loss = identity_loss(logits.float(), ids, label_smoothing=config.label_smoothing)
    loss = loss + batch_hard_triplet(features, ids, margin=config.margin)
    if not bool(loss.isfinite()):
        raise ValueError("the loss is not finite any more: lower the rate, or lengthen the warm-up")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _save(
    path: Path, net: ReidNet, optimizer: torch.optim.Optimizer, config: TrainingConfig, losses: list[float]
) -> None:
    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    state |= {"config": asdict(config), "built": asdict(net.config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _resume(path: Path, net: ReidNet, optimizer: torch.optim.Optimizer, config: TrainingConfig) -> list[float]:
    if not path.exists():
        return []
    state: dict[str, Any] = torch.load(path, map_location=net.mean.device, weights_only=True)
    if (state["config"], state["built"]) != (asdict(config), asdict(net.config)):
        raise ValueError(f"'{path}' is of another run: give another folder, or the config it was started with")
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"])


@torch.inference_mode()
def extract(net: ReidNet, crops: Crops, *, batch: int = 64) -> Tensor:
    """Embeddings of all crops, (N, D), on the CPU."""
    net.eval()
    parts = [net(crops.load(index).to(net.mean.device)).cpu() for index in torch.arange(len(crops.ids)).split(batch)]
    return torch.cat(parts) if parts else torch.empty(0, net.neck.num_features)
