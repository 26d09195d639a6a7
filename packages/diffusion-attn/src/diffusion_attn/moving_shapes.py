"""Clips of moving, bouncing, occluding textured shapes, with words that say what is in them.

What small video models are trained and judged on here: attention in them has something to concentrate on (a shape is
the same shape in the next frame, a few pixels on), and everything in a clip is known: colour, kind, place, speed.
Clips are drawn from seeds, on a canvas of any size and length, so that a model can begin on small ones.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

COLORS = {
    "red": (0.9, 0.15, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.15, 0.25, 0.9),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.6, 0.2, 0.75),
    "white": (0.95, 0.95, 0.95),
}
KINDS = ("disc", "square", "triangle", "ring")
SPEEDS = ("still", "slow", "fast")
_PIXELS_PER_FRAME = {"still": 0.0, "slow": 1.0, "fast": 2.2}
WORDS = ("nothing", *COLORS, *KINDS, *SPEEDS)
"""All words that describe clips; the first one fills captions up."""
CAPTION = 6
"""Words of a caption: colour, kind and speed of two shapes."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Size of clips. Shapes have the same size in pixels whatever the canvas has."""

    frames: int = 14
    """Frames of a clip."""
    size: int = 48
    """Pixels along each side."""
    radius: tuple[float, float] = (6.0, 10.0)
    """Smallest and largest radius of a shape, pixels."""
    two_shapes: float = 0.6
    """Share of clips with a second shape, which may pass before the first."""

    def __post_init__(self) -> None:
        """Raises ValueError on sizes that leave no room."""
        if self.frames < 1 or self.size < 2 * self.radius[1] or not 0 < self.radius[0] <= self.radius[1]:
            raise ValueError(f"frames must be at least 1 and shapes fit into the canvas, got {self}")
        if not 0 <= self.two_shapes <= 1:
            raise ValueError(f"two_shapes must lie in [0, 1], got {self.two_shapes}")


class Clips(NamedTuple):
    """Some clips. pixels: in [-1, 1]. captions: CAPTION words each. centers: of up to two shapes, (x, y) in pixels."""

    pixels: Float[Tensor, "B 3 T H W"]
    captions: list[tuple[str, ...]]
    centers: Float[Tensor, "B 2 T 2"]


def draw_clips(count: int, config: ClipConfig = ClipConfig(), *, generator: torch.Generator) -> Clips:
    """`count` random clips."""
    drawn = [_draw(config, generator) for _ in range(count)]
    pixels, captions, centers = zip(*drawn, strict=True) if drawn else ((), (), ())
    shape = (0, 3, config.frames, config.size, config.size)
    return Clips(
        torch.stack(pixels) if drawn else torch.empty(shape),
        list(captions),
        torch.stack(centers) if drawn else torch.empty(0, 2, config.frames, 2),
    )


def embed_captions(captions: list[tuple[str, ...]], width: int = 32) -> Float[Tensor, "B 6 width"]:
    """Fixed vectors of length 1 for words and their places: a text encoder that needs no training.

    ValueError on words that are not in WORDS.
    """
    unknown = sorted({word for caption in captions for word in caption} - set(WORDS))
    if unknown:
        raise ValueError(f"'{unknown[0]}' is not among the words of captions: {', '.join(WORDS)}")
    table = torch.randn(len(WORDS) + CAPTION, width, generator=torch.Generator().manual_seed(0))
    table = table / table.norm(dim=1, keepdim=True)
    words = torch.tensor([[WORDS.index(word) for word in caption] for caption in captions])
    return (table[words] + table[len(WORDS) :]) / 2**0.5


def _draw(config: ClipConfig, generator: torch.Generator) -> tuple[Tensor, tuple[str, ...], Tensor]:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def pick(names: tuple[str, ...]) -> str:
        return names[int(torch.randint(len(names), (), generator=generator))]

    frames = _background(config, uniform(1, 1, 6, 6))
    caption: list[str] = []
    paths = torch.full((2, config.frames, 2), float("nan"))
    for number in range(1 + int(uniform(1).item() < config.two_shapes)):
        color, kind, speed = pick(tuple(COLORS)), pick(KINDS), pick(SPEEDS)
        low, high = config.radius
        radius, angle = low + (high - low) * uniform(1).item(), 6.2832 * uniform(1).item()
        step = _PIXELS_PER_FRAME[speed] * torch.tensor([angle, angle + 1.5708]).cos()
        paths[number] = _bouncing(uniform(2), step, radius, config)
        inside = _coverage(kind, radius, paths[number], config.size)
        paint = _textured(COLORS[color], paths[number], uniform(3), config.size)
        frames = torch.where(inside > 0, inside * paint + (1 - inside) * frames, frames)
        caption += [color, kind, speed]
    caption += ["nothing"] * (CAPTION - len(caption))
    return (2 * frames - 1).clamp(-1, 1), tuple(caption), paths


def _background(config: ClipConfig, coarse: Float[Tensor, "1 1 h w"]) -> Float[Tensor, "3 T H W"]:
    """A smooth grey texture that stands still."""
    texture = torch.nn.functional.interpolate(coarse, (config.size, config.size), mode="bicubic")[0]
    return (0.25 + 0.3 * texture)[:, None].expand(3, config.frames, -1, -1)


def _bouncing(start: Tensor, step: Tensor, radius: float, config: ClipConfig) -> Float[Tensor, "T 2"]:
    """Centres that move evenly and turn back where the shape touches a side."""
    room = config.size - 2 * radius
    way = start * room + step * torch.arange(config.frames)[:, None]
    return radius + room - (way.remainder(2 * room) - room).abs()


def _coverage(kind: str, radius: float, path: Float[Tensor, "T 2"], size: int) -> Float[Tensor, "T H W"]:
    """How much of each pixel the shape covers, from the distance to its edge."""
    x, y = _offsets(path, size)
    if kind == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    elif kind == "triangle":
        distance = torch.maximum(0.866 * x.abs() + 0.5 * y, -y) - 0.55 * radius
    else:
        distance = (x.square() + y.square()).sqrt() - radius
        if kind == "ring":
            distance = torch.maximum(distance, 0.55 * radius - (distance + radius))
    return (0.5 - distance).clamp(0, 1)


def _textured(color: tuple[float, ...], path: Tensor, drawn: Tensor, size: int) -> Float[Tensor, "3 T H W"]:
    """The colour in stripes that move with the shape."""
    x, y = _offsets(path, size)
    angle, phase = 3.1416 * drawn[0], 6.2832 * drawn[1]
    stripes = 0.8 + 0.2 * torch.sin((0.7 + 0.5 * drawn[2]) * (angle.cos() * x + angle.sin() * y) + phase)
    return torch.tensor(color).view(3, 1, 1, 1) * stripes


def _offsets(path: Float[Tensor, "T 2"], size: int) -> tuple[Float[Tensor, "T H W"], Float[Tensor, "T H W"]]:
    """Pixels' distances from the centre along both axes."""
    at = torch.arange(size) + 0.5
    x = at[None, None] - path[:, 0, None, None]
    y = at[None, :, None] - path[:, 1, None, None]
    return x.expand(-1, size, -1), y.expand(-1, -1, size)
