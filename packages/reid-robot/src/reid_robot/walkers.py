"""Generated people for re-identification: figures of parts, seen by several cameras, in many poses, partly hidden.

Pictures of real people are personal data and none are shipped here; these stand in for them. An identity is what a
person wears and how they are built: skin, hair, colours of torso, legs and shoes, a texture on the torso with its own
frequency, sleeves, skirt or trousers, a bag. What changes from picture to picture is what changes in reality: pose and
direction, place in the crop, the camera's colours and background, something in front, noise. Parts are capsules with
soft edges, painted back to front.

The same seed gives the same pictures, bit for bit. Used for the checks of the light attention block (Eisenbach et al.,
arXiv:2302.14574) where its own data, recorded by a robot in a clinic, are private.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Colour = tuple[float, float, float]
Painting = tuple[Float[np.ndarray, "H W 3"], Float[np.ndarray, "H W"]]


@dataclass(frozen=True)
class CropSet:
    """Crops in memory.

    images: (N, 3, H, W), RGB. ids, cameras: (N,). masks: (N, H, W), where the person is seen, if that is known.
    """

    images: UInt8[Tensor, "N 3 H W"]
    ids: Int[Tensor, "N"]
    cameras: Int[Tensor, "N"]
    masks: Bool[Tensor, "N H W"] | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype != torch.uint8:
            raise ValueError(f"images must be (N, 3, H, W) uint8, got {tuple(self.images.shape)} {self.images.dtype}")
        if not len(self.images) == len(self.ids) == len(self.cameras):
            raise ValueError(
                f"images, ids and cameras must be as many, got {len(self.images)}, {len(self.ids)}, {len(self.cameras)}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: Int[Tensor, "B"]) -> UInt8[Tensor, "B 3 H W"]:
        """The crops of these numbers."""
        return self.images[index]


@dataclass(frozen=True, kw_only=True)
class WalkerConfig:
    """How hard the pictures are."""

    size: tuple[int, int] = (64, 32)
    """Height and width of a crop."""
    cameras: int = 2
    """Each with its own colour cast, brightness and background."""
    images_per_camera: int = 8
    """Of each identity."""
    cast: float = 0.12
    """Largest gain of a colour channel by a camera, as a share; half of it varies from picture to picture."""
    occlusion: float = 0.35
    """Share of pictures with something in front of the person."""
    shift: float = 0.08
    """Largest displacement, as a share of the crop's height."""
    distractor: bool = False
    """A column of random colour, as high as the crop, beside the person in every picture."""

    def __post_init__(self) -> None:
        if min(self.size) < 16:
            raise ValueError(f"size must be at least 16 x 16, got {self.size[0]} x {self.size[1]}")
        if self.cameras < 1 or self.images_per_camera < 1:
            raise ValueError(
                f"cameras and images_per_camera must be positive, got {self.cameras} and {self.images_per_camera}"
            )
        for name in ("cast", "occlusion", "shift"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """What makes an identity. Lengths are shares of the body's height."""

    skin: Colour
    hair: Colour
    torso: Colour
    second: Colour
    legs: Colour
    shoes: Colour
    bag: Colour | None
    texture: int  # 0 plain, 1 stripes across, 2 stripes down, 3 checks
    frequency: float  # stripes over the body's height
    long_sleeves: bool
    long_hair: bool
    skirt: bool
    girth: float


@dataclass(frozen=True, kw_only=True)
class Pose:
    """phase: of the step, radians. facing: -1 left, 0 towards or away, 1 right. away: is the face hidden.

    centre: of the body, shares of crop width and height. height: of the body, share of the crop's height.
    """

    phase: float = 0.6
    facing: int = 0
    away: bool = False
    centre: tuple[float, float] = (0.5, 0.5)
    height: float = 0.88


def draw_appearance(rng: np.random.Generator) -> Appearance:
    """A random identity: two fifths of clothes are dark or grey, as in streets, the others are coloured."""
    shade = float(rng.uniform(0.25, 1.0))
    return Appearance(
        skin=(0.95 * shade, 0.76 * shade, 0.62 * shade),
        hair=tuple(float(c) for c in np.array([0.35, 0.24, 0.14]) * rng.uniform(0.2, 2.2)),  # type: ignore[arg-type]
        torso=_cloth(rng),
        second=_cloth(rng),
        legs=_cloth(rng),
        shoes=_cloth(rng),
        bag=_cloth(rng) if rng.random() < 0.4 else None,
        texture=int(rng.integers(0, 4)),
        frequency=float(rng.uniform(8, 22)),
        long_sleeves=bool(rng.random() < 0.6),
        long_hair=bool(rng.random() < 0.4),
        skirt=bool(rng.random() < 0.25),
        girth=float(rng.uniform(0.075, 0.115)),
    )


def _cloth(rng: np.random.Generator) -> Colour:
    if rng.random() < 0.4:
        return colorsys.hsv_to_rgb(rng.random(), 0.15 * rng.random(), float(rng.uniform(0.05, 0.9)))
    return colorsys.hsv_to_rgb(rng.random(), float(rng.uniform(0.4, 1.0)), float(rng.uniform(0.25, 0.95)))


def draw_pose(rng: np.random.Generator, shift: float, aspect: float = 0.5) -> Pose:
    """A random moment of walking. aspect: width over height of the crop, so that `shift` is the same both ways."""
    return Pose(
        phase=float(rng.uniform(0, 2 * np.pi)),
        facing=int(rng.integers(-1, 2)),
        away=bool(rng.random() < 0.5),
        centre=(0.5 + float(rng.uniform(-1, 1)) * shift / aspect * 0.6, 0.5 + float(rng.uniform(-1, 1)) * shift * 0.5),
        height=float(rng.uniform(0.88 - shift, 0.94)),
    )


def paint_person(appearance: Appearance, pose: Pose, size: tuple[int, int]) -> Painting:
    """Colours (H, W, 3) in [0, 1] and how much of each pixel the person covers (H, W)."""
    height, width = size
    y = (np.arange(height) + 0.5)[:, None] / height
    x = (np.arange(width) + 0.5)[None, :] / height  # in units of the crop's height, both
    u = (x - pose.centre[0] * width / height) / pose.height
    v = (y - pose.centre[1]) / pose.height + 0.5  # 0 at the top of the head, 1 at the soles
    soft = 1 / (height * pose.height)
    colours, cover = np.zeros((height, width, 3)), np.zeros((height, width))
    for colour, distance in _parts(appearance, pose, u, v):
        alpha = np.clip(0.5 - distance / soft, 0, 1)
        colours += alpha[..., None] * (np.asarray(colour) - colours)
        cover += alpha * (1 - cover)
    return colours / np.maximum(cover, 1e-6)[..., None], cover  # were blended with black where cover is thin


def _parts(a: Appearance, pose: Pose, u: np.ndarray, v: np.ndarray) -> list[tuple[np.ndarray | Colour, np.ndarray]]:
    """Colour and signed distance of each part, back to front."""
    side = abs(pose.facing)
    swing = np.sin(pose.phase) * (0.16 if side else 0.05)
    direction = pose.facing if side else 1
    hip, shoulder = (0.03 if side else 0.06), a.girth * (0.55 if side else 1.15)
    sleeve = a.torso if a.long_sleeves else a.skin
    lower = a.skin if a.skirt else a.legs
    parts: list[tuple[np.ndarray | Colour, np.ndarray]] = []

    def limb(sign: float, back: float) -> None:
        knee, foot = sign * hip + 0.6 * swing * sign, sign * hip + swing * sign - 0.03 * direction * side * back
        parts.append((a.legs, _capsule(u, v, sign * hip, 0.5, knee, 0.72, 0.055)))
        parts.append((lower, _capsule(u, v, knee, 0.72, foot, 0.93, 0.042)))
        parts.append((a.shoes, _capsule(u, v, foot, 0.965, foot + 0.05 * direction * side, 0.97, 0.03)))

    def arm(sign: float) -> None:
        hand = sign * shoulder * 1.25 - swing * sign * 0.9
        elbow = (sign * shoulder * 1.2 + hand) / 2 - 0.02 * sign * (1 - side)
        parts.append((a.torso, _capsule(u, v, sign * shoulder, 0.22, elbow, 0.36, 0.036)))
        parts.append((sleeve, _capsule(u, v, elbow, 0.36, hand, 0.49, 0.03)))
        parts.append((a.skin, _capsule(u, v, hand, 0.5, hand, 0.51, 0.028)))

    limb(-1, 1.0)
    limb(1, 0.0)
    if side:
        arm(-1)
    if a.bag is not None:  # a rucksack: behind a person seen from the side, a strip beside one seen from the front
        away = -direction * (a.girth * 1.15) if side else a.girth * 0.9
        parts.append((a.bag, _capsule(u, v, away, 0.24, away, 0.4, 0.06)))
    if a.skirt:
        parts.append((a.legs, _capsule(u, v, 0, 0.5, 0, 0.62, a.girth * 0.95)))
    parts.append((_torso_colours(a, u, v), _capsule(u, v, 0, 0.24, 0, 0.46, a.girth * (0.75 if side else 1.0))))
    arm(1)
    if not side:
        arm(-1)
    if a.bag is not None and not side and pose.away:
        parts.append((a.bag, _capsule(u, v, 0, 0.26, 0, 0.4, 0.065)))
    parts.append((a.skin, _capsule(u, v, 0, 0.15, 0, 0.18, 0.03)))
    if a.long_hair:
        parts.append((a.hair, _capsule(u, v, -0.02 * direction * side, 0.06, -0.03 * direction * side, 0.17, 0.05)))
    parts.append((a.skin, _capsule(u, v, 0.01 * direction * side, 0.075, 0.01 * direction * side, 0.095, 0.05)))
    crown = 0.085 if pose.away and not side else 0.05
    parts.append((a.hair, _capsule(u, v, -0.015 * direction * side, 0.045, -0.02 * direction * side, crown, 0.05)))
    return parts


def _torso_colours(a: Appearance, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    across = np.sin(2 * np.pi * a.frequency * v) + 0 * u
    down = np.sin(2 * np.pi * a.frequency * u) + 0 * v
    wave = {0: np.full_like(across, -1.0), 1: across, 2: down, 3: across * down}[a.texture]
    share = np.clip(0.5 + 1.5 * wave, 0, 1)[..., None]
    return (1 - share) * np.asarray(a.torso) + share * np.asarray(a.second)


def _capsule(u: np.ndarray, v: np.ndarray, u0: float, v0: float, u1: float, v1: float, radius: float) -> np.ndarray:
    du, dv = u1 - u0, v1 - v0
    along = np.clip(((u - u0) * du + (v - v0) * dv) / max(du * du + dv * dv, 1e-9), 0, 1)
    return np.hypot(u - u0 - along * du, v - v0 - along * dv) - radius


@dataclass(frozen=True)
class Camera:
    """What a camera does to its pictures. gains: (3,). ground, wall: colours behind people. gamma: of brightness."""

    gains: np.ndarray
    ground: np.ndarray
    wall: np.ndarray
    gamma: float


def draw_camera(rng: np.random.Generator, cast: float) -> Camera:
    """A random camera."""
    return Camera(
        gains=1 + cast * rng.uniform(-1, 1, 3),
        ground=rng.uniform(0.25, 0.75) + 0.08 * rng.uniform(-1, 1, 3),
        wall=rng.uniform(0.3, 0.85) + 0.15 * rng.uniform(-1, 1, 3),
        gamma=float(np.exp(cast * rng.uniform(-1, 1))),
    )


def draw_walkers(
    num_ids: int, config: WalkerConfig = WalkerConfig(), *, seed: int = 0, camera_seed: int = 0
) -> CropSet:
    """images_per_camera pictures of each of `num_ids` people by each camera; ids count from 0.

    The people depend on `seed` alone, the cameras on `camera_seed`: another seed gives other people before the same
    cameras, which is what training and test sets are.
    """
    if num_ids < 1:
        raise ValueError(f"num_ids must be positive, got {num_ids}")
    cameras = [draw_camera(np.random.default_rng((camera_seed, 7, c)), config.cast) for c in range(config.cameras)]
    images, masks, ids, numbers = [], [], [], []
    for person in range(num_ids):
        rng = np.random.default_rng((seed, 1, person))
        appearance = draw_appearance(rng)
        for number, camera in enumerate(cameras):
            for _ in range(config.images_per_camera):
                image, mask = draw_crop(appearance, camera, config, rng)
                images.append(image)
                masks.append(mask)
                ids.append(person)
                numbers.append(number)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return CropSet(stacked, torch.tensor(ids), torch.tensor(numbers), torch.from_numpy(np.stack(masks)))


def draw_crop(
    appearance: Appearance, camera: Camera, config: WalkerConfig, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]]:
    """One picture and where the person is seen in it."""
    height, width = config.size
    picture = _background(camera, config.size, rng)
    if config.distractor:
        side = rng.integers(0, 2)
        edge = int(width * rng.uniform(0.2, 0.3))
        columns = slice(0, edge) if side == 0 else slice(width - edge, width)
        picture[:, columns] = _cloth(rng)
    pose = draw_pose(rng, config.shift, width / height)
    colours, cover = paint_person(appearance, pose, config.size)
    picture += cover[..., None] * (colours - picture)
    if rng.random() < config.occlusion:
        rows, columns = _occluder(config.size, rng)
        picture[rows, columns] = _cloth(rng)
        cover[rows, columns] = 0
    return _photograph(picture, camera, config.cast, rng), cover > 0.5


def _background(camera: Camera, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    height, width = size
    picture = np.empty((height, width, 3))
    horizon = int(height * rng.uniform(0.3, 0.7))
    picture[:horizon], picture[horizon:] = camera.wall, camera.ground
    for _ in range(3):  # clutter
        top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
        bottom, right = top + int(rng.integers(2, height // 3)), left + int(rng.integers(2, width // 2))
        picture[top:bottom, left:right] = rng.uniform(0.1, 0.9) + 0.2 * rng.uniform(-1, 1, 3)
    return picture


def _occluder(size: tuple[int, int], rng: np.random.Generator) -> tuple[slice, slice]:
    """A low wall in front of the legs, or a post across a side."""
    height, width = size
    if rng.random() < 0.5:
        return slice(int(height * rng.uniform(0.55, 0.8)), height), slice(0, width)
    left = int(width * rng.uniform(0.0, 0.75))
    return slice(0, height), slice(left, left + max(2, int(width * rng.uniform(0.15, 0.3))))


def _photograph(picture: np.ndarray, camera: Camera, cast: float, rng: np.random.Generator) -> np.ndarray:
    gains = camera.gains * (1 + 0.5 * cast * rng.uniform(-1, 1, 3))
    light = np.exp(0.5 * cast * rng.uniform(-1, 1))
    seen = np.clip(picture * gains * light, 0, 1) ** camera.gamma
    seen += 0.03 * rng.standard_normal(seen.shape)
    return np.clip(np.rint(255 * seen), 0, 255).astype(np.uint8)
