"""Pictures and masks from files that may be anybody's: only a few formats, a bounded number of pixels, ids as stored.

H, W are a picture's height and width in pixels.
"""

import contextlib
import io
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import ExifTags, Image, ImageFile

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # lossless only: a JPEG blurs class ids
# What these suffixes promise. Left to itself Pillow goes by the content, and hands PostScript to Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
MASK_FORMATS = ("PNG", "BMP", "TIFF")
Stream = io.BufferedReader | io.BytesIO
Colour = tuple[int, int, int]
"""Red, green and blue, each 0 to 255."""
MOST_PIXELS = 89_000_000  # 270 MB as RGB; from 89.5 million on Pillow warns of attacks

_LOSSY = ("jpeg", "tiff_jpeg", "webp")  # compressions of a TIFF, by Pillow's names
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PILLOW_LIMIT = threading.Lock()


class BadFile(Exception):
    """One picture, mask or label that cannot be used. The text names the file and what is wrong with it."""


def read_image(file: Path | Stream, name: str = "") -> UInt8[np.ndarray, "H W 3"]:
    """A picture as RGB, upright. Raises BadFile, which calls an open file by `name`."""
    try:
        with open_picture(file) as picture:
            if picture.mode.startswith(("I", "F")):
                raise BadFile(f"pixels of mode {picture.mode}, convert to 8 bits a channel")
            upright = _upright(picture)
            return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except Exception as error:
        raise BadFile(f"{name or file}: {_reason(error, IMAGE_FORMATS)}") from None


def read_mask(file: Path | Stream, name: str = "", hint: str = "") -> Shaped[np.ndarray, "H W"]:
    """Class ids as they are stored, grey or palette, upright. Raises BadFile, which calls an open file by `name` and
    says `hint` where a mask is in colour."""
    return _read_lossless(file, name, lambda picture: _class_ids(picture, hint))


def read_binary_mask(file: Path | Stream, name: str = "") -> UInt8[np.ndarray, "H W"]:
    """1 where a mask is bright, more than half of 255, and 0 elsewhere; masks of 0 and 1 stay, and so does what a
    palette has: 0 and all others. Raises BadFile."""
    return _read_lossless(file, name, _two_classes)


def read_colour_mask(
    file: Path | Stream, ids: Mapping[Colour, int], where: str, name: str = ""
) -> UInt8[np.ndarray, "H W"]:
    """The id of every pixel's colour. Raises BadFile, also for a colour that has none; `where` says whose they are."""
    colours = _read_lossless(file, name, _colours).astype(np.int32) @ (1 << 16, 1 << 8, 1)
    known = np.array(sorted((red << 16 | green << 8 | blue, ids[red, green, blue]) for red, green, blue in ids))
    places = np.searchsorted(known[:, 0], colours).clip(max=len(known) - 1)
    if (strange := colours[known[places, 0] != colours]).size:
        found, counts = np.unique(strange, return_counts=True)
        most = f"#{found[counts.argmax()]:06x} ({counts.max()})"
        raise BadFile(
            f"{name or file}: {strange.size} pixels of {len(found)} colours that {where} does not have, most of them "
            f"{most}; colours must be exact, and ignored pixels have the colour of a line `ignore #rrggbb` there"
        )
    return known[places, 1].astype(np.uint8)


def _read_lossless(file: Path | Stream, name: str, of: Callable[[ImageFile.ImageFile], np.ndarray]) -> np.ndarray:
    if isinstance(file, Path) and file.suffix.lower() not in MASK_SUFFIXES:
        raise BadFile(f"{file}: a mask must be lossless, one of {' '.join(MASK_SUFFIXES)}")
    try:
        with open_picture(file, MASK_FORMATS) as picture:
            if picture.info.get("compression") in _LOSSY:
                raise BadFile(f"a mask must be lossless, this one is compressed by {picture.info['compression']}")
            return of(picture)
    except Exception as error:
        raise BadFile(f"{name or file}: {_reason(error, MASK_FORMATS)}") from None


