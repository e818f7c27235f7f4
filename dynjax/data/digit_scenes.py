"""`digits`: handwritten digits on photographs, rendered from what scikit-learn and scikit-image install; no download.

Classes 0 to 9 are the digits, class 10 is the background; or each digit in several colours and textures is a class of
its own, and the background the last. Scene i is a pure function of (seed, split, i, difficulty, size, classes). Train,
val and test use different digits and different parts of the photographs; which ones does not depend on the seed, so a
model trained with one seed has never seen the test digits of another.
"""

import colorsys
import dataclasses
import functools
import importlib.resources
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, Integer, UInt8
from PIL import Image, ImageDraw

from dynjax.config import DataConfig, UserError
from dynjax.data.pictures import BadFile, read_image
from dynjax.data.source import SPLITS, Field, Size, picture_spec

CLASSES = (*"0123456789", "background")
HUES = ("red", "teal", "yellow", "blue", "green", "pink", "orange", "cyan", "lime", "purple")  # the first are far apart
_STRIPES = ("rows", "columns", "rising", "falling")
TEXTURES = ("", *_STRIPES, *(f"fine {stripes}" for stripes in _STRIPES), "dots")
BACKGROUND = 10
SCENES = 2000  # where data.examples says nothing

_PHOTOS = (
    *(("sklearn", f"datasets/images/{name}") for name in ("china.jpg", "flower.jpg")),
    *(("skimage", f"data/{name}.png") for name in ("astronaut", "brick", "camera", "chelsea", "coffee", "grass")),
    *(("skimage", f"data/{name}") for name in ("gravel.png", "motorcycle_left.png", "rocket.jpg")),
)
_SHARES = (0.6, 0.2, 0.2)  # of the digits, for train, val, test
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_PAD = 2  # empty pixels around an 8x8 digit, so that turning and smoothing cut nothing off
KEEP_BYTES = 2 << 30  # a split that needs no more than this stays in memory
_TRIES = 12  # places tried for one digit


def class_names(classes: int) -> tuple[str, ...]:
    """Names of so many classes, of which the last is the background.

    With 10 v + 1 of them there are v variants of a digit: 2 to 10 colours, or 10 colours in 2 to 10 textures, the
    colour first. Raises UserError for another number.
    """
    variants = (classes - 1) // 10
    if classes == len(CLASSES):
        return CLASSES
    most = len(HUES) * len(TEXTURES)
    if classes != 10 * variants + 1 or not 2 <= variants <= most or (variants > len(HUES) and variants % len(HUES)):
        raise UserError(
            f"data.classes={classes}: scenes of digits have 11 classes, or 21, 31, ... up to 101 (colours of digits), "
            f"or 201, 301, ... up to {10 * most + 1} (and textures)"
        )
    looks = [f"{texture} {hue}".strip() for texture in TEXTURES for hue in HUES][:variants]
    return (*(f"{digit} {look}" for digit in CLASSES[:-1] for look in looks), CLASSES[-1])


@functools.cache
def _photos() -> tuple[Image.Image, ...]:
    photos = []
    for package, path in _PHOTOS:
        file = importlib.resources.files(package) / path
        try:
            with file.open("rb") as stream:
                photos.append(Image.fromarray(read_image(io.BytesIO(stream.read()))))
        except (OSError, BadFile) as error:
            raise UserError(
                f"digits needs the photograph {path} of the installed package {package}: {error}; "
                "reinstall scikit-learn and scikit-image"
            ) from error
    return tuple(photos)


def _photo_part(photo: Image.Image, split: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what a split may see: train the left 60%, val and test a half each of the rest."""
    width, height = photo.size
    middle = int(0.6 * width)
    return {
        "train": (0, 0, middle, height),
        "val": (middle, 0, width, height // 2),
        "test": (middle, height // 2, width, height),
    }[split]


@functools.cache
def handwritten() -> tuple[Float[np.ndarray, "N 8 8"], Int32[np.ndarray, " N"]]:
    """scikit-learn's 1,797 digits, ink from 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.float32) / 16, digits.target.astype(np.int32)


def _legible() -> np.ndarray:
    """Which digits look like their class: most of the five nearest of the others are of it. 24 do not."""
    images, labels = handwritten()
    pixels = images.reshape(len(images), -1).astype(np.float64)  # sixteenths: distances are exact, so ties are too
    square = (pixels**2).sum(axis=1)
    distance = square[:, None] + square[None, :] - 2 * pixels @ pixels.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :5]
    return (labels[nearest] == labels[:, None]).sum(axis=1) >= 3


