"""Image messages to RGB arrays: every encoding, padded rows, byte order, and what must be refused."""

from __future__ import annotations

import array
import io

import numpy as np
import pytest
from PIL import Image as PilImage
from sensor_msgs.msg import CompressedImage, Image

from edgellm_ros.convert import ENCODINGS, ImageError, to_message, to_rgb

RNG = np.random.default_rng(5)
PICTURE = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
# Smooth, so that subsampled colour (YUV, Bayer) can be compared with it.
ACROSS, DOWN = np.meshgrid(np.linspace(40, 200, 16), np.linspace(60, 180, 12))
SMOOTH = np.stack((ACROSS, DOWN, np.full_like(DOWN, 90.0)), axis=-1).astype(np.uint8)


def message(pixels: np.ndarray, encoding: str, padding: int = 0, big_endian: bool = False) -> Image:
    """Pixels [rows, width, channels] as an image message whose rows are followed by `padding` bytes of junk."""
    swapped = pixels.astype(pixels.dtype.newbyteorder(">" if big_endian else "<"))
    rows = swapped.reshape(len(pixels), -1).view(np.uint8)
    padded = np.concatenate([rows, RNG.integers(0, 256, (len(rows), padding), dtype=np.uint8)], axis=1)
    out = Image(height=len(pixels), width=pixels.shape[1], encoding=encoding, is_bigendian=int(big_endian))
    out.step = padded.shape[1]
    out.data = array.array("B", padded.tobytes())
    return out


def mono(picture: np.ndarray) -> np.ndarray:
    return picture[..., :1]


def with_alpha(picture: np.ndarray) -> np.ndarray:
    return np.concatenate([picture, np.full_like(picture[..., :1], 7)], axis=2)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "pixels"),
    [
        ("rgb8", PICTURE),
        ("bgr8", PICTURE[..., ::-1]),
        ("8UC3", PICTURE[..., ::-1]),
        ("rgba8", with_alpha(PICTURE)),
        ("bgra8", with_alpha(PICTURE)[..., [2, 1, 0, 3]]),
        ("8UC4", with_alpha(PICTURE)[..., [2, 1, 0, 3]]),
    ],
)
def test_eight_bit_colour(encoding: str, pixels: np.ndarray, padding: int) -> None:
    np.testing.assert_array_equal(to_rgb(message(pixels, encoding, padding)), PICTURE)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize(
    ("encoding", "pixels", "expected"),
    [
        ("rgb16", PICTURE.astype(np.uint16) << 8 | 3, PICTURE),
        ("bgr16", PICTURE[..., ::-1].astype(np.uint16) << 8 | 3, PICTURE),
        ("rgba16", with_alpha(PICTURE).astype(np.uint16) << 8, PICTURE),
        ("bgra16", with_alpha(PICTURE)[..., [2, 1, 0, 3]].astype(np.uint16) << 8, PICTURE),
        ("mono16", mono(PICTURE).astype(np.uint16) << 8 | 3, np.repeat(mono(PICTURE), 3, 2)),
        ("16UC1", mono(PICTURE).astype(np.uint16) << 8, np.repeat(mono(PICTURE), 3, 2)),
    ],
)
def test_sixteen_bit(encoding: str, pixels: np.ndarray, expected: np.ndarray, big_endian: bool) -> None:
    np.testing.assert_array_equal(to_rgb(message(pixels, encoding, 3, big_endian)), expected)


@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
def test_mono(encoding: str) -> None:
    np.testing.assert_array_equal(to_rgb(message(mono(PICTURE), encoding, 2)), np.repeat(mono(PICTURE), 3, 2))


