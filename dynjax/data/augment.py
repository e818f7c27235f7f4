"""Random changes of a training picture and its mask: flip, crop, colour. Pure functions of both and a generator."""

import dataclasses

import numpy as np
from jaxtyping import Int32, Shaped, UInt8
from PIL import Image

from dynjax.config import AugmentConfig, UserError


def check_augment(config: AugmentConfig) -> None:
    """Raises UserError for values out of range."""
    if not 0 < config.crop <= 1:
        raise UserError(f"data.augment.crop={config.crop} is outside (0, 1]: it is a share of the picture's side")
    if not 0 <= config.colour <= 1:
        raise UserError(f"data.augment.colour={config.colour} is outside [0, 1]")


@dataclasses.dataclass(frozen=True)
class Augment:
    """A transformation for grain's `random_map`: {"image", "mask"} to the same, of the same shapes."""

    config: AugmentConfig

    def __call__(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image, mask = example["image"], example["mask"]
        if self.config.crop < 1:
            image, mask = random_crop(image, mask, self.config.crop, rng)
        if self.config.flip and rng.uniform() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        if self.config.colour > 0:
            image = random_colour(image, self.config.colour, rng)
        return {**example, "image": np.ascontiguousarray(image), "mask": np.ascontiguousarray(mask)}


def random_crop(
    image: UInt8[np.ndarray, "H W 3"], mask: Int32[np.ndarray, "H W"], smallest: float, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "H W 3"], Int32[np.ndarray, "H W"]]:
    """A window whose sides are one share, drawn from [smallest, 1], of the picture's, resized back to the whole."""
    height, width = mask.shape
    share = rng.uniform(smallest, 1)
    top, left = rng.uniform(0, (1 - share) * height), rng.uniform(0, (1 - share) * width)
    box = (left, top, left + share * width, top + share * height)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box=box)
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