@functools.cache
def split_digits(split: str) -> tuple[np.ndarray, ...]:
    """Indices into scikit-learn's 1,797 digits that a split may use, one array per class; without the illegible."""
    _, labels = handwritten()
    legible = _legible()
    rng = np.random.default_rng(1797)
    parts = []
    for label in range(10):
        parts.append(cut(np.flatnonzero((labels == label) & legible), rng)[SPLITS.index(split)])
    return tuple(parts)


def cut(indices: Integer[np.ndarray, " N"], rng: np.random.Generator) -> list[Integer[np.ndarray, " _"]]:
    """`indices` in a random order, dealt out to train, val and test."""
    ends = np.round(np.cumsum(_SHARES) * len(indices)).astype(int)
    return np.split(rng.permutation(indices), ends[:-1])


@functools.cache
def _glyph(index: int) -> Image.Image:
    images, _ = handwritten()
    return Image.fromarray(np.round(np.pad(images[index], _PAD) * 255).astype(np.uint8))


class _Look(NamedTuple):
    """What one number, the difficulty, means for a scene. Lengths in pixels of 96, lightness in [0, 1]."""

    contrast: float  # least difference in lightness between a stroke and what is around it
    stroke: float  # ink above this level is stroke: the lower, the thicker
    photo: float  # range of lightness that the photograph may take
    clutter: float  # most patches of plain colour
    spacing: float  # least distance of two digits, as a share of the sum of their radii
    turn: float  # largest rotation, degrees
    small: float  # smallest and largest height of a digit
    large: float


_EASY, _HARD = _Look(0.45, 0.36, 0.30, 0, 1.1, 5, 28, 48), _Look(0.15, 0.48, 0.60, 8, 0.6, 25, 20, 40)


def _look(difficulty: float) -> _Look:
    return _Look(*(easy + (hard - easy) * difficulty for easy, hard in zip(_EASY, _HARD, strict=True)))


def render(
    rng: np.random.Generator, split: str, difficulty: float, size: tuple[int, int], classes: int = len(CLASSES)
) -> tuple[UInt8[np.ndarray, "H W 3"], Integer[np.ndarray, "H W"]]:
    """One scene and its mask of class ids, see `class_names`."""
    look, variants = _look(difficulty), (classes - 1) // 10
    height, width = size
    unit = min(size) / 96
    canvas = _background(rng, split, look, size)
    mask = np.full(size, classes - 1, mask_type(classes))
    placed: list[tuple[float, float, float]] = []
    crowd = rng.uniform()  # 0: nearly empty, 1: crowded; many digits are smaller digits
    for _ in range(1 + int(6.99 * crowd)):
        index = rng.choice(split_digits(split)[rng.integers(10)])
        variant = int(rng.integers(variants)) if variants > 1 else 0
        for _attempt in range(_TRIES if placed else 20 * _TRIES):  # no scene is empty
            tall = rng.uniform(look.small, look.large) * (1 - crowd)
            tall = (tall + rng.uniform(look.small, 0.75 * look.large) * crowd) * unit
            radius = 0.5 * tall
            y, x = rng.uniform(radius, height - radius), rng.uniform(radius, width - radius)
            if any(np.hypot(y - b, x - a) < look.spacing * (radius + r) for b, a, r in placed):
                continue
            ink, top, left = _ink(_glyph(int(index)), y, x, tall, rng.uniform(-look.turn, look.turn), look.stroke, size)
            window = (slice(top, top + ink.shape[0]), slice(left, left + ink.shape[1]))
            hue = _HUES[variant % len(HUES)] if variants > 1 else None
            colour = _ink_colour(rng, canvas[window], ink, look.contrast, hue)
            if colour is None:
                continue
            if variants > len(HUES):
                colour = _textured(colour, TEXTURES[variant // len(HUES)], canvas[window], unit)
            canvas[window] += ink[..., None] * (colour - canvas[window])
            mask[window] = np.where(ink >= 0.5, handwritten()[1][index] * variants + variant, mask[window])
            placed.append((y, x, radius))
            break
    canvas += rng.normal(0, 0.01, canvas.shape).astype(np.float32)
    return np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8), mask


def _background(rng, split, look: _Look, size) -> Float[np.ndarray, "H W 3"]:
    """A part of a photograph with patches of plain colour on it, squeezed into a narrow range of lightness."""
    height, width = size
    photo = _photos()[rng.integers(len(_PHOTOS))]
    left, top, right, bottom = _photo_part(photo, split)
    scale = min(rng.uniform(96, 144) / min(size), (right - left) / width, (bottom - top) / height)
    x, y = rng.uniform(left, right - scale * width), rng.uniform(top, bottom - scale * height)
    crop = photo.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + scale * width, y + scale * height))
    if rng.uniform() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    draw = ImageDraw.Draw(crop)
    for _ in range(rng.integers(round(look.clutter) + 1)):
        _patch(rng, draw, size)
    canvas = np.asarray(crop, np.float32) / 255
    lightness = canvas @ _LUMA
    low, high = np.quantile(lightness[::4, ::4], (0.02, 0.98))
    span = min(high - low, look.photo)
    gain = span / max(high - low, 1e-3)
    # Dark or light as a whole, so that there is room for strokes on one side of nearly all of it.
    dark, light = (0.02, 1 - look.contrast - span), (look.contrast, 0.98 - span)
    floor = rng.uniform(*(dark if rng.uniform() < 0.5 else light))
    return np.clip((canvas - low) * gain + floor, 0, 1)


