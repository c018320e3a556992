"""Between ROS image messages and H x W x 3 uint8 RGB arrays (numpy and PIL only).

Row padding (`step`), byte order, 8 and 16 bit, mono, RGB(A), BGR(A), Bayer and YUV are understood. Everything that a
camera or a careless publisher can get wrong raises ImageError with one line that says what was expected.
"""

from __future__ import annotations

import array
import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage
from sensor_msgs.msg import CompressedImage, Image

from edgellm.errors import RequestError

RGB = npt.NDArray[np.uint8]
MAX_PIXELS = 2**25  # an 8K UHD frame fits; about 100 MB as RGB


class ImageError(RequestError):
    """An image message cannot be turned into a picture."""


@dataclass(frozen=True)
class Layout:
    """How the bytes of one pixel stand in memory: `channels` values of numpy type `dtype`."""

    dtype: str
    channels: int
    kind: str  # mono, rgb, bgr, yuv or bayer


_LAYOUTS = {
    "mono8": Layout("u1", 1, "mono"),
    "mono16": Layout("u2", 1, "mono"),
    "8UC1": Layout("u1", 1, "mono"),
    "16UC1": Layout("u2", 1, "mono"),
    "rgb8": Layout("u1", 3, "rgb"),
    "rgba8": Layout("u1", 4, "rgb"),
    "rgb16": Layout("u2", 3, "rgb"),
    "rgba16": Layout("u2", 4, "rgb"),
    "bgr8": Layout("u1", 3, "bgr"),
    "bgra8": Layout("u1", 4, "bgr"),
    "bgr16": Layout("u2", 3, "bgr"),
    "bgra16": Layout("u2", 4, "bgr"),
    # Without a colour order in the name, OpenCV's order is meant.
    "8UC3": Layout("u1", 3, "bgr"),
    "8UC4": Layout("u1", 4, "bgr"),
    "uyvy": Layout("u1", 2, "yuv"),
    "yuv422": Layout("u1", 2, "yuv"),
    "yuyv": Layout("u1", 2, "yuv"),
    "yuv422_yuy2": Layout("u1", 2, "yuv"),
    "nv12": Layout("u1", 1, "yuv"),
    "nv21": Layout("u1", 1, "yuv"),
    **{
        f"bayer_{pattern}{bits}": Layout(f"u{bits // 8}", 1, "bayer")
        for pattern in ("rggb", "bggr", "gbrg", "grbg")
        for bits in (8, 16)
    },
}
ENCODINGS = tuple(_LAYOUTS)
# What PIL's format plugins raise on damaged data; they do not always wrap struct's and zlib's own errors.
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def to_rgb(message: Image | CompressedImage, max_pixels: int = MAX_PIXELS) -> RGB:
    """The picture in an image message, uint8 [height, width, 3].

    Raises ImageError for an unknown encoding, an empty or too large image, too few bytes, damaged compressed data.
    """
    if isinstance(message, CompressedImage):
        return _decode(message, max_pixels)
    _check_size(message.width, message.height, max_pixels)
    layout = _LAYOUTS.get(message.encoding)
    if layout is None:
        raise ImageError(f"image has encoding {message.encoding!r}; expected one of {', '.join(ENCODINGS)}")
    planar = message.encoding in ("nv12", "nv21")
    pixels = _pixels(message, layout, message.height * 3 // 2 if planar else message.height)
    if layout.kind == "yuv":
        if message.width % 2 or (planar and message.height % 2):
            raise ImageError(f"{message.encoding} image is {message.width}x{message.height}; its sides must be even")
        return _from_nv(pixels[..., 0], message) if planar else _from_yuv422(pixels, message.encoding)
    if layout.dtype == "u2":
        pixels = (pixels >> 8).astype(np.uint8)
    if layout.kind == "bayer":
        return _from_bayer(pixels[..., 0], message.encoding[6:10])
    if layout.kind == "mono":
        return np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels[..., 2::-1] if layout.kind == "bgr" else pixels[..., :3])


def to_message(rgb: RGB) -> Image:
    """An rgb8 message with the picture `rgb`, uint8 [height, width, 3]; the header is the caller's to fill."""
    height, width, _ = rgb.shape
    message = Image(height=height, width=width, encoding="rgb8", is_bigendian=0, step=width * 3)
    # An array.array is taken over as it is; rclpy checks any other sequence value by value.
    message.data = array.array("B", rgb.tobytes())
    return message


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"image is {width}x{height} pixels; it must not be empty")
    if width * height > max_pixels:
        raise ImageError(f"image is {width}x{height} pixels; at most {max_pixels} pixels are accepted, make it smaller")


