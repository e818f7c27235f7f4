"""Random changes of training pictures: crop, flip, colour, pad-and-crop, cutout. What is drawn, and what is done.

All pictures, films and masks of an example change alike, films frame by frame; texts and labels stay. N is the number
of pictures or frames; H, W are height and width in pixels.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped, UInt8
from PIL import Image

from dynjax.config import AugmentConfig, UserError
from dynjax.data.pictures import Colour
from dynjax.data.source import IGNORED, Size, Source, read, size_of


def check_augment(config: AugmentConfig, size: Size) -> None:
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
class Changes:
    """What was drawn for each of N pictures; None for what is turned off."""

    crops: Float[np.ndarray, "N 3"] | None = None
    """The share of the sides that is kept, and the window's top and left in pixels."""
    flips: Bool[np.ndarray, " N"] | None = None
    colours: Float[np.ndarray, "N 3"] | None = None
    """Factors of brightness, contrast and saturation."""
    offsets: Integer[np.ndarray, "N 2"] | None = None
    centres: Integer[np.ndarray, "N 2"] | None = None


def draw(
    config: AugmentConfig, size: Size, rng: np.random.Generator, count: int = 1, part: slice | None = None
) -> Changes:
    """What happens to one example or, with `part`, to the examples of a batch of `count` that lie in it.

    Random numbers are drawn for the whole batch, so that a picture changes alike whatever the number of processes.
    """
    own = [rng]
    if part is None:
        part = slice(None)
    elif config.crop < 1 or config.colour > 0:  # each from a generator of its own
        own = [np.random.default_rng(seed) for seed in rng.integers(2**63, size=count)[part].tolist()]
    low, high = 1 - config.colour, 1 + config.colour
    return Changes(
        crops=np.stack([draw_crop(config.crop, size, each) for each in own]) if config.crop < 1 else None,
        flips=rng.uniform(size=count)[part] < 0.5 if config.flip else None,
        colours=np.stack([each.uniform(low, high, 3) for each in own]) if config.colour > 0 else None,
        offsets=rng.integers(0, 2 * config.pad + 1, (count, 2))[part] if config.pad else None,
        centres=rng.integers(0, size, (count, 2))[part] if config.cutout else None,
    )