def _patch(rng, draw: ImageDraw.ImageDraw, size) -> None:
    """A filled shape, broader than a stroke."""
    height, width = size
    unit = min(size) / 96
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
    y, x, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(7, 16) * unit
    corners = int(rng.integers(3, 8))
    if corners == 7:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * (2 * np.pi / corners)
        angles += rng.uniform(0, 2 * np.pi)
        draw.polygon([(x + r * np.cos(a), y + r * np.sin(a)) for a in angles], fill=colour)


def _ink(glyph: Image.Image, y, x, tall, degrees, stroke, size) -> tuple[Float[np.ndarray, "h w"], int, int]:
    """The opacity of a digit's strokes around (y, x), cut to the scene, and the window's top and left."""
    height, width = size
    zoom = tall / 8
    reach = 0.5 * zoom * (8 + 2 * _PAD)
    top, left = max(0, int(y - reach)), max(0, int(x - reach))
    bottom, right = min(height, int(np.ceil(y + reach))), min(width, int(np.ceil(x + reach)))
    cos, sin = np.cos(np.radians(degrees)) / zoom, np.sin(np.radians(degrees)) / zoom
    middle = glyph.width / 2
    # PIL maps pixels of the result to the glyph's.
    a, b, d, e = cos, sin, -sin, cos
    c, f = middle - a * (x - left) - b * (y - top), middle - d * (x - left) - e * (y - top)
    levels = glyph.transform(
        (right - left, bottom - top), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC
    )
    sharpness = 0.8 * zoom  # an edge about one pixel wide, whatever the zoom
    ink = np.clip((np.asarray(levels, np.float32) / 255 - stroke) * sharpness + 0.5, 0, 1)
    return ink, top, left


def _ink_colour(
    rng, behind: Float[np.ndarray, "h w 3"], ink, contrast: float, hue: Float[np.ndarray, "3"] | None = None
) -> Float[np.ndarray, "3"] | None:
    """A random colour lighter or darker by `contrast` than everything near the strokes, or None where there is none.

    Of a `hue` it is the most colourful one.
    """
    near = ink > 0
    near[1:] |= near[:-1].copy()
    near[:-1] |= near[1:].copy()
    near[:, 1:] |= near[:, :-1].copy()
    near[:, :-1] |= near[:, 1:].copy()
    if not near.any():
        return None
    low, high = np.quantile(behind[near] @ _LUMA, (0.03, 0.97))
    spans = [(a, b) for a, b in ((0.0, low - contrast), (high + contrast, 1.0)) if b >= a]
    if not spans:
        return None
    a, b = spans[rng.integers(len(spans))]
    target = rng.uniform(a, b)
    colour = rng.uniform(0, 1, 3).astype(np.float32) if hue is None else hue
    lightness = float(colour @ _LUMA)
    if hue is not None:
        target = min((min(max(lightness, a), b) for a, b in spans), key=lambda level: abs(level - lightness))
    if lightness > target:
        return colour * (target / lightness)
    return colour + (1 - colour) * ((target - lightness) / (1 - lightness + 1e-6))


