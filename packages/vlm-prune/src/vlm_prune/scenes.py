"""Visual questions with ground truth: numbered, coloured shapes on textured backgrounds, made as fast as one trains.

No weights of a vision-language model come with this package, so its methods are judged on a small model trained on
these scenes (`proofs/train_vlm.py`). A scene has four to six things, each a coloured shape with a real handwritten
digit on it (scikit-learn's, Alpaydin and Kaynak 1998); six kinds of question ask for colour, shape, count, place,
number and existence.

Decided here, so that pruning can be judged:
- a thing covers about 4 % of the picture and most questions are about one thing, so few visual tokens matter;
- things keep the boxes that they were drawn in: `patches_of` says which visual tokens show what was asked about;
- answers are balanced within each kind and independent of the words of the question, so a model that does not look is
  at chance: every scene has exactly one colour and one shape that repeat (two and three times), counts 0, 1, 2 and 3
  are asked equally often, and yes is as frequent as no;
- half of the existence questions with answer no name a colour and a shape that are both there, on different things
  (the adversarial setting of POPE, Li et al. 2023), the other half any absent pair;
- things stand on the corners of patches, give or take `SceneConfig.play`: a small tower learns to read a digit that is
  cut by the patches in nearly the same way each time from far fewer pictures than digits anywhere would take;
- scene `i` of a seed is a function of seed, split and `i` alone; the digits of split "test" are never seen in "train".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float, UInt8
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40), "green": (44, 150, 44), "blue": (40, 70, 200),
    "yellow": (240, 220, 40), "purple": (150, 50, 170), "cyan": (60, 210, 220),
}  # fmt: skip
"""Name and RGB of the colours a thing can have."""
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
"""The cells of the 3 x 3 grid that things stand in, row by row."""
KINDS = ("color", "shape", "count", "place", "number", "existence")
ANSWERS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS), "shape": SHAPES, "count": ("0", "1", "2", "3"), "place": PLACES,
    "number": tuple("0123456789"), "existence": ("yes", "no"),
}  # fmt: skip
"""What can be answered to a question of each kind; all are equally frequent."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
Split = Literal["train", "test"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """How scenes are drawn."""

    size: int = 160
    """Height and width of the picture in pixels."""
    num_things: tuple[int, int] = (4, 6)
    """Fewest and most things; at least 4 and at most 6, or 9 for crowded scenes, which nobody can ask about."""
    radius: tuple[float, float] = (15.5, 19.0)
    """Smallest and largest radius of a thing in pixels."""
    digit: int = 20
    """Height and width of the digits in pixels."""
    grid: int = 10
    """Things stand on the corners of a grid this wide in pixels."""
    play: float = 1.5
    """How far from its corner a thing may stand, in pixels, sideways and up or down."""
    texture: float = 1.0
    """Strength of the background's texture; 0 is a flat background."""

    def __post_init__(self) -> None:
        low, high = self.num_things
        if not (4 <= low <= high <= 6 or (low, high) == (9, 9)):
            raise ValueError(f"num_things must be within (4, 6), or (9, 9) for crowded scenes; got {self.num_things}")
        if not 4.0 <= self.radius[0] <= self.radius[1] <= self.size / 8:
            raise ValueError(f"radius must be rising within (4, size / 8 = {self.size / 8}); got {self.radius}")
        if self.texture < 0 or self.play < 0:
            raise ValueError(f"texture and play must be 0 or more, got {self.texture} and {self.play}")
        if not (8 <= self.digit <= 2 * self.radius[0] and 1 <= self.grid <= self.size / 8):
            raise ValueError(
                f"digit must be from 8 to 2 * radius and grid from 1 to size / 8; got digit {self.digit}, "
                f"radius {self.radius}, grid {self.grid}, size {self.size}"
            )


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One thing of a scene."""

    color: str
    """A name of `COLORS`."""
    shape: str
    """One of `SHAPES`."""
    digit: int
    """The number written on it."""
    place: str
    """One of `PLACES`."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and what is on it."""

    image: UInt8[np.ndarray, "height width 3"]
    """RGB."""
    things: tuple[Thing, ...]
    """Everything but the background."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a scene, with its answer."""

    kind: str
    """One of `KINDS`."""
    text: str
    """As asked, without the image placeholder."""
    answer: str
    """One word."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """Of the things asked about: none where the answer is that there is none."""
    adversarial: bool = False
    """An existence question whose colour and shape are both there, but on different things."""


@dataclass(frozen=True)
class _Layout:
    """Everything random about one thing."""

    color: int
    shape: int
    image: int
    digit: int
    cell: int
    center: tuple[float, float]
    radius: float
    angle: float
    shade: float


@cache
def _digits(split: str) -> tuple[Float[np.ndarray, "digits 8 8"], np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "scenes need scikit-learn's digits: install vlm-prune[test] or scikit-learn"
        ) from None
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 4) == (split == "test")
    return data.images[chosen] / 16.0, data.target[chosen]


def make_scenes(
    count: int, *, seed: int, split: Split = "train", start: int = 0, config: SceneConfig | None = None
) -> list[Scene]:
    """Scenes `start` to `start + count` of a seed, each a function of (seed, split, its number, config) alone."""
    return [scene for scene, _ in _scenes(count, seed, split, start, config or SceneConfig())]


def make_examples(
    count: int,
    *,
    seed: int,
    split: Split = "test",
    start: int = 0,
    kinds: Sequence[str] = KINDS,
    per_kind: int = 1,
    config: SceneConfig | None = None,
) -> list[tuple[Scene, list[Question]]]:
    """Like `make_scenes`, with `per_kind` questions of each kind to every scene, drawn from the scene's own numbers."""
    config = config or SceneConfig()
    return [
        (scene, ask(scene, rng, kinds=kinds, per_kind=per_kind))
        for scene, rng in _scenes(count, seed, split, start, config)
    ]


def _scenes(
    count: int, seed: int, split: str, start: int, config: SceneConfig
) -> Iterator[tuple[Scene, np.random.Generator]]:
    if count < 0 or start < 0 or seed < 0:
        raise ValueError(f"count, start and seed must be 0 or more, got {count}, {start} and {seed}")
    images, labels = _digits(split)
    for index in range(start, start + count):
        rng = np.random.default_rng([seed, split == "test", index])
        layout = _layout(rng, labels, config)
        picture = _background(rng, config)
        for item in layout:
            _draw(picture, item, images[item.image], config.digit)
        picture += 4 * rng.standard_normal(picture.shape, dtype=np.float32)
        image = np.clip(picture, 0, 255).astype(np.uint8)
        yield Scene(image=image, things=tuple(_thing(item) for item in layout)), rng


def _thing(item: _Layout) -> Thing:
    (x, y), r = item.center, item.radius
    return Thing(
        color=tuple(COLORS)[item.color],
        shape=SHAPES[item.shape],
        digit=item.digit,
        place=PLACES[item.cell],
        box=(x - r, y - r, x + r, y + r),
    )


def _layout(rng: np.random.Generator, labels: np.ndarray, config: SceneConfig) -> list[_Layout]:
    number = int(rng.integers(config.num_things[0], config.num_things[1] + 1))
    twice = int(rng.integers(2, 4))  # a colour comes so often, and a shape 5 - twice times; all others once
    if number == 9:
        colors, shapes = rng.integers(0, len(COLORS), 9), rng.integers(0, len(SHAPES), 9)
    else:
        colors, shapes = _repeating(rng, number, twice), _repeating(rng, number, 5 - twice)
    cells = rng.permutation(len(PLACES))[:number]
    pitch, layout = config.size / 3, []
    for color, shape, cell in zip(colors, shapes, cells, strict=True):
        radius = rng.uniform(*config.radius)
        center = [
            config.grid * _pick(rng, _corners(middle, pitch, config.grid)) + rng.uniform(-config.play, config.play)
            for middle in (pitch * (cell % 3 + 0.5), pitch * (cell // 3 + 0.5))
        ]
        digit = int(rng.integers(10))  # first the number, so that all are equally frequent
        image = int(rng.choice(np.flatnonzero(labels == digit)))
        layout.append(
            _Layout(
                int(color), int(shape), image, digit, int(cell), (float(center[0]), float(center[1])), float(radius),
                float(rng.uniform(-0.2, 0.2)), float(rng.uniform(0.85, 1.05)),
            )
        )  # fmt: skip
    return layout


def _corners(middle: float, pitch: float, grid: int) -> list[int]:
    """The grid lines near enough to the middle of a cell that a thing on them stays in it, nearly."""
    near = [line for line in range(int(3 * pitch) // grid + 1) if abs(line * grid - middle) <= pitch / 5]
    return near or [round(middle / grid)]


def _repeating(rng: np.random.Generator, number: int, times: int) -> np.ndarray:
    values = rng.permutation(6)[: number - times + 1]
    return rng.permutation(np.concatenate([np.repeat(values[:1], times), values[1:]]))


@cache
def _stretch(length: int, size: int) -> Float[np.ndarray, "size length"]:
    """The matrix of linear interpolation from `length` to `size` samples."""
    at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(length)[None])).astype(np.float32)


def _background(rng: np.random.Generator, config: SceneConfig) -> Float[np.ndarray, "size size 3"]:
    """A greyish ground; on a part of it stripes, checks or blotches."""
    size = config.size
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    angle, length = rng.uniform(0, np.pi), rng.uniform(5, 14)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    pattern = int(rng.integers(3))
    if pattern == 0:
        texture = np.sin(2 * np.pi * along / length)
    elif pattern == 1:
        texture = np.sign(np.sin(np.pi * along / length) * np.sin(np.pi * across / length))
    else:
        blotches = int(rng.integers(12, 33))
        wide = _stretch(blotches, size)
        texture = wide @ rng.normal(0, 1, (blotches, blotches)).astype(np.float32) @ wide.T
    soft = _stretch(4, size)
    where = soft @ rng.normal(0, 1, (4, 4)).astype(np.float32) @ soft.T
    light = soft @ rng.normal(0, 18, (4, 4)).astype(np.float32) @ soft.T
    grey = rng.uniform(70, 170) + config.texture * (light + rng.uniform(12, 28) * texture * (where > 0))
    return (grey[..., None] + rng.uniform(-14, 14, 3)).astype(np.float32)


def _draw(picture: np.ndarray, item: _Layout, digit: Float[np.ndarray, "8 8"], side: int) -> None:
    """Paints a thing, and in its middle the digit, into the picture."""
    (cx, cy), reach = item.center, int(np.ceil(item.radius)) + 1
    left, top = max(0, round(cx) - reach), max(0, round(cy) - reach)
    window = picture[top : round(cy) + reach + 1, left : round(cx) + reach + 1]
    y, x = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]].astype(np.float32)
    cos, sin = np.cos(item.angle), np.sin(item.angle)
    dx, dy = x + 0.5 - cx, y + 0.5 - cy
    inside = np.clip(0.5 - _distance(SHAPES[item.shape], cos * dx + sin * dy, cos * dy - sin * dx, item.radius), 0, 1)
    color = np.array(tuple(COLORS.values())[item.color], np.float32) * item.shade
    window += inside[..., None] * (color - window)
    wide = _stretch(8, side)
    ink = np.clip(1.4 * (wide @ digit.astype(np.float32) @ wide.T), 0, 1)[..., None]
    ink_left, ink_top = round(cx - side / 2), round(cy - side / 2)
    plate = picture[ink_top : ink_top + side, ink_left : ink_left + side]
    plate += ink * ((20.0 if color @ (0.3, 0.59, 0.11) > 125 else 245.0) - plate)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance (or nearly) in pixels of points to the outline of a shape that fits the circle of radius r."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - 0.95 * r
    if shape == "square":
        return np.maximum(ax, ay) - 0.8 * r
    if shape == "diamond":
        return (ax + ay - r) * np.sqrt(0.5)
    if shape == "triangle":
        return np.maximum(y - 0.6 * r, 0.9 * ax - 0.45 * (y + r))
    if shape == "cross":
        return np.minimum(np.maximum(ax - 0.95 * r, ay - 0.38 * r), np.maximum(ay - 0.95 * r, ax - 0.38 * r))
    fold = np.pi / 5  # star: by symmetry only the edge from the outer point (r, 0) to the inner one counts
    turn = np.abs((np.arctan2(x, -y) + fold) % (2 * fold) - fold)
    px, py = np.hypot(x, y) * np.cos(turn), np.hypot(x, y) * np.sin(turn)
    inner = np.array([np.cos(fold), np.sin(fold)]) * 0.52 * r
    normal = np.array([inner[1], r - inner[0]]) / np.hypot(inner[1], r - inner[0])
    return (px - r) * normal[0] + py * normal[1]


def ask(scene: Scene, rng: np.random.Generator, *, kinds: Sequence[str] = KINDS, per_kind: int = 1) -> list[Question]:
    """`per_kind` questions of each of `kinds`, one after the other. ValueError for unknown kinds and crowded scenes."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"unknown kinds {unknown}; there are {list(KINDS)}")
    if len(scene.things) > 6:
        raise ValueError(f"only scenes of 4 to 6 things can be asked about, this one has {len(scene.things)}")
    return [_ASK[kind](scene.things, rng) for kind in kinds for _ in range(per_kind)]


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _single(things: Sequence[Thing], rng: np.random.Generator, *traits: str) -> Thing:
    """A random thing that no other thing equals in these traits."""
    keys = [tuple(getattr(thing, trait) for trait in traits) for thing in things]
    return _pick(rng, [thing for thing, key in zip(things, keys, strict=True) if keys.count(key) == 1])


def _named(things: Sequence[Thing], rng: np.random.Generator) -> tuple[Thing, str]:
    """A thing and words that fit no other: its shape, its colour, or both."""
    style = int(rng.integers(3))
    if style == 0:
        thing = _single(things, rng, "shape")
        return thing, thing.shape
    if style == 1:
        thing = _single(things, rng, "color")
        return thing, f"{thing.color} shape"
    thing = _single(things, rng, "color", "shape")
    return thing, f"{thing.color} {thing.shape}"


def _ask_color(things: Sequence[Thing], rng: np.random.Generator) -> Question:
    thing = _single(things, rng, "shape")
    return Question(kind="color", text=f"what color is the {thing.shape} ?", answer=thing.color, boxes=(thing.box,))


def _ask_shape(things: Sequence[Thing], rng: np.random.Generator) -> Question:
    thing = _single(things, rng, "color")
    return Question(kind="shape", text=f"what shape is {thing.color} ?", answer=thing.shape, boxes=(thing.box,))


def _ask_count(things: Sequence[Thing], rng: np.random.Generator) -> Question:
    trait = ("color", "shape")[int(rng.integers(2))]
    values = [getattr(thing, trait) for thing in things]
    repeats = max(values.count(value) for value in values)
    answer = (0, 1, 2, 3)[int(rng.integers(4))]
    if answer in (2, 3) and answer != repeats:  # the other trait repeats as often as wanted
        return _ask_count_of(things, "shape" if trait == "color" else "color", answer, rng)
    return _ask_count_of(things, trait, answer, rng)


def _ask_count_of(things: Sequence[Thing], trait: str, answer: int, rng: np.random.Generator) -> Question:
    values = tuple(COLORS) if trait == "color" else SHAPES
    number = {value: sum(getattr(thing, trait) == value for thing in things) for value in values}
    value = _pick(rng, [value for value in values if number[value] == answer])
    words = f"{value} shapes" if trait == "color" else _plural(value)
    boxes = tuple(thing.box for thing in things if getattr(thing, trait) == value)
    return Question(kind="count", text=f"how many {words} are there ?", answer=str(answer), boxes=boxes)


def _ask_place(things: Sequence[Thing], rng: np.random.Generator) -> Question:
    thing, words = _named(things, rng)
    return Question(kind="place", text=f"where is the {words} ?", answer=thing.place, boxes=(thing.box,))


def _ask_number(things: Sequence[Thing], rng: np.random.Generator) -> Question:
    thing, words = _named(things, rng)
    text = f"what number is on the {words} ?"
    return Question(kind="number", text=text, answer=str(thing.digit), boxes=(thing.box,))


def _ask_existence(things: Sequence[Thing], rng: np.random.Generator) -> Question:
    present = {(thing.color, thing.shape) for thing in things}
    colors, shapes = sorted({thing.color for thing in things}), sorted({thing.shape for thing in things})
    if rng.random() < 0.5:
        color, shape = _pick(rng, sorted(present))
        answer, crossed = "yes", False
    else:
        crossed = bool(rng.random() < 0.5)
        pool = [(c, s) for c in (colors if crossed else COLORS) for s in (shapes if crossed else SHAPES)]
        color, shape = _pick(rng, [pair for pair in pool if pair not in present])
        crossed, answer = color in colors and shape in shapes, "no"
    boxes = tuple(thing.box for thing in things if (thing.color, thing.shape) == (color, shape))
    text = f"is there a {color} {shape} ?"
    return Question(kind="existence", text=text, answer=answer, boxes=boxes, adversarial=crossed)


_ASK = {
    "color": _ask_color, "shape": _ask_shape, "count": _ask_count, "place": _ask_place, "number": _ask_number,
    "existence": _ask_existence,
}  # fmt: skip


def describe(scene: Scene) -> str:
    """A caption of all things, row by row: "a red star with 3 at top-left , a blue circle with 7 at right ." """
    things = sorted(scene.things, key=lambda thing: PLACES.index(thing.place))
    parts = [f"a {thing.color} {thing.shape} with {thing.digit} at {thing.place}" for thing in things]
    return " , ".join(parts) + " ."


def prompt(question: str) -> str:
    """The text that goes into the processor with one image; equals the chat template's."""
    return f"USER: <image> {question} ASSISTANT:"


def patches_of(
    boxes: Sequence[tuple[float, float, float, float]], *, size: int = 160, patch: int = 10
) -> Bool[np.ndarray, " patches"]:
    """Which patches, row by row, overlap one of the boxes by at least a quarter of their area."""
    edges = np.arange(0, size, patch)
    covered = np.zeros((len(edges), len(edges)), bool)
    for left, top, right, bottom in boxes:
        x = np.clip(np.minimum(right, edges + patch) - np.maximum(left, edges), 0, None)
        y = np.clip(np.minimum(bottom, edges + patch) - np.maximum(top, edges), 0, None)
        covered |= y[:, None] * x[None] >= 0.25 * patch**2
    return covered.reshape(-1)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the questions, answers and captions; `<s>` is put before every text."""
    words = [
        "what",
        "color",
        "is",
        "the",
        "shape",
        "shapes",
        "how",
        "many",
        "are",
        "there",
        "where",
        "number",
        "on",
        "a",
        "with",
        "at",
        ",",
        ".",
        "?",
        "USER:",
        "ASSISTANT:",
    ]
    words += [*SHAPES, *map(_plural, SHAPES), *COLORS, *PLACES, *"0123456789", "yes", "no"]
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocab = {word: number for number, word in enumerate([*special, *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,]"), "isolated")]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(*, size: int = 160, patch: int = 10) -> LlavaProcessor:
    """`processor(images=..., text=prompt(...), return_tensors="pt")` for a LLaVA of (size / patch)**2 visual tokens."""
    images = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