def _pixels(message: Image, layout: Layout, rows: int) -> npt.NDArray[np.integer[Any]]:
    """[rows, width, channels] view of the message's bytes, in the machine's byte order only if it is the message's."""
    dtype = np.dtype(layout.dtype).newbyteorder(">" if message.is_bigendian else "<")
    pixel = dtype.itemsize * layout.channels
    least = message.width * pixel
    step = message.step or least
    if step < least:
        raise ImageError(f"image step is {step} bytes; {message.width} pixels of {message.encoding} need {least}")
    needed = step * (rows - 1) + least
    if len(message.data) < needed:
        raise ImageError(
            f"image has {len(message.data)} bytes; {message.width}x{message.height} {message.encoding} "
            f"with step {step} needs {needed}"
        )
    shape, strides = (rows, message.width, layout.channels), (step, pixel, dtype.itemsize)
    return np.ndarray(shape, dtype, memoryview(message.data), 0, strides)


def _decode(message: CompressedImage, max_pixels: int) -> RGB:
    """JPEG, PNG and whatever else PIL reads. The size is checked before any pixel is decoded."""
    where = f"compressed image (format {message.format!r}, {len(message.data)} bytes)"
    try:
        with PilImage.open(io.BytesIO(memoryview(message.data))) as picture:
            _check_size(picture.width, picture.height, max_pixels)
            if picture.mode.startswith("I;16"):  # PIL would clip 16 bit values at 255
                mono = (np.asarray(picture) >> 8).astype(np.uint8)
                return np.repeat(mono[..., None], 3, axis=2)
            return np.asarray(picture.convert("RGB"))
    except PilImage.DecompressionBombError:
        raise ImageError(f"{where} has too many pixels; at most {max_pixels} are accepted, make it smaller") from None
    except _UNDECODABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{where} cannot be decoded; send JPEG or PNG ({reason})") from error


def _yuv_to_rgb(y: RGB, u: RGB, v: RGB) -> RGB:
    """BT.601 with video range (luma 16 to 235), what cameras send; all [height, width]."""
    luma = (y.astype(np.float32) - 16.0) * 1.164
    blue, red = u.astype(np.float32) - 128.0, v.astype(np.float32) - 128.0
    rgb = np.stack((luma + 1.596 * red, luma - 0.813 * red - 0.391 * blue, luma + 2.018 * blue), axis=2)
    return rgb.round().clip(0, 255).astype(np.uint8)


def _from_yuv422(pixels: npt.NDArray[np.integer[Any]], encoding: str) -> RGB:
    luma_at = 1 if encoding in ("uyvy", "yuv422") else 0
    chroma = pixels[..., 1 - luma_at].astype(np.uint8)
    u, v = np.repeat(chroma[:, 0::2], 2, axis=1), np.repeat(chroma[:, 1::2], 2, axis=1)
    return _yuv_to_rgb(pixels[..., luma_at].astype(np.uint8), u, v)


def _from_nv(rows: npt.NDArray[np.integer[Any]], message: Image) -> RGB:
    chroma = rows[message.height :].astype(np.uint8).repeat(2, axis=0)
    first, second = chroma[:, 0::2].repeat(2, axis=1), chroma[:, 1::2].repeat(2, axis=1)
    u, v = (first, second) if message.encoding == "nv12" else (second, first)
    return _yuv_to_rgb(rows[: message.height].astype(np.uint8), u, v)


def _from_bayer(mosaic: npt.NDArray[np.integer[Any]], pattern: str) -> RGB:
    """Bilinear demosaicing: a colour is the mean of the nearest pixels that have it. `pattern`: the upper left 2x2."""
    height, width = mosaic.shape
    out = np.empty((height, width, 3), np.uint8)
    for channel, color in enumerate("rgb"):
        has = np.zeros((2, 2), np.float32)
        has.ravel()[[i for i, c in enumerate(pattern) if c == color]] = 1.0
        mask = np.tile(has, (height // 2 + 1, width // 2 + 1))[:height, :width]
        corner = 0.0 if color == "g" else 1.0  # a green pixel's diagonal neighbours are green too, but not its nearest
        weight = _blur(mask, corner)
        mean = _blur(mosaic.astype(np.float32) * mask, corner) / np.maximum(weight, 1e-6)
        out[..., channel] = np.where(mask > 0, mosaic, mean.round())
    return out


def _blur(values: npt.NDArray[np.float32], corner: float) -> npt.NDArray[np.float32]:
    """Sum over the eight neighbours: weight 2 beside, above and below, `corner` at the diagonals; 0 past the edge."""
    p = np.pad(values, 1)
    beside = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:]
    return 2.0 * beside + corner * (p[:-2, :-2] + p[:-2, 2:] + p[2:, :-2] + p[2:, 2:])
