"""Image files of every kind, read into the arrays that a model receives, and folders that hold them."""

import io
import os
import socket
import struct
import subprocess
import sys
import tarfile
import types
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from pictures import STORED_AS
from PIL import Image, ImageFile
from PIL.Image import Transpose
from sklearn.datasets import load_sample_image

from era_s10 import images
from era_s10.datasets.generic import MyDataSet
from era_s10.images import (
    FITS,
    convert_channels,
    is_stray,
    read_image,
    resize_image,
    to_pixels,
)

FLOWER = Image.fromarray(load_sample_image("flower.jpg"))
PHOTO = FLOWER.crop((100, 50, 500, 350)).resize((64, 48))
unix = pytest.mark.skipif(sys.platform == "win32", reason="no such files there")


def encode(image: Image.Image, form: str, **options) -> bytes:
    "Return the content of an image file."
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(
    shape: tuple[int, int],  # height and width
    bits: int,  # per channel
    color: int,  # color type of the format: 0 is grayscale, 2 RGB, 4 and 6 with alpha
    rows: bytes,  # pixels, without filter bytes
    **chunks: bytes,  # other chunks, before the pixels
) -> bytes:  # content of the file
    "Write a PNG of a kind that Pillow reads but does not write."

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    height, width = shape
    step = len(rows) // height
    lines = b"".join(b"\0" + rows[i * step : (i + 1) * step] for i in range(height))
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [chunk(b"IHDR", head)]
    parts += [chunk(name.encode(), content) for name, content in chunks.items()]
    parts += [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tree(folder: Path, content: bytes, suffix: str = ".png") -> Path:
    "Write train/ and test/ with two classes of one image each."
    for part in ("train", "test"):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            (folder / part / name / f"0{suffix}").write_bytes(content)
    return folder


# ---------------------------------------------------------------- color modes

RAMP = np.tile(np.linspace(0, 65535, 28).astype(np.uint16), (28, 1))
FLOATS = RAMP.astype(np.float32)
RAMPS = {
    "P1": Image.fromarray(RAMP),
    "I;16 TIFF": Image.fromarray(RAMP),
    "I;16B TIFF": Image.fromarray(RAMP.astype(">u2")),
    "I TIFF": Image.fromarray(RAMP.astype(np.int32)),
    "PGM": Image.fromarray(RAMP.astype(np.int32)),
    "F to 1": Image.fromarray(FLOATS / 65535),
    "F to 255": Image.fromarray(FLOATS / 257),
    "F to 65535": Image.fromarray(FLOATS),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", RAMPS)
def test_deep_grayscale_is_scaled_to_8_bits(kind, channels, tmp_path):
    form = {"P1": "PNG", "PGM": "PPM"}.get(kind, "TIFF")
    (tmp_path / "ramp").write_bytes(encode(RAMPS[kind], form))
    pixels = read_image(tmp_path / "ramp", channels)
    assert pixels.shape == (28, 28, channels) and pixels.dtype == np.uint8
    assert pixels[5, [0, 7, 14, 21, 27], -1].tolist() == [0, 66, 132, 198, 255]


@pytest.mark.parametrize("top", [1, 100, 255, 4095, 65535, 2**20])
@pytest.mark.parametrize("form", ["TIFF", "BigTIFF", "FITS", "memory"])
def test_32_bit_integers_hold_values_of_8_or_16_bits(form, top, tmp_path):
    stored = np.linspace(0, top, 64).round().astype(np.int32).reshape(8, 8)
    path, image = tmp_path / "image", Image.fromarray(stored)
    if form == "memory":
        pixels = to_pixels(image, 1)
    else:
        content = fits(stored) if form == "FITS" else encode(image, "TIFF", big_tiff=form == "BigTIFF")  # fmt: skip
        path.write_bytes(content)
        assert Image.open(path).mode == "I"
        if form == "FITS" and int(PIL.__version__.split(".")[0]) < 13:
            with pytest.raises(ValueError, match="wrong order; install pillow>=13"):
                read_image(path, 1)
            return
        pixels = read_image(path, 1)
    white = 255 if top <= 255 else max(top, 65535)
    expected = (stored * (255 / white)).astype(np.uint8)
    assert np.abs(pixels[..., 0].astype(int) - expected[:: -1 if form == "FITS" else 1]).max() <= 1  # fmt: skip


def fits(values: np.ndarray) -> bytes:
    "Return a FITS file with 32-bit integers."
    height, width = values.shape
    cards = {"SIMPLE": "T", "BITPIX": 32, "NAXIS": 2, "NAXIS1": width, "NAXIS2": height}
    lines = [f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items()]
    head = "".join([*lines, "END".ljust(80)]).ljust(2880)
    return head.encode() + values.astype(">i4").tobytes()


def tiff(values: np.ndarray, bits: int, kind: int = 1) -> bytes:
    "Return a TIFF file with integers of 12, 16 or 32 bits; kind 2 is signed."
    height, width = values.shape
    if bits == 12:
        first, second = values.reshape(-1, 2).astype(np.uint32).T
        triples = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
        data = np.stack(triples, 1).astype(np.uint8).tobytes()
    else:
        data = values.astype(f"<{'ui'[kind - 1]}{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1}
    tags |= {278: height, 279: len(data), 339: kind}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    directory = [struct.pack("<H", len(tags)), *entries, struct.pack("<I", 0)]
    return head + data + b"".join(directory)


@pytest.mark.parametrize(
    ("bits", "kind", "white"), [(12, 1, 4095), (16, 1, 65535), (16, 2, 65535)]
)
@pytest.mark.parametrize("top", [200, 4095])
def test_12_and_16_bits_are_not_scaled_by_their_content(
    bits, kind, white, top, tmp_path
):
    stored = np.linspace(0, top, 64).round().astype(int).reshape(8, 8)
    (tmp_path / "image").write_bytes(tiff(stored, bits, kind))
    pixels = read_image(tmp_path / "image", 1)[..., 0]
    assert (pixels == (stored * (255 / white)).astype(np.uint8)).all()


@pytest.mark.parametrize("form", ["PNG", "PGM", "plain PGM", "JPEG 2000"])
def test_dark_files_of_16_bits_stay_dark(form, tmp_path):
    dark = np.full((40, 40), 250, np.uint16)
    if form == "plain PGM":
        values = " ".join(map(str, dark.flatten()))
        content = f"P2 40 40 65535 {values}".encode()
    else:
        names = {"PGM": "PPM", "JPEG 2000": "JPEG2000"}
        content = encode(Image.fromarray(dark), names.get(form, form))
    (tmp_path / "image").write_bytes(content)
    assert read_image(tmp_path / "image").max() == 0
    with Image.open(tmp_path / "image") as image:  # as other versions of Pillow open it
        other = image.convert("I")
        other.format = image.format
    if form != "JPEG 2000":
        assert to_pixels(other).max() == 0


def test_a_folder_of_16_bit_images_is_scaled_like_a_single_file(tmp_path):
    tree(tmp_path / "P1", encode(RAMPS["P1"], "PNG"))
    data = MyDataSet(tmp_path / "P1", size=None)
    assert data.x_train[0, 5, [0, 7, 14, 21], 0].tolist() == [0, 66, 132, 198]
    assert (data.x_test[0] == read_image(tmp_path / "P1/test/a/0.png")).all()


def cross(mode: str) -> Image.Image:
    "Return a black cross on a transparent ground whose hidden color is black."
    icon = np.zeros((32, 32, 4), np.uint8)
    icon[14:18, :, 3] = icon[:, 14:18, 3] = 255
    image = Image.fromarray(icon)
    if mode == "RGBA":
        return image
    if mode == "PA":
        gray = Image.new("P", (32, 32))
        gray.putpalette([0, 0, 0])
        return Image.merge("PA", (gray, image.getchannel("A")))
    return image.convert(mode)


def colorkey(mode: str) -> bytes:
    "Return a PNG of a black cross on a ground whose color is declared transparent."
    ground = np.full((32, 32), 3, np.uint8)
    ground[14:18] = ground[:, 14:18] = 0
    if mode == "I;16":
        deep = Image.fromarray(ground.astype(np.uint16) * 1000)
        return encode(deep, "PNG", transparency=3000)
    if mode == "RGB;16":
        rows = np.stack([ground.astype(int) * 1000] * 3, -1).astype(">u2").tobytes()
        key = np.full(3, 3000, ">u2").tobytes()
        return png((32, 32), 16, 2, rows, tRNS=key)
    if mode in ("L;2", "L;4", "1"):
        bits = {"L;2": 2, "L;4": 4, "1": 1}[mode]
        values = (ground > 0) * (2**bits - 1)
        flat = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)
        rows = np.packbits(flat[..., -bits:].reshape(32, -1), axis=1).tobytes()
        return png((32, 32), bits, 0, rows, tRNS=struct.pack(">H", 2**bits - 1))
    image = Image.fromarray(ground)
    if mode == "P bytes":
        image.putpalette([0, 0, 0] * 4)
        return encode(image, "PNG", transparency=bytes([255, 9, 9, 0]))
    if mode in ("P", "GIF"):
        image.putpalette([0, 0, 0] * 4)
        return encode(image, "GIF" if mode == "GIF" else "PNG", transparency=3)
    key = (3, 3, 3) if mode == "RGB" else 3
    return encode(image.convert(mode), "PNG", transparency=key)


ICONS = {
    "P2": lambda: encode(cross("RGBA"), "PNG"),
    "LA": lambda: encode(cross("LA"), "PNG"),
    "LA TIFF": lambda: encode(cross("LA"), "TIFF"),
    "RGBA TIFF": lambda: encode(cross("RGBA"), "TIFF"),
    "RGBA WebP": lambda: encode(cross("RGBA"), "WEBP", lossless=True),
    "RGBA AVIF": lambda: encode(cross("RGBA"), "AVIF", quality=100),
    "RGBA ICO": lambda: encode(cross("RGBA"), "ICO", sizes=[(32, 32)]),
    "RGBA TGA": lambda: encode(cross("RGBA"), "TGA"),
    "RGBA BMP": lambda: encode(cross("RGBA"), "DDS"),
    "16-bit RGBA": lambda: png(
        (32, 32), 16, 6, (np.asarray(cross("RGBA")).astype(">u2") * 257).tobytes()
    ),
    "16-bit LA": lambda: png(
        (32, 32), 16, 4, (np.asarray(cross("LA")).astype(">u2") * 257).tobytes()
    ),
    **{
        f"color key {mode}": lambda mode=mode: colorkey(mode)
        for mode in (
            *("L", "RGB", "P", "P bytes", "GIF", "I;16", "RGB;16", "L;2", "L;4", "1"),
        )
    },
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ICONS)
def test_transparent_pixels_are_white(kind, channels, tmp_path):
    (tmp_path / "icon").write_bytes(ICONS[kind]())
    for size in (None, 32, 16):
        pixels = read_image(tmp_path / "icon", channels, size).astype(int)
        side = size or 32
        assert pixels.shape == (side, side, channels)
        assert pixels[1, 1].min() > 250, "the ground"
        assert pixels[side // 2, side // 2].max() < 5, "the cross"


def test_premultiplied_and_palette_alpha_are_composited(tmp_path):
    for mode in ("PA", "La", "RGBa"):
        image = cross("LA").convert("La") if mode == "La" else cross(mode)
        for channels in (1, 3):
            pixels = np.asarray(images.convert_image(image, channels))
            assert pixels[0, 0].min() == 255 and pixels[16, 16].max() == 0, mode


def test_a_folder_of_icons_is_drawn_on_white(tmp_path):
    tree(tmp_path / "P2", encode(cross("RGBA"), "PNG"))
    x = MyDataSet(tmp_path / "P2").x_train[0]
    assert x[0, 0].tolist() == [255] * 3 and x[16, 16].tolist() == [0] * 3


MODES = ("1", "L", "P", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")


@pytest.mark.parametrize("mode", MODES)
def test_every_color_mode_is_converted(mode):
    image = PHOTO.convert(mode)
    for channels in (1, 3):
        wanted, original = {1: "L", 3: "RGB"}[channels], PHOTO
        if mode in ("1", "L", "P"):  # Pillow itself converts these to both
            original = image
        plain = np.asarray(original.convert(wanted)).astype(int)
        found = np.asarray(images.convert_image(image, channels)).astype(int)
        assert found.shape == plain.shape
        assert abs(found - plain).mean() < (4 if original is PHOTO else 1e-9)


TIFFS = [("CMYK", {}), ("LAB", {}), ("YCbCr", {}), ("RGB", {"compression": "jpeg"})]


@pytest.mark.parametrize("mode, options", TIFFS)
def test_tiff_files_of_all_color_spaces(mode, options, tmp_path):
    (tmp_path / "photo.tif").write_bytes(encode(PHOTO.convert(mode), "TIFF", **options))
    for channels in (1, 3):
        plain = np.asarray(PHOTO.convert({1: "L", 3: "RGB"}[channels])).astype(int)
        found = read_image(tmp_path / "photo.tif", channels).squeeze()
        assert abs(found - plain).mean() < 6


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_files_are_read_as_pillow_reads_them(form, mode, tmp_path):
    (tmp_path / "x").write_bytes(encode(PHOTO.convert(mode), form))
    plain = Image.open(tmp_path / "x")
    assert np.array_equal(read_image(tmp_path / "x"), plain.convert("RGB"))
    gray = read_image(tmp_path / "x", channels=1)
    assert np.array_equal(gray[..., 0], plain.convert("L"))


def test_arrays_are_converted_like_files(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    gray = convert_channels(np.asarray(PHOTO)[None], 1)[0]
    assert np.array_equal(gray, read_image(tmp_path / "photo.png", channels=1))
    assert (convert_channels(gray[None], 3)[0] == gray).all()


# ---------------------------------------------------------------- orientation


def oriented(image: Image.Image, value: int) -> dict:
    "Return the image as stored and its EXIF data, as arguments of `encode`."
    exif = Image.Exif()
    exif[0x0112] = value
    stored = image.transpose(STORED_AS[value]) if value in STORED_AS else image
    return {"image": stored, "exif": exif}


@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "MPO"])
def test_orientation_is_applied_once_in_every_format(form, value, tmp_path):
    quality = {"lossless": True} if form == "WEBP" else {"quality": 98}
    options = oriented(PHOTO, value) | ({} if form in ("PNG", "TIFF") else quality)
    try:
        content = encode(options.pop("image"), form, **options)
    except OSError as error:
        pytest.skip(f"this Pillow does not write {form} ({error})")
    (tmp_path / "photo").write_bytes(content)
    for channels in (1, 3):
        plain = np.asarray(PHOTO.convert({1: "L", 3: "RGB"}[channels])).astype(int)
        found = read_image(tmp_path / "photo", channels).squeeze()
        assert abs(found - plain).mean() < 4
    small = read_image(tmp_path / "photo", size=(24, 32))
    assert abs(small - np.asarray(resize_image(PHOTO, (24, 32))).astype(int)).mean() < 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "F", "CMYK"])
def test_orientation_is_applied_in_every_color_mode(mode, tmp_path):
    image = Image.fromarray(RAMP) if mode == "I;16" else PHOTO.convert(mode)
    form = {"CMYK": "JPEG", "F": "TIFF"}.get(mode, "PNG")
    sharp = {"quality": 98, "subsampling": 0} if form == "JPEG" else {}
    (tmp_path / "plain").write_bytes(encode(image, form, **sharp))
    turned = oriented(image, 6)
    content = encode(turned["image"], form, exif=turned["exif"], **sharp)
    (tmp_path / "turned").write_bytes(content)
    plain, found = (read_image(tmp_path / name) for name in ("plain", "turned"))
    assert abs(plain.astype(int) - found).mean() < (3 if form == "JPEG" else 1e-9)


def test_a_folder_of_turned_photos_is_upright(tmp_path):
    square = PHOTO.resize((32, 32))
    turned = oriented(square, 6)
    sharp = {"quality": 98, "subsampling": 0}
    content = encode(turned["image"], "JPEG", exif=turned["exif"], **sharp)
    tree(tmp_path / "P3", content, ".jpg")
    x = MyDataSet(tmp_path / "P3").x_train[0].astype(int)
    assert abs(x - np.asarray(square)).mean() < 3
    assert (x == read_image(tmp_path / "P3/train/a/0.jpg")).all()


def test_orientation_in_xmp_and_damaged_exif_data(tmp_path):
    stored = PHOTO.transpose(Transpose.ROTATE_90)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    sharp = {"quality": 98, "subsampling": 0}
    (tmp_path / "xmp.jpg").write_bytes(encode(stored, "JPEG", xmp=xmp, **sharp))
    junk = {"junk.jpg": b"Exif\0\0MM\0*" + b"\xff" * 50, "none.jpg": b"Exif\0\0"}
    for name, exif in junk.items():
        (tmp_path / name).write_bytes(encode(PHOTO, "JPEG", exif=exif, **sharp))
    for name in ("xmp.jpg", *junk):
        found = read_image(tmp_path / name).astype(int)
        assert abs(found - np.asarray(PHOTO)).mean() < 3, name


# ---------------------------------------------------------------- frames, formats, sizes


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PNG", "WEBP", "AVIF", "MPO"])
def test_the_first_of_several_frames_is_read(form, tmp_path):
    other = Image.new("RGB", PHOTO.size, "red")
    options = {"save_all": True, "append_images": [other, other]}
    options |= {"lossless": True} if form == "WEBP" else {"quality": 95}
    first = PHOTO.quantize(64) if form == "GIF" else PHOTO
    (tmp_path / "frames").write_bytes(encode(first, form, **options))
    assert Image.open(tmp_path / "frames").n_frames > 1
    for size in (None, 32):
        found = read_image(tmp_path / "frames", size=size).astype(int)
        plain = resize_image(PHOTO, 32) if size else PHOTO
        assert abs(found - np.asarray(plain)).mean() < 8


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_the_content_decides_and_not_the_name(form, tmp_path):
    (tmp_path / "plain").write_bytes(encode(PHOTO, form))
    plain = read_image(tmp_path / "plain")
    for name in (
        "photo.jpg",
        "photo.png",
        "photo.tif",
        "photo.gif",
        "photo.txt",
        "a.b",
    ):
        (tmp_path / name).write_bytes((tmp_path / "plain").read_bytes())
        assert np.array_equal(read_image(tmp_path / name), plain), name


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [32, (20, 48), (48, 20), (1, 1), 224])
def test_any_image_fits_any_size(size, fit, tmp_path):
    for shape in ((1, 1), (1, 300), (300, 1), (31, 33), (640, 480), (2000, 9)):
        PHOTO.resize(shape).save(tmp_path / "photo.jpg")
        pixels = read_image(tmp_path / "photo.jpg", size=size, fit=fit)
        expected = (size, size) if isinstance(size, int) else size
        assert pixels.shape == (*expected, 3)


