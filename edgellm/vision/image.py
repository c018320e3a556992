"""Turning what a caller passes as an image (array, PIL image, path) into a checked RGB picture."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from edgellm.errors import RequestError

ImageInput: TypeAlias = "npt.NDArray[np.uint8] | Image.Image | str | os.PathLike[str]"

# What PIL's format plugins raise on damaged files; they do not always wrap struct's and zlib's own errors.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
# The second is an error only where warnings are turned into errors.
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def load_image(image: ImageInput, *, max_pixels: int, where: str = "image") -> Image.Image:
    """An RGB picture from `image`: an H x W x 3 uint8 RGB array, a PIL image, or the path of an image file.

    A file is turned upright by its EXIF orientation, as transformers' `load_image` does. `where` names the image in
    errors. Raises RequestError for another type, dtype or shape, an empty image, more than `max_pixels` pixels
    (checked before a file is decoded), and a file that is missing or damaged.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, max_pixels, where)
    if isinstance(image, Image.Image):
        _check_size(image.width, image.height, max_pixels, where)
        try:
            return image if image.mode == "RGB" else image.convert("RGB")
        except _UNREADABLE as e:
            raise RequestError(f"{where}: cannot decode the PIL image ({_one_line(e)}); load it first") from e
    if isinstance(image, (str, os.PathLike)):
        return _from_file(Path(image), max_pixels, where)
    raise RequestError(
        f"{where}: cannot use type {type(image).__name__} as an image; pass an HxWx3 uint8 RGB array, a PIL image or a "
        "path"
    )


def _from_array(array: npt.NDArray[np.uint8], max_pixels: int, where: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise RequestError(f"{where}: array has dtype {array.dtype}; expected uint8 with values 0 to 255")
    if array.ndim != 3 or array.shape[2] != 3:
        raise RequestError(f"{where}: array has shape {list(array.shape)}; expected [height, width, 3] in RGB order")
    _check_size(array.shape[1], array.shape[0], max_pixels, where)
    return Image.fromarray(array)


def _from_file(path: Path, max_pixels: int, where: str) -> Image.Image:
    too_large = f"{where}: {path} has too many pixels; the limit is {max_pixels}, make it smaller"
    try:
        with Image.open(path) as picture:
            _check_size(picture.width, picture.height, max_pixels, f"{where}: {path}")
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise RequestError(f"{where}: file {path} does not exist") from None
    except _BOMB:
        raise RequestError(too_large) from None
    except _UNREADABLE as e:
        raise RequestError(f"{where}: cannot read {path} as an image ({_one_line(e)})") from e


def _check_size(width: int, height: int, max_pixels: int, where: str) -> None:
    if width < 1 or height < 1:
        raise RequestError(f"{where}: image is {width}x{height} pixels; it must not be empty")
    if width * height > max_pixels:
        raise RequestError(
            f"{where}: image is {width}x{height} = {width * height} pixels; the limit is {max_pixels}, make it smaller"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