@contextlib.contextmanager
def open_picture(file: Path | Stream, formats: tuple[str, ...] = IMAGE_FORMATS) -> Iterator[ImageFile.ImageFile]:
    """A picture of which only the header is read: one of `formats`, not too large, and alone in its file.

    Raises BadFile, without the file's name, and whatever Pillow raises.
    """
    if isinstance(file, Path):
        if file.exists() and not file.is_file():
            raise BadFile("no regular file")
        # As a stream: what has a name Pillow maps into memory, a turned TIFF in the wrong shape.
        with file.open("rb") as stream, open_picture(stream, formats) as picture:
            yield picture
        return
    with _PILLOW_LIMIT:  # what is too large is said here, in our words
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with picture:
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise BadFile(
                f"{width}x{height} are {width * height / 1e6:.0f} megapixels, more than the {MOST_PIXELS / 1e6:.0f} "
                "that are read; make it smaller"
            )
        # The further pictures of an MPO, which cameras write as .jpg, are thumbnails or depths of the first.
        if getattr(picture, "is_animated", False) and picture.format != "MPO":
            raise BadFile(
                f"a {picture.format} of several pictures (animated, or of many pages); save one of them alone"
            )
        yield picture


def _reason(error: Exception, formats: tuple[str, ...]) -> str:
    """Decoders raise OSError, ValueError, SyntaxError, struct.error and more."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a picture that can be read as {', '.join(formats[:-1])} or {formats[-1]}"
    return one_line(error)


def one_line(error: Exception) -> str:
    """What an exception says, without its line ends and at most 300 characters; its name where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as the EXIF data say."""
    picture.load()  # a TIFF turns itself here, and drops the tag
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data say nothing; the pixels are whole
        return picture
    return picture if turn is None else picture.transpose(turn)


def _colours(picture: ImageFile.ImageFile) -> np.ndarray:
    if picture.mode not in ("1", "L", "P", "RGB", "RGBA"):
        raise BadFile(f"mask has pixels of mode {picture.mode}, colours need 8 bits a channel (RGB)")
    return np.asarray(_upright(picture).convert("RGB"))


def _two_classes(picture: ImageFile.ImageFile) -> np.ndarray:
    if picture.mode not in ("1", "L", "P", "RGB", "RGBA"):
        raise BadFile(f"mask has pixels of mode {picture.mode}, two classes need 8 bits (0 and 255)")
    upright = _upright(picture)
    if upright.mode == "P":
        return (np.asarray(upright) > 0).astype(np.uint8)
    bright = np.asarray(upright.convert("L"))
    return (bright > (127 if bright.max() > 1 else 0)).astype(np.uint8)


def _class_ids(picture: ImageFile.ImageFile, hint: str) -> np.ndarray:
    if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise BadFile(f"mask has pixels of mode {picture.mode}, class ids need one channel (grey or palette){hint}")
    scale, inverted = _stored_as(picture)
    ids = np.asarray(_upright(picture))
    if ids.dtype == bool:
        ids = ids.astype(np.uint8)
        return 1 - ids if inverted else ids
    return (255 - ids if inverted else ids) // scale if scale > 1 or inverted else ids


def _stored_as(picture: ImageFile.ImageFile) -> tuple[int, bool]:
    """By how much Pillow multiplies grey values while it reads, and whether it inverts them first.

    Grey of 2 and 4 bits is spread over 0 to 255, and in a TIFF 0 may stand for white: right for pictures, not for ids.
    """
    arguments = picture.tile[0].args if picture.tile else ""
    raw = str(arguments[0] if isinstance(arguments, tuple) else arguments)
    known = re.fullmatch(r"(1|L|P)(?:;([124])?(I?)R?)?|I(?:;\d+[A-Z]*)?", raw)
    if not known or (picture.format == "BMP" and not _bmp_bits_fit(picture, raw)):
        raise BadFile(f"a {picture.format} mask stored as {raw}: save it with 8 bits a pixel")
    mode, bits, inverted = known.groups()
    return {"2": 85, "4": 17}.get(bits, 1) if mode == "L" else 1, inverted == "I"


def _bmp_bits_fit(picture: ImageFile.ImageFile, raw: str) -> bool:
    """Whether a BMP has the bits a pixel that Pillow takes it to have: by a grey palette it may be misled."""
    file = picture.fp
    assert file is not None  # it is open until the pixels are read
    place = file.tell()
    file.seek(28)
    bits = int.from_bytes(file.read(2), "little")
    file.seek(place)
    return bits == {"1": 1, "P;1": 1, "P;4": 4}.get(raw, 8)