def test_fits_differ_as_documented(tmp_path):
    halves = np.zeros((20, 60, 3), np.uint8)
    halves[:, 20:40], halves[:, 40:] = 90, 180
    Image.fromarray(halves).save(tmp_path / "halves.png")
    crop, pad, stretch = (
        read_image(tmp_path / "halves.png", 1, 30, fit)[..., 0] for fit in FITS
    )
    assert (crop == 90).all()
    assert (pad[[0, 9, 20, 29]] == 255).all()
    assert pad[15, [0, 15, 29]].tolist() == [0, 90, 180]
    assert stretch[:, [0, 15, 29]].tolist() == [[0, 90, 180]] * 30


def test_shrinking_averages_and_enlarging_interpolates(tmp_path):
    checks = np.indices((64, 64)).sum(0) % 2 * 200
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "checks.png")
    assert (read_image(tmp_path / "checks.png", 1, 32) == 100).all()
    edge = np.zeros((2, 2), np.uint8)
    edge[:, 1] = 200
    Image.fromarray(edge).save(tmp_path / "edge.png")
    row = read_image(tmp_path / "edge.png", 1, 8)[0, :, 0]
    assert (np.diff(row.astype(int)) >= 0).all() and len(set(row.tolist())) > 3


def test_large_jpegs_are_decoded_at_a_reduced_size(tmp_path, monkeypatch):
    FLOWER.resize((3200, 2400)).save(tmp_path / "large.jpg", quality=95)
    decoded = []
    convert = images.convert_image
    monkeypatch.setattr(
        images,
        "convert_image",
        lambda image, channels: decoded.append(image.size) or convert(image, channels),
    )
    for size in (32, 64, 224, (100, 500), 1500, None):
        read_image(tmp_path / "large.jpg", size=size)
    sides = [400, 400, 800, 1600, 3200, 3200]
    assert [width for width, _ in decoded] == sides
    # at least twice the size that was asked for is left, or the full size