def draw_crop(smallest: float, size: Size, rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    """A window whose sides are one share, drawn from [smallest, 1], of the picture's; it lies anywhere inside."""
    share = rng.uniform(smallest, 1)
    return np.array([share, *(rng.uniform(0, (1 - share) * side) for side in size)])


@dataclasses.dataclass(frozen=True)
class Augment:
    """Transformations for grain's `random_map`, of examples or, with `batch`, of batches; shapes stay."""

    config: AugmentConfig
    size: Size
    fills: dict[str, Colour | None]
    """Colours of the cutout in pictures and films; None for masks, which have none."""

    @classmethod
    def of(cls, config: AugmentConfig, source: Source) -> "Augment":
        """For a source that has pictures, films or masks. Raises UserError."""
        fields, size = {key: field for key, field in source.spec.items() if field.pixels}, size_of(source)
        if any(field.pixels != size for field in fields.values()):
            found = ", ".join(f"{key} {field.shape}" for key, field in fields.items())
            raise UserError(f"{source.name} has {found}: what is augmented together must be of one size")
        check_augment(config, size)
        fills: dict[str, Colour | None] = {key: None if fields[key].role == "mask" else (0, 0, 0) for key in fields}
        if config.cutout:
            fills = {key: fill and mean_colour(source, key) for key, fill in fills.items()}
        return cls(dataclasses.replace(config, flip=config.flip and not source.handed), size, fills)

    def __call__(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        changes, found = draw(self.config, self.size, rng), {}
        for key, fill in self.fills.items():
            frames = example[key].reshape(-1, *self.size, *(() if fill is None else (3,)))
            every = {name: None if a is None else a.repeat(len(frames), 0) for name, a in vars(changes).items()}
            found[key] = self._changed(frames, fill, Changes(**every)).reshape(example[key].shape)
        return {**example, **found}

    def batch(
        self, batch: dict[str, np.ndarray], rng: np.random.Generator, count: int, part: slice
    ) -> dict[str, np.ndarray]:
        """A batch of pictures that are the `part` of a batch of `count`."""
        changes = draw(self.config, self.size, rng, count, part)
        return {**batch, **{key: self._changed(batch[key], fill, changes) for key, fill in self.fills.items()}}

    def _changed(self, frames: Shaped[np.ndarray, "N H W ..."], fill: Colour | None, changes: Changes) -> np.ndarray:
        """Frames of a picture, a film or a mask; a mask keeps its classes, and is ignored where there is padding."""
        if changes.crops is not None:
            frames = np.stack([crop(*pair) for pair in zip(frames, changes.crops, strict=True)])
        if changes.flips is not None:
            turned = changes.flips.reshape(-1, *(1 for _ in frames.shape[1:]))
            frames = np.where(turned, frames[:, :, ::-1], frames)
        if changes.colours is not None and fill is not None:
            frames = np.stack([colour(*pair) for pair in zip(frames, changes.colours, strict=True)])
        if changes.offsets is not None:
            frames = shift(frames, changes.offsets, self.config.pad, IGNORED if fill is None else 0)
        if changes.centres is not None and fill is not None:
            frames = cut_out(frames, changes.centres, self.config.cutout, fill)
        return np.ascontiguousarray(frames)


def shift(
    images: Shaped[np.ndarray, "N H W ..."], offsets: Integer[np.ndarray, "N 2"], pad: int, fill: int = 0
) -> Shaped[np.ndarray, "N H W ..."]:
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
    images: UInt8[np.ndarray, "N H W 3"], centres: Integer[np.ndarray, "N 2"], side: int, fill: Colour
) -> UInt8[np.ndarray, "N H W 3"]:
    """A square of `side` pixels around each centre takes the colour `fill`; what lies outside the picture is lost.

    DeVries and Taylor 2017: centres anywhere, and zero after the mean of the data was subtracted, so its mean before.
    """
    images = images.copy()
    for index, (y, x) in enumerate((centres - side // 2).tolist()):
        images[index, max(0, y) : y + side, max(0, x) : x + side] = fill
    return images


def mean_colour(source: Source, key: str, examples: int = 256) -> Colour:
    """Mean of so many pictures or films, spread evenly over a source, rounded."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(examples, len(source))).astype(int)).tolist()
    means = [each.mean(tuple(range(each.ndim - 1))) for each in (read(source, index)[key] for index in indices)]
    red, green, blue = np.mean(means, axis=0).round().astype(int).tolist()
    return red, green, blue


def crop(frame: Shaped[np.ndarray, "H W ..."], window: Float[np.ndarray, "3"]) -> Shaped[np.ndarray, "H W ..."]:
    """A window of a picture, or of a mask by its nearest pixels, resized back to the whole; see `Changes.crops`."""
    (height, width), (share, top, left) = frame.shape[:2], window.tolist()
    if frame.ndim == 2:
        rows = (top + (np.arange(height) + 0.5) * share).astype(int)  # the pixel that the centre falls on
        columns = (left + (np.arange(width) + 0.5) * share).astype(int)
        return frame[rows[:, None], columns]
    box = (left, top, left + share * width, top + share * height)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box=box))


def colour(frame: UInt8[np.ndarray, "H W 3"], factors: Float[np.ndarray, "3"]) -> Shaped[np.ndarray, "H W 3"]:
    """Brightness, contrast and saturation, each multiplied by its factor."""
    brightness, contrast, saturation = factors
    picture = Image.fromarray(frame)
    grey = picture.convert("L")
    mean = np.asarray(grey).mean()
    picture = Image.blend(grey.convert("RGB"), picture, saturation)
    table = np.clip((np.arange(256) - mean) * (contrast * brightness) + mean * brightness + 0.5, 0, 255)
    return np.asarray(picture.point(table.astype(np.uint8).tolist() * 3))
