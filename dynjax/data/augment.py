"""Random changes of training pictures: crop, flip, pad-and-crop, colour, cutout. Pure functions and a generator.

Masks move with their picture, example by example (`Augment`); small pictures with labels are changed a whole batch at a
time (`AugmentBatch`). B is the number of pictures; H, W are height and width in pixels.
"""

import dataclasses
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int32, Integer, Shaped, UInt8
from PIL import Image

from dynjax.config import AugmentConfig, UserError

IGNORED = -1  # every ignored pixel of a batch, whatever the source calls it

Mask = TypeVar("Mask", Int32[np.ndarray, "H W"], None)
"""A picture's mask, or none where there is none."""


def check_augment(config: AugmentConfig, size: tuple[int, int]) -> None:
    """Raises UserError for values out of range for pictures of height and width `size`."""
    if not 0 < config.crop <= 1:
        raise UserError(f"data.augment.crop={config.crop} is outside (0, 1]: it is a share of the picture's side")
    if not 0 <= config.colour <= 1:
        raise UserError(f"data.augment.colour={config.colour} is outside [0, 1]")
    for name in ("pad", "cutout"):
        value = getattr(config, name)
        if not 0 <= value < min(size):
            raise UserError(f"data.augment.{name}={value}: pictures of {size[0]}x{size[1]} allow 0 to {min(size) - 1}")


@dataclasses.dataclass(frozen=True)
class Augment:
    """A transformation for grain's `random_map`: {"image", "mask"} to the same, of the same shapes."""

    config: AugmentConfig
    fill: tuple[int, int, int] = (0, 0, 0)
    """Colour of the cutout."""

    def __call__(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, mask = example["image"], example["mask"]
        config = self.config
        if config.crop < 1:
            image, mask = random_crop(image, mask, config.crop, rng)
        if config.flip and rng.uniform() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        if config.colour > 0:
            image = random_colour(image, config.colour, rng)
        if config.pad:
            offsets = rng.integers(0, 2 * config.pad + 1, (1, 2))
            image, mask = shift(image[None], offsets, config.pad)[0], shift(mask[None], offsets, config.pad, IGNORED)[0]
        if config.cutout:
            image = cut_out(image[None], rng.integers(0, mask.shape, (1, 2)), config.cutout, self.fill)[0]
        return {**example, "image": np.ascontiguousarray(image), "mask": np.ascontiguousarray(mask)}


@dataclasses.dataclass(frozen=True)
class AugmentBatch:
    """A transformation for grain's `random_map`: {"image" (B, H, W, 3), "label", ...} to the same.

    The batch is this process's part of one of `batch_size` pictures. Random numbers are drawn for all of these, so that
    a picture changes in the same way whatever the number of processes.
    """

    config: AugmentConfig
    batch_size: int
    part: slice
    fill: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, batch: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        images, config = batch["image"], self.config
        if config.crop < 1 or config.colour > 0:  # these are of PIL, picture by picture
            seeds = rng.integers(2**63, size=self.batch_size)[self.part]
            images = np.stack([self._one(*pair) for pair in zip(images, seeds.tolist(), strict=True)])
        if config.flip:
            turned = rng.uniform(size=self.batch_size)[self.part] < 0.5
            images = np.where(turned[:, None, None, None], images[:, :, ::-1], images)
        if config.pad:
            offsets = rng.integers(0, 2 * config.pad + 1, (self.batch_size, 2))
            images = shift(images, offsets[self.part], config.pad)
        if config.cutout:
            centres = rng.integers(0, images.shape[1:3], (self.batch_size, 2))
            images = cut_out(images, centres[self.part], config.cutout, self.fill)
        return {**batch, "image": images}

    def _one(self, image: np.ndarray, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        if self.config.crop < 1:
            image, _ = random_crop(image, None, self.config.crop, rng)
        return random_colour(image, self.config.colour, rng) if self.config.colour > 0 else image


def shift(
    images: Shaped[np.ndarray, "B H W ..."], offsets: Integer[np.ndarray, "B 2"], pad: int, fill: int = 0
) -> Shaped[np.ndarray, "B H W ..."]:
    """Pictures padded by `pad` pixels of `fill` on each side, and those from `offsets` on (0 to 2 pad) cropped out.

    He et al. 2016, section 4.2, on CIFAR-10. Black, as training code that pads before it normalises has it; what they
    pad has its mean subtracted.
    """
    height, width = images.shape[1:3]
    around = ((0, 0), (pad, pad), (pad, pad), *((0, 0) for _ in images.shape[3:]))
    padded = np.pad(images, around, constant_values=fill)
    found = np.empty_like(images, order="C")
    for index, (top, left) in enumerate(offsets.tolist()):
        found[index] = padded[index, top : top + height, left : left + width]
    return found


def cut_out(
    images: UInt8[np.ndarray, "B H W 3"], centres: Integer[np.ndarray, "B 2"], side: int, fill: tuple[int, int, int]
) -> UInt8[np.ndarray, "B H W 3"]:
    """A square of `side` pixels around each centre takes the colour `fill`; what lies outside the picture is lost.

    DeVries and Taylor 2017: centres anywhere, and zero after the mean of the data was subtracted, so its mean before.
    """
    images = images.copy()
    for index, (y, x) in enumerate((centres - side // 2).tolist()):
        images[index, max(0, y) : y + side, max(0, x) : x + side] = fill
    return images


def mean_colour(source: Any, examples: int = 256) -> tuple[int, int, int]:
    """Mean of so many pictures, spread evenly over a source, rounded."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(examples, len(source))).astype(int))
    means = [source[int(index)]["image"].mean((0, 1)) for index in indices]
    red, green, blue = np.mean(means, axis=0).round().astype(int).tolist()
    return red, green, blue


def random_crop(
    image: UInt8[np.ndarray, "H W 3"],
    mask: Mask,
    smallest: float,
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "H W 3"], Mask]:
    """A window whose sides are one share, drawn from [smallest, 1], of the picture's, resized back to the whole."""
    height, width = image.shape[:2]
    share = rng.uniform(smallest, 1)
    top, left = rng.uniform(0, (1 - share) * height), rng.uniform(0, (1 - share) * width)
    box = (left, top, left + share * width, top + share * height)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box=box)
    if mask is None:
        return np.asarray(resized), None
    rows = (top + (np.arange(height) + 0.5) * share).astype(int)  # the pixel that the centre falls on
    columns = (left + (np.arange(width) + 0.5) * share).astype(int)
    return np.asarray(resized), mask[rows[:, None], columns]


def random_colour(
    image: UInt8[np.ndarray, "H W 3"], most: float, rng: np.random.Generator
) -> Shaped[np.ndarray, "H W 3"]:
    """Brightness, contrast and saturation, each multiplied by a factor drawn from [1 - most, 1 + most]."""
    brightness, contrast, saturation = rng.uniform(1 - most, 1 + most, 3)
    picture = Image.fromarray(image)
    grey = picture.convert("L")
    mean = np.asarray(grey).mean()
    picture = Image.blend(grey.convert("RGB"), picture, saturation)
    table = np.clip((np.arange(256) - mean) * (contrast * brightness) + mean * brightness + 0.5, 0, 255).astype(
        np.uint8
    )
    return np.asarray(picture.point(table.tolist() * 3))
