"""Images as callers hand them in: what is read, what is refused, and that each refusal is one clear line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgellm.errors import CheckpointError, RequestError
from edgellm.vision.base import read_preprocessor_config
from edgellm.vision.image import load_image

LIMIT = 2**25
RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def refused(image: object, limit: int = LIMIT) -> str:
    with pytest.raises(RequestError) as caught:
        load_image(image, max_pixels=limit, where="messages[0].content[1]")  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith("messages[0].content[1]: ") and "\n" not in message
    return message


def test_array_pil_and_file_give_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path)
    for image in (RGB, Image.fromarray(RGB), path, str(path), np.asfortranarray(RGB)):
        assert np.array_equal(np.asarray(load_image(image, max_pixels=LIMIT)), RGB)


def test_file_is_turned_upright_by_its_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to view"
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path, exif=exif)
    assert load_image(path, max_pixels=LIMIT).size == (4, 6)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (RGB.astype(np.float32), "dtype float32; expected uint8"),
        (RGB[:, :, 0], r"shape [4, 6]; expected [height, width, 3]"),
        (np.zeros((4, 6, 4), np.uint8), "shape [4, 6, 4]"),
        (np.zeros((0, 0, 3), np.uint8), "0x0 pixels; it must not be empty"),
        (np.zeros((5, 0, 3), np.uint8), "0x5 pixels; it must not be empty"),
        (Image.new("RGB", (0, 0)), "0x0 pixels"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "20000x20000 = 400000000 pixels; the limit is"),
        (12, "cannot use type int as an image"),
        (None, "cannot use type NoneType"),
        ("/nonexistent/x.png", "does not exist"),
        ("/", "cannot read /"),
    ],
)
def test_bad_image_is_refused(image: object, message: str) -> None:
    assert message in refused(image)


@pytest.mark.parametrize("side", [7_000, 12_000, 20_000])
def test_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    """One-bit pictures: small files that claim more pixels than the limit, below and above PIL's own thresholds."""
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    with_warnings = pytest.warns(Image.DecompressionBombWarning) if side == 12_000 else None
    if with_warnings is None:
        assert "the limit is 33554432" in refused(path)
    else:
        with with_warnings:
            assert "the limit is 33554432" in refused(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif", ".tiff"])
def test_damaged_file_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    for keep in (0, 10, len(data) // 2):
        path = tmp_path / f"cut{keep}{suffix}"
        path.write_bytes(data[:keep])
        assert "cannot read" in refused(path)


def test_preprocessor_config_in_either_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no preprocessor_config"):
        read_preprocessor_config(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"patch_size": 16}}')
    assert read_preprocessor_config(tmp_path) == {"patch_size": 16}
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 14}')
    assert read_preprocessor_config(tmp_path) == {"patch_size": 14}
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_preprocessor_config(tmp_path)
