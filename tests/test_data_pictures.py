"""Pictures and masks of every kind: ids as stored, upright, only the promised formats, bounded."""

import io
import pathlib
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from dynjax.data.pictures import MOST_PIXELS, BadFile, read_image, read_mask


def packed(ids, bits):
    """Rows of pixels of so many bits, filled up to whole bytes."""
    return [np.packbits(np.unpackbits(row[:, None].astype(">u2").view(np.uint8), axis=1)[:, -bits:]) for row in ids]


def png(ids, bits, colours=0, width=None):
    """A PNG of one channel: grey, or with `colours` 3 a palette."""
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed(ids, bits)))
    header = struct.pack(">IIBBBBB", width or ids.shape[1], ids.shape[0], bits, colours, 0, 0, 0)
    parts = [(b"IHDR", header), *([(b"PLTE", bytes(range(3)) * 2**bits)] if colours else []), (b"IDAT", rows)]
    chunks = [(name, content) for name, content in [*parts, (b"IEND", b"")]]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def tiff(ids, bits, photometric):
    """A TIFF without compression; `photometric` 0 says that 0 is white, 1 that it is black."""
    rows = b"".join(row.tobytes() for row in (packed(ids, bits) if bits < 16 else ids.astype("<u2")))
    rows += b"\0" * (len(rows) % 2)
    height, width = ids.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(rows)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_ids_are_read_as_stored(bits):
    ids = np.arange(15).reshape(3, 5) % min(2**bits, 15)
    files = {"grey": png(ids, bits), "0 is white": tiff(ids, bits, 0), "0 is black": tiff(ids, bits, 1)}
    if bits < 16:
        files["palette"] = png(ids, bits, colours=3)
    for name, content in files.items():
        np.testing.assert_array_equal(read_mask(io.BytesIO(content), name), ids, err_msg=name)
    if bits < 16:  # as a picture, white is white
        grey = np.round(ids * 255 / (2**bits - 1))[..., None]
        for name, right in (("grey", grey), ("0 is white", 255 - grey)):
            np.testing.assert_array_equal(read_image(io.BytesIO(files[name]), name), np.tile(right, 3), err_msg=name)


def test_compressed_and_bitmap_masks(tmp_path):
    ids = (np.arange(15).reshape(3, 5) % 4).astype(np.uint8)
    Image.fromarray(255 - ids).save(tmp_path / "a.tif", compression="tiff_lzw", tiffinfo={262: 0})  # Pillow inverts it
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), ids)
    Image.fromarray(ids).save(tmp_path / "a.bmp")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.bmp"), ids)
    content = (tmp_path / "a.bmp").read_bytes()
    (tmp_path / "few.bmp").write_bytes(content[:28] + struct.pack("<H", 4) + content[30:])  # 4 bits, a grey palette
    with pytest.raises(BadFile, match=r"few\.bmp: a BMP mask stored as L: save it with 8 bits a pixel"):
        read_mask(tmp_path / "few.bmp")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "lossy.tif", compression="jpeg")
    with pytest.raises(BadFile, match=r"lossy\.tif: a mask must be lossless, this one is compressed by"):
        read_mask(tmp_path / "lossy.tif")


@pytest.mark.parametrize("turn", range(9))
def test_pictures_and_masks_stand_upright(tmp_path, turn):
    upright = np.random.default_rng(0).integers(0, 9, (4, 6), np.uint8)
    # What a camera held that way stores, by the EXIF standard's words for row 0 and column 0.
    stored = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, 3),
    }.get(turn, upright)
    exif = Image.Exif()
    exif[0x0112] = turn
    picture = Image.fromarray(np.dstack([stored * 20] * 3))
    for name in ("a.png", "a.tif", "a.webp"):
        picture.save(tmp_path / name, exif=exif, lossless=True)
        np.testing.assert_array_equal(read_image(tmp_path / name)[..., 0], upright * 20, err_msg=name)
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert read_image(tmp_path / "a.jpg").shape == (4, 6, 3)
    for name in ("m.png", "m.tif"):
        Image.fromarray(stored).save(tmp_path / name, exif=exif)
        np.testing.assert_array_equal(read_mask(tmp_path / name), upright, err_msg=name)


def test_damaged_exif_data_cost_no_picture(tmp_path):
    Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(tmp_path / "a.png", exif=b"Exif\0\0XX*\0nonsense")
    assert (read_image(tmp_path / "a.png") == 7).all()


def test_a_picture_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(BadFile, match=r"a\.png: not a picture that can be read as PNG, JPEG, BMP, TIFF or WEBP"):
        read_image(file)
    with pytest.raises(BadFile, match=r"a\.png: not a picture that can be read as PNG, BMP or TIFF"):
        read_mask(file)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("form", ["GIF", "PPM", "ICO"])
def test_other_formats_under_these_names(tmp_path, form):
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.png", form)
    for read in (read_image, read_mask):
        with pytest.raises(BadFile, match="not a picture that can be read as"):
            read(tmp_path / "a.png")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.png", "JPEG")
    assert read_image(tmp_path / "a.png").shape == (16, 16, 3)
    with pytest.raises(BadFile, match="not a picture that can be read as PNG, BMP or TIFF"):
        read_mask(tmp_path / "a.png")


@pytest.mark.parametrize("width", [MOST_PIXELS + 1, 2 * 89_478_485 + 1, 2**31 - 1])
def test_pixels_are_counted_before_they_are_decoded(width):
    content = png(np.zeros((1, 8), int), 8, width=width)
    limit = Image.MAX_IMAGE_PIXELS
    for read in (read_image, read_mask):
        with pytest.raises(BadFile, match=rf"x: {width}x1 are {width / 1e6:.0f} megapixels, more than the 89 that"):
            read(io.BytesIO(content), "x")
    assert Image.MAX_IMAGE_PIXELS == limit


def test_large_pictures_give_no_warning():
    content = png(np.zeros((1, 8), int), 8, width=MOST_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadFile, match="truncated"):  # its pixels are asked for
            read_mask(io.BytesIO(content), "x")


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_pictures_of_several_frames_or_pages(tmp_path, suffix):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 90, 180)]
    file = tmp_path / f"a.{suffix}"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    with pytest.raises(BadFile, match=rf"a\.{suffix}: a \w+ of several pictures \(animated, or of many pages\)"):
        read_image(file)
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "phone.jpg") == 0).all()


def test_what_is_no_regular_file(tmp_path):
    with pytest.raises(BadFile, match="no regular file"):
        read_image(tmp_path)


def test_pictures_are_opened_in_one_place():
    root = pathlib.Path(__file__).parents[1]
    files = [file for folder in ("dynjax", "experiments", "benchmarks") for file in (root / folder).rglob("*.py")]
    opening = [file.name for file in files if "Image.open(" in file.read_text()]
    assert len(files) > 50 and opening == ["pictures.py"]