def yuv_of(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BT.601, video range, as the standard writes it (its inverse is what is tested)."""
    r, g, b = (rgb[..., i].astype(float) for i in range(3))
    y = 16 + 0.257 * r + 0.504 * g + 0.098 * b
    u = 128 - 0.148 * r - 0.291 * g + 0.439 * b
    v = 128 + 0.439 * r - 0.368 * g - 0.071 * b
    return tuple(np.round(p).astype(np.uint8) for p in (y, u, v))


@pytest.mark.parametrize("encoding", ["uyvy", "yuv422", "yuyv", "yuv422_yuy2"])
def test_yuv422(encoding: str) -> None:
    y, u, v = yuv_of(SMOOTH)
    chroma = np.where(np.arange(y.shape[1]) % 2 == 0, u, v)
    luma_first = encoding in ("yuyv", "yuv422_yuy2")
    pixels = np.stack((y, chroma) if luma_first else (chroma, y), axis=-1)
    np.testing.assert_allclose(to_rgb(message(pixels, encoding, 4)).astype(int), SMOOTH, atol=16)


@pytest.mark.parametrize("encoding", ["nv12", "nv21"])
def test_nv(encoding: str) -> None:
    y, u, v = yuv_of(SMOOTH)
    first, second = (u, v) if encoding == "nv12" else (v, u)
    chroma = np.stack((first[::2, ::2], second[::2, ::2]), axis=-1).reshape(len(y) // 2, -1)
    out = message(np.concatenate([y, chroma])[..., None], encoding)
    out.height = len(y)
    np.testing.assert_allclose(to_rgb(out).astype(int), SMOOTH, atol=16)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer(pattern: str, bits: int) -> None:
    mosaic = np.empty(SMOOTH.shape[:2], np.uint8)
    for index, color in enumerate(pattern):
        row, column = divmod(index, 2)
        mosaic[row::2, column::2] = SMOOTH[row::2, column::2, "rgb".index(color)]
    pixels = mosaic[..., None] if bits == 8 else mosaic[..., None].astype(np.uint16) << 8
    np.testing.assert_allclose(to_rgb(message(pixels, f"bayer_{pattern}{bits}", 1)).astype(int), SMOOTH, atol=16)


def test_every_encoding_is_tested() -> None:
    bayer = {f"bayer_{p}{b}" for p in ("rggb", "bggr", "gbrg", "grbg") for b in (8, 16)}
    eight = {"rgb8", "bgr8", "8UC3", "rgba8", "bgra8", "8UC4", "mono8", "8UC1"}
    sixteen = {"rgb16", "bgr16", "rgba16", "bgra16", "mono16", "16UC1"}
    assert set(ENCODINGS) == bayer | eight | sixteen | {"uyvy", "yuv422", "yuyv", "yuv422_yuy2", "nv12", "nv21"}


def test_there_and_back() -> None:
    np.testing.assert_array_equal(to_rgb(to_message(PICTURE)), PICTURE)


def compressed(picture: PilImage.Image, kind: str) -> CompressedImage:
    file = io.BytesIO()
    picture.save(file, kind)
    out = CompressedImage(format=kind.lower())
    out.data = array.array("B", file.getvalue())
    return out


def test_compressed() -> None:
    np.testing.assert_array_equal(to_rgb(compressed(PilImage.fromarray(PICTURE), "PNG")), PICTURE)
    np.testing.assert_allclose(to_rgb(compressed(PilImage.fromarray(SMOOTH), "JPEG")).astype(int), SMOOTH, atol=12)
    deep = PilImage.fromarray(PICTURE[..., 0].astype(np.uint16) << 8)
    np.testing.assert_array_equal(to_rgb(compressed(deep, "PNG"))[..., 1], PICTURE[..., 0])


def changed(**fields: object) -> Image:
    out = to_message(PICTURE)
    for name, value in fields.items():
        setattr(out, name, value)
    return out


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (changed(encoding="rgb9"), "encoding 'rgb9'; expected one of mono8"),
        (changed(encoding="32FC1"), "encoding '32FC1'"),
        (changed(encoding=""), "encoding ''"),
        (changed(width=0, height=0), "0x0 pixels; it must not be empty"),
        (changed(width=20_000, height=20_000), "20000x20000 pixels; at most"),
        (changed(step=23), "step is 23 bytes; 8 pixels of rgb8 need 24"),
        (changed(height=7), "has 144 bytes; 8x7 rgb8 with step 24 needs 168"),
        (changed(data=array.array("B")), "has 0 bytes"),
        (changed(encoding="yuyv", width=7), "sides must be even"),
        (CompressedImage(format="jpeg"), "cannot be decoded"),
        (CompressedImage(format="jpeg", data=array.array("B", b"\xff\xd8\xff\xe0 not a picture")), "cannot be decoded"),
        (compressed(PilImage.new("1", (20_000, 20_000)), "PNG"), "too many pixels|20000x20000"),
    ],
)
def test_refused(bad: Image | CompressedImage, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        to_rgb(bad)
    assert "\n" not in str(caught.value)


def test_truncated_jpeg_is_refused() -> None:
    whole = compressed(PilImage.fromarray(np.repeat(np.repeat(SMOOTH, 8, 0), 8, 1)), "JPEG")
    whole.data = whole.data[: len(whole.data) // 2]
    with pytest.raises(ImageError, match="cannot be decoded"):
        to_rgb(whole)