_HUES = np.array([colorsys.hsv_to_rgb(turn / 10, 1, 1) for turn in (0, 5, 2, 7, 4, 9, 1, 6, 3, 8)], np.float32)


def _textured(
    colour: Float[np.ndarray, "3"], texture: str, behind: Float[np.ndarray, "h w 3"], unit: float
) -> Float[np.ndarray, "h w 3"]:
    """The colour with stripes or dots half way to white, or to black where it is darker than what is behind."""
    rows, columns = np.mgrid[: behind.shape[0], : behind.shape[1]] / unit
    slope = 2**-0.5
    along = dict(zip(_STRIPES, (rows, columns, slope * (rows + columns), slope * (rows - columns)), strict=True))
    period = 3.0 if texture.startswith("fine") else 6.0
    if texture == "dots":
        other = (rows % 4.0 < 2.0) == (columns % 4.0 < 2.0)
    else:
        other = along[texture.split()[-1]] % period < period / 2 if texture else np.zeros(rows.shape, bool)
    lighter = float(colour @ _LUMA) > float((behind @ _LUMA).mean())
    shade = colour + (float(lighter) - colour) * 0.5
    return np.where(other[..., None], shade, colour).astype(np.float32)


def mask_type(classes: int) -> np.dtype:
    """The smallest type that holds the class ids."""
    return np.min_scalar_type(classes - 1)


@dataclasses.dataclass(frozen=True)
class DigitsSource:
    """Scenes of one split; each is rendered when first asked for and then kept in memory, unless all are too many."""

    split: str
    examples: int
    difficulty: float
    seed: int
    size: Size
    classes: tuple[str, ...] = CLASSES
    name: str = "digits"
    handed: bool = True  # a mirrored 2 is no 2
    seen: None = None
    _kept: dict[int, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def spec(self) -> dict[str, Field]:
        return picture_spec(self.size, "mask")

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.examples:
            raise IndexError(f"scene {index} of {self.examples}")
        scene = self._kept.get(index)
        if scene is None:
            rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
            scene = render(rng, self.split, self.difficulty, self.size, len(self.classes))
            if (3 + scene[1].itemsize) * self.examples * self.size[0] * self.size[1] <= KEEP_BYTES:
                self._kept[index] = scene
        image, mask = scene
        return {"image": image, "mask": mask.astype(np.int32)}

    def describe(self) -> str:
        height, width = self.size
        look = f"difficulty {self.difficulty:g}, seed {self.seed}"
        classes = "" if self.classes == CLASSES else f"{len(self.classes)} classes, "
        return f"digits {self.split}: {self.examples} scenes {height}x{width}, {classes}{look}"


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> DigitsSource:
    """`config.examples` training scenes; val and test have a tenth of it each. Raises UserError for values out of
    range."""
    examples = SCENES if config.examples is None else config.examples
    size = config.size or (96, 96)
    if not 0 <= config.difficulty <= 1:
        raise UserError(f"data.difficulty={config.difficulty} is outside [0, 1]")
    if examples < 1:
        raise UserError(f"data.examples={examples}: digits needs at least 1 training scene")
    if min(size) < 48:
        raise UserError(f"data.size={size}: a scene of digits is at least 48 pixels high and wide")
    if seed < 0:
        raise UserError(f"seed={seed} is negative")
    count = examples if split == "train" else max(1, examples // 10)
    names = class_names(config.classes or len(CLASSES))
    _photos()  # a missing photograph is found now, not in the middle of training
    return DigitsSource(split, count, config.difficulty, seed, size, names)