@pytest.mark.parametrize("form", ["JPEG", "MPO"])
def test_jpegs_of_200_megapixels_are_read_at_a_small_size(form, tmp_path):
    large = Image.new("L", (16_320, 12_240), 90)  # H3, as phones write them
    large.paste(200, (8160, 0, 16_320, 12_240))
    more = {"save_all": True, "append_images": [Image.new("L", (8, 8))]}
    options = more if form == "MPO" else {}
    (tmp_path / "H3.jpg").write_bytes(encode(large, form, quality=60, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(tmp_path / "H3.jpg", size=32)
    assert abs(pixels[:, :15].astype(int) - 90).max() <= 1
    assert abs(pixels[:, 17:].astype(int) - 200).max() <= 1
    with pytest.raises(ValueError, match=r"H3\.jpg: has more than 89,478,485 pixels"):
        read_image(tmp_path / "H3.jpg")


def test_images_of_too_many_pixels_are_refused(tmp_path):
    for name, size in (("a.png", (10_000, 9_000)), ("b.png", (20_000, 20_000))):
        Image.new("1", size).save(tmp_path / name)
        for wanted in (None, 32):
            with pytest.raises(ValueError, match="has more than 89,478,485 pixels"):
                read_image(tmp_path / name, size=wanted)
    content = bytearray(encode(PHOTO, "JPEG"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", 60_000, 60_000)  # only declared
    (tmp_path / "c.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="has more than 357,913,940 pixels"):
        read_image(tmp_path / "c.jpg", size=32)


# ---------------------------------------------------------------- files that are refused


def refusal(path: Path | str, **options) -> str:
    "Return the error of a file, which is one line that begins with its path."
    with pytest.raises(ValueError) as error:
        read_image(path, **options)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def archive(kind: str) -> bytes:
    "Return an archive with a photo in it."
    content, file = encode(PHOTO, "PNG"), io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as bundle:
            bundle.writestr("photo.png", content)
    else:
        with tarfile.open(fileobj=file, mode="w:" + kind.removeprefix("tar")) as bundle:
            info = tarfile.TarInfo("photo.png")
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return file.getvalue()


OTHERS = {
    "a ZIP archive": lambda: archive("zip"),
    "a tar archive": lambda: archive("tar"),
    "a gzip archive": lambda: archive("targz"),
    "a bzip2 archive": lambda: archive("tarbz2"),
    "an xz archive": lambda: archive("tarxz"),
    "a PDF document": lambda: encode(PHOTO, "PDF"),
    "a text file": lambda: b"milk, bread\n",
    "an HTML page": lambda: b"\n<!DOCTYPE html><html>404</html>",
    "an SVG drawing": lambda: b'<?xml version="1.0"?><svg width="9" height="9"/>',
    "a video": lambda: b"\0\0\0\x20ftypisom" + bytes(100),
    "a JPEG XL image": lambda: b"\xff\x0a" + bytes(100),
    "a NumPy array": lambda: b"\x93NUMPY\x01\0" + bytes(100),
    "a thumbnail cache or an Office document": lambda: (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)
    ),
    "a Git LFS pointer; run `git lfs pull`": lambda: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named_for_what_they_are(kind, tmp_path):
    (tmp_path / "photo.png").write_bytes(OTHERS[kind]())
    assert f"(it is {kind})" in refusal(tmp_path / "photo.png")


def test_folders_empty_files_and_links_are_named_for_what_they_are(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "noise.jpg").write_bytes(bytes(range(128, 256)))
    assert refusal(tmp_path / "folder") == "is a folder, not a file"
    assert refusal(tmp_path / "empty.jpg") == "is empty (0 bytes)"
    assert refusal(tmp_path / "none.jpg") == "file not found"
    assert refusal(tmp_path / "empty.jpg" / "x.jpg") == "file not found"
    assert "not an image in a format" in refusal(tmp_path / "noise.jpg")
    assert "can't be read" in refusal("null\0.png")


@unix
def test_pipes_sockets_devices_and_broken_links_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "to_pipe.png").symlink_to("pipe.png")
    assert refusal(tmp_path / "pipe.png") == "is a named pipe, not a file"
    assert refusal(tmp_path / "to_pipe.png") == "is a named pipe, not a file"
    assert refusal(tmp_path / "broken.png") == "is a broken link to nowhere.png"
    assert "can't be read" in refusal(tmp_path / "loop.png")
    assert refusal("/dev/zero") == "is a device, not a file"
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket must be short
        try:
            server.bind("socket.png")
        finally:
            os.chdir(here)
        assert refusal(tmp_path / "socket.png") == "is a socket, not a file"


@unix
@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read"
)
def test_a_file_without_permission_is_refused(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    (tmp_path / "photo.png").chmod(0)
    assert refusal(tmp_path / "photo.png") == "no permission to read it"


CUT = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "AVIF", "JPEG2000"]


@pytest.mark.parametrize("form", CUT)
def test_truncated_files_are_refused(form, tmp_path):
    content = encode(FLOWER.resize((200, 150)), form)
    path = tmp_path / "cut"
    for share in (0.02, 0.3, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        for size in (None, 32):
            assert refusal(path, size=size)


def test_every_flipped_bit_of_a_png_is_noticed(tmp_path):
    content = encode(PHOTO.resize((8, 6)), "PNG")
    path = tmp_path / "flipped.png"
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refusal(path)


def test_damaged_files_raise_one_kind_of_error(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for form in ("JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA", "MPO"):
        content = encode(PHOTO, form)
        for _ in range(60):
            damaged = bytearray(content)
            for position in random.integers(0, min(300, len(content)), 3):
                damaged[position] = random.integers(256)
            path.write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    pixels = read_image(path, size=32)
                    assert pixels.shape == (32, 32, 3)
                except ValueError as error:
                    assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
def test_an_open_file_is_read_like_a_path(kind, tmp_path):
    image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "image"
    image.save(path, kind, **({} if kind == "GIF" else {"exif": exif}))
    content = path.read_bytes()
    for options in ({}, {"size": 32}, {"size": (20, 30), "fit": "pad", "channels": 1}):
        expected = read_image(path, **options)
        assert np.array_equal(read_image(io.BytesIO(content), **options), expected)
    with pytest.raises(ValueError, match=r"^image: "):
        read_image(io.BytesIO(content[:30]))


def test_arguments_are_checked_before_the_file_is_opened():
    for options, message in (
        ({"channels": 4}, r"channels must be 1 or 3 \(got 4\)"),
        ({"size": 0}, r"size must be an integer from 1 to 4096 \(got 0\)"),
        ({"size": (32, -1)}, r"size must be an integer from 1 to 4096 \(got -1\)"),
        ({"size": (32, 32, 3)}, "size must be a number of pixels, or height and width"),
        ({"size": 32.5}, "size must be"),
        ({"fit": "letterbox"}, "unknown fit 'letterbox'; choose one of crop, pad"),
    ):
        with pytest.raises(ValueError, match=message):
            read_image("nowhere.png", **options)


def test_reading_changes_no_setting_of_pillow(tmp_path):
    (tmp_path / "heic.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    PHOTO.save(tmp_path / "photo.png")
    read_image(tmp_path / "photo.png")
    before = dict(Image.OPEN), Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    refusal(tmp_path / "heic.jpg")
    read_image(tmp_path / "photo.png", size=32)
    assert (dict(Image.OPEN), Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# ---------------------------------------------------------------- HEIC


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1"])
def test_heic_is_named_where_pillow_heif_is_not_installed(brand, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    message = refusal(tmp_path / "IMG_1.HEIC")
    assert message == "is a HEIC image; install pillow-heif, or convert it to JPEG"


def test_heic_is_read_with_pillow_heif(tmp_path, monkeypatch):
    turned = oriented(PHOTO, 6)
    decoded = turned["image"].copy()
    decoded.info["exif"] = turned["exif"].tobytes()
    opened = types.SimpleNamespace(size=decoded.size, to_pillow=lambda: decoded)
    fake = types.SimpleNamespace(open_heif=lambda file: opened)
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    assert np.array_equal(read_image(tmp_path / "IMG_1.HEIC"), PHOTO)
    opened.size = (20_000, 20_000)
    assert "has more than" in refusal(tmp_path / "IMG_1.HEIC")


def test_a_real_heic_file_is_read(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    turned = oriented(PHOTO, 6)
    exif = turned["exif"].tobytes()
    pillow_heif.from_pillow(turned["image"]).save(
        tmp_path / "IMG_1.HEIC", quality=95, exif=exif
    )
    found = read_image(tmp_path / "IMG_1.HEIC").astype(int)
    assert found.shape == (48, 64, 3)
    assert abs(found - np.asarray(PHOTO)).mean() < 6


# ---------------------------------------------------------------- folders

STRAY_FOLDERS = ["__MACOSX", "@eaDir", ".ipynb_checkpoints", "$RECYCLE.BIN", ".git"]
STRAYS = [
    *("Thumbs.db", "thumbs.db", "desktop.ini", ".DS_Store", "._photo.jpg", ".hidden"),
    *("Icon\r", ".gitignore"),
    *("notes.txt", "README", "README.md", "labels.CSV", "info.json", "photo.jpg~"),
    *("LICENSE", "index.html", "IMG_1.AAE", "IMG_1.xmp", "train.log", "a.crdownload"),
]


@pytest.mark.parametrize("name", STRAYS)
def test_strays_are_recognized_by_name(name):
    assert is_stray(name) and is_stray(Path("photos") / name)


@pytest.mark.parametrize("name", STRAY_FOLDERS)
def test_stray_folders_are_recognized_by_name(name):
    assert is_stray(name, folder=True) and is_stray(Path("photos") / name, folder=True)


@pytest.mark.parametrize(
    "name", ["copying", "readme", "dog~", "a.py", "license", "x.md"]
)
def test_a_class_may_have_the_name_of_a_stray_file(name):
    assert is_stray(name) and not is_stray(name, folder=True)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "scan0001", "a.heic", "txt.png"])
def test_images_and_unknown_files_are_not_strays(name):
    assert not is_stray(name) and not is_stray(Path(".cache") / "notes.txt" / name)


@pytest.mark.slow
def test_reading_in_a_new_process_imports_no_torch_model(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    code = f"from era_s10.images import read_image; print(read_image({str(tmp_path / 'photo.png')!r}).shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(48, 64, 3)\n", done.stderr
